"""Ahead: the batches of the next steps, read and packed by a thread while the device computes."""

from __future__ import annotations

import dataclasses
import queue
import threading
from collections.abc import Iterator
from typing import Any

from headway_apps.proteins.data.packing import Batch, Batches


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """What this process computes of one step of the optimizer."""

    batches: list[Batch]
    place: dict[str, Any]
    """Of the stream, after these."""
    epoch: float


class Ahead(Iterator[Step]):
    """So many batches a step; `depth` steps are kept ready. What fails while reading is raised by `next`."""

    def __init__(self, batches: Batches, per_step: int, *, pinned: bool, depth: int = 2) -> None:
        self._source, self._per_step, self._pinned = batches, per_step, pinned
        self._ready: queue.Queue[Step | BaseException] = queue.Queue(depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._read, name="batches ahead", daemon=True)
        self._thread.start()

    def __next__(self) -> Step:
        found = self._ready.get()
        if isinstance(found, BaseException):
            raise found
        return found

    def close(self) -> None:
        self._closed.set()
        while not self._ready.empty():
            self._ready.get_nowait()
        self._thread.join()

    def _read(self) -> None:
        while not self._closed.is_set():
            try:
                found: Step | BaseException = self._step()
            except BaseException as error:
                found = error
            while not self._closed.is_set():
                try:
                    self._ready.put(found, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if isinstance(found, BaseException):
                return

    def _step(self) -> Step:
        batches = [next(self._source) for _ in range(self._per_step)]
        if self._pinned:
            batches = [each.pin_memory() for each in batches]
        return Step(batches, self._source.state_dict(), self._source.epoch)

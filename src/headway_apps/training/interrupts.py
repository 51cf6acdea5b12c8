"""Interrupts: Ctrl-C or SIGTERM lets long work end in order, and a second one ends it at once."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SECONDS = 2.0
"""In which several are one: a terminal sends Ctrl-C to all processes, and torchrun passes it on once more."""

Asked = Callable[[], "signal.Signals | None"]


@contextmanager
def heard(told: str) -> Iterator[Asked]:
    """What asks whether the work should end, and by which signal; `told` goes to stderr as one arrives.

    For the main thread, which is the one that Python calls. On the way out each signal means what it meant before.
    """
    first: signal.Signals | None = None
    since = 0.0
    before: dict[signal.Signals, Any] = {}

    def hear(number: int, _: object) -> None:
        nonlocal first, since
        if first is None:
            first, since = signal.Signals(number), time.monotonic()
            os.write(2, f"{first.name}: {told}; once more ends it at once\n".encode())  # print may be in use below us
        elif time.monotonic() - since > SECONDS:
            restore()
            signal.raise_signal(number)

    def restore() -> None:
        for each, handler in before.items():
            signal.signal(each, handler)

    try:
        before.update((each, signal.signal(each, hear)) for each in SIGNALS)
        yield lambda: first
    finally:
        restore()

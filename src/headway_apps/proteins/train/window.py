"""Window: what the steps since the last log came to, over all processes."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor


class Window:
    """Sums over the steps since the last log. They stay on the device until they are told."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.wrong = torch.full((), -1, device=device)
        self.rate = self.epoch = 0.0
        self._begin()

    def _begin(self) -> None:
        self.nats = torch.zeros((), device=self.device)
        self.residues = self.sequences = self.steps = 0
        self.norm: Tensor | None = None
        self.since = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done here is no part of a step's time."""
        begun = time.perf_counter()
        yield
        self.since += time.perf_counter() - begun

    def add(self, nats: Tensor, residues: int, sequences: int, norm: Tensor | None, step: int) -> None:
        self.nats += nats
        self.residues, self.sequences, self.steps = self.residues + residues, self.sequences + sequences, self.steps + 1
        self.norm = norm
        self.wrong = torch.where((self.wrong < 0) & ~nats.isfinite(), step - 1, self.wrong)

    def first_wrong(self, accelerator: Accelerator) -> int | None:
        wrong = accelerator.gather(self.wrong.view(1)) if accelerator.num_processes > 1 else self.wrong.view(1)
        found = [int(each) for each in wrong.tolist() if each >= 0]
        return min(found) if found else None

    def told(self, accelerator: Accelerator, step: int) -> dict[str, Any]:
        """Of all processes, by the names under which they are tracked; then the sums begin anew."""
        counts = torch.tensor([self.residues, self.sequences], device=self.device)
        nats = self.nats
        if accelerator.num_processes > 1:
            nats, counts = accelerator.reduce(nats), accelerator.reduce(counts)
        loss, (residues, sequences) = float(nats), counts.tolist()
        seconds = time.perf_counter() - self.since
        found = {
            "train/step": step, "train/epoch": self.epoch,
            "train/loss": loss / residues, "train/learning_rate": self.rate,
            "train/grad_norm": math.nan if self.norm is None else float(self.norm),
            "train/batch_time": seconds / self.steps, "train/samples_per_second": sequences / seconds,
            "train/residues_per_second": residues / seconds,
        }  # fmt: skip
        if self.device.type == "cuda":
            found["system/gpu_memory_allocated_gb"] = torch.cuda.max_memory_allocated(self.device) / 1e9
            found["system/gpu_memory_reserved_gb"] = torch.cuda.max_memory_reserved(self.device) / 1e9
        self._begin()
        return found

"""Do predictions differ from example to example? Evenly picked numbers of each, over all batches that were seen."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from headway.watch.statistics import wide

PICKED = 1024


@dataclasses.dataclass(slots=True)
class Spread:
    """How far one output (or input) differs between examples, along its first axis and from call to call."""

    shape: tuple[int, ...]
    """Of one example."""
    examples: int = 0
    mean: Tensor | None = None
    squares: Tensor | None = None
    nonfinite: int = 0
    std: float = 0.0
    """Between examples: the mean over the picked numbers."""
    rms: float = 0.0
    """Of the picked numbers themselves."""

    def add(self, tensor: Tensor) -> None:
        """One batch more; examples with NaN or Inf are counted and left out."""
        rows = tensor.detach().flatten(1) if tensor.dim() > 1 else tensor.detach()[:, None]
        width = rows.shape[1]
        if width > PICKED:
            rows = rows[:, torch.linspace(0, width - 1, PICKED, dtype=torch.float64).long().to(rows.device)]
        for part in rows.split(PICKED):
            self._add(wide(part).cpu().double())
        if self.mean is not None and self.squares is not None:
            self.std = float((self.squares / self.examples).sqrt().mean())
            self.rms = math.sqrt(float((self.mean.square() + self.squares / self.examples).mean()))

    def _add(self, part: Tensor) -> None:
        sound = part.isfinite().all(1)
        self.nonfinite += int((~sound).sum())
        part = part[sound]
        if len(part) == 0:
            return
        mean = part.mean(0)
        squares = (part - mean).square().sum(0)
        if self.mean is None or self.squares is None:
            self.mean, self.squares, self.examples = mean, squares, len(part)
            return
        total = self.examples + len(part)
        apart = mean - self.mean
        self.squares += squares + apart.square() * (self.examples * len(part) / total)
        self.mean += apart * (len(part) / total)
        self.examples = total

    @property
    def share(self) -> float:
        """Spread between examples against the size of the numbers: near 0 is one answer for all."""
        return self.std / self.rms if self.rms else 0.0

    def to_dict(self) -> dict[str, Any]:
        return {
            "shape": list(self.shape),
            "examples": self.examples,
            "nonfinite": self.nonfinite,
            "std": self.std,
            "rms": self.rms,
        }

    @classmethod
    def from_dict(cls, held: dict[str, Any]) -> Spread:
        return cls(**{**held, "shape": tuple(held["shape"])})

"""The learning rate by optimizer step: up in a line, down along a cosine, and the least for ever after."""

from __future__ import annotations

import dataclasses
import math

from headway import RequestError


@dataclasses.dataclass(frozen=True, slots=True)
class Rate:
    """`rate(step)` is that of the step-th real optimizer step, from 1 on: micro-batches and skipped steps do not count.

    >>> rate = Rate(peak=1.0, warmup=2, steps=4, least=0.1)
    >>> [round(rate(step), 3) for step in (1, 2, 3, 4, 5, 1000)]
    [0.5, 1.0, 0.55, 0.1, 0.1, 0.1]
    """

    peak: float
    """Reached at step `warmup`."""
    warmup: int
    steps: int
    """The step that reaches `least`; equal to `peak`, that keeps the rate constant after the warm-up."""
    least: float = 0.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.peak) and 0 <= self.least <= self.peak and self.peak > 0):
            raise RequestError(f"got {self}, takes a peak above 0 and a least rate from 0 to the peak")
        if not 0 <= self.warmup < self.steps:
            raise RequestError(f"got {self}, takes a warm-up that ends before the last step; shorten it, or add steps")

    def __call__(self, step: int) -> float:
        if step < 1:
            raise RequestError(f"got step {step}, takes 1 for the first optimizer step")
        if step <= self.warmup:
            return self.peak * (step / self.warmup)
        done = min((step - self.warmup) / (self.steps - self.warmup), 1.0)
        fallen = self.least + (self.peak - self.least) * (1 + math.cos(math.pi * done)) / 2
        return min(self.peak, fallen)  # which rounding could pass

"""Less noise in the first steps of training.

A curriculum gives the schedule and the times of a step. Whoever noises, conditions the model or weighs the loss reads
them from there: the level used is the level told. Under one the training loss rises while the task hardens, and it is
no bound until the curriculum has ended.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable

from torch import Tensor

from headway import RequestError
from headway_apps.proteins.diffusion.schedules import Scaled, Schedule

SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda u: u,
    "exponential": lambda u: math.expm1(-3 * u) / math.expm1(-3),  # without the division it would end at 0.95
    "cosine": lambda u: (1 - math.cos(math.pi * u)) / 2,
}
"""How far a curriculum is after a share u of its steps: 0 at 0, 1 at 1."""


@dataclasses.dataclass(frozen=True)
class Curriculum(abc.ABC):
    steps: int
    """After so many steps it has ended."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise RequestError(f"got a curriculum of {self.steps} steps; takes 1 or more, or Steady() for none")

    def schedule(self, schedule: Schedule, step: int) -> Schedule:
        """The schedule to use at `step` in place of `schedule`."""
        return schedule

    def times(self, positions: Tensor, step: int, least: float = 1e-3) -> Tensor:
        """The times in [least, 1] of a batch, from positions in [0, 1]."""
        return least + (1 - least) * positions ** self._power(step)

    def _power(self, step: int) -> float:
        return 1.0

    def _share(self, step: int) -> float:
        return min(1.0, step / self.steps)


@dataclasses.dataclass(frozen=True)
class Steady(Curriculum):
    """No curriculum: the schedule as it is, times drawn uniformly."""

    steps: int = dataclasses.field(default=1, init=False)


@dataclasses.dataclass(frozen=True)
class LessNoise(Curriculum):
    """All noise times 0.1 at first, times 1 after `steps` (version 1)."""

    steps: int = 5000
    shape: str = "exponential"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shape not in SHAPES:
            raise RequestError(f"got shape {self.shape!r}; takes one of {', '.join(SHAPES)}")

    def factor(self, step: int) -> float:
        return 0.1 + 0.9 * SHAPES[self.shape](self._share(step))

    def schedule(self, schedule: Schedule, step: int) -> Schedule:
        return schedule if step >= self.steps else Scaled(schedule, self.factor(step))


@dataclasses.dataclass(frozen=True)
class EarlyTimes(Curriculum):
    """Times drawn near 0 more often at first, u³, and evenly after `steps`; noise itself as it is (version 2)."""

    steps: int = 2500

    def _power(self, step: int) -> float:
        return 1 + 2 * (1 - self._share(step))

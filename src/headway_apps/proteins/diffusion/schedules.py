"""Noise schedules: sigma_bar(t), the noise gathered until time t in [0, 1], and rate(t), its derivative.

A token has jumped by time t with probability 1 - exp(-sigma_bar(t)). Sampling starts from noise alone. A schedule that
leaves much of the data at t = 1 would start it where no model was trained, and is refused unless `reaches` says less.
"""

from __future__ import annotations

import abc
import dataclasses
import math

import torch
from torch import Tensor

from headway import RequestError
from headway_apps.proteins.diffusion.given import insist


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule(abc.ABC):
    reaches: float = 0.99
    """The least probability of having jumped by t = 1 that is taken."""

    def __post_init__(self) -> None:
        if not self.jumped_at_end >= self.reaches:
            raise RequestError(
                f"got {self}, under which a token has jumped by t=1 with probability {self.jumped_at_end:.4f};"
                f" takes {self.reaches} or more, as sampling starts from noise alone: raise its noise, or pass reaches="
            )

    @property
    def sigma_bar_at_end(self) -> float:
        return float(self.sigma_bar(torch.ones((), dtype=torch.float64)))

    @property
    def jumped_at_end(self) -> float:
        """How likely a token has jumped by t = 1."""
        return -math.expm1(-self.sigma_bar_at_end)

    def sigma_bar(self, t: Tensor) -> Tensor:
        return self._sigma_bar(_times_given(t))

    def rate(self, t: Tensor) -> Tensor:
        return self._rate(_times_given(t))

    def reveal(self, t: Tensor) -> Tensor:
        """The rate at which a masked token is revealed as time runs back: the weight of the cross-entropy."""
        return self.rate(t) / torch.expm1(self.sigma_bar(t))

    @abc.abstractmethod
    def _sigma_bar(self, t: Tensor) -> Tensor: ...

    @abc.abstractmethod
    def _rate(self, t: Tensor) -> Tensor: ...


@dataclasses.dataclass(frozen=True)
class LogLinear(Schedule):
    """A token has jumped with probability (1 - eps) t, and a masked one is revealed at the rate 1 / t."""

    eps: float = 1e-3

    def __post_init__(self) -> None:
        if not 0 < self.eps < 1:
            raise RequestError(f"got eps={self.eps}; takes a number between 0 and 1, such as 1e-3")
        super().__post_init__()

    def _kept(self, t: Tensor) -> Tensor:
        return (1 - t) + self.eps * t  # 1 - (1 - eps) t, which would round near t = 1

    def _sigma_bar(self, t: Tensor) -> Tensor:
        return torch.where(t < 0.5, -torch.log1p((self.eps - 1) * t), -self._kept(t).log())

    def _rate(self, t: Tensor) -> Tensor:
        return (1 - self.eps) / self._kept(t)

    def reveal(self, t: Tensor) -> Tensor:
        return 1 / _times_given(t)


@dataclasses.dataclass(frozen=True)
class Geometric(Schedule):
    """sigma_bar grows from `sigma_min` to `sigma_max` by equal factors in equal times."""

    sigma_min: float = 1e-4
    sigma_max: float = 20.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max:
            raise RequestError(f"got {self}; takes 0 < sigma_min < sigma_max")
        super().__post_init__()

    def _sigma_bar(self, t: Tensor) -> Tensor:
        return self.sigma_min ** (1 - t) * self.sigma_max**t

    def _rate(self, t: Tensor) -> Tensor:
        return self._sigma_bar(t) * math.log(self.sigma_max / self.sigma_min)


@dataclasses.dataclass(frozen=True)
class Cosine(Schedule):
    """sigma_bar goes from `sigma_min` to `sigma_max` along half a cosine; its rate is 0 at both ends."""

    sigma_max: float
    sigma_min: float = 1e-4

    def __post_init__(self) -> None:
        if not 0 <= self.sigma_min < self.sigma_max:
            raise RequestError(f"got {self}; takes 0 <= sigma_min < sigma_max")
        super().__post_init__()

    def _sigma_bar(self, t: Tensor) -> Tensor:
        return self.sigma_min + (self.sigma_max - self.sigma_min) * torch.sin(math.pi / 2 * t) ** 2

    def _rate(self, t: Tensor) -> Tensor:
        # sin(pi t), as pi t itself would round where the rate goes to 0 at t = 1
        return math.pi / 2 * (self.sigma_max - self.sigma_min) * torch.sin(math.pi * torch.minimum(t, 1 - t))


@dataclasses.dataclass(frozen=True)
class Scaled(Schedule):
    """Another schedule with all its noise times `factor`: a stage of training, from which nobody samples."""

    schedule: Schedule
    factor: float
    reaches: float = dataclasses.field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        if not 0 < self.factor <= 1:
            raise RequestError(f"got factor={self.factor}; takes more than 0, up to 1")
        super().__post_init__()

    def _sigma_bar(self, t: Tensor) -> Tensor:
        return self.factor * self.schedule.sigma_bar(t)

    def _rate(self, t: Tensor) -> Tensor:
        return self.factor * self.schedule.rate(t)


def draw_positions(count: int, *, generator: torch.Generator) -> Tensor:
    """`count` numbers in [0, 1), each uniform, together evenly spread: for the times of a batch, with less variance."""
    evenly = torch.arange(count, dtype=torch.float64, device=generator.device) / count
    return (evenly + torch.rand(1, generator=generator, dtype=torch.float64, device=generator.device)) % 1.0


def _times_given(t: Tensor) -> Tensor:
    if t.dtype not in (torch.float32, torch.float64):
        raise RequestError(f"got times in {t.dtype}; takes float32 or float64")
    insist(((t >= 0) & (t <= 1)).all(), "got a time outside [0, 1] or NaN; takes times from 0 to 1")
    return t

"""Mean, spread, extremes, zeros, NaN and Inf of tensors, piece by piece: nothing as large as a tensor is made."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

PIECE = 1 << 16
"""Numbers looked at together: 512 KiB in float64, which stays in a core's cache."""
_SQUARABLE = 1e140
"""Only float64 holds more, and the squares of many such would run over."""


@dataclasses.dataclass(slots=True)
class Statistics:
    """Of all numbers seen so far. Mean, spread, extremes and zeros are those of the finite ones.

    >>> one = measure(torch.tensor([0.0, 1.0, 2.0, float("nan")]))
    >>> one.mean, one.least, one.most, one.zeros, one.nans
    (1.0, 0.0, 2.0, 1, 1)
    """

    finite: int = 0
    zeros: int = 0
    nans: int = 0
    infs: int = 0
    mean: float = 0.0
    spread: float = 0.0
    """Sum of squared distances from the mean."""
    least: float = math.inf
    most: float = -math.inf

    @property
    def count(self) -> int:
        return self.finite + self.nans + self.infs

    @property
    def std(self) -> float:
        """Over all numbers: divided by their count, not by one less."""
        return math.sqrt(self.spread / self.finite) if self.finite else 0.0

    @property
    def zero_share(self) -> float:
        return self.zeros / self.count if self.count else 0.0

    @property
    def norm(self) -> float:
        """Length of the finite numbers as one vector."""
        return math.sqrt(self.spread + self.finite * self.mean**2)

    @property
    def rms(self) -> float:
        return self.norm / math.sqrt(self.finite) if self.finite else 0.0

    def add(self, other: Statistics) -> None:
        """Join what another saw (Chan, Golub and LeVeque's update)."""
        self.zeros += other.zeros
        self.nans += other.nans
        self.infs += other.infs
        if other.finite == 0:
            return
        total = self.finite + other.finite
        apart = other.mean - self.mean
        self.spread += other.spread + apart**2 * self.finite * other.finite / total
        self.mean += apart * other.finite / total
        self.finite = total
        self.least = min(self.least, other.least)
        self.most = max(self.most, other.most)


def measure(tensor: Tensor) -> Statistics:
    """Statistics of one tensor of any dtype and layout; a sparse gradient is measured with the zeros it leaves out."""
    if tensor.layout is not torch.strided:
        held = tensor.coalesce().values()
        found = measure(held)
        found.add(
            Statistics(finite=tensor.numel() - held.numel(), zeros=tensor.numel() - held.numel(), least=0.0, most=0.0)
        )
        return found
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    found = Statistics()
    if tensor.numel() == 0:
        return found
    cut = list(pieces(tensor))
    for piece, row in zip(cut, _read([_summary(piece) for piece in cut]), strict=True):
        found.add(
            _statistics(row, piece.numel()) if math.isfinite(row[1]) and abs(row[0]) < _SQUARABLE else _careful(piece)
        )
    return found


def is_finite(tensor: Tensor) -> bool:
    """True if no number is NaN or Inf; faster than `measure`."""
    if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.numel() == 0:
        return True
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    cut = list(pieces(tensor))
    sums = _read([torch.sum(wide(piece)).reshape(1) for piece in cut])
    # A sum may run over where no number does, so a suspicion is looked into.
    return all(math.isfinite(row[0]) or bool(piece.isfinite().all()) for piece, row in zip(cut, sums, strict=True))


def pieces(tensor: Tensor, at_most: int = PIECE) -> Iterator[Tensor]:
    """The tensor's numbers, each once, in parts of about `at_most`; views where it is dense, in any order of axes."""
    if tensor.numel() <= at_most:
        yield tensor
        return
    steps = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda axis: -steps[axis])
    tensor = tensor.permute(order)
    if tensor.is_contiguous():
        yield from tensor.view(-1).split(at_most)
        return
    rows = at_most * tensor.shape[0] // tensor.numel()
    if rows >= 1:
        yield from tensor.split(rows)
    else:
        for row in tensor.unbind():
            yield from pieces(row, at_most)


def wide(tensor: Tensor) -> Tensor:
    """In float64, or in the widest that its device has."""
    return tensor.to(torch.float32 if tensor.device.type == "mps" else torch.float64)


def _summary(piece: Tensor) -> Tensor:
    numbers = wide(piece)
    spread, mean = torch.var_mean(numbers, correction=0)
    least, most = torch.aminmax(numbers)
    return torch.stack((mean, spread, least, most, torch.count_nonzero(numbers)))


def _read(rows: Sequence[Tensor]) -> list[list[float]]:
    """All of them to the host at once: each reading waits for the device."""
    read: list[list[float]] = torch.stack(list(rows)).tolist()
    return read


def _statistics(row: list[float], count: int) -> Statistics:
    mean, variance, least, most, nonzero = row
    return Statistics(count, count - round(nonzero), 0, 0, mean, variance * count, least, most)


def _careful(piece: Tensor) -> Statistics:
    """The same where some numbers are NaN or Inf, or too large to be squared."""
    numbers = wide(piece)
    nans = int(numbers.isnan().sum())
    finite = numbers[numbers.isfinite()]
    found = Statistics(nans=nans, infs=piece.numel() - nans - finite.numel())
    if finite.numel():
        row = _summary(finite.clamp(-_SQUARABLE, _SQUARABLE)).tolist()
        row[2], row[3] = float(finite.min()), float(finite.max())
        found.add(_statistics(row, finite.numel()))
    return found

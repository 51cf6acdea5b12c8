"""How an axis of tokens is divided into sequences: end to end, padded to one length, or lying anywhere.

Kernels read the tensors, so whoever writes to those in place (a decoding loop, a CUDA graph's owner) is followed; the
lists beside them say the same to the host.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.compiler import is_compiling

from headway.errors import RequestError
from headway.masks.documents import Packing
from headway.masks.memo import is_recorded
from headway.sites.packed import packing as checked_packing

Info = TypeVar("Info", bound="_SeqLenInfo")


def default_device(device: torch.device | None = None) -> torch.device:
    """Where lengths go if nobody says: to the GPU, if there is one."""
    if device is not None:
        return torch.device(device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _counted(numbers: Sequence[int], device: torch.device) -> Tensor:
    if device.type != "cuda":
        return torch.tensor(numbers, dtype=torch.int32, device=device)
    return torch.tensor(numbers, dtype=torch.int32, pin_memory=True).to(device, non_blocking=True)


def _lengths(seqlens: Iterable[int]) -> list[int]:
    """What was given, checked: a list of counts."""
    if isinstance(seqlens, Tensor):
        raise RequestError("got lengths in a tensor, takes a list of ints: lengths.tolist()")
    lengths = list(seqlens)
    if not lengths:
        raise RequestError("got no lengths, takes one per sequence: leave attn_bias out where there is nothing to pack")
    if min(lengths) < 0:
        raise RequestError(f"got a length of {min(lengths)}, takes 0 or more")
    return lengths


@dataclass
class _SeqLenInfo:
    """Sequences end to end: [2, 3, 2] starts at 0, 2, 5 and ends at 7."""

    seqstart: Tensor
    max_seqlen: int
    min_seqlen: int
    seqstart_py: list[int]

    def __post_init__(self) -> None:
        self._known: tuple[Any, Packing | None] = (None if is_compiling() else self._state(), None)

    def _state(self) -> Any:
        """What the packing was made of; tensors of inference mode do not tell whether they were written to."""
        starts = self.seqstart
        return id(starts), 0 if starts.is_inference() else starts._version, tuple(self.seqstart_py)

    def packing(self, name: str, total: int, device: torch.device) -> Packing:
        """As masks take it, for an axis of `total`; once for all layers, until somebody writes to this in place."""
        if is_compiling() or is_recorded(self.seqstart.device):
            # What is recorded reads the tensor at each run.
            return checked_packing(name, self.seqstart.to(device), total, self.max_seqlen, device)
        self._follow()
        state, known = self._known
        if known is None:
            known = checked_packing(name, torch.tensor(self.seqstart_py, dtype=torch.int32), total, None, device)
            if device.type != "cpu" and self.seqstart.device == device:
                known = dataclasses.replace(known, starts=self.seqstart.clone())  # which saves a copy to there
            self._known = state, known
        if known.total != total:
            raise RequestError(f"got {total} tokens for {name}, takes the {known.total} that it was made for")
        return known

    def _follow(self) -> None:
        """Bring the lists up to the tensor, if it was written to in place: kernels would read that."""
        state, was = self._state(), self._known[0]
        if state == was and not self.seqstart.is_inference():
            return
        if self.seqstart.device.type == "cpu":  # where nothing waits to read it
            starts = self.seqstart.tolist()
            if starts != self.seqstart_py:
                lengths = [end - start for start, end in itertools.pairwise(starts)]
                self.seqstart_py, self.max_seqlen, self.min_seqlen = starts, max(lengths), min(lengths)
                state = self._state()
        elif was is not None and state != was and state[2] == was[2]:
            raise RequestError(
                "got seqstart written to in place on a device, takes from_seqlens_inplace(lengths), or seqstart_py"
                " set too, so that no call has to wait to read it"
            )
        if state != was:
            self._known = state, None

    def to(self: Info, device: torch.device) -> Info:
        device = torch.device(device)
        if self.seqstart.device == device:
            return self
        held: dict[str, Any] = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        # Nothing waits for a copy to an accelerator; one from there must have come before it is read.
        later = device.type != "cpu"
        return dataclasses.replace(self, **{name: t.to(device, non_blocking=later) for name, t in held.items()})

    def intervals(self) -> Iterable[tuple[int, int]]:
        yield from itertools.pairwise(self.seqstart_py)

    @classmethod
    def from_seqlens(cls, seqlens: Iterable[int], *, device: torch.device | None = None) -> _SeqLenInfo:
        lengths = _lengths(seqlens)
        starts = [0, *itertools.accumulate(lengths)]
        return cls(_counted(starts, default_device(device)), max(lengths), min(lengths), starts)

    def from_seqlens_inplace(self, seqlens: Iterable[int]) -> None:
        """Other lengths in the same tensors, as a recorded CUDA graph wants them: as many, and none longer."""
        lengths = _lengths(seqlens)
        _fits(lengths, len(self.seqstart_py) - 1, self.max_seqlen, "max_seqlen")
        starts = [0, *itertools.accumulate(lengths)]
        self.seqstart_py[:] = starts
        self.seqstart.copy_(_counted(starts, self.seqstart.device), non_blocking=True)
        self._known = self._state(), None

    def split(self, x: Tensor, batch_sizes: Sequence[int] | None = None) -> list[Tensor]:
        """The sequences of x, (1, tokens, ...), apart; `batch_sizes` says how many of them shared a tensor."""
        total = self.seqstart_py[-1]
        if x.shape[0] != 1 or x.shape[1] != total:
            raise RequestError(f"got {list(x.shape)} to split, takes (1, {total}, ...), all sequences end to end")
        sizes = [1] * (len(self.seqstart_py) - 1) if batch_sizes is None else list(batch_sizes)
        edges = [self.seqstart_py[at] for at in (0, *itertools.accumulate(sizes))]
        parts = x.split([end - start for start, end in itertools.pairwise(edges)], dim=1)
        return [
            part.reshape(size, part.shape[1] // max(size, 1), *x.shape[2:])
            for size, part in zip(sizes, parts, strict=True)
        ]


def _fits(lengths: list[int], count: int, longest: int, name: str) -> None:
    if len(lengths) != count or max(lengths) > longest:
        raise RequestError(
            f"got {len(lengths)} lengths of at most {max(lengths)} to put in place, takes {count} of at most the"
            f" {name} of {longest}: make a new bias"
        )


class _WithLengths(_SeqLenInfo):
    """Sequences that have a length of their own within their space."""

    seqlen: Tensor
    seqlen_py: Sequence[int]

    def intervals(self) -> Iterator[tuple[int, int]]:
        for (start, _), length in zip(super().intervals(), self.seqlen_py, strict=False):
            yield start, start + length

    @classmethod
    def from_seqlens(cls, seqlens: Iterable[int], *, device: torch.device | None = None) -> _SeqLenInfo:
        raise RequestError(f"got lengths alone for {cls.__name__}, takes where sequences lie too: {cls._MAKER}")

    _MAKER = ""

    def split(self, x: Tensor, batch_sizes: Sequence[int] | None = None) -> list[Tensor]:
        raise NotImplementedError(f"got {type(self).__name__}, takes sequences end to end: slice x by intervals()")


@dataclass
class _PaddedSeqLenInfo(_WithLengths):
    """Sequences padded to one length: [2, 3, 2] padded to 4 starts at 0, 4, 8 and ends at 12."""

    seqlen: Tensor
    seqlen_py: list[int]
    padding: int

    _MAKER = "from_seqlens_padded(seqlens, padding)"

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.seqstart_py) != len(self.seqlen_py) + 1:
            raise RequestError(f"got {len(self.seqstart_py)} starts for {len(self.seqlen_py)} lengths, takes one more")

    @classmethod
    def from_seqlens_padded(
        cls, seqlens: Sequence[int], padding: int, *, device: torch.device | None = None
    ) -> _PaddedSeqLenInfo:
        lengths = _lengths(seqlens)
        _fits(lengths, len(lengths), padding, "padding")
        starts = [padding * i for i in range(len(lengths) + 1)]
        device = default_device(device)
        return cls(
            _counted(starts, device), max(lengths), min(lengths), starts,
            seqlen=_counted(lengths, device), seqlen_py=lengths, padding=padding,
        )  # fmt: skip

    def from_seqlens_padded_inplace(self, seqlens: Sequence[int]) -> None:
        """Other lengths in the same tensors: as many, and none longer than the longest was."""
        lengths = _lengths(seqlens)
        _fits(lengths, len(self.seqlen_py), min(self.max_seqlen, self.padding), "max_seqlen")
        self.seqlen_py[:] = lengths
        self.seqlen.copy_(_counted(lengths, self.seqlen.device), non_blocking=True)


@dataclass
class _GappySeqInfo(_WithLengths):
    """Sequences anywhere: each has a start and a length, and the last start is where the axis ends.

    Of keys in pages, starts are counted from where each sequence's own pages begin, the last start says nothing, and
    `seqlen` is where each sequence ends.
    """

    seqlen: Tensor
    seqlen_py: Sequence[int]

    _MAKER = "from_seqlens_gappy(seqstarts, seqlens, paged)"

    @classmethod
    def from_seqlens_gappy(
        cls, seqstarts: Sequence[int], seqlens: Sequence[int], paged: bool, *, device: torch.device
    ) -> _GappySeqInfo:
        lengths, starts = _lengths(seqlens), list(seqstarts)
        if len(starts) != len(lengths) + (not paged):
            takes = "as many starts as lengths" if paged else "one start more than lengths, the end of the axis"
            raise RequestError(f"got {len(starts)} starts for {len(lengths)} lengths, takes {takes}")
        longest, shortest = max(lengths), min(lengths)
        if paged:
            lengths = [start + length for start, length in zip(starts, lengths, strict=True)]
            starts.append(-1)
        return cls(
            _counted(starts, device), longest, shortest, starts, seqlen=_counted(lengths, device), seqlen_py=lengths
        )

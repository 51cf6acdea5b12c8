"""Documents: several sequences packed end to end, none of which sees another."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from headway.errors import MaskError
from headway.masks.base import Blocks, Mask, Rule, Tiles, Witness, shape_of
from headway.masks.frame import Frame


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Packing:
    """Where each of some packed sequences starts and ends."""

    starts: Tensor
    """Cumulative lengths, int32, from 0 to the total: what flash kernels call cu_seqlens."""
    total: int
    longest: int

    @classmethod
    def of(cls, lengths: Sequence[int] | Tensor) -> Packing:
        counts = torch.as_tensor(lengths)
        if counts.ndim != 1 or counts.numel() == 0 or counts.is_floating_point() or counts.dtype == torch.bool:
            raise MaskError(f"got lengths {shape_of(counts)}, takes one integer per document")
        if int(counts.min()) < 0:
            raise MaskError(f"got a document of length {int(counts.min())}, takes lengths of 0 or more")
        starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
        return cls(starts, int(counts.sum()), int(counts.max()))

    def ids(self, count: int, device: torch.device) -> Tensor:
        """The document of each of `count` positions."""

        def find() -> Tensor:
            positions = torch.arange(count, dtype=torch.int32, device=device)
            return torch.searchsorted(self.on(device)[1:], positions, right=True, out_int32=True)

        return self._once((count, device), find)

    def on(self, device: torch.device) -> Tensor:
        """The starts on `device`."""
        return self._once(device, lambda: self.starts.to(device, non_blocking=True))

    def _once(self, what: object, make: Callable[[], Tensor]) -> Tensor:
        """A tensor made at its first use and kept: a packing never changes. Tracers get it anew."""
        if torch.compiler.is_compiling():
            return make()
        if what not in self._kept:
            self._kept[what] = make()
        return self._kept[what]

    @functools.cached_property
    def _kept(self) -> dict[object, Tensor]:
        return {}


@dataclasses.dataclass(frozen=True, eq=False, init=False, repr=False)
class Documents(Mask):
    """Tokens attend within their own document.

    `lengths` are the documents' lengths in order, and must add up to the sequence. For cross-attention between
    packed sequences give `kv_lengths` too. Lengths on an accelerator are read once here, when the mask is made.

    >>> print(Documents([2, 1]).matrix(3, 3))
    ■ ■ ·
    ■ ■ ·
    · · ■
    """

    queries: Packing
    keys: Packing
    kind: ClassVar[str] = "documents"

    def __init__(self, lengths: Sequence[int] | Tensor, kv_lengths: Sequence[int] | Tensor | None = None) -> None:
        queries = Packing.of(lengths)
        self._set(queries, queries if kv_lengths is None else Packing.of(kv_lengths))

    def _set(self, queries: Packing, keys: Packing) -> None:
        if queries.starts.shape != keys.starts.shape:
            raise MaskError(
                f"got {queries.starts.numel() - 1} query documents and {keys.starts.numel() - 1} key documents,"
                " takes as many of one as of the other"
            )
        object.__setattr__(self, "queries", queries)
        object.__setattr__(self, "keys", keys)

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor, *, longest: int | None = None, total: int | None = None) -> Documents:
        """From cumulative lengths, as flash kernels take them.

        With `longest` and `total` given nothing is read back from the device, and they are taken at their word.

        >>> Documents.from_cu_seqlens(torch.tensor([0, 2, 3]))
        Documents(2 of at most 2, 3 tokens)
        """
        if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 2 or cu_seqlens.is_floating_point():
            raise MaskError(f"got cu_seqlens {shape_of(cu_seqlens)}, takes 1-D integers from 0 to the total")
        if longest is not None and total is not None:
            packing = Packing(cu_seqlens.to(torch.int32, copy=True), total, longest)
        else:
            if int(cu_seqlens[0]) != 0:
                raise MaskError(f"got cu_seqlens that start at {int(cu_seqlens[0])}, takes a start of 0")
            packing = Packing.of(cu_seqlens.diff())
        mask = cls.__new__(cls)
        mask._set(packing, packing)
        return mask

    def __repr__(self) -> str:
        count = self.queries.starts.numel() - 1
        return f"Documents({count} of at most {self.queries.longest}, {self.queries.total} tokens)"

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.queries.starts, self.keys.starts)

    @property
    def one_packing(self) -> bool:
        """True if queries and keys are packed alike."""
        return self.queries is self.keys

    def check(self, frame: Frame) -> None:
        for name, packing, length in (("queries", self.queries, frame.q_len), ("keys", self.keys, frame.kv_len)):
            if packing.total != length:
                raise MaskError(
                    f"got documents of {packing.total} tokens in all for {length} {name}; they must be equal"
                )

    def rule(self, frame: Frame) -> Rule:
        q_doc = self.queries.ids(frame.q_len, frame.device)
        k_doc = q_doc if self.one_packing else self.keys.ids(frame.kv_len, frame.device)
        return lambda b, h, q, k: q_doc[q] == k_doc[k]

    def blocks(self, frame: Frame, tiles: Tiles) -> Blocks:
        q_doc = self.queries.ids(frame.q_len, frame.device)
        k_doc = q_doc if self.one_packing else self.keys.ids(frame.kv_len, frame.device)
        # Ids ascend, so a tile's first and last document bound it.
        q_low, q_high, k_low, k_high = (
            q_doc[tiles.q_first],
            q_doc[tiles.q_last],
            k_doc[tiles.k_first],
            k_doc[tiles.k_last],
        )
        return Blocks(some=(q_low <= k_high) & (k_low <= q_high), every=(q_low == k_high) & (k_low == q_high))

    def shows(self, frame: Frame, witness: Witness) -> bool:
        return self.one_packing and frame.q_len == frame.kv_len and witness is not Witness.FIRST_KEY

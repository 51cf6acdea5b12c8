"""Documents: several sequences packed end to end, none of which sees another."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from headway.errors import MaskError
from headway.masks.base import CuSeqlens, Mask, Rule, Witness, holds_integers, shape_of
from headway.masks.frame import Frame
from headway.masks.memo import Remembers
from headway.masks.tiles import Blocks, Tiles


def documents_of(positions: Tensor, starts: Tensor) -> Tensor:
    """The document of each position, by where documents start.

    Searched among all starts, not among the ends in a slice: inductor searches from where a slice's storage begins
    (pytorch#182343).
    """
    return torch.searchsorted(starts, positions, right=True, out_int32=True) - 1


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Packing(Remembers):
    """Where each of some packed sequences starts and ends. It never changes."""

    starts: Tensor
    """Cumulative lengths, int32, from 0 to the total: what flash kernels call cu_seqlens."""
    total: int
    longest: int
    lengths: tuple[int, ...] | None = None
    """The length of each, where the host knows them."""

    @classmethod
    def of(cls, lengths: Sequence[int] | Tensor) -> Packing:
        counts = torch.as_tensor(lengths)
        if counts.ndim != 1 or counts.numel() == 0 or not holds_integers(counts):
            raise MaskError(f"got lengths {shape_of(counts)}, takes one integer per document")
        if isinstance(lengths, Tensor) and torch.compiler.is_compiling():
            raise MaskError(
                "got lengths in a tensor inside a compiled function, takes numbers, as a tensor would have to be read;"
                " use Documents.from_cu_seqlens(..., longest=, total=), or make the mask outside"
            )
        known = tuple(lengths.tolist() if isinstance(lengths, Tensor) else map(int, lengths))
        if min(known) < 0:
            raise MaskError(f"got a document of length {min(known)}, takes lengths of 0 or more")
        starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
        return cls(starts, sum(known), max(known), known)

    @property
    def count(self) -> int:
        """How many sequences there are."""
        return self.starts.shape[0] - 1

    def on(self, device: torch.device) -> Tensor:
        """The starts on `device`."""
        return self.moved(self.starts, device)

    def ids(self, count: int, device: torch.device) -> Tensor:
        """The document of each of `count` positions."""

        def find() -> tuple[Tensor]:
            positions = torch.arange(count, dtype=torch.int32, device=device)
            return (documents_of(positions, self.on(device)),)

        return self.once(("ids", count), device, find)[0]

    def extremes(self, corners: Tensor, size: int, count: int) -> tuple[Tensor, ...]:
        """Each tile's (lowest, highest) document, and (highest, lowest), of `count` positions in all.

        Both as tiles of queries and as tiles of keys, the way tiles.Tiles has them.
        """

        def find() -> tuple[Tensor, ...]:
            ends, back = self.ids(count, corners.device)[corners].view(2, 2, 1, 1, -1)  # ids ascend
            return ends[..., None], back[..., None], ends[..., None, :], back[..., None, :]

        return self.once(("extremes", size, count), corners.device, find)


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
        keys = queries if kv_lengths is None else Packing.of(kv_lengths)
        self._set(queries, queries if keys.lengths == queries.lengths else keys)

    def _set(self, queries: Packing, keys: Packing) -> None:
        if queries.starts.shape != keys.starts.shape:
            raise MaskError(
                f"got {queries.starts.numel() - 1} query documents and {keys.starts.numel() - 1} key documents,"
                " takes as many of one as of the other; a document may have length 0"
            )
        object.__setattr__(self, "queries", queries)
        object.__setattr__(self, "keys", keys)

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor, *, longest: int | None = None, total: int | None = None) -> Documents:
        """From cumulative lengths, as flash kernels take them.

        With `longest` and `total` given nothing is read back from the device, and they are taken at their word.

        >>> Documents.from_cu_seqlens(torch.tensor([0, 2, 3]))
        Documents(2 of up to 2 tokens, 3 in all)
        """
        if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 2 or not holds_integers(cu_seqlens):
            raise MaskError(f"got cu_seqlens {shape_of(cu_seqlens)}, takes 1-D integers from 0 to the total")
        if longest is not None and total is not None:
            packing = Packing(cu_seqlens.to(torch.int32, copy=True), total, longest)
        else:
            packing = Packing.of(cu_seqlens.diff())
            if int(cu_seqlens[0]) != 0:
                raise MaskError(f"got cu_seqlens that start at {int(cu_seqlens[0])}, takes a start of 0")
            for name, given, real in (("longest", longest, packing.longest), ("total", total, packing.total)):
                if given not in (None, real):
                    raise MaskError(f"got {name}={given}, but these cu_seqlens say {real}; leave {name} out")
        return cls.packed(packing, packing)

    @classmethod
    def packed(cls, queries: Packing, keys: Packing) -> Documents:
        """From what is known of them already; one packing for both says that they are packed alike."""
        mask = cls.__new__(cls)
        mask._set(queries, keys)
        return mask

    def __repr__(self) -> str:
        queries, keys = self.queries, self.keys
        other = "" if self.one_packing else f"; keys of up to {keys.longest} tokens, {keys.total} in all"
        return f"Documents({queries.count} of up to {queries.longest} tokens, {queries.total} in all{other})"

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
                known = packing.lengths or ()
                cumulative = len(known) > 1 and known[0] == 0 and known[-1] == length and list(known) == sorted(known)
                instead = (
                    "these look like cumulative lengths, which Documents.from_cu_seqlens takes"
                    if cumulative
                    else "count the filler as a document of its own"
                )
                raise MaskError(
                    f"got documents of {packing.total} tokens in all for {length} {name}, takes lengths that add up to"
                    f" all {name}; {instead}"
                )

    def rule(self, frame: Frame) -> Rule:
        q_doc = self.queries.ids(frame.q_len, frame.device)
        # One tensor, also where nothing is remembered: that two are the same is what compiled code is guarded by.
        k_doc = q_doc if self.one_packing and frame.q_len == frame.kv_len else self.keys.ids(frame.kv_len, frame.device)
        return lambda b, h, q, k: q_doc[q] == k_doc[k]

    def blocks(self, frame: Frame, tiles: Tiles) -> Blocks:
        q_ends, q_back, _, _ = self.queries.extremes(tiles.q_corners, tiles.size, frame.q_len)
        _, _, k_ends, k_back = self.keys.extremes(tiles.k_corners, tiles.size, frame.kv_len)
        # Two tiles share a document if each one's low is at most the other's high, and hold no other if each one's high
        # is at most the other's low.
        return Blocks((q_ends <= k_back) & (k_ends <= q_back))

    def shows(self, frame: Frame, witness: Witness) -> bool:
        return self.one_packing and frame.q_len == frame.kv_len and witness is not Witness.FIRST_KEY

    def to_cu_seqlens(self, frame: Frame) -> CuSeqlens:
        """Starts of the documents, for all batch entries laid end to end.

        >>> Documents([2, 1]).to_cu_seqlens(Frame(3, 3, batch=2))[0]
        tensor([0, 2, 3, 5, 6], dtype=torch.int32)
        """
        self.check(frame)
        q_starts = _end_to_end(self.queries.on(frame.device), frame.q_len, frame.batch)
        k_starts = q_starts if self.one_packing else _end_to_end(self.keys.on(frame.device), frame.kv_len, frame.batch)
        return q_starts, k_starts, self.queries.longest, self.keys.longest


def _end_to_end(starts: Tensor, length: int, batch: int) -> Tensor:
    if batch == 1:
        return starts
    shifts = torch.arange(batch, device=starts.device, dtype=starts.dtype)[:, None] * length
    return torch.cat((starts[:1], (starts[1:] + shifts).flatten()))

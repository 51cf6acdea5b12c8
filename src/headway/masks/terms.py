"""Terms: a mask in normal form, as the parts a kernel may know by name."""

from __future__ import annotations

import dataclasses

from headway.masks.alibi import Alibi
from headway.masks.band import Band
from headway.masks.base import And, Mask, Witness
from headway.masks.bias import Bias
from headway.masks.causal import Causal
from headway.masks.documents import Documents
from headway.masks.frame import Frame
from headway.masks.full import Full
from headway.masks.padding import Padding
from headway.masks.window import Window


@dataclasses.dataclass(frozen=True)
class Terms:
    """A conjunction: at most one band, at most one packing, and the rest."""

    band: Band | None = None
    documents: Documents | None = None
    padding: Padding | None = None
    alibi: Alibi | None = None
    bias: Bias | None = None
    rest: tuple[Mask, ...] = ()
    """What no kernel knows by name: it has to become a tensor, or flex attention's program."""

    def kinds(self, frame: Frame) -> frozenset[str]:
        """The words that limits go by. A band is causal or a window, and skewed lengths say how they are aligned."""
        # A second packing, band or bias is not what a kernel would make of that word: it has to be a tensor.
        words = {"and" if part.kind in NAMED else part.kind for part in self.rest}
        if self.band is not None:
            word = "causal" if (self.band.left, self.band.right) == (None, 0) else "window"
            words.add(word + _skew(frame, self.band.offset))
        if self.documents is not None:
            # A band over two different packings is not a band within each document.
            words.add("documents" if self.documents.one_packing else "documents-cross")
        if self.alibi is not None:
            words.add("alibi" + _skew(frame, frame.offset(self.alibi.align)))
        for part in (self.padding, self.bias):
            if part is not None:
                words.add(part.kind)
        return frozenset(words)


NAMED = ("causal", "window", "documents", "padding", "alibi", "bias")
"""Kinds that may be one of the terms above."""


def _skew(frame: Frame, offset: int) -> str:
    """How a diagonal is aligned, where lengths differ."""
    return "" if frame.q_len == frame.kv_len else "-lower-right" if offset else "-upper-left"


def terms(mask: Mask | None, frame: Frame) -> Terms:
    """Sort a mask's conjuncts, joining bands of one alignment into one."""
    band: Band | None = None
    found: dict[str, Mask] = {}
    rest: list[Mask] = []
    parts = mask.parts if isinstance(mask, And) else () if mask is None else (mask,)
    for part in parts:
        if isinstance(part, Full):
            continue
        if isinstance(part, Causal | Window):
            other = part.band(frame)
            if other.left is None and other.right is None:
                continue
            if band is None or band.offset == other.offset:
                band = other if band is None else _tighter(band, other)
            else:
                rest.append(part)
        elif isinstance(part, Documents | Padding | Alibi | Bias) and part.kind not in found:
            found[part.kind] = part
        else:
            rest.append(part)
    return Terms(band, rest=tuple(rest), **found)  # type: ignore[arg-type]  # keys are the kinds above


def _tighter(one: Band, other: Band) -> Band:
    left = [side for side in (one.left, other.left) if side is not None]
    right = [side for side in (one.right, other.right) if side is not None]
    return Band(min(left) if left else None, min(right) if right else None, one.offset)


def rows_may_be_empty(mask: Mask | None, frame: Frame) -> bool:
    """False only if every query surely sees some key; unread data counts as a maybe."""
    if frame.kv_len == 0:
        return True
    if mask is None:
        return False
    fits = frame.q_len <= frame.kv_len
    witnesses = [Witness.FIRST_KEY, *((Witness.UPPER_DIAGONAL, Witness.LOWER_DIAGONAL) if fits else ())]
    return not any(mask.shows(frame, witness) for witness in witnesses)

"""Pictures of the masks that a swapped model really makes, sampled while the example runs once."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from headway.errors import HeadwayError
from headway.limits.request import mask_words
from headway.masks import Causal, Frame, Mask
from headway.masks.draw import sample
from headway.masks.terms import terms
from headway.sites.noted import Call, noted
from headway.sites.site import Ticket, site_of
from headway.swap.still import still
from headway.swap.swap import Example, Swap, runner

AT_MOST = 48
"""Rows and columns of a picture; longer masks are sampled evenly."""

ENTRIES = 3
"""Batch entries looked at; those that look alike are one picture."""

PICTURES = 16

Rows = tuple[tuple[bool, ...], ...]


@dataclasses.dataclass(frozen=True)
class Picture:
    """One mask as it was seen, or as its kind alone says it is."""

    words: str
    """The kinds of its terms, as requests name them."""
    mask: str
    """The mask as it prints."""
    q_len: int
    kv_len: int
    entry: int
    """The batch entry that is drawn."""
    rows: Rows
    sites: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return {
            **{field: getattr(self, field) for field in ("words", "mask", "q_len", "kv_len", "entry")},
            "rows": ["".join("■" if cell else "·" for cell in row) for row in self.rows],
            "sites": list(self.sites),
        }


def pictures(swap: Swap, example: Example) -> tuple[Picture, ...]:
    """Run the example once through the swapped model, and sample each mask that its sites are given."""
    run = runner(example)
    assert run is not None
    seen: dict[tuple[str, int, int, Rows], Picture] = {}

    def note(module: nn.Module, call: Call) -> None:
        site = site_of(module)
        if call.mask is not None and site is not None:
            for picture in _pictures(call.mask, call.frame, site.ticket.name):
                _add(picture, seen)

    with noted(swap.model, note, counted=True), still(swap.model), torch.no_grad():
        run(swap.model)
    return tuple(seen.values())


def _pictures(mask: Mask, frame: Frame, site: str) -> Iterator[Picture]:
    words = mask_words(terms(mask, frame).kinds(frame))
    for entry in range(min(ENTRIES, frame.batch)):
        try:
            rows = _rows(mask, frame, entry)
        except HeadwayError:  # a mask that cannot be drawn is no reason to lose the report
            return
        yield Picture(words, repr(mask), frame.q_len, frame.kv_len, entry, rows, (site,))


def _add(picture: Picture, seen: dict[tuple[str, int, int, Rows], Picture]) -> None:
    at = (picture.words, picture.q_len, picture.kv_len, picture.rows)
    known = seen.get(at)
    if known is None and len(seen) < PICTURES:
        seen[at] = picture
    elif known is not None and picture.sites[0] not in known.sites:
        seen[at] = dataclasses.replace(known, sites=known.sites + picture.sites)


def from_words(tickets: Iterable[Ticket]) -> tuple[Picture, ...]:
    """What decisions alone tell, without a run: a causal mask is fully said by its word and the lengths."""
    seen: dict[tuple[str, int, int, Rows], Picture] = {}
    for ticket in tickets:
        for decision in ticket.decisions.values():
            request = decision.request
            if len(request.mask) == 1 and min(request.q_len, request.kv_len) > 0:
                (word,) = request.mask
                kind, _, align = word.partition("-")
                if kind == "causal":
                    mask = Causal(align or None)  # type: ignore[arg-type]  # the word ends with the alignment's name
                    rows = _rows(mask, Frame(request.q_len, request.kv_len), 0)
                    _add(Picture(word, repr(mask), request.q_len, request.kv_len, 0, rows, (ticket.name,)), seen)
    return tuple(seen.values())


def _rows(mask: Mask, frame: Frame, entry: int) -> Rows:
    keep = sample(mask, frame.q_len, frame.kv_len, batch=entry, head=0, at_most=AT_MOST)
    return tuple(tuple(row) for row in keep.tolist())

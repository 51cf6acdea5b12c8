"""The calls of a swapped model's sites, noted while it runs; the sites themselves stay as they are."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from headway.masks.base import Mask
from headway.masks.frame import Frame
from headway.sites.site import HELD, Site, Ticket, site_of


class Call(NamedTuple):
    """What decides the weights of one call of a site: all that it was given but the values and the dropout."""

    q: Tensor
    k: Tensor
    mask: Mask | None
    scale: float | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def frame(self) -> Frame:
        return Frame(self.q.shape[2], self.k.shape[2], self.q.shape[0], self.q.shape[1], self.q.device)


class Noted(Site):
    """Stands in for a site during one run, and tells of each of its calls after it was made.

    Another thread may run the model at the same time. Its calls are not of this run, and go to the site itself.
    """

    def __init__(self, site: Site, ticket: Ticket, note: Callable[[Call], None]) -> None:
        super().__init__(ticket, site.require)
        self.site, self.note, self.thread = site, note, threading.get_ident()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None = None, **wants: Any) -> Tensor:
        if threading.get_ident() != self.thread:
            return self.site.attend(q, k, v, mask, **wants)
        out = super().attend(q, k, v, mask, **wants)
        self._tell(q, k, mask, **wants)
        return out

    def in_full(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None = None, **wants: Any) -> tuple[Tensor, Tensor]:
        if threading.get_ident() != self.thread:
            return self.site.in_full(q, k, v, mask, **wants)
        answer = super().in_full(q, k, v, mask, **wants)
        self._tell(q, k, mask, **wants)
        return answer

    def _tell(self, q: Tensor, k: Tensor, mask: Mask | None, dropout: float = 0.0, **wants: Any) -> None:
        del dropout
        self.note(Call(q, k, mask, **wants))


@contextlib.contextmanager
def noted(model: nn.Module, note: Callable[[nn.Module, Call], None], *, counted: bool) -> Iterator[None]:
    """Inside, each call of a site of `model` is told to `note`, with its module; tickets count it if `counted`."""
    sites = {module: site for module in model.modules() if (site := site_of(module)) is not None}
    noting: dict[nn.Module, Noted] = {}
    for module, site in sites.items():
        noting[module] = Noted(site, site.ticket if counted else _blank(site.ticket), functools.partial(note, module))
    try:
        for module, stand_in in noting.items():
            module.__dict__[HELD] = stand_in
        yield
    finally:
        with _LEAVING:
            for module, mine in noting.items():
                _leave(module, mine)


_LEAVING = threading.Lock()


def _leave(module: nn.Module, mine: Noted) -> None:
    """Take one stand-in out, be it in front or behind that of a run which began meanwhile."""
    front = module.__dict__[HELD]
    if front is mine:
        module.__dict__[HELD] = mine.site
    while isinstance(front, Noted):
        if front.site is mine:
            front.site = mine.site
        front = front.site


def _blank(ticket: Ticket) -> Ticket:
    """One that nobody reads; it knows the decisions, which take longer to make than to copy."""
    return dataclasses.replace(ticket, runs=Counter(), decisions=dict(ticket.decisions))

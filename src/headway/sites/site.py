"""A site, a place in a model where attention is computed; and its ticket, the record of what it asked and what ran."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from headway.attention import attention, explain
from headway.backends.kernel import Extras
from headway.backends.reference import in_full
from headway.choice.choose import Decision
from headway.limits.request import representative
from headway.masks.base import Mask

Undo: TypeAlias = Any
"""A call that puts back the very objects that were there before; `apply` of each kind returns one."""

HELD = "_headway"
"""The attribute of a swapped module that holds its site."""


@dataclasses.dataclass(frozen=True)
class Found:
    """A site as a kind finds it, before anything is changed."""

    name: str
    """The module's path in the model; '' is the model itself."""
    module: nn.Module
    kind: str
    because: str = ""
    """Why it has to be left alone; '' if it can be swapped."""
    aliases: tuple[str, ...] = ()
    """Other paths to the same module."""


@dataclasses.dataclass
class Ticket:
    """A site's record."""

    name: str
    kind: str
    asked: str = "auto"
    """The backend asked for."""
    because: str = ""
    """Why the site was left alone; '' if it was swapped."""
    aliases: tuple[str, ...] = ()
    runs: Counter[str] = dataclasses.field(default_factory=Counter)
    """How often each backend really ran here. What a compiled model runs is not counted."""
    in_full: int = 0
    """How often attention was computed in full here, because the caller wanted its weights."""
    decisions: dict[Any, Decision] = dataclasses.field(default_factory=dict)
    """The decision for each kind of call met, by shapes, dtype and what else it depends on."""

    @property
    def swapped(self) -> bool:
        return not self.because


Check: TypeAlias = Callable[[Ticket, Decision, Tensor, Tensor, Tensor, "Mask | None", Extras, Tensor], None]
"""Raises if a call's answer is wrong."""


class Site:
    """What a swapped module holds: its ticket, and attention that writes into it."""

    def __init__(self, ticket: Ticket, require: tuple[str, ...] = ()) -> None:
        self.ticket, self.require = ticket, require
        self.check: Check | None = None
        """What each kind of call is put to that the ticket has no decision for."""

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Mask | None = None,
        *,
        scale: float | None = None,
        dropout: float = 0.0,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """`headway.attention` as this site asks for it, (B, H, L, D)."""
        asked = self.ticket.asked
        out = attention(
            q, k, v, mask, scale=scale, dropout=dropout, softcap=softcap, sinks=sinks,
            backend=asked, require=self.require,
        )  # fmt: skip
        if not is_compiling():
            grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
            lengths = representative(q.shape[2]), representative(k.shape[2])  # a cache grows at every call
            sizes = q.shape[:2], k.shape[1], q.shape[3], v.shape[3], lengths
            # Autocast shows in the dtype that comes out.
            at = (*sizes, out.dtype, q.device, grad, _kinds(mask), dropout > 0, softcap is None, sinks is None)
            decision = self.ticket.decisions.get(at)
            if decision is None:
                decision = explain(
                    q, k, v, mask, scale=scale, dropout=dropout, softcap=softcap, sinks=sinks,
                    backend=asked, require=self.require,
                )  # fmt: skip
                if self.check is not None:
                    self.check(self.ticket, decision, q, k, v, mask, Extras(scale, dropout, softcap, sinks), out)
                self.ticket.decisions[at] = decision  # which it is not known by while it is wrong
            self.ticket.runs[decision.backend().name] += 1
        return out

    def in_full(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None = None, **wants: Any) -> tuple[Tensor, Tensor]:
        """The function of that name, counted."""
        answer = in_full(q, k, v, mask, **wants)
        if not is_compiling():
            self.ticket.in_full += 1
        return answer


def _kinds(mask: Mask | None) -> Any:
    """The mask's kind, and those of its parts."""
    parts: tuple[Mask, ...] = getattr(mask, "parts", ())
    return None if mask is None else (mask.kind, *map(_kinds, parts)) if parts else mask.kind


def site_of(module: nn.Module) -> Site | None:
    """The site that a swapped module holds."""
    return module.__dict__.get(HELD)

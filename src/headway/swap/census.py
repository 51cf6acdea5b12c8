"""The census: every place in a model where attention is computed, and what became of it."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

from headway.sites.site import Ticket


@dataclasses.dataclass(frozen=True)
class Census:
    """All tickets of a model."""

    model: str
    """The model's class."""
    tickets: tuple[Ticket, ...]
    notes: tuple[str, ...] = ()
    planned: bool = False
    """True of a census of `inspect`: what a swap would do."""

    @property
    def swapped(self) -> tuple[Ticket, ...]:
        return tuple(ticket for ticket in self.tickets if ticket.swapped)

    def __str__(self) -> str:
        lines = map(_plan if self.planned else _line, self.tickets)
        return "\n".join((self._head(), *lines, *(f"note: {note}" for note in self.notes)))

    def _head(self) -> str:
        taken, left = len(self.swapped), len(self.tickets) - len(self.swapped)
        sites = "1 site" if len(self.tickets) == 1 else f"{len(self.tickets)} sites"
        done = f"of which a swap would take {taken}" if self.planned else f"{taken} swapped, {left} left alone"
        return f"{self.model}: {sites} of attention, {done}{'' if self.tickets else ': no attention was found'}"

    def as_dict(self) -> dict[str, Any]:
        return {"model": self.model, "sites": [_as_dict(t) for t in self.tickets], "notes": list(self.notes)}

    def save(self, path: str | Path) -> Path:
        path = Path(path)
        path.write_text(json.dumps(self.as_dict(), indent=1) + "\n")
        return path


def _plan(ticket: Ticket) -> str:
    would = "take it" if ticket.swapped else f"leave it alone, because {ticket.because}"
    return f"  {_name(ticket)}  {ticket.kind}{_asked(ticket)}: a swap would {would}"


def _line(ticket: Ticket) -> str:
    if not ticket.swapped:
        return f"  {_name(ticket)}  {ticket.kind}: left alone, because {ticket.because}"
    # The runs of a proof are not counted: what it alone has met is named without a number.
    chosen = Counter({decision.backend().name: 0 for decision in ticket.decisions.values()})
    chosen.update(ticket.runs)
    ran = [f"{backend}{_runs(count)}" for backend, count in chosen.most_common()]
    if ticket.in_full:
        ran.append(f"in full for its weights ({_times(ticket.in_full)}; a call that asks for none runs on a kernel)")
    return f"  {_name(ticket)}  {ticket.kind}{_asked(ticket)}: {', '.join(ran) or 'no call has run on a kernel yet'}"


def _runs(count: int) -> str:
    return f" ({_times(count)})" if count else ""


def _times(count: int) -> str:
    return f"{count} run" if count == 1 else f"{count} runs"


def _name(ticket: Ticket) -> str:
    return " = ".join((ticket.name or "(the model itself)", *ticket.aliases))


def _asked(ticket: Ticket) -> str:
    return "" if ticket.asked == "auto" else f" (asked for {ticket.asked})"


def _as_dict(ticket: Ticket) -> dict[str, Any]:
    return {
        "name": ticket.name,
        "aliases": list(ticket.aliases),
        "kind": ticket.kind,
        "asked": ticket.asked,
        "swapped": ticket.swapped,
        "because": ticket.because,
        "runs": dict(ticket.runs),
        "runs_in_full": ticket.in_full,
        "decisions": [
            {
                "request": str(decision.request),
                "chosen": decision.backend().name,
                "why": decision.why,
                "refusals": {name: [str(refusal) for refusal in refusals] for name, refusals in decision.refusals},
            }
            for decision in ticket.decisions.values()
        ],
    }

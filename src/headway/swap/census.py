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

    @property
    def swapped(self) -> tuple[Ticket, ...]:
        return tuple(ticket for ticket in self.tickets if ticket.swapped)

    def __str__(self) -> str:
        return "\n".join((self._head(), *map(_line, self.tickets), *(f"note: {note}" for note in self.notes)))

    def _head(self) -> str:
        left = len(self.tickets) - len(self.swapped)
        sites = "1 site" if len(self.tickets) == 1 else f"{len(self.tickets)} sites"
        return f"{self.model}: {sites} of attention, {len(self.swapped)} swapped, {left} left alone"

    def as_dict(self) -> dict[str, Any]:
        return {"model": self.model, "sites": [_as_dict(t) for t in self.tickets], "notes": list(self.notes)}

    def save(self, path: str | Path) -> Path:
        path = Path(path)
        path.write_text(json.dumps(self.as_dict(), indent=1) + "\n")
        return path


def _line(ticket: Ticket) -> str:
    name = (ticket.name or "(the model itself)") + "".join(f" = {alias}" for alias in ticket.aliases)
    if not ticket.swapped:
        return f"  {name}  {ticket.kind}: left alone, because {ticket.because}"
    chosen = Counter({decision.backend().name: 0 for decision in ticket.decisions.values()})
    chosen.update(ticket.runs)
    ran = [f"{backend} ({count} runs)" for backend, count in chosen.most_common()]
    if ticket.in_full:
        ran.append(f"in full for its weights ({ticket.in_full} runs; a call that asks for none runs on a kernel)")
    asked = "" if ticket.asked == "auto" else f" (asked for {ticket.asked})"
    return f"  {name}  {ticket.kind}{asked}: {', '.join(ran) or 'has not run yet'}"


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

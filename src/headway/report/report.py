"""Report: all that is known of one swap, as data; the terminal table, the JSON and the page are views of it."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from headway.choice.choose import Decision
from headway.report.pictures import Picture, from_words
from headway.report.times import Times
from headway.sites.site import Ticket
from headway.swap.census import Census
from headway.swap.judge import Errors
from headway.swap.proof import Certificate, Proof
from headway.swap.swap import Swap

FORMAT = "headway report 1"


@dataclasses.dataclass(frozen=True)
class Report:
    """A census, its certificate, and what was measured beside.

    >>> import torch
    >>> from headway.swap import swap
    >>> model = torch.nn.MultiheadAttention(16, 2, batch_first=True)
    >>> report = Report.of(swap(model, (torch.randn(1, 4, 16),) * 3))
    >>> report.proven, report.verdict
    (True, 'proven: 1 of 1 site swapped, and it errs no more than before')
    """

    title: str
    census: Census
    certificate: Certificate | None
    times: Times | None = None
    pictures: tuple[Picture, ...] = ()
    command: str = ""
    """What made this report, to be typed again."""

    @classmethod
    def of(
        cls,
        swap: Swap,
        *,
        title: str = "",
        times: Times | None = None,
        pictures: tuple[Picture, ...] | None = None,
        command: str = "",
    ) -> Report:
        drawn = from_words(swap.census.tickets) if pictures is None else pictures
        return cls(title or swap.census.model, swap.census, swap.certificate, times, drawn, command)

    @property
    def proven(self) -> bool:
        """Something is swapped, and nothing failed the proof."""
        return bool(self.census.swapped) and self.certificate is not None and self.certificate.passed

    @property
    def verdict(self) -> str:
        swapped, all_ = len(self.census.swapped), len(self.census.tickets)
        count = f"{swapped} of {all_} {'site' if all_ == 1 else 'sites'} swapped"
        if self.certificate is None:
            return f"not proven: {count}, and no example was given"
        if self.proven:
            return f"proven: {count}, and {'it errs' if swapped == 1 else 'each errs'} no more than before"
        if self.failures:
            return f"not proven: {count}; {len(self.failures)} failed the proof"
        return "nothing swapped: " + ("no attention was found" if not all_ else "every site is left alone")

    @property
    def failures(self) -> tuple[str, ...]:
        """What failed the proof, and how."""
        if self.certificate is None:
            return ()
        whole = self.certificate.whole
        proofs = (*self.certificate.proofs, *(() if whole is None else (whole,)))
        failed = [f"{proof.name or proof.kind}: {proof.failure}" for proof in proofs if proof.failure]
        return (
            *failed,
            *(f"{card.case} on {card.backend}: {card.failure}" for card in self.certificate.deck if card.failure),
        )

    @property
    def rows(self) -> tuple[Row, ...]:
        proofs = {} if self.certificate is None else {proof.name: proof for proof in self.certificate.proofs}
        return tuple(Row(ticket, proofs.get(ticket.name)) for ticket in self.census.tickets)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, as JSON has it."""
        census = self.census.as_dict()
        for site, ticket in zip(census["sites"], self.census.tickets, strict=True):
            site["decisions"] = [_decision(decision) for decision in ticket.decisions.values()]
        return {
            "format": FORMAT,
            "title": self.title,
            "command": self.command,
            "proven": self.proven,
            "verdict": self.verdict,
            "failures": list(self.failures),
            "census": census,
            "certificate": None if self.certificate is None else self.certificate.as_dict(),
            "times": None if self.times is None else self.times.as_dict(),
            "masks": [picture.as_dict() for picture in self.pictures],
        }

    def save(self, path: str | Path) -> Path:
        """Census and certificate in one JSON file."""
        path = Path(path)
        path.write_text(json.dumps(self.as_dict(), indent=1, allow_nan=False, ensure_ascii=False) + "\n", "utf-8")
        return path


@dataclasses.dataclass(frozen=True)
class Level:
    """The worst error, as a share of the truth's largest number; before and now."""

    before: float
    now: float

    def __str__(self) -> str:
        return f"{digits(self.now)} / {digits(self.before)}"


@dataclasses.dataclass(frozen=True)
class Row:
    """One site, in the words that every view uses."""

    ticket: Ticket
    proof: Proof | None

    @property
    def site(self) -> str:
        return self.ticket.name or "(the model itself)"

    @property
    def state(self) -> str:
        if self.ticket.swapped:
            return "swapped"
        return "failed" if self.proof is not None else "left alone"

    @property
    def chosen(self) -> dict[str, int]:
        """Each backend chosen here, with how often it really ran; what ran most comes first."""
        names = [decision.chosen.name for decision in self.ticket.decisions.values() if decision.chosen is not None]
        found = dict.fromkeys((*names, *self.ticket.runs))
        return {name: self.ticket.runs[name] for name in sorted(found, key=lambda name: -self.ticket.runs[name])}

    @property
    def why(self) -> tuple[str, ...]:
        """Why each was chosen, or why the site is left alone."""
        if not self.ticket.swapped:
            return (f"left alone, because {self.ticket.because}",)
        found = list(dict.fromkeys(decision.why for decision in self.ticket.decisions.values()))
        if self.ticket.in_full:
            times = "once" if self.ticket.in_full == 1 else f"{self.ticket.in_full} times"
            wanted = "because the caller wanted its weights; a call that asks for none runs on a kernel"
            found.append(f"computed in full {times}, {wanted}")
        return tuple(found)

    @property
    def forward(self) -> Level | None:
        return self._level(True)

    @property
    def gradients(self) -> Level | None:
        return self._level(False)

    @property
    def worst(self) -> Level | None:
        """Of both passes."""
        return None if self.proof is None else level(list(self.proof.errors))

    def _level(self, forward: bool) -> Level | None:
        errors = () if self.proof is None else self.proof.errors
        return level([e for e in errors if e.what.startswith("forward") == forward])


def level(errors: list[Errors]) -> Level | None:
    """The worst of several, of before and of now each.

    A gradient that is 0 in truth has nothing to be a share of, and is set against the largest of the others.
    """
    others = max((e.largest for e in errors), default=0.0)
    judged = [(share(e.worst_before, e, others), share(e.worst_now, e, others)) for e in errors if e.judged]
    return Level(max(was for was, _ in judged), max(now for _, now in judged)) if judged else None


def share(error: float, of: Errors, instead: float = 0.0) -> float:
    largest = of.largest or instead
    return error / largest if largest else (0.0 if error == 0 else math.inf)


def digits(number: float) -> str:
    """Two digits.

    >>> digits(0.00000123), digits(0.0), digits(float("inf"))
    ('1.2e-06', '0', 'inf')
    """
    return "0" if number == 0 else f"{number:.1e}" if math.isfinite(number) else str(number)


def _decision(decision: Decision) -> dict[str, Any]:
    return {
        "request": str(decision.request),
        "chosen": None if decision.chosen is None else decision.chosen.name,
        "why": decision.why,
        "also": [name for name in decision.accepted if decision.chosen is None or name != decision.chosen.name],
        "refusals": {
            name: [{"got": one.got, "takes": one.takes, "remedy": one.remedy} for one in refusals]
            for name, refusals in decision.refusals
        },
    }

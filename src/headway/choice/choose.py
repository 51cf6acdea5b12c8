"""choose: a request and a machine in, a decision out. Pure: machines nobody owns are decided for in tests."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator

from headway.backends.registry import Backend, candidates, named
from headway.choice.quarantine import quarantined
from headway.choice.timings import Time, measured
from headway.choice.words import in_words
from headway.errors import NoBackendError
from headway.limits.limit import Refusal, within
from headway.limits.machine import Machine
from headway.limits.request import Request, mask_words

STRUCTURE = ("causal", "window", "documents", "tree", "predicate", "prefix", "and", "or", "not")
"""Terms whose dense form is far larger than they are."""

UNMEASURED = Time(math.inf, False)

PLAIN = ("sdpa-math", "reference")
"""Backends that hold all scores in memory."""

LARGE = 1 << 20
"""Scores per head from which a dense form of a structured mask costs more than a slower kernel that needs none."""


@dataclasses.dataclass(frozen=True)
class Decision:
    """The backend chosen, why, and every other one with all its refusals."""

    request: Request
    machine: Machine
    asked: str
    """'auto', or the backend asked for by name."""
    chosen: Backend | None
    why: str

    @functools.cached_property
    def accepted(self) -> tuple[str, ...]:
        """Backends that take the request, best first."""
        return tuple(one.name for one in _takers(self.request, self.machine, self.asked)[0])

    @functools.cached_property
    def refusals(self) -> tuple[tuple[str, tuple[Refusal, ...]], ...]:
        """Every backend that is not accepted, with all that it has against the request."""
        every = (
            (one.name, why_not(one, self.request, self.machine, by_name=one.name == self.asked))
            for one in candidates(self.machine.device)
        )
        return tuple(pair for pair in every if pair[1])

    def __str__(self) -> str:
        head = f"{self.chosen.name}: {self.why}" if self.chosen else f"no backend: {self.why}"
        return "\n".join((head, *self._lines()))

    def _lines(self) -> list[str]:
        facts = [("asked", str(self.request)), ("machine", str(self.machine))]
        if self.chosen is None:
            return in_words(facts, self._asked_of, instead=self.accepted)
        others = [name for name in self.accepted if name != self.chosen.name]
        facts += [("also", ", ".join(others))] if others else []
        return in_words(facts, self.refusals)

    @property
    def _asked_of(self) -> tuple[tuple[str, tuple[Refusal, ...]], ...]:
        """Who asks by name wants to know about that name, and what would do instead."""
        if self.asked == "auto":
            return self.refusals
        return ((self.asked, why_not(named(self.asked, self.machine.device), self.request, self.machine)),)

    def backend(self) -> Backend:
        """The chosen backend, or NoBackendError with every reason and remedy."""
        if self.chosen is None:
            first = f"no backend can run this attention call: {self.why}"
            raise NoBackendError("\n".join((first, *self._lines())))
        return self.chosen


def choose(request: Request, machine: Machine, backend: str = "auto") -> Decision:
    """Decide by name, or for the fastest exact backend that takes the request."""
    if backend == "auto":
        takers, times = _takers(request, machine, backend)
        chosen = takers[0] if takers else None
        why = _why(chosen, request, machine, times) if chosen else "every one refuses"
    else:
        asked = named(backend, machine.device)
        chosen = asked if takes(asked, request, machine, by_name=True) else None
        why = "asked for by name" if chosen else f"{backend} was asked for by name and does not take it"
    return Decision(request, machine, backend, chosen, why)


def _takers(request: Request, machine: Machine, backend: str) -> tuple[list[Backend], dict[str, Time]]:
    """Backends that take the request, best first, and what was measured of them."""
    takers = [
        one for one in candidates(machine.device)
        if takes(one, request, machine, by_name=one.name == backend)
    ]  # fmt: skip
    times = measured(request, machine)
    takers.sort(
        key=lambda one: (times.get(one.name, UNMEASURED), _wasteful(one, request, machine), _tier(one, machine))
    )
    return takers, times


_APPROXIMATE = Refusal(
    "a call that does not name it", "calls that do", "pass backend='sage' if an approximation is good enough"
)


def why_not(backend: Backend, request: Request, machine: Machine, by_name: bool = True) -> tuple[Refusal, ...]:
    """All of a backend's refusals."""
    return tuple(_against(backend, request, machine, by_name))


def takes(backend: Backend, request: Request, machine: Machine, by_name: bool) -> bool:
    """Whether there is no refusal: one is enough to know."""
    return next(_against(backend, request, machine, by_name), None) is None


def _against(backend: Backend, request: Request, machine: Machine, by_name: bool) -> Iterator[Refusal]:
    for limit in backend.all_limits:
        yield from limit.refusals(request, machine)
    for entry in quarantined(backend.name):
        yield from entry.refusals(request, machine)
    if not (backend.exact or by_name):
        yield _APPROXIMATE


def _wasteful(backend: Backend, request: Request, machine: Machine) -> bool:
    """True if the backend would spread a large structured mask out as a tensor."""
    structured = any(kind.startswith(STRUCTURE) for kind in request.mask)
    large = request.q_len * request.kv_len >= LARGE
    return machine.device != "cpu" and large and structured and not backend.masks.is_native(request.mask)


def _tier(backend: Backend, machine: Machine) -> int:
    """Kernels go first on GPUs they are tuned for, then those tuned for others, then what writes all scores out.

    Flex on CPU compiles for seconds at every new shape, which its gain there hardly ever pays for.
    """
    if backend.name == "flex" and machine.device == "cpu":
        return 3
    if backend.name in PLAIN:
        return 2
    got = machine.capability
    return 1 if backend.best_on and got is not None and not within(got, *backend.best_on) else 0


def _why(backend: Backend, request: Request, machine: Machine, times: dict[str, Time]) -> str:
    if backend.name in times:
        ms, host = times[backend.name]
        took = f"{ms:.3g} ms, which the host takes to ask" if host else f"{ms:.3g} ms"
        return f"fastest measured on {machine.name} near this call ({took})"
    if request.mask and not backend.masks.is_native(request.mask):
        return f"first in order that takes the call, with the mask {mask_words(request.mask)} as a dense tensor"
    return "first in order that takes the call"

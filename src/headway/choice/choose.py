"""choose: a request and a machine in, a decision out. Pure: machines nobody owns are decided for in tests."""

from __future__ import annotations

import dataclasses
import math

from headway.backends.registry import Backend, candidates, named
from headway.choice.quarantine import quarantined
from headway.choice.timings import measured
from headway.errors import NoBackendError
from headway.limits.limit import Refusal
from headway.limits.machine import Machine
from headway.limits.request import Request, mask_words

STRUCTURE = ("causal", "window", "documents", "tree", "predicate", "prefix", "and", "or", "not")
"""Terms whose dense form is far larger than they are."""

LARGE = 1 << 20
"""Scores per head from which a dense form of a structured mask costs more than a slower kernel that needs none."""


@dataclasses.dataclass(frozen=True)
class Decision:
    """The backend chosen, why, and every other one with all its refusals."""

    request: Request
    machine: Machine
    chosen: Backend | None
    why: str
    accepted: tuple[str, ...]
    """Backends that take the request, best first."""
    refusals: tuple[tuple[str, tuple[Refusal, ...]], ...]

    def __str__(self) -> str:
        head = f"{self.chosen.name}: {self.why}" if self.chosen else f"no backend: {self.why}"
        others = [name for name in self.accepted if self.chosen is None or name != self.chosen.name]
        lines = [head, f"  asked    {self.request}", f"  machine  {self.machine}"]
        if others:
            lines.append(f"  also     {', '.join(others)}")
        return "\n".join((*lines, *self._why_not()))

    def _why_not(self) -> list[str]:
        """Refusals, one a line; a fact about the machine is said once, for all it stops."""
        everywhere: dict[str, list[str]] = {}
        for name, refusals in self.refusals:
            for refusal in refusals:
                if refusal.machine_wide:
                    everywhere.setdefault(str(refusal), []).append(name)
        width = max((len(name) for name, _ in self.refusals), default=0)
        lines = [f"  {', '.join(names)}: {text}" for text, names in everywhere.items()]
        for name, refusals in self.refusals:
            lines += [f"  {name:<{width}}  {refusal}" for refusal in refusals if not refusal.machine_wide]
        return lines

    def backend(self) -> Backend:
        """The chosen backend, or NoBackendError with every reason and remedy."""
        if self.chosen is None:
            raise NoBackendError(str(self).replace("no backend:", "no backend can run this attention call:", 1))
        return self.chosen


def choose(request: Request, machine: Machine, backend: str = "auto") -> Decision:
    """Decide by name, or for the fastest exact backend that takes the request."""
    if backend != "auto":
        asked = named(backend, machine.device)
        refusals = why_not(asked, request, machine)
        why = "asked for by name" if not refusals else f"{backend} was asked for by name and does not take it"
        if refusals:
            return Decision(request, machine, None, why, (), ((asked.name, refusals),))
        return Decision(request, machine, asked, why, (backend,), ())
    accepted: list[Backend] = []
    refused: list[tuple[str, tuple[Refusal, ...]]] = []
    for one in candidates(machine.device):
        refusals = why_not(one, request, machine)
        if refusals:
            refused.append((one.name, refusals))
        elif one.exact:
            accepted.append(one)
        else:
            refused.append((one.name, (_APPROXIMATE,)))
    times = measured(request, machine)
    accepted.sort(key=lambda one: (times.get(one.name, math.inf), _wasteful(one, request, machine)))
    names = tuple(one.name for one in accepted)
    if not accepted:
        return Decision(request, machine, None, "every one refuses", names, tuple(refused))
    return Decision(request, machine, accepted[0], _why(accepted[0], request, machine, times), names, tuple(refused))


_APPROXIMATE = Refusal(
    "auto", "calls that ask for it by name", "pass backend='sage' if an approximation is good enough"
)


def why_not(backend: Backend, request: Request, machine: Machine) -> tuple[Refusal, ...]:
    """All of a backend's refusals."""
    found = [refusal for limit in backend.all_limits if (refusal := limit.refuses(request, machine))]
    if not found:
        found = [refusal for entry in quarantined(backend.name) if (refusal := entry.refuses(request, machine))]
    return tuple(found)


def _wasteful(backend: Backend, request: Request, machine: Machine) -> bool:
    """True if the backend would spread a large structured mask out as a tensor."""
    structured = any(kind.startswith(STRUCTURE) for kind in request.mask)
    large = request.q_len * request.kv_len >= LARGE
    return machine.device != "cpu" and large and structured and not backend.masks.is_native(request.mask)


def _why(backend: Backend, request: Request, machine: Machine, times: dict[str, float]) -> str:
    if backend.name in times:
        return f"fastest measured on {machine.name} near this call ({times[backend.name]:.3g} ms)"
    if request.mask and not backend.masks.is_native(request.mask):
        return f"first in order that takes the call, with the mask {mask_words(request.mask)} as a dense tensor"
    return "first in order that takes the call"

"""Times of a model as it was and as it is, taken in turns, and what may honestly be claimed from them."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from headway.sites.copies import deep_copy
from headway.swap.answer import tensors_of
from headway.swap.still import still
from headway.swap.swap import Example, Swap, runner, undo

WARM_UP = 2
LEAST_ROUNDS = 5
"""Rounds that are run whatever they take: of fewer, even one side winning all could be chance."""

LEAST_GAIN = 0.03
"""A difference below this share is no difference: the same model against itself differs as much."""

CHANCE = 0.05
"""A side is not said to win if two equal ones would make it win as many rounds with this probability."""

Work = Callable[[], object]


@dataclasses.dataclass(frozen=True)
class Pass:
    """One kind of pass, timed once a round for each side.

    >>> print(Pass("forward", (2.0, 2.1, 1.9, 2.0, 2.0), (1.0, 1.1, 0.9, 1.0, 1.0)))
    forward: faster: 2.00x (2 ms before, 1 ms now)
    >>> print(Pass("forward", (2.0, 2.1, 1.9, 2.0, 2.0), (2.0, 2.1, 1.9, 2.0, 2.0)).claim)
    no gain: 1.00x
    """

    name: str
    before_ms: tuple[float, ...]
    now_ms: tuple[float, ...]

    @property
    def before(self) -> float:
        return statistics.median(self.before_ms)

    @property
    def now(self) -> float:
        return statistics.median(self.now_ms)

    @property
    def gain(self) -> float:
        """How many times as fast it is now, by the medians."""
        return self.before / self.now if self.now else math.inf

    @property
    def verdict(self) -> Literal["faster", "slower", "no gain", "unclear"]:
        """What the rounds bear out: medians that differ by more than noise, and a sign test over the rounds."""
        if abs(self.gain - 1) <= LEAST_GAIN:
            return "no gain"
        faster = self.gain > 1
        wins = sum((was > now) == faster and was != now for was, now in zip(self.before_ms, self.now_ms, strict=True))
        if _by_chance(wins, len(self.now_ms)) >= CHANCE:
            return "unclear"
        return "faster" if faster else "slower"

    @property
    def claim(self) -> str:
        doubt = ", which may be noise" if self.verdict == "unclear" else ""
        return f"{self.verdict}: {self.gain:.2f}x{doubt}"

    def __str__(self) -> str:
        return f"{self.name}: {self.claim} ({in_ms(self.before)} before, {in_ms(self.now)} now)"

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "claim": self.claim,
            "ms_p50_before": self.before,
            "ms_p50_now": self.now,
            "ms_before": list(self.before_ms),
            "ms_now": list(self.now_ms),
        }


def _by_chance(wins: int, rounds: int) -> float:
    """How likely one of two equal sides wins so many rounds or more.

    >>> _by_chance(5, 5), _by_chance(4, 5)
    (0.03125, 0.1875)
    """
    return sum(math.comb(rounds, n) for n in range(wins, rounds + 1)) / float(2**rounds)


def in_ms(number: float) -> str:
    """Three digits, and no exponent.

    >>> in_ms(0.01234), in_ms(12.3456), in_ms(12345.6)
    ('0.0123 ms', '12.3 ms', '12,346 ms')
    """
    return f"{number:,.0f} ms" if number >= 1000 else f"{number:.3g} ms"


@dataclasses.dataclass(frozen=True)
class Times:
    """Every kind of pass that was timed, and how."""

    passes: tuple[Pass, ...]
    how: str
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "\n".join((*map(str, self.passes), *(f"note: {note}" for note in self.notes)))

    def as_dict(self) -> dict[str, Any]:
        return {"passes": [one.as_dict() for one in self.passes], "how": self.how, "notes": list(self.notes)}


def measure(
    swap: Swap, example: Example, *, backward: bool = False, rounds: int = 9, at_most_seconds: float = 30.0
) -> Times:
    """Time the model as it was and as it is on the example, in evaluation mode; both share the model's parameters.

    At least 5 rounds are taken, and no more once `at_most_seconds` have passed.
    A round times both sides, each going first in every other round, so that a machine that slows down slows both.
    """
    run = runner(example)
    assert run is not None
    device = next((p.device for p in swap.model.parameters()), torch.device("cpu"))
    with still(swap.model):
        before, now = twin(swap.model), twin(swap.model)
        undo(before)
        error = fails(before, example)
        if error:
            return Times((), "nothing was timed", (f"the model as it was does not run with the example: {error}",))
        kinds: list[tuple[str, Callable[[nn.Module], Work]]] = [("forward", lambda model: _forward(model, run))]
        notes = []
        if backward and _has_gradient(now, run):
            kinds.append(("forward and backward", lambda model: _both(model, run)))
        elif backward:
            notes.append("no output of the model has a gradient, so there is no backward pass to time")
        budget = at_most_seconds / len(kinds)
        passes = tuple(Pass(name, *_taken((make(before), make(now)), device, rounds, budget)) for name, make in kinds)
    counted = min(len(one.now_ms) for one in passes)
    how = f"median of {counted} rounds in turns, in evaluation mode, on {device.type}"
    threads = torch.get_num_threads()
    how += f" with {threads} thread{'s' * (threads != 1)}" if device.type == "cpu" else ""
    how += ", by CUDA events" if device.type == "cuda" else ""
    return Times(passes, how, tuple(notes))


def fails(model: nn.Module, example: Example) -> str:
    """What the model says to the example; '' if it runs."""
    run = runner(example)
    assert run is not None
    try:
        with still(model), torch.no_grad():
            run(model)
    except Exception as error:  # whatever a stranger's model raises
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return ""


def twin(model: nn.Module) -> nn.Module:
    """A copy with modules of its own and the very parameters and buffers of the model: no second set of weights."""
    shared: dict[int, Any] = {id(x): x for x in (*model.parameters(), *model.buffers())}
    return deep_copy(model, shared)


def _forward(model: nn.Module, run: Callable[[nn.Module], Any]) -> Work:
    def work() -> None:
        with torch.no_grad():
            run(model)

    return work


def _both(model: nn.Module, run: Callable[[nn.Module], Any]) -> Work:
    """Gradients are asked for, not accumulated: the parameters' own .grad stays as it is."""
    wanted = [p for p in model.parameters() if p.requires_grad]

    def work() -> None:
        with torch.enable_grad():
            torch.autograd.grad(_total(model, run), wanted, allow_unused=True)

    return work


def _has_gradient(model: nn.Module, run: Callable[[nn.Module], Any]) -> bool:
    with torch.enable_grad():
        return any(p.requires_grad for p in model.parameters()) and _total(model, run).requires_grad


def _total(model: nn.Module, run: Callable[[nn.Module], Any]) -> Tensor:
    ends = [out.float().sum() for out in tensors_of(run(model)) if out.requires_grad]
    return torch.stack(ends).sum() if ends else torch.zeros(())


def _taken(
    works: tuple[Work, Work], device: torch.device, rounds: int, seconds: float
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Milliseconds of each side, round by round."""
    for work in works * WARM_UP:
        work()
    times: tuple[list[float], list[float]] = ([], [])
    start = time.perf_counter()
    for number in range(max(rounds, LEAST_ROUNDS)):
        if number >= LEAST_ROUNDS and time.perf_counter() - start > seconds:
            break
        for side in (0, 1) if number % 2 == 0 else (1, 0):
            times[side].append(_ms(works[side], device))
    return tuple(times[0]), tuple(times[1])


def _ms(work: Work, device: torch.device) -> float:
    if device.type == "cuda":
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record(torch.cuda.current_stream(device))
        work()
        last.record(torch.cuda.current_stream(device))
        last.synchronize()
        return float(first.elapsed_time(last))
    start = time.perf_counter()
    work()
    if device.type == "mps":
        torch.mps.synchronize()
    return (time.perf_counter() - start) * 1000

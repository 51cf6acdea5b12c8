"""The proof: each site, and the whole model, against float64, beside the error the model had before.

Each is run with the same inputs in three copies: as it was, as it is now, and as it was in float64, which is the judge.
Forward and gradients count. What the judge itself cannot say (a row that sees nothing, where PyTorch gives NaN) is left
out, and the certificate says how much that was.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import logging
import math
import platform
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from headway.choice.here import here
from headway.errors import HeadwayError
from headway.limits.machine import Machine
from headway.sites import transformers
from headway.sites.copies import deep_copy
from headway.sites.seen import Inputs, see
from headway.sites.site import Ticket, site_of
from headway.swap.answer import SEED, Answer, answer, named, names_of, rows_that_see, wants_no_gradients
from headway.swap.deck import Card, Shape, deal
from headway.swap.judge import Errors, errors_of, finite, with_usual, worse
from headway.swap.still import still

LOG = logging.getLogger(__name__)
"""Says at INFO what is being proven; silent unless somebody listens."""

FORMAT = "headway certificate 1"
WHOLE = "the whole model"
NOTHING = "nothing was swapped, so there is nothing to prove"


@dataclasses.dataclass(frozen=True)
class Proof:
    """All errors of one site, or of the whole model."""

    name: str
    kind: str
    judge: str
    """'float64', or why something else had to judge; and what gradients it could not judge."""
    backends: tuple[str, ...]
    errors: tuple[Errors, ...]
    wrong: str = ""
    """What went wrong beside numbers: an exception, or an answer of another shape."""

    @property
    def failure(self) -> str:
        """Why it failed, or ''."""
        if self.wrong:
            return self.wrong
        failed = [errors for errors in self.errors if not errors.passed]
        forward = [errors for errors in self.errors if errors.what == "forward"]
        if forward and not any(errors.judged for errors in forward):
            return "nothing of its answer to this example could be judged: it is NaN, or of rows that see nothing"
        return "" if not failed else str(max(failed, key=lambda errors: errors.worst_now))


@dataclasses.dataclass(frozen=True)
class Certificate:
    """The proof of one swap, on this machine."""

    model: str
    proofs: tuple[Proof, ...]
    deck: tuple[Card, ...]
    whole: Proof | None
    """The model from end to end; None if nothing is swapped or its forward did not run."""
    facts: dict[str, Any]

    @property
    def passed(self) -> bool:
        proofs = (*self.proofs, *self.deck, *(() if self.whole is None else (self.whole,)))
        return bool(self.proofs) and not any(proof.failure for proof in proofs)

    def failure(self, name: str) -> str:
        return next((proof.failure for proof in self.proofs if proof.name == name), "")

    def __str__(self) -> str:
        if not self.proofs:
            return f"proof: none, because {NOTHING}"
        good = sum(not proof.failure for proof in self.proofs)
        lines = [f"proof: {good} of {len(self.proofs)} sites err no more than before"]
        if self.whole is not None:
            lines.append(f"  the whole model: {self.whole.failure or _worst(self.whole)}{_judged(self.whole)}")
        lines += [f"  {_name(proof)} is judged by {proof.judge}" for proof in self._all() if WITHOUT in proof.judge]
        lines.append(f"  edge deck: {self._deck()}")
        lines += [f"  {proof.name}: {proof.failure}" for proof in self.proofs if proof.failure]
        lines += [f"  {card.case} on {card.backend}: {card.failure}" for card in self.deck if card.failure]
        return "\n".join(lines)

    def _all(self) -> tuple[Proof, ...]:
        return self.proofs if self.whole is None else (*self.proofs, self.whole)

    def _deck(self) -> str:
        ran = [card for card in self.deck if card.backend]
        refused = len(self.deck) - len(ran)
        good = sum(not card.failure for card in ran)
        if not self.deck:
            return "none, as the example needed no kernel"
        return f"{good} of {len(ran)} calls right" + (f", {refused} refused" if refused else "")

    def as_dict(self) -> dict[str, Any]:
        """Plain data, as JSON has it; what is no number is the text of it."""
        made: dict[str, Any] = {"format": FORMAT, "passed": self.passed, **dataclasses.asdict(self)}
        return cast(dict[str, Any], _plain(made))

    def save(self, path: str | Path) -> Path:
        path = Path(path)
        path.write_text(json.dumps(self.as_dict(), indent=1, allow_nan=False) + "\n")
        return path


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _name(proof: Proof) -> str:
    return proof.name or WHOLE


def _worst(proof: Proof) -> str:
    return str(max(proof.errors, key=lambda e: e.worst_now / max(e.largest, 1e-30), default="nothing to compare"))


def _judged(proof: Proof) -> str:
    """What share of the answer that was, where there are rows of filler."""
    share = min((errors.judged for errors in proof.errors if errors.what == "forward"), default=1.0)
    return "" if share == 1 else f"; judged on {share:.1%} of its answer, the rest is of rows that see nothing"


Restore = Callable[[nn.Module], None]
"""Makes a copy of a swapped model as it was before."""


def prove(
    model: nn.Module,
    run: Callable[[nn.Module], Any],
    tickets: Sequence[Ticket],
    restore: Restore,
    put_back: Callable[[Ticket], None],
) -> Certificate:
    """Prove each swapped site on its own inputs of one run, put back those that fail, and prove the whole model."""
    with torch.inference_mode(False), still(model):
        calls = see(copied(model, restore), run, keep={"", *(ticket.name for ticket in tickets)}).calls
        modules = dict(model.named_modules(remove_duplicate=False))
        proofs = []
        for at, ticket in enumerate(tickets, 1):
            LOG.info("proving site %d of %d: %s", at, len(tickets), ticket.name or "the model itself")
            proofs.append(_prove(ticket, modules[ticket.name], calls[ticket.name], restore))
        dealt = {ticket.name: _shapes(ticket) for ticket in tickets}
        deck = tuple(deal(shape for shapes in dealt.values() for shape in shapes))
        for ticket, proof in zip(tickets, proofs, strict=True):
            edges = (
                f"{card.case}: {card.failure}" for card in deck if card.failure and card.shape in dealt[ticket.name]
            )
            failure = proof.failure or next(edges, "")
            if failure:
                ticket.because = f"it failed the proof: {failure}"
                put_back(ticket)
        whole = None
        if "" in calls and any(ticket.swapped for ticket in tickets):
            LOG.info("proving the whole model")
            whole = _prove(Ticket("", WHOLE), model, calls[""], restore, NUDGES)
    return Certificate(type(model).__name__, tuple(proofs), deck, whole, facts(model))


def _shapes(ticket: Ticket) -> list[Shape]:
    return list(dict.fromkeys(Shape.of(decision.request, ticket.asked) for decision in ticket.decisions.values()))


def copied(module: nn.Module, restore: Restore) -> nn.Module:
    """A copy as the module was before the swap."""
    again = deep_copy(module)
    restore(again)
    return again


def _dtype(module: nn.Module) -> torch.dtype:
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)


def _prove(ticket: Ticket, module: nn.Module, inputs: Inputs, restore: Restore, nudges: int = 0) -> Proof:
    name = ticket.name
    # Eager attention of transformers also returns weights that nobody asked for.
    run: Run = partial(answer, inputs=inputs, at_most=1 if ticket.kind == transformers.KIND else None)
    if any(kind.__module__.startswith("transformers.") for kind in type(module).__mro__):
        run = partial(run, seeing=rows_that_see(named(module, inputs).get("attention_mask")))
    run, before, left_out = _before(run, partial(copied, module, restore), inputs)
    judge, truth = _truth(copied(module, restore), run, before)
    judge += left_out
    alone, eps = truth is before, torch.finfo(_dtype(module)).eps
    again = partial(_again, partial(copied, module, restore), run, before, truth)
    if _dtype(module) == torch.float64 and not alone:
        before = again(0)
    ours = deep_copy(module)
    try:
        now = run(ours, among=before)
    except Exception as error:  # whatever it is, the model as it was did not raise it
        if isinstance(error, HeadwayError) and ticket.asked != "auto":
            raise
        return Proof(name, ticket.kind, judge, (), (), _short(error))
    held = [site.ticket for site in map(site_of, ours.modules()) if site is not None]
    for one in held:
        if one.name == ticket.name:
            ticket.decisions |= one.decisions
    backends = tuple(sorted({backend for one in held for backend in one.runs}))
    if [x.shape for x in before.outputs] != [x.shape for x in now.outputs]:
        shapes = [list(x.shape) for x in before.outputs], [list(x.shape) for x in now.outputs]
        return Proof(name, ticket.kind, judge, backends, (), f"it answers with shapes {shapes[1]}, before {shapes[0]}")
    errors = _compared(truth, before, now, eps, alone)
    for nudge in range(1, nudges + 1):
        failed = [e for e in errors if not e.passed]
        if not failed or any(e.what == "forward" or not math.isfinite(e.worst_now) for e in failed):
            break
        more = _compared(truth, again(nudge), now, eps, alone)
        errors = tuple(one if one.passed else worse(one, other) for one, other in zip(errors, more, strict=True))
        judge = f"{judge.partition(BESIDE)[0]}{BESIDE}{nudge} more roundings of its weights"
    if not alone and eps > FINE and ticket.kind != WHOLE:  # its sites have said it
        errors += _in_float64(deep_copy(module), run, before, truth, eps)
    return Proof(name, ticket.kind, judge, backends, errors)


def _in_float64(module: nn.Module, run: Run, before: Answer, truth: Answer, eps: float) -> tuple[Errors, ...]:
    """What a module of half precision answers in float64, where a scale 1 % off is no rounding; held to float32's."""
    for site in filter(None, map(site_of, module.modules())):
        site.ticket.asked = "auto"  # a backend asked for by name may not take float64
    now = run(module.double(), dtype=torch.float64, among=before, without=None)
    least = [t + (b.double() - t) * (FINE / eps) for t, b in zip(truth.outputs, before.outputs, strict=True)]
    answers = zip(truth.outputs, least, now.outputs, strict=True)
    return tuple(errors_of("forward in float64", *answer, FINE) for answer in answers if answer[0].numel())


def _compared(truth: Answer, before: Answer, now: Answer, eps: float, alone: bool) -> tuple[Errors, ...]:
    pairs = [("forward", t, b, n) for t, b, n in zip(truth.outputs, before.outputs, now.outputs, strict=True)]
    pairs += [
        (f"gradient of {of}", t, before.gradients[of], now.gradients[of])  # type: ignore[misc]
        for of, t in truth.gradients.items()
        if t is not None and before.gradients.get(of) is not None
    ]
    gradients = [t if finite(t) else t[t.isfinite()] for t in truth.gradients.values() if t is not None]
    least = {True: max((t.norm(math.inf).item() for t in gradients if t.numel()), default=0.0) / 30, False: 0.0}
    return with_usual(
        [errors_of(what, t, b, n, eps, least[what != "forward"], alone) for what, t, b, n in pairs if t.numel()]
    )


Run = Callable[..., Answer]
FINE = torch.finfo(torch.float32).eps
WITHOUT = ", without "
BESIDE = ", beside "

NUDGES = 8
"""How often, before it fails by a gradient, a whole model is asked again as it was, with its weights rounded otherwise.

Where an activation bends, one rounding shows as hundreds do elsewhere, and whom it hits is chance. Sites do not bend.
"""

CANNOT = (RuntimeError, TypeError, ValueError, AssertionError, LookupError, AttributeError)
"""What a model raises that casts inside its forward, or looks something up by dtype, in one it did not reckon with."""


def _before(run: Run, fresh: Callable[[], nn.Module], inputs: Inputs) -> tuple[Run, Answer, str]:
    """What the model said before, with as many gradients as it runs with; and what those left out are of, and why."""
    first = _tried(run, fresh)
    if isinstance(first, Answer):
        return run, first, ""
    rest, left_out, names = partial(run, without=None), "any gradient", names_of(inputs)
    if isinstance(_tried(partial(run, without=names), fresh), Answer):
        alone = {name: partial(run, without=[other for other in names if other != name]) for name in names}
        unasked = [name for name, one in alone.items() if not isinstance(_tried(one, fresh), Answer)]
        rest, left_out = partial(run, without=unasked), f"gradients of {', '.join(unasked)}"
    return rest, rest(fresh()), f"{WITHOUT}{left_out} ({_short(first)})"


def _tried(run: Run, fresh: Callable[[], nn.Module]) -> Answer | RuntimeError:
    """The answer, or what a model raised that would run if its tensors had no gradients: one that calls .numpy()."""
    try:
        return run(fresh())
    except RuntimeError as error:
        if not wants_no_gradients(error):
            raise
        return error


def _truth(module: nn.Module, run: Run, before: Answer) -> tuple[str, Answer]:
    """What float64 says. A model that casts inside its forward cannot run in it: then what it said before must do."""
    if before.drew:
        return "the model as it was (it draws random numbers, which float64 would draw others)", before
    try:
        return "float64", run(module.double(), dtype=torch.float64, among=before)
    except CANNOT as error:
        return f"the model as it was ({_short(error)})", before


def _again(fresh: Callable[[], nn.Module], run: Run, before: Answer, truth: Answer, nudge: int) -> Answer:
    """What the model as it was says with its weights rounded otherwise."""
    module = fresh()
    if _dtype(module) == torch.float64 and truth is not before:
        return _as_rounded(_nudged(module.float(), nudge), run, before)
    return run(_nudged(module, nudge), among=before)


def _nudged(module: nn.Module, nudge: int) -> nn.Module:
    """With weights as near to what they stand for as those it has, one in the last digit up or down; 0 leaves them."""
    for parameter in module.parameters():
        if nudge and parameter.is_floating_point():
            generator = torch.Generator(parameter.device).manual_seed(nudge)
            drawn = torch.rand(parameter.shape, generator=generator, device=parameter.device) - 0.5
            parameter.data.add_(parameter.data * drawn * torch.finfo(parameter.dtype).eps)
    return module


def _as_rounded(module: nn.Module, run: Run, truth: Answer) -> Answer:
    """What a model in float64 erred before, which float64 cannot say: what it errs in float32, as many roundings."""
    ratio = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    try:
        narrow = run(module, dtype=torch.float32, among=truth)
    except CANNOT:
        return truth

    def rounded(exact: Tensor, coarse: Tensor | None) -> Tensor:
        return exact if coarse is None else exact + (coarse.double() - exact) * ratio

    outputs = [rounded(*pair) for pair in zip(truth.outputs, narrow.outputs, strict=True)]
    gradients = {name: g if g is None else rounded(g, narrow.gradients[name]) for name, g in truth.gradients.items()}
    return Answer(outputs, gradients)


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def facts(model: nn.Module) -> dict[str, Any]:
    """The machine, versions and seed that a certificate holds for."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    machine = here(device)
    return {
        "device": machine.device,
        "name": machine.name,
        "capability": machine.capability,
        "dtype": str(_dtype(model)).removeprefix("torch."),
        "versions": versions(machine),
        "parameters": sum(p.numel() for p in model.parameters()),
        "seed": SEED,
        "date": datetime.date.today().isoformat(),
    }


def versions(machine: Machine) -> dict[str, str]:
    import headway

    return {"headway": headway.__version__, "python": platform.python_version(), **dict(machine.versions)}

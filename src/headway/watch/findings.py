"""What a recording shows to be wrong, in words, with what to do about it."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from headway.watch.rows import MODULE, MODULE_GRADIENT, PARAMETER_GRADIENT, Parameter

if TYPE_CHECKING:
    from headway.watch.recording import Recording

SEVERITIES = ("error", "warning", "note")

SAME_ANSWER = 1e-3
"""Spread between examples over the size of the numbers, below which predictions count as one answer for all."""
SAME_INPUT = 1e-6
ONE_KEY = 0.02
"""Share of its possible entropy below which a head counts as collapsed to one key."""
LARGE_LOGIT = 100.0
"""Softmax of float32 is one-hot far below; bfloat16 logits of this size are off by 0.25 or more."""
VANISHED, EXPLODED = 1e-6, 1e4
"""Root mean square of a weight's gradient against the median weight's."""


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """One thing to know."""

    severity: str
    """'error': results are wrong. 'warning': something does not work as it was surely meant. 'note': worth a look."""
    module: str
    what: str
    do: str

    def __str__(self) -> str:
        return f"{self.severity:<8} {self.module or '(model)'}: {self.what}\n{'':<8} → {self.do}"


class Report(tuple[Finding, ...]):
    """Findings, worst first."""

    __slots__ = ()

    def __str__(self) -> str:
        return "\n".join(map(str, self)) if self else "nothing to report"

    @property
    def worst(self) -> str:
        """The first one's severity, '' for none."""
        return self[0].severity if self else ""


def report(recording: Recording) -> Report:
    found = [finding for look in _LOOKS for finding in look(recording)]
    return Report(sorted(found, key=lambda finding: SEVERITIES.index(finding.severity)))


def _nonfinite(recording: Recording) -> Iterator[Finding]:
    """Where NaN and Inf began: the first of each, as all that follows may come from it."""
    nans = [origin for origin in recording.origins if origin.what == "NaN"]
    infs = [origin for origin in recording.origins if origin.what == "Inf"]
    for origin in nans[:1]:
        where = " in backward" if origin.phase == "backward" else ""
        if origin.inputs == "finite":
            what = f"the first NaN: made by {origin.op}{where} of finite numbers"
            do = "look at what goes in: 0 / 0, log or sqrt of a negative, an infinite slope of sqrt or norm at 0"
        elif origin.inputs == "Inf":
            what = f"the first NaN: made by {origin.op}{where} of inputs that held Inf but no NaN"
            do = "find the Inf: a softmax row that is masked entirely, ∞ - ∞, 0 · ∞, or an overflow before"
        else:
            what = f"the first NaN arrived at {origin.op}{where}, held by {origin.inputs}"
            do = "look there: no operator in this block made it"
        yield Finding("error", origin.path, what, do)
    for origin in infs[:1]:
        # Much code takes a log of 0 and then picks another branch: what no module hands on is no fault.
        spread = origin.phase == "outside" or any(
            row.values.infs or row.values.nans
            for row in recording.rows.values()
            if row.kind in (MODULE, MODULE_GRADIENT, PARAMETER_GRADIENT)
        )
        before = not nans or origin.order < nans[0].order
        yield Finding(
            "warning" if spread and before else "note",
            origin.path,
            f"the first Inf: made by {origin.op} ({origin.phase}) of finite numbers: overflow, or log of 0",
            "scale down what goes in, or compute it in float32; harmless where it only masks scores",
        )
    for row in recording.of(PARAMETER_GRADIENT):
        if row.values.nans or row.values.infs:
            yield Finding(
                "error",
                row.path,
                f"its gradient held {row.values.nans} NaN and {row.values.infs} Inf",
                "skip this step (clip or scale the loss), and follow the first NaN or Inf above",
            )
            return  # one is enough: all gradients before it in the network share it
    if not nans:
        for row in recording.of(MODULE):
            if row.values.nans:
                yield Finding(
                    "error", row.path, f"its output {row.name} holds {row.values.nans} NaN", "watch with operators=True"
                )
                return


def _dead(recording: Recording) -> Iterator[Finding]:
    """Trainable parameters that no gradient reached, once a gradient reached any."""
    trainable = {name: one for name, one in recording.parameters.items() if one.trainable}
    if not any(one.reached for one in trainable.values()):
        return
    unused = _groups(trainable, lambda one: not one.used and not one.reached)
    cut = _groups(trainable, lambda one: one.used and not one.reached)
    zero = _groups(trainable, lambda one: one.reached > 0 and not one.nonzero)
    for where, names in unused:
        yield Finding(
            "warning",
            where,
            f"unused: no forward took {_names(names, trainable)}",
            "call it, freeze it with requires_grad_(False), or delete it",
        )
    for where, names in cut:
        yield Finding(
            "warning",
            where,
            f"no gradient path: forward used {_names(names, trainable)}, and no backward reached it",
            "its result is detached, overwritten or not in the loss: use it there, or freeze it",
        )
    fresh = any(one.zeros_only and len(one.shape) > 1 for one in recording.parameters.values())
    for where, names in zero:
        yield Finding(
            "note",
            where,
            f"gradient exactly 0: {_names(names, trainable)}",
            "as it must be while a weight after it is all zeros, as one here is; look again after some steps"
            if fresh
            else "a ReLU that is never on, a mask, or a factor of 0 stands after it; look again after some steps",
        )


def _groups(parameters: dict[str, Parameter], dead: Callable[[Parameter], bool]) -> list[tuple[str, list[str]]]:
    """Dead parameters by the outermost module whose parameters are all dead in this way."""
    found = {name for name, one in parameters.items() if dead(one)}
    groups: dict[str, list[str]] = {}
    for name in parameters:
        if name not in found:
            continue
        parts = name.split(".")
        # The model itself is no group: some parameter of it lives.
        for depth in range(1, len(parts) + 1):
            prefix = ".".join(parts[:depth])
            inside = [one for one in parameters if one == prefix or one.startswith(f"{prefix}.")]
            if all(one in found for one in inside):
                groups.setdefault(prefix, inside)
                break
    return list(groups.items())


def _names(names: list[str], parameters: dict[str, Parameter]) -> str:
    count = sum(parameters[name].count for name in names)
    return f"1 parameter of {count:,}" if len(names) == 1 else f"{len(names)} parameters, {count:,} numbers"


def _flow(recording: Recording) -> Iterator[Finding]:
    """Weights whose gradients are far smaller, or larger, than those of most."""
    rows = [row for row in recording.of(PARAMETER_GRADIENT) if len(row.shape) > 1 and row.values.rms > 0]
    if len(rows) < 3:
        return
    middle = statistics.median(row.values.rms for row in rows)
    for row in rows:
        ratio = row.values.rms / middle
        if ratio < VANISHED:
            yield Finding(
                "warning",
                row.path,
                f"vanishing gradient: {row.values.rms:.1e} in root mean square, {ratio:.0e} of the median weight's",
                "look at the saturated function or the missing residual or normalisation between it and the loss",
            )
        elif ratio > EXPLODED:
            yield Finding(
                "warning",
                row.path,
                f"exploding gradient: {row.values.rms:.1e} in root mean square, {ratio:.0e} times the median weight's",
                "normalise before it, lower its scale, or clip gradients",
            )


def _collapse(recording: Recording) -> Iterator[Finding]:
    """One answer for all examples, although the examples differ."""
    inputs = [spread for spread in recording.inputs.values() if spread.examples > 1]
    if not any(spread.share > SAME_INPUT for spread in inputs):
        return
    for name, spread in recording.outputs.items():
        if spread.examples < 2 or not any(spread.examples == one.examples for one in inputs):
            continue  # its first axis is not that of the examples
        if spread.rms == 0:
            yield Finding(
                "note",
                "",
                f"{name} is 0 for all {spread.examples} examples",
                "as it must be while its last layer is all zeros; look again after some steps",
            )
        elif spread.share < SAME_ANSWER:
            yield Finding(
                "warning",
                "",
                f"predictions collapsed: {name} differs between {spread.examples} examples by {spread.std:.1e},"
                f" {spread.share:.1e} of its size, although the inputs differ",
                "follow the modules' outputs to where the input is lost; look at the loss and at saturated layers",
            )


def _attention(recording: Recording) -> Iterator[Finding]:
    for site, heads in recording.heads.items():
        if heads.nonfinite:
            yield Finding(
                "error",
                site,
                f"attention scores hold NaN or +Inf in {heads.nonfinite} rows",
                "normalise queries and keys, or compute scores in float32",
            )
        large = [head for head in range(heads.count) if (heads.highest(head) or 0.0) > LARGE_LOGIT]
        narrow = [head for head in range(heads.count) if (share := heads.share(head)) is not None and share < ONE_KEY]
        if narrow:
            yield Finding(
                "warning" if set(narrow) & set(large) or len(narrow) == heads.count else "note",
                site,
                f"entropy collapse: heads {_list(narrow)} of {heads.count} look at one key each",
                "normalise queries and keys, wrap their projections in σReparam, or lower the learning rate",
            )
        if large:
            most = max(heads.highest(head) or 0.0 for head in large)
            yield Finding(
                "warning",
                site,
                f"attention logits up to {most:.0f} in heads {_list(large)} of {heads.count}",
                "normalise queries and keys, or cap the scores (softcap); keep these projections out of low precision",
            )


def _empty(recording: Recording) -> Iterator[Finding]:
    """Query rows that may see nothing, as one finding: layers share their masks."""
    sites = [site for site, heads in recording.heads.items() if heads.empty]
    if sites:
        rows = sum(recording.heads[site].empty // recording.heads[site].count for site in sites)
        yield Finding(
            "note",
            sites[0],
            f"{rows} query rows that were looked at may see no key, in {len(sites)} attentions, this the first",
            "nothing, where they are padding; headway.attention gives 0 for them, others perhaps NaN",
        )


def _list(heads: list[int]) -> str:
    return ", ".join(map(str, heads[:8])) + (", …" if len(heads) > 8 else "")


def _silent(recording: Recording) -> Iterator[Finding]:
    """Modules whose output is 0 everywhere, other than by fresh weights of 0."""
    silent: list[str] = []
    speaks = {row.path for row in recording.of(MODULE) if row.values.zeros < row.values.count}
    for row in recording.of(MODULE):
        if not row.values.count or row.path in speaks:
            continue
        if any(row.path == one or row.path.startswith(f"{one}.") for one in silent):
            continue
        silent.append(row.path)
        own = [one for name, one in recording.parameters.items() if name.startswith(f"{row.path}.")]
        if any(one.zeros_only and len(one.shape) > 1 for one in own):
            continue  # a weight of zeros, as LoRA and adaLN begin with
        yield Finding(
            "warning" if own else "note",
            row.path,
            f"its output {row.name} is 0 everywhere, in {row.calls} calls",
            "look at what goes in: a ReLU that is never on, a mask that hides all, or an input of zeros",
        )


def _about(recording: Recording) -> Iterator[Finding]:
    """What this recording cannot tell."""
    facts = recording.facts
    if facts.error:
        yield Finding("note", "", f"the block ended in {facts.error}", "what ran before it is recorded")
    if not facts.forwards:
        yield Finding("note", "", "no forward pass ran", "call the model inside the block, on the block's own thread")
    elif not facts.backwards:
        why = "" if facts.grad_enabled else ": gradients were off (no_grad)"
        yield Finding(
            "note",
            "",
            f"no gradients were seen{why}",
            "run backward inside the block for gradient flow and dead parameters",
        )
    elif not recording.of(PARAMETER_GRADIENT) and not recording.of(MODULE_GRADIENT):
        yield Finding(
            "note", "", "a backward pass ran and reached nothing of this model", "does the loss depend on its output?"
        )
    for path, one in recording.modules.items():
        if one.unseen:
            yield Finding("note", path, f"not looked into: {one.unseen}", "watch the module before it is compiled")
            break
    if recording.ledger.refused:
        yield Finding(
            "note",
            "",
            f"{recording.ledger.refused} readings were left out to stay within {recording.ledger.bound} bytes",
            f"watch with bound={recording.ledger.bound * 4}, or with operators=False",
        )
    if facts.unread:
        yield Finding(
            "note",
            "",
            f"{facts.unread} tensors have numbers that cannot be read as they lie (subclass, nested, quantised, meta)",
            "nothing: they ran as always, and have no statistics",
        )


_LOOKS = (_nonfinite, _dead, _flow, _collapse, _attention, _empty, _silent, _about)

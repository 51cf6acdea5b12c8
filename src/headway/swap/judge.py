"""How far an answer is from the truth, and whether that is no more than before."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

TIMES_WORST, TIMES_RMS = 3.0, 2.0
"""How many times what it erred before an answer may err, at worst and by the root mean square."""

ROUNDINGS_WORST, ROUNDINGS_RMS = 2.0, 0.25
"""What it may err on top of that, for a before that was exact by chance; far below 1 % even in bfloat16."""


@dataclasses.dataclass(frozen=True)
class Errors:
    """How far two answers are from the truth, over what the truth can judge."""

    what: str
    """'forward', or the name of what the gradient is of."""
    worst_before: float
    worst_now: float
    rms_before: float
    rms_now: float
    largest: float
    rms: float
    """The truth's largest number and its root mean square, and of gradients at least `least`."""
    judged: float
    """Share of the numbers that are finite in the truth and in the answer of before."""
    eps: float
    usual: float = 0.0
    """What the gradients of the same answer erred before, as a share of their size: one of few numbers may be lucky."""

    @property
    def passed(self) -> bool:
        usual = self.usual * self.rms
        worst = TIMES_WORST * max(self.worst_before, usual) + ROUNDINGS_WORST * self.eps * self.largest
        rms = TIMES_RMS * max(self.rms_before, usual) + ROUNDINGS_RMS * self.eps * self.rms
        return self.worst_now <= worst and self.rms_now <= rms

    def __str__(self) -> str:
        return (
            f"{self.what} errs {self.worst_now:.3g} at worst, {self.rms_now:.3g} rms;"
            f" before {self.worst_before:.3g}, {self.rms_before:.3g}"
        )


def errors_of(
    what: str,
    truth: Tensor,
    before: Tensor,
    now: Tensor | None,
    eps: float,
    least: float = 0.0,
    judge_is_before: bool = False,
) -> Errors:
    """Compare what the judge, the model as it was and the model as it is say.

    `least` is what the truth counts as at least: a gradient that is 0 in truth is nothing but rounding of the others.
    Where the model as it was has to be the judge, it gets a rounding or two to have erred by, and a gradient, which
    goes forwards and back, twice as many.
    """
    truth, judged = truth.double(), 1.0
    now = torch.full_like(truth, math.nan) if now is None else now
    if not finite(truth, before):
        valid = truth.isfinite() & before.isfinite()
        judged = valid.double().mean().item()
        truth, before, now = truth[valid], before[valid], now[valid]
    if judged == 0:
        return Errors(what, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, eps)
    largest, rms = (max(least, size) for size in _sizes(truth))
    passes = 1 if what.startswith("forward") else 2
    own = (2 * passes * eps * largest, passes * eps * rms)
    worst_before, rms_before = own if judge_is_before else _sizes(before - truth)
    worst_now, rms_now = _sizes(now - truth)
    return Errors(
        what,
        worst_before=worst_before,
        worst_now=worst_now,
        rms_before=rms_before,
        rms_now=rms_now,
        largest=largest,
        rms=rms,
        judged=judged,
        eps=eps,
    )


def with_usual(errors: Sequence[Errors]) -> tuple[Errors, ...]:
    """The same, and gradients know what those beside them erred."""
    shares = [e.rms_before / e.rms for e in errors if e.what != "forward" and e.rms > 0]
    usual = math.sqrt(sum(share**2 for share in shares) / len(shares)) if shares else 0.0
    return tuple(e if e.what == "forward" else dataclasses.replace(e, usual=usual) for e in errors)


def worse(one: Errors, other: Errors) -> Errors:
    """The first, beside the most that either erred before."""
    most = {name: max(getattr(one, name), getattr(other, name)) for name in ("worst_before", "rms_before", "usual")}
    return dataclasses.replace(one, **most)


def finite(*tensors: Tensor) -> bool:
    """Whether all numbers are; a sum that overflows may say no."""
    return all(math.isfinite(x.sum().item()) for x in tensors)  # a tenth of what isfinite() takes


def _sizes(x: Tensor) -> tuple[float, float]:
    """Its largest number, and its root mean square; of what holds a NaN both are inf."""
    largest, norm = (torch.linalg.vector_norm(x, order).item() for order in (math.inf, 2))
    return (math.inf, math.inf) if math.isnan(norm) else (largest, norm / math.sqrt(x.numel()))

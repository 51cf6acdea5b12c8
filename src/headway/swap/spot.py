"""A kind of call that a proof has not met, checked as it is made: some rows of its answer against float64."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator

import torch
from torch import Tensor

from headway.backends import reference
from headway.backends.kernel import Extras
from headway.choice.choose import Decision
from headway.errors import SwapError
from headway.masks.base import Mask
from headway.masks.frame import Frame
from headway.masks.memo import is_recorded, is_traced
from headway.sites.site import Ticket
from headway.swap.judge import Errors, errors_of
from headway.watch.apart import apart

MOST_ROWS, MOST_SCORES, MOST_NUMBERS = 64, 1 << 24, 1 << 25
"""How many rows are judged, and scores and numbers of keys and values looked at for it: 256 MB in float64."""
FEW = 16
"""Of fewer numbers all may be exact before, and none now, by chance."""
STEEP = 256
"""How many roundings a kernel of full precision may err at least, or as many as its largest score could be.

One rounding of a score far from 0 shows as many of its answer's. An error here stops somebody's run; what is wrong is
wrong by more.
"""


def insist(
    ticket: Ticket, decision: Decision, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, extras: Extras, out: Tensor
) -> None:
    """Raise if `out` is wrong. What cannot be said of a call (dropout draws, a tracer looks) is not said."""
    exact = decision.backend().exact and not extras.dropout
    if not (exact and out.numel() and k.numel() and _real(out) and _may_wait(decision, out)):
        return
    with apart():  # a checkpoint that counts operators, a tracer or a profiler must not meet these
        errors = _errors(q, k, v, mask, extras, out)
    if not errors.passed:
        what = "the model itself" if not ticket.name else ticket.name
        raise SwapError(
            f"{what} met a kind of call that no proof had met, and {decision.backend().name} is wrong there: {errors};"
            " swap again with such a call as the example, or with another backend=, or undo the swap"
        )


def _real(out: Tensor) -> bool:
    """Whether its numbers can be looked at now, and in float64."""
    return type(out) is Tensor and out.device.type in ("cpu", "cuda") and not is_traced()


def _may_wait(decision: Decision, out: Tensor) -> bool:
    """Whether nobody has forbidden, or asked to be told, that the host waits for the device."""
    if out.device.type != "cuda":
        return True
    forbidden = "no-sync" in decision.request.require or torch.cuda.get_sync_debug_mode()
    return not forbidden and not is_recorded(out.device)


def _errors(q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, extras: Extras, out: Tensor) -> Errors:
    """Of some rows of some heads, first and last among them; what plain PyTorch errs there is the before."""
    frame = Frame(q.shape[2], k.shape[2], q.shape[0], q.shape[1], q.device)
    numbers = frame.kv_len * (k.shape[3] + v.shape[3])
    entries = _spread(frame.batch, min(2, MOST_NUMBERS // numbers), q.device)
    heads = _spread(frame.heads, MOST_NUMBERS // (numbers * len(entries)), q.device)
    rows = _spread(frame.q_len, min(MOST_ROWS, MOST_SCORES // (frame.kv_len * len(entries) * len(heads))), q.device)
    of_keys = heads // (q.shape[1] // k.shape[1])

    b, h, q_index, k_index = frame.indices()
    at = b[entries], h[heads], q_index[rows], k_index
    keep = None if mask is None else mask.rule(frame)(*at)
    score = None if mask is None else mask.score(frame)
    extras = dataclasses.replace(extras, sinks=None if extras.sinks is None else extras.sinks[heads])
    # What autocast computes in shows in what comes out.
    q, now = (x[entries][:, heads][:, :, rows].to(out.dtype) for x in (q, out))
    k, v = (x[entries][:, of_keys].to(out.dtype) for x in (k, v))

    def answer(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        zero = torch.zeros((1, 1, 1, 1), dtype=torch.promote_types(dtype, torch.float32), device=q.device)
        added = None if score is None else score(zero, *at).to(dtype)
        weights, _ = reference.weigh(q.to(dtype), k.to(dtype), (keep, added), extras)
        return weights.to(dtype) @ v.to(dtype), weights  # weights are rounded too, as in every kernel

    # What float64 errs itself it cannot say: as many roundings as float32.
    plain = torch.float32 if q.dtype == torch.float64 else q.dtype
    eps = torch.finfo(q.dtype).eps * max(1.0, FEW / now.numel())
    (truth, weights), (plainly, _) = answer(torch.float64), answer(plain)
    wrong = (plainly - truth).abs() * (torch.finfo(q.dtype).eps / torch.finfo(plain).eps)
    rounded = (weights.square() @ v.double().square()).sqrt() * eps / 4
    # Kernels differ in what they make of numbers that are none, also where a mask hides them.
    sound = functools.reduce(operator.and_, (x.isfinite().flatten(2).all(-1) for x in (q, k, v)))
    truth = truth.masked_fill(~sound[..., None, None], math.nan)
    steep = max(STEEP, _largest_score(q, k, extras)) if plain == torch.float32 else 1
    return errors_of("forward", truth, truth + wrong.maximum(rounded), now, eps * steep)


def _spread(count: int, most: int, device: torch.device) -> Tensor:
    """Indices from first to last, at most so many, and one at least."""
    return torch.linspace(0, count - 1, max(1, min(count, most)), dtype=torch.float64, device=device).long()


def _largest_score(q: Tensor, k: Tensor, extras: Extras) -> float:
    """No score is larger."""
    scale = q.shape[3] ** -0.5 if extras.scale is None else abs(extras.scale)
    bound = scale * q.norm(dim=-1).amax(-1) * k.norm(dim=-1).amax(-1)
    return float(bound.nan_to_num(0.0, 0.0).max())

"""A kind of call that a proof has not met, checked as it is made: some rows of its answer against float64."""

from __future__ import annotations

import torch
from torch import Tensor

from headway.backends import reference
from headway.backends.kernel import Extras
from headway.choice.choose import Decision
from headway.errors import SwapError
from headway.masks.base import Mask
from headway.masks.frame import Frame
from headway.masks.memo import is_traced
from headway.sites.site import Ticket
from headway.swap.judge import Errors, errors_of

MOST_ROWS, MOST_SCORES = 64, 1 << 24
STEEP = 256
"""How many roundings a kernel of full precision may err: one of a score far from 0 shows as many of its answer's.

An error here stops somebody's run. What is wrong is wrong by more.
"""


def insist(
    ticket: Ticket, decision: Decision, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, extras: Extras, out: Tensor
) -> None:
    """Raise if `out` is wrong. What cannot be said of a call (dropout draws, a tracer looks) is not said."""
    if not decision.backend().exact or extras.dropout or not out.numel() or not k.numel() or not _real(out):
        return
    errors = _errors(q, k, v, mask, extras, out)
    if not errors.passed:
        what = "the model itself" if not ticket.name else ticket.name
        raise SwapError(
            f"{what} met a kind of call that no proof had met, and {decision.backend().name} is wrong there: {errors};"
            " swap again with such a call as the example, or with another backend=, or undo the swap"
        )


def _real(out: Tensor) -> bool:
    """Whether its numbers can be looked at now."""
    capturing = out.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    return type(out) is Tensor and not out.is_meta and not is_traced() and not capturing


@torch.no_grad()
def _errors(q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, extras: Extras, out: Tensor) -> Errors:
    """Of rows from first to last of the first and the last batch entry; what plain PyTorch errs there is the before."""
    frame = Frame(q.shape[2], k.shape[2], q.shape[0], q.shape[1], q.device)
    entries = sorted({0, frame.batch - 1})
    count = max(1, min(frame.q_len, MOST_ROWS, MOST_SCORES // (len(entries) * frame.heads * max(frame.kv_len, 1))))
    rows = torch.linspace(0, frame.q_len - 1, count, device=q.device).long()
    b, h, q_index, k_index = frame.indices()
    at = b[entries], h, q_index[rows], k_index
    keep = None if mask is None else mask.rule(frame)(*at)

    def answer(dtype: torch.dtype) -> Tensor:
        zero = torch.zeros((1, 1, 1, 1), dtype=torch.promote_types(dtype, torch.float32), device=q.device)
        score = None if mask is None else mask.score(frame)
        added = None if score is None else score(zero, *at).to(dtype)
        some = q[entries][:, :, rows].to(dtype), k[entries].to(dtype), v[entries].to(dtype)
        return reference.attend(*some, (keep, added), extras)[0]

    # What float64 errs itself it cannot say: as many roundings as float32.
    plain = torch.float32 if q.dtype == torch.float64 else q.dtype
    eps, truth = torch.finfo(q.dtype).eps, answer(torch.float64)
    before = truth + (answer(plain) - truth) * (eps / torch.finfo(plain).eps)
    steep = STEEP if plain == torch.float32 else 1
    return errors_of("forward", truth, before, out[entries][:, :, rows], eps * steep)

"""flash_attn.ops.triton.cross_entropy: the loss of each row, of which only the logits are kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.compiler import is_compiling

from headway.errors import RequestError
from headway.masks.base import shape_of
from headway.shims.flash_attn.ops.fused_dense import check_one_process
from headway.shims.insist import insist

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def cross_entropy_loss(
    logits: Tensor,
    labels: Tensor,
    precomputed_lse: Tensor | None = None,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    lse_square_scale: float = 0.0,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    process_group: ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """(loss, z-loss) of each row, float32 at least; both are 0 where the label is `ignore_index`.

    `lse_square_scale` adds that share of the squared log-sum-exp, the z-loss, which is returned for logs alone.
    `precomputed_lse` is that log-sum-exp, and is used where it fits (no smoothing, no scale). `inplace_backward`
    writes the gradient over the logits.

    >>> cross_entropy_loss(torch.zeros(2, 4), torch.tensor([1, -100]))[0]
    tensor([1.3863, 0.0000])
    """
    check_one_process("cross_entropy_loss", process_group)
    if logits.dim() != 2 or labels.shape != logits.shape[:1]:
        raise RequestError(
            f"got logits {list(logits.shape)} and labels {list(labels.shape)}, takes (rows, classes) and (rows,):"
            " flatten both"
        )
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise RequestError(f"got labels {shape_of(labels)}, takes int64 class numbers")
    if not logit_scale > 0:
        raise RequestError(f"got logit_scale={logit_scale}, takes more than 0")
    if precomputed_lse is not None and precomputed_lse.shape != labels.shape:
        raise RequestError(f"got precomputed_lse {shape_of(precomputed_lse)}, takes one number a row")
    insist(
        ((labels == ignore_index) | ((labels >= 0) & (labels < logits.shape[1]))).all(),
        f"got labels outside 0 to {logits.shape[1] - 1} that are not ignore_index={ignore_index}, takes class numbers",
    )
    if logit_scale != 1 or label_smoothing != 0:
        precomputed_lse = None  # as there: it is of other logits, or spares nothing
    return cast(
        "tuple[Tensor, Tensor]",
        _RowLoss.apply(  # type: ignore[no-untyped-call]
            logits, labels, precomputed_lse, label_smoothing, logit_scale, lse_square_scale, ignore_index,
            inplace_backward,
        ),
    )  # fmt: skip


class _RowLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, lse: Tensor | None, smoothing: float, logit_scale: float,
        lse_square_scale: float, ignore_index: int, inplace_backward: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ignored = labels == ignore_index
        classes = labels.masked_fill(ignored, 0).long()[:, None]
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32)) * logit_scale
        lse = torch.logsumexp(wide, dim=-1) if lse is None else lse.to(wide.dtype)
        loss = lse - (1 - smoothing) * wide.gather(1, classes).squeeze(1)
        if smoothing != 0:
            loss = loss - smoothing * wide.mean(dim=-1)
        z_loss = (lse_square_scale * lse.square()).masked_fill(ignored, 0.0)
        ctx.save_for_backward(logits, lse, classes, ignored)
        ctx.mark_non_differentiable(z_loss)
        ctx.options = smoothing, logit_scale, lse_square_scale, inplace_backward
        return loss.masked_fill(ignored, 0.0) + z_loss, z_loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        logits, lse, classes, ignored = ctx.saved_tensors
        smoothing, logit_scale, lse_square_scale, inplace_backward = ctx.options
        wide = logits.to(lse.dtype) * logit_scale
        lse = lse[:, None]
        grad = (wide - lse).exp_().mul_(1 + 2 * lse_square_scale * lse)
        grad.scatter_add_(1, classes, torch.full_like(classes, smoothing - 1, dtype=grad.dtype))
        if smoothing != 0:
            grad.sub_(smoothing / logits.shape[1])
        grad.mul_((grad_loss.masked_fill(ignored, 0.0) * logit_scale)[:, None])
        if inplace_backward and not is_compiling():  # a compiler decides itself what memory is used again
            logits.detach().copy_(grad)
            return (logits.detach(), *[None] * 7)
        return (grad.to(logits.dtype), *[None] * 7)

"""flash_attn.losses.cross_entropy: cross-entropy as a module, on any device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from headway.errors import RequestError
from headway.shims.flash_attn.ops.fused_dense import check_one_process
from headway.shims.flash_attn.ops.triton.cross_entropy import cross_entropy_loss

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class CrossEntropyLoss(nn.Module):
    """Cross-entropy of logits (rows, classes), with smoothing and z-loss; float32 at least.

    >>> loss = CrossEntropyLoss(ignore_index=-1)
    >>> import torch
    >>> loss(torch.zeros(3, 4), torch.tensor([0, 2, -1]))
    tensor(1.3863)
    """

    def __init__(
        self,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        logit_scale: float = 1.0,
        lse_square_scale: float = 0.0,
        inplace_backward: bool = False,
        process_group: ProcessGroup | None = None,
        return_z_loss: bool = False,
    ) -> None:
        super().__init__()
        if reduction not in ("mean", "none", "sum"):
            raise RequestError(f"got reduction={reduction!r}, takes 'mean', 'none' or 'sum'")
        check_one_process("CrossEntropyLoss", process_group)
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.logit_scale = logit_scale
        self.lse_square_scale = lse_square_scale
        self.inplace_backward = inplace_backward
        self.process_group = process_group
        self.return_z_loss = return_z_loss

    def forward(self, input: Tensor, target: Tensor, precomputed_lse: Tensor | None = None) -> Any:
        losses = cross_entropy_loss(
            input,
            target,
            precomputed_lse=precomputed_lse,
            label_smoothing=self.label_smoothing,
            logit_scale=self.logit_scale,
            lse_square_scale=self.lse_square_scale,
            ignore_index=self.ignore_index,
            inplace_backward=self.inplace_backward,
        )
        loss, z_loss = (self._reduced(each, target) for each in losses)
        return (loss, z_loss) if self.return_z_loss else loss

    def _reduced(self, losses: Tensor, target: Tensor) -> Tensor:
        if self.reduction == "none":
            return losses
        total = losses.sum()
        return total / (target != self.ignore_index).sum() if self.reduction == "mean" else total

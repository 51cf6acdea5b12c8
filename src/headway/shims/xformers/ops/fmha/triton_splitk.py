"""Names of xFormers' operators on Triton's split-K: a wish, as the kernel is Headway's to choose."""

from headway.packages import SHIM
from headway.shims.xformers.ops.common import register_operator
from headway.shims.xformers.ops.fmha.common import AttentionFwOpBase


@register_operator
class FwOp(AttentionFwOpBase):
    NAME = f"triton_splitKF{SHIM}"

"""Names of xFormers' operators on Flash-Attention 3: a wish, as the kernel is Headway's to choose."""

from headway.packages import SHIM
from headway.shims.xformers.ops.common import register_operator
from headway.shims.xformers.ops.fmha.common import AttentionBwOpBase, AttentionFwOpBase


@register_operator
class FwOp(AttentionFwOpBase):
    NAME = f"fa3F{SHIM}"


@register_operator
class BwOp(AttentionBwOpBase):
    NAME = f"fa3B{SHIM}"

"""Names of xFormers' operators on CUTLASS: a wish, as the kernel is Headway's to choose."""

from headway.packages import SHIM
from headway.shims.xformers.ops.common import register_operator
from headway.shims.xformers.ops.fmha.common import AttentionBwOpBase, AttentionFwOpBase


@register_operator
class FwOp(AttentionFwOpBase):
    NAME = f"cutlassF{SHIM}"


@register_operator
class BwOp(AttentionBwOpBase):
    NAME = f"cutlassB{SHIM}"

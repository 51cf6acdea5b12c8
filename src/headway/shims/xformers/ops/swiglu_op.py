"""SwiGLU: w3(silu(w1 x) · (w2 x)), with the parameter names that checkpoints have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headway.errors import RequestError
from headway.shims.xformers.ops.unbind import stack_or_none, unbind


class SwiGLUOp:
    """A way to compute it; of one with PACKED_WEIGHTS, w1 and w2 come in one tensor."""

    def __init__(
        self, op: Callable[..., Tensor], packed_weights: bool, name: str, constraints: Sequence[Callable[..., bool]]
    ) -> None:
        self.op, self.PACKED_WEIGHTS, self.NAME, self.constraints = op, packed_weights, name, constraints

    def supports(self, op: SwiGLUOpDispatch) -> bool:
        return (op.packed_weights or not self.PACKED_WEIGHTS) and all(fits(op) for fits in self.constraints)

    def __call__(self, *args: Tensor | None) -> Tensor:
        return self.op(*args)

    def __str__(self) -> str:
        return f"SwiGLUOp:{self.NAME}"


def _eager(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, w3: Tensor, b3: Tensor | None
) -> Tensor:
    return F.linear(F.silu(F.linear(x, w1, b1)) * F.linear(x, w2, b2), w3, b3)


SwiGLUEagerOp = SwiGLUOp(_eager, False, "eager", constraints=[])


@dataclass
class SwiGLUOpDispatch:
    """What a choice between ways depends on; there is one."""

    device: torch.device | str
    dtype: torch.dtype
    dtype_autocast_gpu: torch.dtype | None
    packed_weights: bool
    bias_enabled: bool

    @property
    def op(self) -> SwiGLUOp:
        return SwiGLUEagerOp

    @staticmethod
    def from_arguments(
        x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, w3: Tensor, b3: Tensor | None
    ) -> SwiGLUOpDispatch:
        return SwiGLUOpDispatch(
            device=x.device,
            dtype=x.dtype,
            dtype_autocast_gpu=torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else w1.dtype,
            packed_weights=stack_or_none((w1, w2), dim=0) is not None,
            bias_enabled=all(bias is not None for bias in (b1, b2, b3)),
        )


def swiglu(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    w3: Tensor,
    b3: Tensor | None,
    *,
    op: SwiGLUOp | None = None,
) -> Tensor:
    """w3(silu(w1 x + b1) · (w2 x + b2)) + b3, over the last axis of x."""
    if w1.ndim != 2 or w1.shape != w2.shape or w3.ndim != 2 or w3.shape[1] != w1.shape[0]:
        raise RequestError(
            f"got w1 {list(w1.shape)}, w2 {list(w2.shape)}, w3 {list(w3.shape)}, takes (hidden, in) twice, then"
            " (out, hidden)"
        )
    for name, bias, weight in (("b1", b1, w1), ("b2", b2, w2), ("b3", b3, w3)):
        if bias is not None and bias.shape != weight.shape[:1]:
            raise RequestError(f"got {name} {list(bias.shape)}, takes ({weight.shape[0]},), as its weight has rows")
    if op is None:
        op = SwiGLUEagerOp
    if not isinstance(op, SwiGLUOp):
        raise RequestError(f"got op={op!r}, takes a SwiGLUOp such as SwiGLUEagerOp, or None")
    if not op.PACKED_WEIGHTS:
        return op(x.reshape(-1, x.shape[-1]), w1, b1, w2, b2, w3, b3).reshape(*x.shape[:-1], w3.shape[0])
    packed, biases = stack_or_none((w1, w2), 0), None if b1 is None or b2 is None else stack_or_none((b1, b2), 0)
    if packed is None or (biases is None) != (b1 is None and b2 is None):
        raise NotImplementedError(f"got w1 and w2 apart for {op}, takes views of one tensor: w1, w2 = unbind(w12, 0)")
    return swiglu_packed(x, packed, biases, w3, b3, op=op)


def swiglu_packed(
    x: Tensor, w1w2: Tensor, b1b2: Tensor | None, w3: Tensor, b3: Tensor | None, *, op: SwiGLUOp
) -> Tensor:
    """The same with w1 and w2 in one tensor, (2, hidden, in)."""
    if not op.PACKED_WEIGHTS:
        raise RequestError(f"got {op} for packed weights, takes one with PACKED_WEIGHTS: use swiglu")
    return op(x.reshape(-1, x.shape[-1]), w1w2, b1b2, w3, b3).reshape(*x.shape[:-1], w3.shape[0])


class SwiGLU(nn.Module):
    """swiglu with weights of its own: w12, which holds w1 and w2, and w3."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int | None = None,
        bias: bool = True,
        *,
        _pack_weights: bool = True,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.hidden_features = hidden_features or in_features
        self.out_features = out_features or in_features
        self.w12: nn.Linear | None = None
        if _pack_weights:
            self.w12 = nn.Linear(in_features, 2 * self.hidden_features, bias=bias)
        else:
            self.w1 = nn.Linear(in_features, self.hidden_features, bias=bias)
            self.w2 = nn.Linear(in_features, self.hidden_features, bias=bias)
        self.w3 = nn.Linear(self.hidden_features, self.out_features, bias=bias)
        self.op: SwiGLUOp | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.w12 is not None and self.op is not None:
            return swiglu_packed(x, *self._packed_ordered_params(), op=self.op)
        return swiglu(x, *self._ordered_params(), op=self.op)

    def _ordered_params(self) -> tuple[Any, ...]:
        if self.w12 is None:
            return self.w1.weight, self.w1.bias, self.w2.weight, self.w2.bias, self.w3.weight, self.w3.bias
        weights, biases, *last = self._packed_ordered_params()
        (w1, w2), (b1, b2) = unbind(weights, 0), (None, None) if biases is None else unbind(biases, 0)
        return w1, b1, w2, b2, *last

    def _packed_ordered_params(self) -> tuple[Any, ...]:
        if self.w12 is None:
            raise RequestError("got _pack_weights=False, takes packed weights: SwiGLU(...) has them by default")
        weight, bias = self.w12.weight, self.w12.bias
        pair = None if bias is None else bias.view(2, -1)
        return weight.view(2, -1, weight.shape[1]), pair, self.w3.weight, self.w3.bias

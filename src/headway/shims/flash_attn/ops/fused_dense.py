"""flash_attn.ops.fused_dense: linear layers, and the MLP of two, by PyTorch's own kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from headway.errors import RequestError
from headway.shims.flash_attn.ops.activations import gelu_fwd, sqrelu_fwd

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup  # which not every build of torch has

Heuristic = Literal["auto"] | int
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu_approx": gelu_fwd, "relu": F.relu, "sqrelu": sqrelu_fwd}


def fused_dense_func(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    return_residual: bool = False,
    process_group: ProcessGroup | None = None,
    sequence_parallel: bool = True,
) -> Any:
    """x weightᵀ + bias, and x itself too if asked for."""
    check_one_process("fused_dense_func", process_group)
    out = F.linear(x, weight, bias)
    return (out, x) if return_residual else out


class FusedDense(nn.Linear):
    """A linear layer that may return its input too."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        return_residual: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.return_residual = return_residual

    def forward(self, x: Tensor, process_group: ProcessGroup | None = None) -> Any:
        return fused_dense_func(x, self.weight, self.bias, self.return_residual, process_group)


def fused_mlp_func(
    x: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    bias1: Tensor | None = None,
    bias2: Tensor | None = None,
    activation: str = "gelu_approx",
    save_pre_act: bool = True,
    return_residual: bool = False,
    checkpoint_lvl: int = 0,
    heuristic: int = 0,
    process_group: ProcessGroup | None = None,
    sequence_parallel: bool = True,
) -> Any:
    """Linear, activation, linear; and x itself too if asked for.

    `checkpoint_lvl`: 1 computes the activation again in the backward pass, 2 (or `save_pre_act=False`) the first
    layer too. `heuristic` picks among flash-attn's kernels and changes nothing here.
    """
    check_one_process("fused_mlp_func", process_group)
    _check_mlp(activation, checkpoint_lvl, heuristic)
    level = checkpoint_lvl if save_pre_act else 2

    def rest(hidden: Tensor) -> Tensor:
        return F.linear(_ACTIVATIONS[activation](hidden), weight2, bias2)

    def whole(x: Tensor) -> Tensor:
        hidden = F.linear(x, weight1, bias1)
        return _again(rest, hidden) if level == 1 else rest(hidden)

    out = _again(whole, x) if level == 2 else whole(x)
    return (out, x) if return_residual else out


def _again(part: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """part(x), of which nothing is kept for the backward pass: it is computed again there."""
    if not torch.is_grad_enabled():
        return part(x)
    out: Tensor = checkpoint(part, x, use_reentrant=False, preserve_rng_state=False)
    return out


def _check_mlp(activation: str, checkpoint_lvl: int, heuristic: Heuristic) -> None:
    if activation not in _ACTIVATIONS:
        raise RequestError(f"got activation={activation!r}, takes {', '.join(map(repr, _ACTIVATIONS))}")
    if checkpoint_lvl not in (0, 1, 2):
        raise RequestError(f"got checkpoint_lvl={checkpoint_lvl}, takes 0, 1 or 2")
    if heuristic != "auto" and heuristic not in range(-1, 5):
        raise RequestError(f"got heuristic={heuristic!r}, takes 'auto', or -1 to 4")


class FusedMLP(nn.Module):
    """Linear, activation, linear, under the names fc1 and fc2."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        bias1: bool = True,
        bias2: bool = True,
        activation: str = "gelu_approx",
        return_residual: bool = False,
        checkpoint_lvl: int = 0,
        heuristic: Heuristic = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_mlp(activation, checkpoint_lvl, heuristic)
        hidden_features = hidden_features or 4 * in_features
        self.activation = activation
        self.return_residual = return_residual
        self.checkpoint_lvl = checkpoint_lvl
        self.heuristic = -1 if activation == "sqrelu" else heuristic
        self.fc1 = nn.Linear(in_features, hidden_features, bias=bias1, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden_features, out_features or in_features, bias=bias2, device=device, dtype=dtype)

    def forward(self, x: Tensor, process_group: ProcessGroup | None = None) -> Any:
        return fused_mlp_func(
            x,
            self.fc1.weight,
            self.fc2.weight,
            self.fc1.bias,
            self.fc2.bias,
            activation=self.activation,
            save_pre_act=self.training,
            return_residual=self.return_residual,
            checkpoint_lvl=self.checkpoint_lvl,
            process_group=process_group,
        )


# -- over several processes: not here ---------------------------------------------------------------------------------


def refuse_parallel(name: str) -> None:
    raise RequestError(
        f"got {name}, which splits a layer over the processes of a group, takes layers of one process: build the one"
        " without Parallel, and split it by torch.distributed.tensor.parallel"
    )


def check_one_process(name: str, process_group: Any) -> None:
    if process_group is not None:
        refuse_parallel(f"{name} with a process_group")


class ColumnParallelLinear(nn.Linear):
    """Refused: its weights would lie on several processes."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        process_group: ProcessGroup,
        bias: bool = True,
        sequence_parallel: bool = True,
        multiple_of: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        refuse_parallel("ColumnParallelLinear")


class RowParallelLinear(nn.Linear):
    """Refused: its weights would lie on several processes."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        process_group: ProcessGroup,
        bias: bool = True,
        sequence_parallel: bool = True,
        multiple_of: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        refuse_parallel("RowParallelLinear")


class ParallelFusedMLP(nn.Module):
    """Refused: its weights would lie on several processes."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        activation: str = "gelu_approx",
        process_group: ProcessGroup | None = None,
        bias1: bool = True,
        bias2: bool = True,
        sequence_parallel: bool = True,
        checkpoint_lvl: int = 0,
        heuristic: Heuristic = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        refuse_parallel("ParallelFusedMLP")

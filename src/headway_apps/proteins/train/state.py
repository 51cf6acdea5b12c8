"""State: all that a run is, as tensors by name and plain values, gathered from however many processes, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, distribute_tensor

FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
"""Whole tensors on the CPU of the first process, whoever holds their parts; others get nothing."""


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    held: Any = get_model_state_dict(model, options=FULL)
    return dict(held)


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Shards put together, on the CPU."""
    return {name: (x.full_tensor() if isinstance(x, DTensor) else x).cpu() for name, x in tensors.items()}


def divided(tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors as those they are meant for: the same shards, where those are shards."""

    def one(x: Tensor, other: Tensor) -> Tensor:
        x = x.to(other.device)
        return distribute_tensor(x, other.device_mesh, other.placements) if isinstance(other, DTensor) else x

    return {name: one(x, like[name]) if name in like else x for name, x in tensors.items()}


def optimizer_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Its tensors, as 'weight/what'; numbers such as the learning rate are the config's."""
    held: Any = get_optimizer_state_dict(model, optimizer, options=FULL)
    return {f"{name}/{what}": value for name, each in held.get("state", {}).items() for what, value in each.items()}


def give_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    # torch gives an optimizer a state where no weight has a gradient yet, and leaves none.
    gradients = [(weight, weight.grad) for weight in model.parameters()]
    optimizer.zero_grad()
    _give(model, optimizer, tensors)
    for weight, gradient in gradients:
        weight.grad = gradient


def _give(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    held: dict[str, Any] = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
    state: dict[str, Any] = {}
    for name, value in tensors.items():
        weight, _, what = name.rpartition("/")
        state.setdefault(weight, {})[what] = value
    set_optimizer_state_dict(
        model,
        optimizer,
        {"state": state, "param_groups": held["param_groups"]},
        options=StateDictOptions(full_state_dict=True),
    )

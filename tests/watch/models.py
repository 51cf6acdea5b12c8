"""Small models to watch, and what is compared of a model before and after."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Wrapped(nn.Module):
    """As the seed's SigmaReparam: a linear inside, a scale outside, and none of nn.Linear's attributes."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.sigma = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.sigma * F.normalize(self.linear.weight, dim=1)
        return F.linear(x, weight, self.linear.bias)


class Halve(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


class Mixed(nn.Module):
    """Attention of three kinds, a wrapped, a parametrised and a normalised part, and outputs in a dict with a tuple."""

    def __init__(self, size: int = 16) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(size)
        self.attend = nn.MultiheadAttention(size, 2, batch_first=True, dropout=0.1)
        self.layer = nn.TransformerEncoderLayer(size, 2, 24, batch_first=True)
        self.wrapped = Wrapped(nn.Linear(size, size))
        self.halved = nn.Linear(size, size)
        nn.utils.parametrize.register_parametrization(self.halved, "weight", Halve())
        self.normed = nn.utils.parametrizations.spectral_norm(nn.Linear(size, size))
        self.memory = nn.LSTM(size, size, batch_first=True)
        self.drop = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> dict[str, Any]:
        x = self.norm(x.transpose(1, 2)).transpose(1, 2)
        x = x + self.attend(x, x, x)[0]
        x = self.layer(x)
        x = self.normed(self.halved(self.wrapped(x)))
        out, state = self.memory(x)
        q = out.unflatten(-1, (2, -1)).transpose(1, 2)
        return {"tokens": self.drop(F.scaled_dot_product_attention(q, q, q, is_causal=True)), "state": state}


def images() -> nn.Module:
    features = (nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.GELU())
    return nn.Sequential(*features, nn.Flatten(), nn.Linear(216, 5), nn.Dropout(0.1))


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mixed": (Mixed, (3, 7, 16)),
    "images": (images, (2, 3, 8, 8)),
    "encoder": (encoder, (3, 6, 16)),
    "lstm": (lambda: nn.LSTM(8, 8, 2, dropout=0.1), (5, 2, 8)),
}


def tensors(value: Any) -> list[Tensor]:
    """All of them in a nested output."""
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value
    return [tensor for item in items for tensor in tensors(item)]


def state(model: nn.Module) -> dict[str, Any]:
    """All that watching must leave as it was, tensors cloned."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
    return {
        "values": {name: value.clone() for name, value in model.state_dict().items()},
        "objects": [id(one) for one in (*model.parameters(), *model.buffers(), *model.modules())],
        "classes": [type(module) for module in model.modules()],
        "training": [module.training for module in model.modules()],
        "dicts": [list(module.__dict__) for module in model.modules()],
        "hooks": [len(getattr(module, hook)) for module in model.modules() for hook in hooks],
        "parameter hooks": [
            (len(p._backward_hooks or ()), len(getattr(p, "_post_accumulate_grad_hooks", None) or ()))
            for p in model.parameters()
        ],
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "learns": [p.requires_grad for p in model.parameters()],
        "random": torch.get_rng_state(),
        "grad mode": torch.is_grad_enabled(),
        "process hooks": [
            len(getattr(torch.nn.modules.module, f"_global_{which}"))
            for which in ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")
        ],
    }


def same(one: Any, other: Any) -> bool:
    """Bit for bit, NaN equal to NaN."""
    if isinstance(one, Tensor):
        alike = isinstance(other, Tensor) and one.dtype == other.dtype
        return alike and torch.equal(one.nan_to_num(7), other.nan_to_num(7))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)

"""A model held still while it is looked at: what a run would change is put back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def still(model: nn.Module) -> Iterator[None]:
    """In evaluation inside; afterwards each module's mode, the buffers, and the random state are as before."""
    with unchanged(model):
        for module in model.modules():
            module.training = False
        yield


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """In the model's own mode inside; afterwards modes, buffers and the random state are as before."""
    modes = [(module, module.training) for module in model.modules()]
    held = [(module, dict(module._buffers)) for module in model.modules()]
    buffers = [
        (buffer, _version(buffer), buffer.detach().clone())
        for _, named in held
        for buffer in named.values()
        if buffer is not None
    ]
    cards = {x.device.index for x in model.parameters() if x.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(index for index in cards if index is not None)):
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            for module, named in held:
                module._buffers.clear()
                module._buffers.update(named)
            with torch.no_grad():
                for buffer, version, was in buffers:
                    if _version(buffer) != version:
                        buffer.copy_(was)
                    elif buffer.layout == torch.strided and not buffer.is_meta and not _equal(buffer, was):
                        buffer.data.copy_(was)  # batch_norm does not count what it writes, nor may this


def _version(buffer: Tensor) -> int:
    """How often it was written to; those made for inference do not count."""
    return 0 if buffer.is_inference() else buffer._version


def _equal(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one, other) or (
        one.is_floating_point()
        and torch.equal(one.isnan(), other.isnan())
        and torch.equal(one.nan_to_num(0.0), other.nan_to_num(0.0))
    )

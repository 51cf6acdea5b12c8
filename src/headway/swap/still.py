"""A model held still while it is looked at: what a run would change is put back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


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
    buffers = [
        (module, name, buffer, buffer._version, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    cards = {x.device.index for x in model.parameters() if x.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(index for index in cards if index is not None)):
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            with torch.no_grad():
                for module, name, buffer, version, was in buffers:
                    module._buffers[name] = buffer
                    if buffer._version != version:
                        buffer.copy_(was)
                    elif buffer.layout == torch.strided and not buffer.is_meta and not torch.equal(buffer, was):
                        buffer.data.copy_(was)  # batch_norm does not count what it writes, nor may this

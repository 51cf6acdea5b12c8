"""A model in eval mode for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from headway_apps.proteins.model.dit import DiT


@contextmanager
def evaluated(model: DiT, device: torch.device | str | None = None) -> Iterator[DiT]:
    """On a device, or where it is; every module has its own mode and place back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    before = model.device
    try:
        yield model.eval().to(before if device is None else device)
    finally:
        model.to(before)
        for module, training in modes:
            module.training = training

"""Keeps the recorder's own arithmetic out of everything else: graphs, autocast, and whatever other modes are on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch._C import _functorch

_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
for _name in dir(torch._C.DispatchKey):
    if _name.startswith("Autocast"):
        _AUTOCAST = _AUTOCAST | torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, _name))


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Inside, nothing is differentiated, cast, or shown to any mode, ours or another tool's."""
    with (
        torch._C.DisableTorchFunction(),
        torch._C._DisableTorchDispatch(),
        torch._C._ExcludeDispatchKeyGuard(_AUTOCAST),
        torch.no_grad(),
    ):
        yield


def readable(tensor: Tensor) -> bool:
    """True for a tensor whose numbers can be read as they lie: no subclass with its own dispatch, no fake, no batch."""
    return (
        type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__
        and tensor.layout is torch.strided
        and not tensor.is_nested
        and not tensor.is_quantized
        and tensor.device.type != "meta"
        and not _functorch.is_functorch_wrapped_tensor(tensor)
    )

"""Values that must hold in tensors, asked for without waiting for a device."""

from __future__ import annotations

from torch import Tensor, _assert_async
from torch.compiler import is_compiling

from headway.errors import RequestError


def insist(holds: Tensor, message: str) -> None:
    """RequestError unless `holds` is True.

    On CUDA reading it would wait for the device, and in a compiled graph there is nothing to read yet: there the
    assertion runs with the kernels around it, and its failure is a RuntimeError with the same message (on CUDA with the
    message in the device's log alone).
    """
    if is_compiling() or holds.is_cuda:
        _assert_async(holds, message)
    elif not bool(holds):
        raise RequestError(message)

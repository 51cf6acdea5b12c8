"""Work done once: tensors made at their first use and kept for the next."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import maybe_current_level
from torch.autograd import forward_ad


def is_traced() -> bool:
    """Whether tensors made now are not plain ones: inside torch.compile, a fake mode, or a torch.func transform."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None
        or maybe_current_level() is not None
        or forward_ad._current_level >= 0
    )


def is_recorded(device: torch.device) -> bool:
    """Whether a CUDA graph records what runs now: tensors made here hold nothing until it is replayed."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def lasts(device: torch.device) -> bool:
    """Whether tensors made now are worth keeping: a tracer's are not, nor what a CUDA graph only records."""
    return not (is_traced() or is_recorded(device))


def kept(
    store: dict[Any, Any], what: Hashable, device: torch.device, make: Callable[[], tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """What `make` makes for `device`: from `store`, if it was made before.

    Kept is only what outlives the moment. Tensors of inference mode are of no use to a backward pass, and are kept
    apart. Nor may a tracer be given what was kept before it came.
    """
    if not lasts(device):
        return make()
    index = torch.cuda.current_device() if device.type == "cuda" and device.index is None else device.index
    at = (what, device.type, index, torch.is_inference_mode_enabled())
    found: tuple[Tensor, ...] | None = store.get(at)
    if found is None:
        found = store[at] = make()
    return found


class Bounded(dict[Any, Any]):
    """A store for what depends on lengths alone, emptied when it holds `most` things."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def __setitem__(self, at: Any, value: Any) -> None:
        if len(self) >= self.most:
            self.clear()
        super().__setitem__(at, value)


class Remembers:
    """A value that keeps what was worked out from it. That lives and dies with it, and is not copied or saved."""

    @functools.cached_property
    def memo(self) -> dict[Any, Any]:
        return Bounded(256)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "memo"}

    def once(self, what: Hashable, device: torch.device, make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """What `make` makes for `device`, kept with this value."""
        return make() if is_traced() else kept(self.memo, what, device, make)

    def moved(self, tensor: Tensor, device: torch.device) -> Tensor:
        """One of this value's own tensors on `device`: copied there once, and again when it has changed."""

        def copy() -> tuple[Tensor]:
            # Nothing waits for a copy to an accelerator; one from there must have come before it is read.
            return (tensor.to(device, non_blocking=device.type != "cpu"),)

        if tensor.device.type == device.type or is_traced() or tensor.requires_grad or tensor.is_inference():
            return copy()[0]
        return self.once(("moved", id(tensor), tensor._version), device, copy)[0]

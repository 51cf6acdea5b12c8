"""Which device a run is on, and what it computes in: chosen with a reason, or refused; never another in silence."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from headway import UnknownNameError
from headway_apps.training.errors import DeviceError

KINDS = ("cuda", "mps", "cpu")
"""In the order in which `auto` takes them. AMD's GPUs are `cuda` to PyTorch too."""
PRECISIONS = ("auto", "float32", "float16", "bfloat16")
NATIVE_BFLOAT16 = (8, 0)
"""The first compute capability that multiplies bfloat16 itself; before it PyTorch emulates that, slowly."""


@dataclasses.dataclass(frozen=True, slots=True)
class Precision:
    """What the forward computes in; weights, losses and the optimizer stay in float32."""

    dtype: torch.dtype
    scaled: bool
    """The loss is scaled, as gradients in float16 would underflow without it."""
    why: str


def device(asked: str = "auto") -> torch.device:
    """The best that is here for `auto`, else the very device that was asked for."""
    return find(asked, here())


def here() -> dict[str, int]:
    """How many devices of each kind this process can use."""
    return {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}


def find(asked: str, here: Mapping[str, int]) -> torch.device:
    """`device` on a machine with these devices.

    >>> find("auto", {"cuda": 0, "mps": 1, "cpu": 1})
    device(type='mps')
    """
    if asked == "auto":
        return torch.device(next(kind for kind in KINDS if here.get(kind)))
    if asked.partition(":")[0] == "gpu":
        raise DeviceError(f"got device {asked}, which torch knows as cuda, or on a Mac as mps; ask for one of these")
    try:
        found = torch.device(asked)
    except RuntimeError as error:
        raise UnknownNameError("device", asked, ("auto", *KINDS)) from error
    if found.type not in KINDS:
        raise UnknownNameError("device", asked, ("auto", *KINDS))
    if (found.index or 0) >= here.get(found.type, 0):
        there = ", ".join(f"{count} {kind}" for kind, count in here.items() if count)
        raise DeviceError(f"got device {asked}, takes what is here: {there}; ask for one of these, or for auto")
    return found


def chosen(device: torch.device, asked: str = "auto") -> Precision:
    """What this device trains in: by `auto` the fastest that it computes itself, else what was asked for."""
    nvidia = device.type == "cuda" and torch.version.hip is None
    return choose(device.type, torch.cuda.get_device_capability(device) if nvidia else None, asked)


def choose(kind: str, capability: tuple[int, int] | None, asked: str = "auto") -> Precision:
    """`chosen` on a device of this kind; NVIDIA's GPUs have a compute capability.

    >>> choose("cuda", (7, 0)).dtype
    torch.float16
    """
    if asked not in PRECISIONS:
        raise UnknownNameError("precision", asked, PRECISIONS)
    emulated = capability is not None and capability < NATIVE_BFLOAT16
    name = kind if capability is None else f"{kind} {capability[0]}.{capability[1]}"
    if asked == "auto":
        return _auto(kind, emulated, name)
    if asked == "bfloat16" and emulated:
        raise DeviceError(
            f"got bfloat16 on {name}, which emulates it, takes cuda 8.0 or newer; ask for float16 or auto"
        )
    if asked == "float16" and kind == "cpu":
        raise DeviceError("got float16 on cpu, takes a GPU to train in it; ask for float32, bfloat16 or auto")
    return Precision(getattr(torch, asked), asked == "float16", f"{asked}: asked for, on {name}")


def _auto(kind: str, emulated: bool, name: str) -> Precision:
    if kind != "cuda":
        return Precision(torch.float32, False, f"float32: on {name} nothing narrower is sure to be faster, and right")
    if emulated:
        why = f"float16 with loss scaling: {name} has no bfloat16 but an emulated, slow one (native from cuda 8.0)"
        return Precision(torch.float16, True, why)
    return Precision(torch.bfloat16, False, f"bfloat16: {name} computes it natively, and it needs no loss scaling")

"""Runs one backend on a small call and compares it with the reference.

    python -m headway.backends.trial flash4 cuda:0

Meant for a child process: a kernel built for another machine may take its process down.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from headway.backends import reference
from headway.backends.kernel import Extras, Kernel
from headway.backends.registry import Backend, named
from headway.limits.limit import Backward, DTypes
from headway.limits.machine import Machine
from headway.masks import Causal, Documents, Frame, Mask

LENGTH = 128
PARTS = ("answer", "gradient of q", "gradient of k", "gradient of v")
WIDEST = {"mps": torch.float32}
"""Where there is no float64."""


def trial(name: str, device: str) -> str | None:
    """What is wrong with the backend's answer, or None. Errors of the kernel itself are raised."""
    machine = _machine(torch.device(device))
    backend = named(name, machine.device)
    dtype = _dtype(backend, machine)
    learns = all(limit.here(machine) for limit in backend.limits if isinstance(limit, Backward))
    mask = Causal() & Documents([LENGTH]) if backend.masks.needs else Causal()
    generator = torch.Generator().manual_seed(0)
    made = torch.randn(4, 1, 2, LENGTH, 64, generator=generator).to(device, dtype)
    answer = _run(backend.load(), made, mask, learns)
    truth = _run(reference, made.to(WIDEST.get(machine.device, torch.float64)), mask, learns)
    for what, got, wanted in zip(PARTS, answer, truth, strict=False):
        error = got.to(wanted.dtype).sub(wanted).abs().max().item()
        if not error < (0.05 if backend.exact else 0.2):
            return f"its {what} is off by {error:.3g}"
    return None


def _run(kernel: Kernel, made: Tensor, mask: Mask, learns: bool) -> tuple[Tensor, ...]:
    """The answer, and the gradients of q, k and v if the backend has them."""
    q, k, v = (x.clone().requires_grad_(learns) for x in made[:3])
    frame = Frame(LENGTH, LENGTH, 1, 2, q.device)
    extras = Extras(needs_grad=learns)
    out = kernel.attend(q, k, v, kernel.lower(mask, frame, q.dtype), extras)[0]
    return (out, *torch.autograd.grad(out, (q, k, v), made[3])) if learns else (out,)


def _machine(device: torch.device) -> Machine:
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" and not torch.version.hip else None
    return Machine(device.type, capability=capability)


def _dtype(backend: Backend, machine: Machine) -> torch.dtype:
    names = next((limit.here(machine) for limit in backend.limits if isinstance(limit, DTypes)), ("float32",))
    dtype: torch.dtype = getattr(torch, names[0])
    return dtype


def in_a_line(test: Callable[..., str | None], *arguments: str) -> str | None:
    """What is wrong, errors among it: the process that asks lives for nothing else."""
    try:
        return test(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


if __name__ == "__main__":
    sys.exit(in_a_line(trial, *sys.argv[1:]))

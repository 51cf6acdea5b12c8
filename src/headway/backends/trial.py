"""Runs one backend on a small call and compares it with the reference: `python -m headway.backends.trial flash4`.

Meant for a child process: a kernel built for another machine may take its process down.
"""

from __future__ import annotations

import sys

import torch

from headway.backends import reference
from headway.backends.kernel import Extras
from headway.backends.registry import named
from headway.limits.limit import Backward, DTypes
from headway.masks import Causal, Frame


def trial(name: str, device: str) -> str | None:
    """What is wrong with the backend's answer, or None. Errors of the kernel itself are raised."""
    backend = named(name, device)
    kernel = backend.load()
    dtypes = next((limit.names for limit in backend.limits if isinstance(limit, DTypes)), ("float32",))
    dtype: torch.dtype = getattr(torch, dtypes[0])
    learns = all(limit.inputs for limit in backend.limits if isinstance(limit, Backward))
    generator = torch.Generator().manual_seed(0)
    made = torch.randn(3, 1, 2, 128, 64, generator=generator).to(device, dtype)
    q, k, v = (x.clone().requires_grad_(learns) for x in made.unbind())
    frame = Frame(128, 128, 1, 2, q.device)
    extras = Extras(scale=0.125, needs_grad=learns)
    out = kernel.attend(q, k, v, kernel.lower(Causal(), frame, dtype), extras)[0]
    wide = made.double()
    truth = reference.attend(wide[0], wide[1], wide[2], reference.lower(Causal(), frame, torch.float64), extras)[0]
    error = (out.double() - truth).abs().max().item()
    if not error < (0.05 if backend.exact else 0.2):
        return f"its answer is off by {error:.3g}"
    if learns:
        torch.autograd.backward(out.sum())
        if not all(x.grad is not None and bool(x.grad.isfinite().all()) for x in (q, k, v)):
            return "its gradients are not finite"
    return None


if __name__ == "__main__":
    wrong = trial(sys.argv[1], "cuda" if torch.cuda.is_available() else "cpu")
    if wrong:
        sys.exit(wrong)

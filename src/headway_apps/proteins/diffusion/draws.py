"""Random numbers and choices in float64.

In float32 the tail of the noise that chooses is cut off, and samples come out colder than their probabilities (Zheng et
al. 2024, arXiv:2409.02908). Every draw takes its generator, so nobody else's random state moves. A generator may be the
CPU's for tokens on any device, and then all devices draw the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headway import RequestError
from headway_apps.proteins.diffusion.given import insist


def doubled(x: Tensor) -> Tensor:
    """`x` in float64; from MPS, which has none, on the CPU."""
    return x.cpu().double() if x.device.type == "mps" else x.double()


def uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    """Numbers in [0, 1), one for each element of `like`, where float64 can be had."""
    if generator.device.type == "mps":
        raise RequestError("got a generator on mps, which has no float64; takes torch.Generator('cpu')")
    numbers = torch.rand(like.shape, generator=generator, device=generator.device, dtype=torch.float64)
    return numbers.to("cpu" if like.device.type == "mps" else like.device)


def categorical(log_weight: Tensor, generator: torch.Generator) -> Tensor:
    """One index for each row of log weights (..., n), which need not be normalised; -inf is never drawn.

    A race of exponential clocks: the first to ring is index i with its probability.
    """
    log_weight = doubled(log_weight)
    insist(
        log_weight.amax(-1).isfinite().all(),
        "got log weights of which a whole row is -inf, or one is NaN or infinite; takes one finite in each row:"
        " look for NaN in the log scores",
    )
    clocks = -uniform(log_weight, generator).clamp_min(2.0**-54).log()  # neither 0 nor infinite
    return (log_weight - clocks.log()).argmax(-1)

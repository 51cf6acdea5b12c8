"""sage: SageAttention, which computes scores in int8; never chosen by auto."""

from __future__ import annotations

import torch
from torch import Tensor

from headway.backends.kernel import Attended, Extras
from headway.masks.base import Mask
from headway.masks.frame import Frame
from headway.masks.terms import terms


def lower(mask: Mask | None, frame: Frame, dtype: torch.dtype) -> bool:
    """Causal or nothing; the registry declares no other mask."""
    return terms(mask, frame).band is not None


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, extras: Extras) -> Attended:
    from sageattention import sageattn

    # Every argument by its own name: sageattn swallows unknown ones, and calls the scale sm_scale.
    return sageattn(q, k, v, tensor_layout="HND", is_causal=causal, sm_scale=extras.scale), None

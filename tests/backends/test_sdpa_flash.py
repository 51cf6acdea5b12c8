"""sdpa-flash: how it says bands to its CUDA operators, which can be asked without one."""

from __future__ import annotations

import pytest
import torch

from headway import Causal, Full, Mask, Window
from headway.backends import sdpa_flash
from headway.masks import Frame

SAID: dict[str, tuple[Mask | None, tuple[int, int], tuple[bool, tuple[int | None, int | None] | None]]] = {
    "none": (None, (6, 6), (False, None)),
    "full": (Full(), (6, 6), (False, None)),
    "causal": (Causal(), (6, 6), (True, None)),
    "open window": (Window(), (6, 6), (False, None)),
    "window": (Window(2, 3), (6, 6), (False, (2, 3))),
    "one side": (Window(right=3), (6, 6), (False, (None, 3))),
    "joined": (Causal() & Window(left=2), (6, 6), (False, (2, 0))),
    "lower-right, more keys": (Causal("lower-right"), (4, 6), (False, (None, 0))),
    "lower-right, fewer keys": (Causal("lower-right"), (6, 4), (False, (None, 0))),
    "lower-right window": (Window(1, 2, align="lower-right"), (4, 6), (False, (1, 2))),
}
"""The mask, the lengths, and whether that is the operator's own causal or a window aligned lower-right."""


@pytest.mark.parametrize("name", SAID)
def test_bands(name: str) -> None:
    mask, lengths, (causal, window) = SAID[name]
    lowered = sdpa_flash.lower(mask, Frame(*lengths, device=torch.device("cuda")), torch.bfloat16)
    assert (lowered.causal, lowered.window, lowered.dense) == (causal, window, None)

"""The lists written by one launch are those made by sorting. On a GPU, or by Triton's interpreter:

TRITON_INTERPRET=1 pytest tests/masks/test_visits.py
"""

from __future__ import annotations

import itertools
import os

import pytest
import torch

from headway.masks import Causal, Documents, Frame, Padding, Prefix, Window
from headway.masks.block_mask import _one_launch, _sorted
from headway.masks.tiles import tiles_of

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="needs a GPU or TRITON_INTERPRET=1")
TILE = 4


@needs_triton
@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (2, 1), (1, 3), (2, 3)])
@pytest.mark.parametrize("hang", [0, 1])
@pytest.mark.parametrize("expanded", [False, True])
def test_as_by_sorting(batch: int, heads: int, hang: int, expanded: bool) -> None:
    from headway.masks.visits import visits

    for rows, columns in itertools.product((1, 2, 5, 16), (1, 3, 5, 33)):
        frame = Frame(rows * TILE - hang, columns * TILE - hang, batch, heads, torch.device(DEVICE))
        small = (2, 1, heads, rows, 1) if expanded else (2, batch, heads, rows, columns)
        judged = torch.rand(small, device=DEVICE) > 0.5
        judged[1] &= judged[0]
        judged = judged.expand(2, batch, heads, rows, columns)
        wanted = _sorted(judged, tiles_of(frame, TILE).inside)
        got = visits(judged, frame.q_len, frame.kv_len, TILE)
        for one, other in zip((*wanted[0], *wanted[1]), (*got[0], *got[1]), strict=True):
            torch.testing.assert_close(other, one, rtol=0, atol=0)
            assert other.is_contiguous()


@pytest.mark.cuda
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize(
    "mask", [Causal(), Window(300, 0), Documents([700, 1, 299]), Padding([900]), Prefix(300)], ids=repr
)
def test_the_gpu_makes_the_block_mask_the_cpu_makes(mask) -> None:
    theirs, ours = (
        mask.to_block_mask(Frame(1000, 1000)),
        mask.to_block_mask(Frame(1000, 1000, device=torch.device(DEVICE))),
    )
    assert _one_launch(torch.ones(2, 1, 1, 2, 2, dtype=torch.bool, device=torch.device(DEVICE)))
    for name in ("kv", "full_kv", "q", "full_q"):
        for field in (f"{name}_num_blocks", f"{name}_indices"):
            assert getattr(ours, field).tolist() == getattr(theirs, field).tolist(), field

"""sdpa-cudnn: what its kernel is given. It runs on CUDA alone, where tests/test_agreement.py has it."""

from __future__ import annotations

import pytest
import torch

from headway.backends.sdpa_cudnn import lower
from headway.masks import Bias, Dense, Frame, Mask


@pytest.mark.parametrize(
    "mask",
    [Dense(torch.ones(1, 2, 48, 1, dtype=torch.bool)), Bias(torch.zeros(48, 1)), Bias(torch.zeros(3, 1, 1, 48))],
    ids=repr,
)
def test_rows_of_a_bias_are_contiguous(mask: Mask) -> None:
    """On an H200 a stride of 0 between keys was a misaligned address, which ends the process's use of the GPU."""
    bias = lower(mask, Frame(48, 48, 3, 2), torch.bfloat16).bias
    assert bias is not None
    assert bias.stride(-1) == 1

"""sdpa-cudnn: what its kernel is given. It runs on CUDA alone, where tests/test_agreement.py has it."""

from __future__ import annotations

import pytest
import torch

from headway.backends import sdpa_cudnn
from headway.backends.kernel import Extras
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


@pytest.mark.parametrize("values, spread", [(8, False), (16, True)])
def test_a_query_spread_over_heads_is_laid_out_for_values_of_another_size(
    monkeypatch: pytest.MonkeyPatch, values: int, spread: bool
) -> None:
    """On an H200 it ended the process: batch and heads went innermost in the answer, so that features lay apart."""
    given: list[torch.Tensor] = []

    def cudnn(q: torch.Tensor, *_: object) -> tuple[torch.Tensor, torch.Tensor]:
        given.append(q)
        return q, q

    monkeypatch.setattr(sdpa_cudnn, "_cudnn", cudnn)
    q, v = torch.randn(1, 1, 4, 16).expand(3, 2, 4, 16), torch.randn(3, 2, 4, values)
    sdpa_cudnn.attend(q, q, v, sdpa_cudnn.Lowered(), Extras())
    assert (0 in given[0].stride()) == spread

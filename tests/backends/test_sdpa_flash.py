"""sdpa-flash: how it says bands to its CUDA operators, which can be asked without one."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from headway import Causal, Full, Mask, Padding, Window, attention
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


@pytest.mark.parametrize("compiled", (False, True), ids=("", "compiled"))
@pytest.mark.parametrize("where", ("q", "k", "every k"))
@pytest.mark.parametrize("mask", (None, Causal(), Padding([4, 5]), Window(2, 1)), ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_a_nan_among_the_inputs_is_not_lost(dtype: torch.dtype, mask: Mask | None, where: str, compiled: bool) -> None:
    """PyTorch's kernel for CPU answers 0 to a row whose scores are all NaN, as if it saw nothing (pytorch#141128)."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 5, 8, dtype=dtype) for heads in (4, 2, 2))
    (q[0, 0, 2] if where == "q" else k[0, 0, 0] if where == "k" else k[0, 0])[..., 3] = float("nan")

    def call(backend: str) -> tuple[torch.Tensor, torch.Tensor]:
        return attention(q, k, v, mask, backend=backend, return_lse=True)

    torch._dynamo.reset()
    run = torch.compile(call, backend="eager", fullgraph=True) if compiled else call
    for mine, truth in zip(run("sdpa-flash"), call("reference"), strict=True):
        assert truth.isnan().any()
        assert mine.isnan()[truth.isnan()].all()  # by a mask as numbers one that is hidden spreads too
        real = ~mine.isnan()
        assert real.any()
        torch.testing.assert_close(mine[real], truth[real], atol=2e-2, rtol=2e-2)


def test_rows_whose_denominator_is_1_keep_their_answer() -> None:
    """Its log is 0, as for a row that the kernel takes for empty."""
    v = torch.randn(1, 1, 1, 8)
    out, lse = attention(torch.zeros(1, 1, 3, 8), torch.randn(1, 1, 1, 8), v, backend="sdpa-flash", return_lse=True)
    assert not lse.any()
    assert torch.equal(out, v.expand_as(out))


def test_a_tracer_of_operators_takes_it_whole() -> None:
    """Nothing of it depends on a number that would have to be read."""
    q = torch.randn(1, 2, 5, 8)
    traced = make_fx(lambda q: attention(q, q, q, Causal(), backend="sdpa-flash"))(q)
    for value in (1.0, float("nan")):
        other = torch.full((1, 1, 5, 1), value) * torch.randn(1, 2, 5, 8)
        wanted = attention(other, other, other, Causal(), backend="sdpa-flash")
        torch.testing.assert_close(traced(other), wanted, equal_nan=True)

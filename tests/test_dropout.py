"""Dropout, on every backend that has it: the share, the mean, the seed, and the gradients of the weights that are left.

Values that are the identity make the output the weights themselves, after dropout.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from accepts import ACCEPTS, PACKAGES
from deck import DEVICES
from test_agreement import TABLES, installed
from torch import Tensor

import headway
from headway import Causal, Mask, Padding

SIZE = 128
MASKS: dict[str, Callable[[], Mask | None]] = {
    "none": lambda: None,
    "causal": Causal,
    "padding": lambda: Padding([SIZE, 0]),
}
HAVE_DROPOUT = [
    pytest.param(device, backend, case, marks=pytest.mark.cuda if device == "cuda" else ())
    for device in DEVICES
    for backend, accepts in ACCEPTS[TABLES[device]].items()
    for case in ("dropout", "dropout, causal", "dropout, padding-all")
    if case in accepts.learns and installed(backend)
]


def draw(device: str, *, learns: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q, k, v = torch.randn(3, 2, 4, SIZE, SIZE, generator=generator).to(device, dtype).unbind()
    return (q.requires_grad_(), k.requires_grad_(), v.requires_grad_()) if learns else (q, k, v)


def mask_of(case: str) -> Mask | None:
    return MASKS[case.removeprefix("dropout").removeprefix(", ").removesuffix("-all") or "none"]()


def identity(like: Tensor) -> Tensor:
    return torch.eye(SIZE, device=like.device, dtype=like.dtype).expand_as(like).contiguous()


def weights_left(q: Tensor, k: Tensor, mask: Mask | None, backend: str, dropout: float, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return headway.attention(q, k, identity(k), mask=mask, dropout=dropout, backend=backend)


def assert_drops(left: Tensor, weights: Tensor, dropout: float) -> None:
    """Each weight is dropped or scaled up, and the share dropped is what was asked for, to five standard deviations."""
    left, weights = left.double(), weights.double()
    seen = weights > 1e-6
    dropped = left[seen] == 0
    spread = (dropout * (1 - dropout) / dropped.numel()) ** 0.5
    assert abs(dropped.double().mean().item() - dropout) < 5 * spread, "the wrong share is dropped"
    torch.testing.assert_close(left[seen][~dropped], weights[seen][~dropped] / (1 - dropout), rtol=2e-2, atol=1e-3)
    assert bool((left[~seen] < 1e-5).all())


@pytest.mark.parametrize(("device", "backend", "case"), HAVE_DROPOUT)
def test_share_and_mean(device: str, backend: str, case: str) -> None:
    q, k, _ = draw(device)
    mask = mask_of(case)
    weights = weights_left(q, k, mask, backend, 0.0)
    for dropout in (0.1, 0.5, 0.9):
        assert_drops(weights_left(q, k, mask, backend, dropout), weights, dropout)


@pytest.mark.parametrize(("device", "backend", "case"), HAVE_DROPOUT)
def test_the_seed_decides(device: str, backend: str, case: str) -> None:
    q, k, _ = draw(device)
    first, again, other = (weights_left(q, k, mask_of(case), backend, 0.3, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(("device", "backend", "case"), HAVE_DROPOUT)
def test_gradients_flow_through_the_weights_that_are_left(device: str, backend: str, case: str) -> None:
    q, k, v = draw(device, learns=True)
    mask = mask_of(case)
    left = weights_left(q, k, mask, backend, 0.3, seed=5).detach().double()
    torch.manual_seed(5)
    out = headway.attention(q, k, v, mask=mask, dropout=0.3, backend=backend)
    push = torch.randn(out.shape, generator=torch.Generator().manual_seed(4)).to(out)
    got = torch.autograd.grad(out, (q, k, v), push)

    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    scores = wide[0] @ wide[1].transpose(-1, -2) / SIZE**0.5
    if mask is not None:
        frame = headway.masks.Frame(SIZE, SIZE, 2, 4, q.device)
        scores = scores.masked_fill(~mask.to_bool(frame), torch.finfo(torch.float64).min)
    truth = (scores.softmax(-1) * (left != 0) / 0.7) @ wide[2]
    close = {"rtol": 3e-2, "atol": 3e-2} if device == "cuda" else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(out.double(), truth, **close)
    for one, other in zip(got, torch.autograd.grad(truth, wide, push.double()), strict=True):
        torch.testing.assert_close(one.double(), other, **close)


@pytest.mark.usefixtures("flex_uncompiled")
@pytest.mark.parametrize("case", ["none", "causal", "padding"])
def test_without_dropout_no_random_number_is_drawn(case: str, device: str) -> None:
    q, k, v = draw(device, learns=True)
    states = torch.get_rng_state(), torch.cuda.get_rng_state() if device == "cuda" else None
    headway.attention(q, k, v, mask=MASKS[case]()).sum().backward()
    assert torch.equal(states[0], torch.get_rng_state())
    if states[1] is not None:
        assert torch.equal(states[1], torch.cuda.get_rng_state())


def test_all_that_have_dropout_are_tested_here() -> None:
    """A package that is not installed is the only reason to leave one out."""
    tested = {(param.values[0], param.values[1]) for param in HAVE_DROPOUT}
    for device in DEVICES:
        listed = {name for name, accepts in ACCEPTS[TABLES[device]].items() if "dropout" in accepts.learns}
        assert {name for name in listed if (device, name) not in tested} <= set(PACKAGES)

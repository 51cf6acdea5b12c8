"""After the proof: a kind of call that it did not meet is checked as it is made."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headway import Alibi, Bias, Causal, Documents, Mask, Padding, Prefix, Window, attention
from headway.backends import sdpa_flash, sdpa_math
from headway.backends.kernel import Extras
from headway.errors import SwapError
from headway.sites.site import site_of
from headway.swap import spot, swap


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: Tensor, dropout: float = 0.0) -> Tensor:
        q, k, v = (y.unflatten(-1, (2, 8)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout).transpose(1, 2).flatten(2)


def swapped() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(Own(), nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)).eval()
    assert len(swap(model, torch.randn(2, 9, 16)).census.swapped) == 2
    return model


def spoil(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on the kernels are 2 % off."""
    for kernel in (sdpa_math, sdpa_flash):

        def wrong(*args: Any, right: Callable[..., Any] = kernel.attend) -> Any:
            out, lse = right(*args)
            return out * 1.02, lse

        monkeypatch.setattr(kernel, "attend", wrong)


CHANGES: dict[str, Callable[[nn.Sequential], Any]] = {
    "another dtype": lambda model: model.double(),
    "other weights": lambda model: model.load_state_dict(model.state_dict()),
    "no gradients": lambda model: model.requires_grad_(False),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_makes_calls_new_and_new_calls_are_checked(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = swapped()
    x = torch.randn(2, 9, 16)
    spoil(monkeypatch)
    for part in model:
        part(x)  # a kind of call that was proven
    CHANGES[change](model)
    x = x.to(model[0].qkv.weight.dtype)
    for part in model:
        with pytest.raises(SwapError, match=r"kind of call that no proof had met.* is wrong there: forward errs"):
            part(x)


@pytest.mark.parametrize("change", CHANGES)
def test_right_calls_pass_after_any_change(change: str) -> None:
    model = swapped()
    CHANGES[change](model)
    dtype = model[0].qkv.weight.dtype
    for length in (1, 9, 200):
        model(torch.randn(3, length, 16, dtype=dtype))
    model[1](torch.randn(2, 9, 16, dtype=dtype), src_key_padding_mask=torch.arange(9) >= torch.tensor([[0], [4]]))


def test_without_a_proof_every_kind_of_call_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.MultiheadAttention(16, 2, batch_first=True).eval()
    swap(model)
    spoil(monkeypatch)
    with pytest.raises(SwapError, match="the model itself met a kind of call"):
        model(*[torch.randn(2, 9, 16)] * 3, need_weights=False)


def test_what_cannot_be_said_of_a_call_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    model = swapped()
    spoil(monkeypatch)
    model[0](torch.randn(2, 9, 16), 0.5)  # drops others than any judge would
    torch.func.vmap(model[0])(torch.randn(3, 2, 9, 16).double().float())
    model.to("meta")(torch.empty(2, 9, 16, device="meta"))


def test_copies_and_pickles_are_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model = swapped()
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        site = site_of(again[0])
        assert site is not None
        assert site.check is spot.insist


def test_a_print_says_what_has_changed_since() -> None:
    model = nn.MultiheadAttention(16, 2, batch_first=True)
    one = swap(model, tuple([torch.randn(2, 9, 16)] * 3))
    assert "now in" not in str(one)
    model.double()
    assert "proven in float32 on cpu, now in float64 on cpu: each new kind of call is checked as it is made" in str(one)


MASKS: list[Mask | None] = [
    None,
    Causal("lower-right"),
    Window(3, 0, "lower-right"),
    Padding([70, 0]),
    Documents([40, 30, 0]) & Causal(),
    Prefix(5) | Causal("upper-left"),
    Bias(torch.linspace(-3, 3, 70 * 70).view(70, 70)) & Padding([70, 9]),
    Bias(torch.zeros(70, 70).fill_diagonal_(float("-inf"))),
    Alibi(torch.tensor([0.5, 0.25])),
]


@pytest.mark.parametrize("mask", MASKS, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rows_are_judged_under_every_mask(mask: Mask | None, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q = torch.randn(2, 4 if mask is None else 2, 70, 16).to(dtype)
    k, v = (torch.randn(2, 2, 70, 16).to(dtype) for _ in range(2))
    for options in ({}, {"scale": 0.7, "softcap": 5.0, "sinks": torch.randn(q.shape[1])}):
        extras = Extras(**options)
        out = attention(q, k, v, mask, **options)
        assert spot._errors(q, k, v, mask, extras, out).passed
        assert not spot._errors(q, k, v, mask, extras, out * 1.02).passed
        if mask is not None:
            other = attention(q, k, v, **options)
            assert not spot._errors(q, k, v, mask, extras, other).passed


def test_long_calls_are_judged_by_fewer_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spot, "MOST_SCORES", 2 * 70 * 3)
    q, k, v = (torch.randn(1, 2, 70, 16) for _ in range(3))
    out = attention(q, k, v, Causal())
    assert spot._errors(q, k, v, Causal(), Extras(), out).passed
    out[:, :, -1] *= 1.1
    assert not spot._errors(q, k, v, Causal(), Extras(), out).passed, "the last row is always among them"

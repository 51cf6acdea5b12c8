"""After the proof: a kind of call that it did not meet is checked as it is made."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, seed, settings
from test_fuzz import DRAWS, POLICY, Drawn, backends, calls
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from headway import Alibi, Bias, Causal, Documents, Mask, Padding, Prefix, Window, attention
from headway.backends import reference, sdpa_flash, sdpa_math
from headway.backends.kernel import Extras
from headway.errors import NoBackendError, SwapError
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


def test_a_wrong_kernel_is_wrong_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = swapped()
    spoil(monkeypatch)
    for _ in range(2):  # who caught the error once computes nothing wrong the second time
        with pytest.raises(SwapError, match="is wrong there"):
            model[0](torch.randn(3, 9, 16))


def test_autocast_and_what_masks_are_made_of_make_calls_new() -> None:
    model = nn.MultiheadAttention(16, 2, batch_first=True)
    swap(model)
    site = site_of(model)
    assert site is not None
    q, k, v = (torch.randn(2, 2, 9, 8) for _ in range(3))
    for mask in (Causal() & Padding([9, 4]), Causal() & Bias(torch.randn(9, 9)), Causal() | Padding([9, 4])):
        for narrow in (False, True):
            known = len(site.ticket.decisions)
            with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
                site.attend(q, k, v, mask)
            assert len(site.ticket.decisions) == known + 1


def test_autocast_is_judged_by_what_it_computes_in(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (torch.randn(2, 2, 70, 16) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(q, k, v)
        inside = spot._errors(q.double(), k.double(), v.double(), None, Extras(), out)
    assert out.dtype == torch.bfloat16
    assert inside.passed
    assert not spot._errors(q, k, v, None, Extras(), out * 1.02).passed


def test_the_look_is_seen_by_nobody() -> None:
    """A checkpoint that keeps some operators' results counts them, and a tracer takes no numbers out."""
    torch.manual_seed(0)
    model = swapped()
    kept = {torch.ops.aten.bmm.default, torch.ops.aten.mm.default, torch.ops.aten.addmm.default}
    context = partial(create_selective_checkpoint_contexts, list(kept))

    class After(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = model[0](x)
            return torch.bmm(torch.tanh(torch.bmm(y, y.mT)), y)

    def gradients() -> list[Tensor]:
        x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))
        checkpoint(After(), x, use_reentrant=False, context_fn=context).square().sum().backward()
        found = [p.grad for p in model[0].parameters() if p.grad is not None]
        model.zero_grad()
        return found

    first, second = gradients(), gradients()
    assert len(first) == 2
    torch.testing.assert_close(first, second, rtol=0, atol=0)

    totals = []
    for _ in range(2):
        with FlopCounterMode(display=False) as counter:
            model(torch.randn(4, 9, 16))
        totals.append(counter.get_total_flops())
    assert totals[0] == totals[1]


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("mask", [None, Causal(), Padding([3, 70]), Bias(torch.zeros(70, 70))], ids=repr)
@pytest.mark.parametrize("backend", ["auto", "sdpa-math"])
def test_what_is_no_number_judges_nothing(backend: str, mask: Mask | None, number: float) -> None:
    """Kernels make this and that of it, also where a mask hides it; the other heads are judged all the same."""
    torch.manual_seed(0)
    for broken in range(3):
        operands = [torch.randn(2, 2, 70, 16) for _ in range(3)]
        operands[broken][0, 1, 35] = number
        q, k, v = operands
        out = attention(q, k, v, mask, backend=backend)
        errors = spot._errors(q, k, v, mask, Extras(), out)
        assert errors.passed
        assert errors.judged == 0.75
        assert not spot._errors(q, k, v, mask, Extras(), out * 1.02).passed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_that_cancel_are_judged_by_roundings_of_weights(dtype: torch.dtype) -> None:
    """Equal weights over centred values give 0 but for the rounding of each weight, which every kernel does."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 4, 64, 64) for _ in range(3))
    q, k, v = (x.to(dtype) for x in (q * 0.01, k, v - v.mean(2, keepdim=True)))
    assert spot._errors(q, k, v, None, Extras(), attention(q, k, v)).passed


def test_few_numbers_may_be_exact_by_luck() -> None:
    torch.manual_seed(0)
    for _ in range(2000):
        q, k, v = (torch.randn(1, 1, n, 2).half() for n in (1, 3, 3))
        out = attention(q, k, v)
        assert spot._errors(q, k, v, None, Extras(), out).passed
        assert not spot._errors(q, k, v, None, Extras(), out + v.abs().amax() * 0.1).passed


def test_scores_far_from_0_err_by_their_roundings() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 70, 64, dtype=torch.float64) for _ in range(3))
    q, k = q * 64, (k * 64)[:, :, :1].expand(1, 2, 70, 64).contiguous()
    assert spot._errors(q, k, v, None, Extras(), attention(q, k, v, backend="sdpa-math")).passed


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
    one.undo()
    assert "1 site no longer runs through Headway: the swap was undone, or the modules replaced" in str(one)


WEIGHTS: dict[str, Callable[[nn.Module], Any]] = {
    "a step": lambda model: torch.optim.SGD(model.parameters(), 0.1).step(),
    "loaded": lambda model: model.load_state_dict(model.state_dict()),
    "assigned": lambda model: model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True),
    "replaced": lambda model: setattr(model, "in_proj_weight", nn.Parameter(model.in_proj_weight.detach().clone())),
}


@pytest.mark.parametrize("change", WEIGHTS)
def test_a_print_says_that_weights_are_others_than_the_proven(change: str) -> None:
    model, x = nn.MultiheadAttention(16, 2, batch_first=True), torch.randn(2, 9, 16)
    done = swap(model, (x, x, x))
    model(x, x, x)[0].sum().backward()
    assert "parameters" not in str(done)
    WEIGHTS[change](model)
    count = 1 if change == "replaced" else 4
    written = f"{count} of 4 parameters were written to or replaced since the proof"
    assert f"{written}: it holds for the weights of then; swap again to prove these" in str(done)
    assert "parameters" not in str(swap(model, (x, x, x)))


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


@pytest.mark.parametrize("most", [1, 2 * 70 * 32, 2 * 70 * 32 * 3])
def test_keys_that_would_fill_the_memory_are_judged_by_fewer_heads(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spot, "MOST_NUMBERS", most)
    q, (k, v), sinks = torch.randn(2, 6, 70, 16), (torch.randn(2, 3, 70, 16) for _ in range(2)), torch.randn(6)
    mask = Alibi(torch.rand(6)) & Padding([70, 20])
    wide: list[int] = []
    real = reference.weigh

    def weigh(q: Tensor, k: Tensor, *rest: Any) -> Any:
        wide.append(2 * k.numel())
        return real(q, k, *rest)

    monkeypatch.setattr(reference, "weigh", weigh)
    out = attention(q, k, v, mask, sinks=sinks)
    assert spot._errors(q, k, v, mask, Extras(sinks=sinks), out).passed
    assert max(wide) <= max(most, 2 * 70 * 16)
    out[0, 0] *= 1.1
    assert not spot._errors(q, k, v, mask, Extras(sinks=sinks), out).passed, "the first head is always among them"


def test_a_device_without_float64_is_not_looked_at() -> None:
    q = torch.randn(2, 2, 9, 8)
    assert spot._real(q)
    assert not spot._real(q.to("meta"))
    described = SimpleNamespace(device=torch.device("mps"), is_meta=False)
    assert not spot._real(cast(Tensor, described))


def test_right_calls_are_never_taken_for_wrong(device: str) -> None:
    """Random calls, on every backend that takes them and is quick to try: an error here would stop somebody's run."""

    @seed(0)
    @settings(POLICY, max_examples=DRAWS // 10)
    @given(calls(device))
    def holds(drawn: Drawn) -> None:
        call = drawn.call()
        extras = Extras(scale=call.scale, softcap=call.softcap, sinks=call.sinks)
        for name in set(backends(device, call)) - {"flex"}:
            with torch.no_grad():
                try:
                    out = attention(call.q, call.k, call.v, backend=name, **{**call.options(), "return_lse": False})
                except NoBackendError:
                    continue
                errors = spot._errors(call.q, call.k, call.v, call.mask, extras, out)
            assert errors.passed, f"{name}: {errors}"

    holds()

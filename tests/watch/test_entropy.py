"""Entropy and largest logit of each head, against the formula on whole score matrices in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import headway
from headway import Bias, Causal, Documents, Mask, Padding
from headway.masks import Frame
from headway.watch import entropy as blocks
from headway.watch import watch

ALL_ROWS = 10_000


def formula(scores: Tensor, sinks: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Mean entropy, mean log(keys seen) and largest logit a head, of (B, H, L, S) scores; over rows that see a key."""
    logits = scores
    if sinks is not None:
        logits = torch.cat((scores, sinks.double().view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)), -1)
    weights = logits.softmax(-1)
    entropy = -(weights * weights.clamp(min=1e-300).log()).sum(-1)
    sees = (scores > -math.inf).any(-1)
    room = (logits > -math.inf).sum(-1).double().log()
    count = sees.sum((0, 2))
    return (
        torch.where(sees, entropy, 0.0).sum((0, 2)) / count,
        torch.where(sees, room, 0.0).sum((0, 2)) / count,
        scores.amax((0, 2, 3)),
    )


def scores_of(q: Tensor, k: Tensor, added: Tensor | float = 0.0, scale: float | None = None) -> Tensor:
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    return (q.double() @ k.double().mT) * (q.shape[-1] ** -0.5 if scale is None else scale) + added


def agrees(heads: Any, truth: tuple[Tensor, Tensor, Tensor], rel: float = 1e-6) -> None:
    entropy, room, highest = (one.tolist() for one in truth)
    assert heads.count == len(entropy)
    for head in range(heads.count):
        assert heads.entropy(head) == pytest.approx(entropy[head], rel=rel, abs=1e-6)
        assert heads.share(head) == pytest.approx(entropy[head] / room[head], rel=rel, abs=1e-6)
        assert heads.highest(head) == pytest.approx(highest[head], rel=rel, abs=1e-6)


class Call(nn.Module):
    """A module that is one attention call."""

    def __init__(self, call: Callable[..., Tensor]) -> None:
        super().__init__()
        self.call = call

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.call(*tensors)


def watched(call: Callable[..., Any], *tensors: Tensor, rows: int = ALL_ROWS) -> Any:
    model = Call(call)
    with watch(model, rows=rows) as recording:
        model(*tensors)
    (heads,) = recording.heads.values()
    assert heads.calls == 1
    return heads


def draw(heads: tuple[int, int] = (4, 4), lengths: tuple[int, int] = (9, 9), dtype: torch.dtype = torch.float32) -> Any:
    q, k, v = (torch.randn(3, heads[at], lengths[at], 8).to(dtype) for at in (0, 1, 1))
    return 2 * q, k, v


def blocked(may: Tensor) -> Tensor:
    return torch.zeros(may.shape, dtype=torch.float64).masked_fill(~may, -math.inf)


PADDING = torch.arange(9) < torch.tensor([9, 4, 7])[:, None, None, None]
TRIANGLE = torch.ones(9, 9, dtype=torch.bool).tril()
BIAS = torch.linspace(-3, 3, 81).view(9, 9)

SDPA: dict[str, tuple[dict[str, Any], Tensor | float]] = {
    "plain": ({}, 0.0),
    "causal": ({"is_causal": True}, blocked(TRIANGLE)),
    "padded": ({"attn_mask": PADDING}, blocked(PADDING)),
    "both": ({"attn_mask": PADDING & TRIANGLE}, blocked(PADDING & TRIANGLE)),
    "added": ({"attn_mask": BIAS}, BIAS.double()),
}


@pytest.mark.parametrize("block", [blocks.BLOCK, 100], ids=["whole", "in blocks"])
@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["fused", "by hand"])
@pytest.mark.parametrize("name", SDPA)
def test_sdpa(name: str, dropout: float, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", block)
    options, added = SDPA[name]
    q, k, v = draw()
    found = watched(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, **options), q, k, v)
    agrees(found, formula(scores_of(q, k, added)), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_shared_key_heads_unequal_lengths_and_scale(dtype: torch.dtype) -> None:
    q, k, v = draw((4, 2), (5, 13), dtype)
    found = watched(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.7, enable_gqa=True), q, k, v)
    agrees(found, formula(scores_of(q, k, scale=0.7)))


DOOR: dict[str, tuple[dict[str, Any], Mask | None]] = {
    "plain": ({}, None),
    "causal": ({}, Causal()),
    "padded causal": ({}, Causal() & Padding(torch.tensor([9, 4, 7]))),
    "documents": ({}, Documents([3, 6])),
    "bias": ({}, Bias(BIAS[None, None])),
    "softcap": ({"softcap": 2.0}, Causal()),
    "sinks": ({"sinks": torch.tensor([0.5, -1.0, 3.0, 0.0])}, Causal()),
}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", DOOR)
def test_headway_attention(name: str, backend: str) -> None:
    options, mask = DOOR[name]
    q, k, v = draw((4, 2))
    found = watched(lambda q, k, v: headway.attention(q, k, v, mask, backend=backend, **options), q, k, v)
    scores = scores_of(q, k)
    if "softcap" in options:
        scores = 2.0 * torch.tanh(scores / 2.0)
    if mask is not None:
        scores = scores + mask.to_additive(Frame(9, 9, 3, 4), torch.float64)
    agrees(found, formula(scores, options.get("sinks")))


@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "no weights"])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "fast path"])
def test_multihead_attention(grad: bool, need_weights: bool) -> None:
    module = nn.MultiheadAttention(16, 4, batch_first=True).eval()
    nn.init.normal_(module.in_proj_bias)
    x, filler = torch.randn(3, 6, 16), torch.arange(6) >= torch.tensor([6, 3, 5])[:, None]
    with torch.set_grad_enabled(grad), watch(module, rows=ALL_ROWS) as recording:
        module(x, x, x, key_padding_mask=filler, need_weights=need_weights)
    assert grad or [row.name for row in recording.of("op")][-1].startswith("_native_multi_head_attention")
    q, k, _ = F.linear(x, module.in_proj_weight, module.in_proj_bias).detach().chunk(3, -1)
    q, k = (one.unflatten(-1, (4, 4)).transpose(1, 2) for one in (q, k))
    agrees(recording.heads[""], formula(scores_of(q, k, blocked(~filler[:, None, None]))), rel=1e-4)


@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "no weights"])
def test_a_swapped_module_has_the_entropies_it_had(need_weights: bool) -> None:
    """By its kernel, or in full where its weights are asked for; once each, with all masks."""
    module = nn.MultiheadAttention(16, 4, batch_first=True).eval()
    x, filler = torch.randn(3, 6, 16), torch.arange(6) >= torch.tensor([6, 3, 5])[:, None]
    found = []
    for _ in range(2):
        with watch(module, rows=ALL_ROWS) as recording:
            module(x, x, x, key_padding_mask=filler, need_weights=need_weights)[0].sum().backward()
        found.append(recording.heads[""])
        headway.swap(module)
    before, now = found
    assert now.calls == before.calls == 1
    assert now.rows == before.rows
    assert now.entropies == pytest.approx(before.entropies, rel=1e-5)
    assert now.logits == pytest.approx(before.logits, rel=1e-5)


@pytest.mark.parametrize("norm_first", [True, False])
def test_fast_path_of_a_layer(norm_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=norm_first).eval()
    x, blocks_future = torch.randn(3, 6, 16), ~torch.ones(6, 6, dtype=torch.bool).tril()
    found = {}
    for grad in (True, False):
        with torch.set_grad_enabled(grad), watch(layer, rows=ALL_ROWS) as recording:
            layer(x, src_mask=blocks_future)
        (found[grad],) = recording.heads.values()
    for head in range(4):
        assert found[True].entropy(head) == pytest.approx(found[False].entropy(head), rel=1e-5)
        assert found[True].highest(head) == pytest.approx(found[False].highest(head), rel=1e-5)


def test_rows_are_sampled_evenly_and_counted() -> None:
    q, k, v = draw(lengths=(200, 200))
    found = watched(F.scaled_dot_product_attention, q, k, v, rows=60)
    assert found.rows == [60] * 4
    assert found.of_rows == 600
    whole = formula(scores_of(q, k))[0]
    for head in range(4):
        assert found.entropy(head) == pytest.approx(float(whole[head]), rel=0.1)


def test_rows_that_see_nothing_are_counted_apart() -> None:
    q, k, v = draw()
    found = watched(lambda q, k, v: headway.attention(q, k, v, Padding(torch.tensor([9, 0, 7]))), q, k, v)
    assert found.empty == 9 * 4
    assert found.rows == [18] * 4


@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["fused", "by hand"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_lowest_number_of_a_dtype_blocks_as_infinity_does(dtype: torch.dtype, dropout: float) -> None:
    q, k, v = draw(dtype=dtype)
    may = PADDING & TRIANGLE
    mask = torch.zeros(may.shape, dtype=dtype).masked_fill(~may, torch.finfo(dtype).min)
    found = watched(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask, dropout_p=dropout), q, k, v)
    truth = formula(scores_of(q, k, blocked(may)))
    agrees(found, truth, rel=1e-5 if dtype == torch.float32 or dropout == 0 else 0.02)


def test_sinks_by_hand() -> None:
    q, k, v = draw()
    sinks = torch.tensor([0.5, -1.0, 3.0, 0.0])

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT / 8**0.5
        logits = torch.cat((scores, sinks.view(1, -1, 1, 1).expand(3, -1, 9, 1)), -1)
        return logits.softmax(-1)[..., :-1] @ v

    found, (entropy, _, _) = watched(call, q, k, v), formula(scores_of(q, k), sinks)
    for head in range(4):
        assert found.entropy(head) == pytest.approx(float(entropy[head]), rel=1e-5)


def test_a_classifiers_softmax_is_no_attention() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Softmax(-1), nn.Linear(5, 2))
    with watch(model) as recording:
        model(torch.randn(2, 3, 4))
    assert not recording.heads


def test_two_calls_in_one_module_and_two_runs_of_it() -> None:
    q, k, v = draw()

    def twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return headway.attention(headway.attention(q, k, v), k, v)

    model = Call(twice)
    with watch(model) as recording:
        model(q, k, v)
        model(q, k, v)
    assert {site: heads.calls for site, heads in recording.heads.items()} == {"": 2, "#2": 2}


def test_collapsed_heads_and_large_logits_are_reported() -> None:
    q, k, v = draw()
    model = Call(F.scaled_dot_product_attention)
    with watch(model) as sound:
        model(q, k, v)
    assert not [finding for finding in sound.report() if "attention" in finding.what or "entropy" in finding.what]
    with watch(model) as collapsed:
        model(q * 1000, k, v)
    said = str(collapsed.report())
    assert "entropy collapse: heads 0, 1, 2, 3 of 4" in said
    assert "attention logits up to" in said


def test_nan_scores_are_counted_and_poison_nothing() -> None:
    q, k, v = draw()
    q[0, 1, 2] = math.nan
    found = watched(F.scaled_dot_product_attention, q, k, v)
    assert found.nonfinite == 1
    assert found.rows == [27, 26, 27, 27]
    assert all(math.isfinite(found.entropy(head)) for head in range(4))

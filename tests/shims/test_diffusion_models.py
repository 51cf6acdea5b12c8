"""Models that import flash_attn at the top run where there is none: built as SEDD's and MDLM's are, on CPU."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from deck import Source
from torch import Tensor

from headway import shims
from headway.errors import RequestError

MODELS = Path(__file__).parent / "models"
NAMES = ("diffusion_transformer", "sedd", "mdlm")
SMALL = {"dim": 32, "heads": 4, "blocks": 2, "cond_dim": 8, "vocabulary": 11}
BATCH, LENGTH = 3, 9


@pytest.fixture
def imported(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Imports of these models under the shim, which leave nothing behind."""
    monkeypatch.syspath_prepend(str(MODELS))
    with shims.installed("flash_attn", force=True):
        yield importlib.import_module
    for name in NAMES:
        sys.modules.pop(name, None)


def plain_turn(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    one, other = qkv.chunk(2, -1)
    return qkv * cos + torch.cat((-other, one), -1) * sin


def plain_attend(qkv: Tensor, cu_seqlens: Tensor, length: int) -> Tensor:
    q, k, v = qkv.unflatten(0, (-1, length)).unbind(2)
    weights = (torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(0, 1)


def stirred(model: Any) -> Any:
    """With weights of which none is 0, so that each block and head counts."""
    with torch.no_grad():
        for name, each in model.named_parameters():
            each.copy_(0.3 * Source(name).normal(*each.shape))
    return model


def inputs() -> tuple[Tensor, Tensor]:
    source = Source("inputs")
    return (source.normal(BATCH, LENGTH).abs() * 7).long() % 11, source.normal(BATCH).abs()


@pytest.mark.parametrize("name", ["sedd", "mdlm"])
def test_it_computes_what_its_formulas_say(name: str, imported: Any) -> None:
    model = stirred(imported(name).build(**SMALL)).double()
    plain = imported("diffusion_transformer").DiffusionTransformer(
        plain_turn, plain_attend, scores=name == "sedd", **SMALL
    )
    plain.double().load_state_dict(model.state_dict())
    tokens, sigma = inputs()
    outs = [each(tokens, sigma) for each in (model, plain)]
    torch.testing.assert_close(*outs)
    push = Source("cotangent").normal(*outs[0].shape)
    grads = [
        torch.autograd.grad(out, list(each.parameters()), push) for out, each in zip(outs, (model, plain), strict=True)
    ]
    assert all(each.any() for each in grads[0])
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("name", ["sedd", "mdlm"])
def test_it_learns_under_autocast(name: str, imported: Any) -> None:
    model = imported(name).build(**SMALL, dropout=0.1)
    tokens, sigma = inputs()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(tokens, sigma.float())
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), (tokens + 1).flatten() % 11)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(each.grad is not None and each.grad.isfinite().all() for each in model.parameters())
    assert losses[-1] < 0.8 * losses[0]


def test_the_structure_is_the_original_one(imported: Any) -> None:
    """Counted by others: 24,061,985 parameters for 32 tokens and a mask, and GPT-2's 50,257 for SEDD small."""
    with torch.device("meta"):
        proteins = imported("sedd").build(dim=512, heads=8, blocks=6, cond_dim=256, vocabulary=33)
        small = imported("sedd").build(dim=768, heads=12, blocks=12, cond_dim=128, vocabulary=50258)
    counts = [sum(each.numel() for each in model.parameters()) for model in (proteins, small)]
    assert counts == [24_061_985, 169_627_218]


def test_it_compiles_whole(imported: Any) -> None:
    torch._dynamo.reset()
    model = stirred(imported("mdlm").build(**SMALL)).double()
    tokens, sigma = inputs()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens, sigma), model(tokens, sigma))
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["sedd", "mdlm"])
def test_lengths_without_a_leading_0_are_refused_and_lose_no_rows(name: str, imported: Any) -> None:
    """Which the originals' own branch for lengths makes of them."""
    model = imported(name).build(**SMALL).double()
    with pytest.raises(RequestError) as refusal:
        model(*inputs(), seqlens=torch.full((BATCH,), LENGTH, dtype=torch.int32))
    assert "cu_seqlens" in str(refusal.value)

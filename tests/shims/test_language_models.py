"""A GPT and a BERT built from flash_attn.modules learn and answer, on CPU."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from headway import shims

SIZES = {"dim": 32, "heads": 4, "layers": 2, "vocabulary": 13}
BATCH, LENGTH = 4, 12


@pytest.fixture
def imported(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Imports of these models under the shim, which leave nothing behind."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "models"))
    with shims.installed("flash_attn", force=True):
        yield importlib.import_module
    for name in ("gpt", "bert"):
        sys.modules.pop(name, None)


def texts() -> Tensor:
    """Each counts up from its own start, so that a token tells the next."""
    return (torch.arange(LENGTH) + torch.arange(BATCH)[:, None] * 3) % 11 + 2


def trained(model: Any, loss: Callable[[], Tensor], steps: int) -> tuple[float, float]:
    """The loss before and after."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        assert all(each.grad is not None and each.grad.isfinite().all() for each in model.parameters())
        optimizer.step()
        losses.append(value.item())
    return losses[0], losses[-1]


@dataclasses.dataclass
class Cache:
    """What flash_attn.utils.generation.InferenceParams has."""

    max_seqlen: int = LENGTH
    max_batch_size: int = BATCH
    seqlen_offset: int = 0
    batch_size_offset: int = 0
    key_value_memory_dict: dict[Any, Tensor] = dataclasses.field(default_factory=dict)
    lengths_per_sample: Tensor | None = None


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_gpt_learns_and_goes_on_as_it_learned(dropout: float, imported: Any) -> None:
    model = imported("gpt").GPT(**SIZES, dropout=dropout)
    before, after = trained(model, lambda: model.learn(texts()), 40)
    assert before > 2
    assert after < 0.5
    model.eval()
    cache, known = Cache(), texts()[:, :4]
    step = known
    with torch.no_grad():
        while known.shape[1] < LENGTH:
            logits = model(step, cache)
            torch.testing.assert_close(logits[:, -1], model(known)[:, -1])
            cache.seqlen_offset += step.shape[1]
            step = logits[:, -1:].argmax(-1)
            known = torch.cat((known, step), 1)
    assert torch.equal(known, texts())


def test_a_gpt_compiles_whole(imported: Any) -> None:
    torch._dynamo.reset()
    model = imported("gpt").GPT(**SIZES)
    losses = [run(texts()) for run in (torch.compile(model.learn, fullgraph=True, backend="aot_eager"), model.learn)]
    torch.testing.assert_close(*losses)
    grads = [torch.autograd.grad(loss, list(model.parameters())) for loss in losses]
    torch.testing.assert_close(*grads)
    torch._dynamo.reset()


def masked() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, which of them are real, and which are hidden."""
    lengths = torch.tensor([12, 7, 1, 9])
    real = torch.arange(LENGTH) < lengths[:, None]
    return texts().masked_fill(~real, 0), real, real & (torch.arange(LENGTH) % 3 == 0)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_bert_learns(dropout: float, packed: bool, imported: Any) -> None:
    model = imported("bert").BERT(**SIZES, dropout=dropout, packed=packed)
    before, after = trained(model, lambda: model.learn(*masked()), 60)
    assert before > 2
    assert after < 0.5


def test_a_bert_answers_alike_packed_and_padded(imported: Any) -> None:
    packed = imported("bert").BERT(**SIZES).double()
    padded = imported("bert").BERT(**SIZES, packed=False).double()
    padded.load_state_dict(packed.state_dict())
    tokens, real, hidden = masked()
    torch.testing.assert_close(packed(tokens, real)[real], padded(tokens, real)[real])
    grads = [
        torch.autograd.grad(model.learn(tokens, real, hidden), list(model.parameters())) for model in (packed, padded)
    ]
    torch.testing.assert_close(*grads)


GPT_NAMES = """
embeddings.word_embeddings.weight lm_head.weight ln_f.weight
layers.0.mixer.Wqkv.weight layers.0.mixer.Wqkv.bias layers.0.mixer.out_proj.weight layers.0.mixer.out_proj.bias
layers.0.mlp.fc1.weight layers.0.mlp.fc1.bias layers.0.mlp.fc2.weight layers.0.mlp.fc2.bias
layers.0.norm1.weight layers.0.norm2.weight
"""
BERT_NAMES = """
embeddings.word_embeddings.weight embeddings.position_embeddings.weight embeddings.token_type_embeddings.weight
emb_ln.weight emb_ln.bias decoder.weight decoder.bias
layers.0.mixer.Wqkv.weight layers.0.mixer.Wqkv.bias layers.0.mixer.out_proj.weight layers.0.mixer.out_proj.bias
layers.0.mlp.fc1.weight layers.0.mlp.fc1.bias layers.0.mlp.fc2.weight layers.0.mlp.fc2.bias
layers.0.norm1.weight layers.0.norm1.bias layers.0.norm2.weight layers.0.norm2.bias
"""


@pytest.mark.parametrize(("model", "names"), [("gpt", GPT_NAMES), ("bert", BERT_NAMES)], ids=["gpt", "bert"])
def test_checkpoints_have_the_names_of_models_on_flash_attn(model: str, names: str, imported: Any) -> None:
    built = getattr(imported(model), model.upper())(**SIZES | {"layers": 1})
    assert built.state_dict().keys() == set(names.split())

"""hf: models: made tiny by type or config class, taken as they are from a folder, never downloaded."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import typer

from headway.cli.hugging_face import TINY, tiny
from headway.cli.models import found
from headway.swap import inspect

transformers = pytest.importorskip("transformers")

# transformers warns of its own ways while it makes a model.
pytestmark = pytest.mark.filterwarnings("ignore:::transformers", "ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.mark.parametrize("name", ["llama", "LlamaConfig", "bert", "vit", "t5", "clip", "whisper", "qwen3_moe"])
def test_a_type_is_made_tiny_and_runs(name: str) -> None:
    model, example = found(f"hf:{name}")
    assert sum(p.numel() for p in model.parameters()) < 1_000_000
    assert not model.training
    assert inspect(model, example).tickets


def test_parts_are_made_tiny_too() -> None:
    config = tiny(transformers.CLIPConfig())
    assert config.text_config.num_hidden_layers == config.vision_config.num_hidden_layers == 2
    assert config.vision_config.image_size == TINY["image_size"]


def test_a_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    config = tiny(transformers.LlamaConfig())
    config.num_hidden_layers = 3
    config.save_pretrained(tmp_path)
    model, _ = found(f"hf:{tmp_path}")
    assert len(model.model.layers) == 3  # type: ignore[union-attr, arg-type]
    with torch.no_grad():
        model.lm_head.weight.fill_(0.25)  # type: ignore[union-attr]
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    again, _ = found(f"hf:{tmp_path}", seed=1)
    assert again.lm_head.weight.eq(0.25).all()  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["lama", "meta-llama/Llama-3.2-1B", "LlamaModel"])
def test_nothing_is_downloaded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("went to the network"))
    with pytest.raises(typer.BadParameter, match="nothing is downloaded"):
        found(f"hf:{name}")


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match="takes a folder with a transformers config.json"):
        found(f"hf:{tmp_path}")


def test_is_imported_only_when_asked_for() -> None:
    before = sys.modules.copy()
    found("encoder")
    assert {name for name in sys.modules.keys() - before.keys() if name.startswith("transformers")} == set()


@pytest.mark.parametrize("prefix", ["hf:", ""])
def test_a_saved_model_comes_back_with_its_own_head(prefix: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    saved = transformers.BertForSequenceClassification(tiny(transformers.BertConfig(num_labels=5)))
    saved.save_pretrained(tmp_path)
    model, _ = found(f"{prefix}{tmp_path}")
    assert type(model) is type(saved)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(model.parameters(), saved.parameters(), strict=True))

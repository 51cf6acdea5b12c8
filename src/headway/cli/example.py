"""An example input for a model that came without one: from what it says itself, or from its first layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import typer
from torch import Tensor, nn

from headway.cli import hugging_face
from headway.report.times import fails
from headway.sites.copies import deep_copy
from headway.swap.swap import as_meant

BATCH, LENGTH = 2, 32


def example_for(model: nn.Module) -> Any:
    """The first input that the model runs with; BadParameter if none does."""
    tried: list[str] = []
    guesses = hugging_face.examples(model) if hugging_face.is_one(model) else _guesses(model)
    for one in guesses:
        error = why_not(model, one)
        if not error:
            return one
        tried.append(f"{_said(one)}: {error}")
    told = "; ".join(("", *dict.fromkeys(tried)))
    raise typer.BadParameter(
        f"got a {type(model).__name__} without an example, and cannot guess one{told}."
        " Let a function (path/to/file.py:function) return (model, example), the example being a tensor, a tuple,"
        " a dict, or a function that runs the model"
    )


def why_not(model: nn.Module, example: Any) -> str:
    """What the model says to an example; '' if it runs, or would if it did what it means, as it does once swapped."""
    error = fails(model, example)
    if not error:
        return ""
    meant = deep_copy(model)
    as_meant(meant)
    return error if fails(meant, example) else ""


def _guesses(model: nn.Module) -> Iterator[tuple[Any, ...] | dict[str, Any]]:
    given = getattr(model, "example_input_array", None)  # Lightning's name for it
    if given is not None:
        yield given if isinstance(given, tuple) else (given,)
    for module in model.modules():
        found = _first(module)
        if found is not None:
            yield (found,)
            yield (found, found)
            yield (found, found, found)
            return


def _first(module: nn.Module) -> Tensor | None:
    """What a layer that could come first takes."""
    if isinstance(module, nn.Embedding):
        return torch.randint(module.num_embeddings, (BATCH, LENGTH))
    if isinstance(module, nn.Conv2d):
        return torch.randn(BATCH, module.in_channels, 64, 64)
    if isinstance(module, nn.Conv1d):
        return torch.randn(BATCH, module.in_channels, 16 * LENGTH)
    if isinstance(module, nn.MultiheadAttention):
        return torch.randn(BATCH, LENGTH, module.embed_dim)
    if isinstance(module, nn.Linear):
        return torch.randn(BATCH, LENGTH, module.in_features)
    return None


def _said(example: tuple[Any, ...] | dict[str, Any]) -> str:
    pairs = example.items() if isinstance(example, dict) else (("", x) for x in example)
    return ", ".join(f"{name} {list(x.shape)}".strip() for name, x in pairs if isinstance(x, Tensor))

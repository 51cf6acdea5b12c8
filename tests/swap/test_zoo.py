"""Real models of other people: swapped, trained a step, saved, put back, each with its certificate.

docs/models.md is made of what happens here; `HEADWAY_WRITE_DOCS=1 pytest tests/swap/test_zoo.py` writes it.
"""

from __future__ import annotations

import copy
import importlib.metadata
import os
from pathlib import Path

import pytest
import torch
from swap.zoo import ZOO, Entry

import headway
from headway.swap.answer import tensors_of

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


@pytest.mark.parametrize("entry", ZOO, ids=lambda entry: entry.name)
def test_swapped_trained_and_put_back(entry: Entry) -> None:
    torch.manual_seed(0)
    model, example = entry.make().eval(), entry.example()
    twin = copy.deepcopy(model)
    classes = [type(module) for module in model.modules()]
    keys, held = list(model.state_dict()), [id(p) for p in model.parameters()]

    swapped = headway.swap(model, example)
    assert swapped.certificate is not None
    assert swapped.certificate.passed, str(swapped)
    assert len(swapped.census.swapped) == entry.sites, str(swapped.census)
    assert list(model.state_dict()) == keys
    assert [id(p) for p in model.parameters()] == held

    for one in (model, twin):
        step(one, example)
    assert all(ticket.runs or ticket.in_full for ticket in swapped.census.swapped), str(swapped.census)
    for name, tensor in twin.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=1e-3, atol=1e-4, msg=f"{name} after a step")
    twin.load_state_dict(model.state_dict())

    swapped.undo()
    assert [type(module) for module in model.modules()] == classes
    line = f"| {entry.name} | {entry.sites} | {kinds(swapped)} |"
    if os.environ.get("HEADWAY_WRITE_DOCS"):
        write(line)
    assert line in PAGE.read_text(), "HEADWAY_WRITE_DOCS=1 pytest tests/swap/test_zoo.py writes docs/models.md"


def step(model: torch.nn.Module, example: object) -> None:
    """One training step, without dropout so that two models can be compared."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(1)
    out = model(**example) if isinstance(example, dict) else model(*example)
    real = example.get("attention_mask") if isinstance(example, dict) else None
    losses = []
    for x in tensors_of(out):
        if x.requires_grad:
            of_real = x[real.bool()] if real is not None and x.shape[:2] == real.shape else x
            losses.append((of_real.float() ** 2).mean())  # what comes out for filler is nobody's to say
    sum(losses).backward()
    optimizer.step()


def kinds(swapped: headway.Swap) -> str:
    return ", ".join(sorted({ticket.kind for ticket in swapped.census.swapped}))


def write(line: str) -> None:
    text = PAGE.read_text() if PAGE.exists() else ""
    if line not in text:
        PAGE.write_text(text + line + "\n")


def test_the_page_names_the_versions() -> None:
    text = PAGE.read_text()
    assert all(importlib.metadata.version(name) for name in ("transformers", "x-transformers", "diffusers"))
    assert text.startswith("# Models that were swapped")

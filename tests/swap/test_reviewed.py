"""Models that draw, write to their inputs, cast or checkpoint; and proofs that judged nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import headway
from headway.sites.site import Site


class Own(nn.Module):
    """A module that calls F.scaled_dot_product_attention."""

    def __init__(self) -> None:
        super().__init__()
        self.all, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        q, k, v = (y.unflatten(-1, (4, -1)).transpose(1, 2) for y in self.all(x).chunk(3, -1))
        keep = None if attention_mask is None else ~attention_mask[:, None, None]
        return self.out(F.scaled_dot_product_attention(q, k, v, keep).transpose(1, 2).flatten(2))


class Draws(Own):
    """Takes a random number in evaluation too."""

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return x + super().forward(x) * (torch.rand(2, 1, 1) > 0.3)


class Writes(Own):
    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x += 1
        return super().forward(x)


class Checkpoints(Own):
    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False) if self.training else super().forward(x)


class Counts(Own):
    runs = 0

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        self.runs += 1
        return super().forward(x)


def inputs() -> Tensor:
    return torch.randn(2, 9, 32)


def wrong(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    attend = Site.attend
    monkeypatch.setattr(Site, "attend", lambda *a, **k: attend(*a, **k) * factor)


def test_models_that_draw_are_compared_on_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(8):
        torch.manual_seed(seed)
        swapped = headway.swap(Draws(), inputs())
        assert swapped.certificate is not None
        assert swapped.certificate.passed, str(swapped)
        assert "draws random numbers" in swapped.certificate.proofs[0].judge
    wrong(monkeypatch, 1.2)
    torch.manual_seed(0)
    assert not headway.swap(Draws(), inputs()).census.swapped


def test_a_proof_that_judged_nothing_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another model's attention_mask, with True for blocked, was read as transformers': every row was left out."""
    wrong(monkeypatch, 7.0)
    example = {"x": inputs(), "attention_mask": torch.zeros(2, 9, dtype=torch.bool)}
    assert not headway.swap(Own(), example).census.swapped


def test_models_may_write_to_their_inputs() -> None:
    x = inputs()
    kept = x.clone()
    for model in (Writes(), nn.Sequential(nn.ReLU(inplace=True), Own())):
        assert headway.swap(model, x).certificate.passed  # type: ignore[union-attr]
    assert torch.equal(x, kept)


def test_under_autocast_and_in_inference_mode() -> None:
    x = inputs()

    def run(model: nn.Module) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    swapped = headway.swap(nn.Sequential(nn.Linear(32, 32), Own()), run)
    assert swapped.certificate is not None
    assert swapped.certificate.passed, str(swapped)
    assert swapped.certificate.proofs[0].errors[0].worst_before > 1e-4, "proven in bfloat16, as the example runs"
    with torch.inference_mode():
        assert headway.swap(Own(), inputs()).certificate.passed  # type: ignore[union-attr]


def test_what_checkpoints_inside_is_left_alone() -> None:
    (ticket,) = headway.swap(Checkpoints(), inputs()).census.tickets
    assert "checkpoints inside its forward" in ticket.because


def test_the_model_itself_is_not_run() -> None:
    model = Counts()
    headway.inspect(model, inputs())
    headway.swap(model, inputs())
    assert model.runs == 0


def test_a_growing_cache_leaves_few_decisions() -> None:
    model = Own()
    swapped = headway.swap(model, inputs())
    for length in range(1, 60):
        model(torch.randn(2, length, 32))
    assert len(swapped.census.swapped[0].decisions) < 8


def test_a_module_that_pickles_its_own_way() -> None:
    import threading

    class Locked(Own):
        def __init__(self) -> None:
            super().__init__()
            self.lock = threading.Lock()

        def __getstate__(self) -> dict[str, Any]:
            return {name: value for name, value in self.__dict__.items() if name != "lock"}

    model = Locked()
    assert headway.swap(model, inputs()).certificate.passed  # type: ignore[union-attr]
    assert not hasattr(copy.deepcopy(model), "lock")

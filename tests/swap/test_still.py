"""A model held still: what a run changes is put back, whatever its buffers are."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from headway.swap.still import still, unchanged


class Fills(nn.Module):
    """Makes a buffer at its first run, and another anew at each."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("late", None)
        self.register_buffer("anew", torch.zeros(2))
        self.register_buffer("wide", torch.full((1,), float("nan")).expand(3))

    def forward(self, x: Tensor) -> Tensor:
        self.late = x
        self.anew = x
        self.register_buffer("new", x)
        return x


def test_buffers_are_those_of_before() -> None:
    model = Fills()
    before = dict(model._buffers)
    with still(model):
        model(torch.ones(2))
    assert model._buffers.keys() == before.keys()
    assert all(model._buffers[name] is was for name, was in before.items())
    assert model.late is None


def test_a_model_made_for_inference() -> None:
    with torch.inference_mode():
        model = nn.BatchNorm1d(3)
    with torch.inference_mode(), unchanged(model):
        model(torch.randn(4, 3) + 5)
    assert bool((model.running_mean == 0).all())

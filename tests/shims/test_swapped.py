"""A swap of a model that runs on the shims: its calls are redirected as those of the packages are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from headway.shims import installed
from headway.shims.flash_attn import flash_attn_func
from headway.shims.xformers.ops import memory_efficient_attention
from headway.swap import swap


class Flash(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_qkv = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Any:
        return flash_attn_func(*self.to_qkv(x).unflatten(-1, (3, 2, 8)).unbind(2), causal=True)


class Efficient(Flash):
    def forward(self, x: Tensor) -> Any:
        return memory_efficient_attention(*self.to_qkv(x).unflatten(-1, (3, 2, 8)).unbind(2))


@pytest.mark.parametrize("while_installed", [True, False])
@pytest.mark.parametrize("make", [Flash, Efficient])
def test_a_model_on_a_shim_is_swapped_and_proven(make: Callable[[], nn.Module], while_installed: bool) -> None:
    model, x = make(), torch.randn(2, 5, 16)
    before = model(x)
    if while_installed:
        with installed():
            done = swap(model, x)
    else:
        done = swap(model, x)
    (ticket,) = done.census.tickets
    assert ticket.swapped, ticket.because
    torch.testing.assert_close(model(x), before)
    done.undo()
    assert type(model) is make

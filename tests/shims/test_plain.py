"""The dtype that shims compute attention in."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from headway import attention
from headway.shims.flash_attn import flash_attn_func
from headway.shims.xformers.ops import memory_efficient_attention
from headway.shims.xformers.ops.fmha.attn_bias import BlockDiagonalMask

plain = importlib.import_module("headway.shims.plain")


@pytest.mark.parametrize("capability, emulated", [((7, 0), True), ((7, 5), True), ((8, 0), False), ((9, 0), False)])
def test_gpus_without_bfloat16_are_told_of_once(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], emulated: bool
) -> None:
    monkeypatch.setattr(plain, "_TOLD", set())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla V100")
    if emulated:
        with pytest.warns(RuntimeWarning, match="Tesla V100 has no bfloat16 arithmetic.* in float16"):
            assert plain.emulates_bfloat16(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert plain.emulates_bfloat16(0) is emulated


@pytest.mark.parametrize(
    "call",
    [
        lambda q: flash_attn_func(q, q, q),
        lambda q: memory_efficient_attention(q, q, q),
        lambda q: memory_efficient_attention(q, q, q, attn_bias=BlockDiagonalMask.from_seqlens([2, 3])),
    ],
    ids=["flash_attn", "xformers", "xformers packed"],
)
def test_both_shims_compute_in_what_the_device_has(
    monkeypatch: pytest.MonkeyPatch, call: Callable[[Tensor], Tensor]
) -> None:
    ran: list[torch.dtype] = []

    def note(q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        ran.append(q.dtype)
        return attention(q, *args, **kwargs)

    monkeypatch.setattr(plain, "attention", note)
    monkeypatch.setattr(plain, "_as_computed", lambda x: x.half() if x.dtype == torch.bfloat16 else x)
    assert call(torch.randn(1, 5, 2, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert call(torch.randn(1, 5, 2, 8)).dtype == torch.float32
    assert set(ran) == {torch.float16, torch.float32}


@pytest.mark.parametrize("call", [flash_attn_func, memory_efficient_attention])
def test_autocast_does_not_narrow_what_is_given(call: Callable[..., Tensor]) -> None:
    q, k, v = torch.randn(3, 2, 5, 4, 8, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        out = call(q.float(), k.float(), v.float())
    torch.testing.assert_close(out.double(), call(q, k, v), rtol=1e-4, atol=1e-5)

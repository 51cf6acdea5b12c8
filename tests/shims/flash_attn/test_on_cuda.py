"""On a GPU: right, without waiting for the device, captured in graphs, compiled; wrong lengths fail there."""

from __future__ import annotations

import importlib
import itertools
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from shims.flash_attn.truth import packed, rows
from torch import Tensor
from waiting import no_waiting

from headway.shims.flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache

plain = importlib.import_module("headway.shims.plain")

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
LENGTHS = {
    "alike": ((64, 64, 64), (64, 64, 64)),
    "ragged": ((100, 0, 1, 37), (100, 0, 1, 37)),
    "cross": ((3, 20, 1), (40, 2, 64)),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "all": {},
    "causal": {"causal": True},
    "window": {"window_size": (9, 3)},
    "softcap": {"softcap": 5.0, "causal": True},
}


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)


def starts(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32).cuda()


def close(got: Tensor, wanted: Tensor) -> None:
    """bfloat16 beside float64: the worst element, and on the whole."""
    away = (got.detach().cpu().double() - wanted.detach()).abs()
    size = wanted.detach().abs().max().item()
    assert away.max().item() <= 0.03 * size
    assert away.square().mean().sqrt().item() <= 0.004 * size


def compare(run: Callable[..., Tensor], right: Callable[..., Any], inputs: tuple[Tensor, ...]) -> None:
    exact = tuple(x.detach().cpu().double().requires_grad_() for x in inputs)
    out, wanted = run(*inputs), right(*exact)[0]
    close(out, wanted)
    toward = torch.randn_like(wanted)
    gradients = torch.autograd.grad(out, inputs, toward.to(out)), torch.autograd.grad(wanted, exact, toward)
    for got, expected in zip(*gradients, strict=True):
        close(got, expected)


@pytest.mark.parametrize("dropout", [False, True], ids=["", "as with dropout"])
@pytest.mark.parametrize("option", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_packed(
    monkeypatch: pytest.MonkeyPatch, lengths: tuple[tuple[int, ...], ...], option: dict[str, Any], dropout: bool
) -> None:
    """Also laid out as rows, as is done for dropout."""
    if dropout:
        monkeypatch.setattr("headway.sites.packed._kernels_know_documents", lambda q: False)
    q_starts, k_starts = (starts(each) for each in lengths)
    longest = max(lengths[0]), max(lengths[1])
    operands = draw(sum(lengths[0]), 4, 64), draw(sum(lengths[1]), 2, 64), draw(sum(lengths[1]), 2, 64)
    compare(
        lambda q, k, v: flash_attn_varlen_func(
            q, k, v, q_starts, q_starts if lengths[0] == lengths[1] else k_starts, *longest, **option
        ),
        lambda q, k, v: packed(q, k, v, *lengths, **option),
        operands,
    )


@pytest.mark.parametrize("option", OPTIONS.values(), ids=OPTIONS)
def test_rows(option: dict[str, Any]) -> None:
    operands = draw(2, 40, 4, 64), draw(2, 70, 2, 64), draw(2, 70, 2, 64)
    compare(lambda q, k, v: flash_attn_func(q, k, v, **option), lambda q, k, v: rows(q, k, v, **option), operands)


def call(name: str) -> Callable[[], Any]:
    """One with lengths that nothing has been made of yet."""
    x, cache, q = draw(192, 4, 64), draw(3, 256, 4, 64).detach(), draw(3, 1, 4, 64)
    if name == "cache":
        ends = torch.tensor([3, 200, 0]).int().cuda()
        return lambda: flash_attn_with_kvcache(q, cache, cache, q, q, cache_seqlens=ends, causal=True)
    lengths = (64, 64, 64) if name == "alike" else (100, 60, 32)
    at, most = starts(lengths), max(lengths)
    other = starts((90, 70, 32)) if name == "cross" else at
    dropout = 0.1 if name == "dropout" else 0.0
    return lambda: flash_attn_varlen_func(
        x, x, x, at, other, most, 90 if name == "cross" else most, dropout, causal=True
    )


@pytest.mark.parametrize("name", ["alike", "ragged", "cross", "dropout", "cache"])
def test_nothing_waits_for_the_device(name: str) -> None:
    call(name)()  # plans and compiled kernels
    fresh = call(name)
    with no_waiting():
        out = fresh()
        if out.requires_grad:
            out.sum().backward()


@pytest.mark.parametrize("name", ["alike", "ragged", "cache"])
@torch.no_grad()
def test_a_cuda_graph_replays_it(name: str) -> None:
    run = call(name)
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = run()
    graph.replay()
    torch.testing.assert_close(recorded, run())


@pytest.mark.parametrize("name", ["alike", "ragged", "cross"])
def test_one_graph_compiled(name: str) -> None:
    run = call(name)
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(run, fullgraph=True)(), run(), atol=2e-2, rtol=2e-2)


def test_wrong_lengths_fail_on_the_device() -> None:
    code = """
import torch
from headway.shims.flash_attn import flash_attn_varlen_func
x = torch.randn(8, 2, 64, device="cuda", dtype=torch.bfloat16)
at = torch.tensor([0, 3, 7], device="cuda", dtype=torch.int32)
flash_attn_varlen_func(x, x, x, at, at, 4, 4)
torch.cuda.synchronize()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "_assert_async" in done.stderr


def test_bfloat16_is_computed_in_float16_where_it_is_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []
    real = plain.attention
    monkeypatch.setattr(plain, "emulates_bfloat16", lambda device: True)
    monkeypatch.setattr(plain, "attention", lambda q, *args, **how: seen.append(q.dtype) or real(q, *args, **how))
    operands = draw(2, 40, 4, 64), draw(2, 70, 2, 64), draw(2, 70, 2, 64)
    compare(lambda q, k, v: flash_attn_func(q, k, v), lambda q, k, v: rows(q, k, v), operands)
    assert flash_attn_func(*operands).dtype == torch.bfloat16
    assert set(seen) == {torch.float16}

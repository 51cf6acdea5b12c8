"""xFormers' attention on a GPU: as right as plain PyTorch there, without waiting for the device, and in CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from shims.biases import CASES
from torch import Tensor
from waiting import no_waiting

from headway.shims.xformers import ops as xops
from headway.shims.xformers.ops.fmha import attn_bias as ab

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

NAMES = (
    "local from bottom right 3x6", "BlockDiagonalMask, alike", "BlockDiagonalMask, nothing in some",
    "causal from bottom right, more keys", "causal, more queries", "padded causal, decoding",
    "padded causal, more keys", "causal, nothing in some", "causal local, nothing in some",
    "gappy causal, more keys", "paged causal, decoding", "paged gappy causal, decoding",
)  # fmt: skip


def rand(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True)


def textbook(q: Tensor, k: Tensor, v: Tensor, sees: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The answer and its gradients of q, k and v, worked out in `dtype`."""
    q, k, v = learns = tuple(x.detach().to(dtype).requires_grad_() for x in (q, k, v))
    logits = (q.transpose(1, 2) @ k.permute(0, 2, 3, 1) * q.shape[-1] ** -0.5).masked_fill(~sees, float("-inf"))
    some = sees.any(-1, keepdim=True)
    out = ((torch.where(some, logits, 0.0).softmax(-1) * some) @ v.transpose(1, 2)).transpose(1, 2)
    return out, *torch.autograd.grad(out.sum(), learns)


def answered(q: Tensor, k: Tensor, v: Tensor, bias: Any) -> tuple[Tensor, ...]:
    out = xops.memory_efficient_attention(q, k, v, bias)
    return out, *torch.autograd.grad(out.sum(), (q, k, v))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_as_right_as_plain_pytorch_and_without_waiting(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]()
    sees, (queries, keys) = case.sees.cuda(), case.sees.shape
    q, k, v = (rand(1, length, 4, 64, dtype=dtype) for length in (queries, keys, keys))
    bias, fresh = (made.bias.to("cuda") for made in (case, CASES[name]()))
    answered(q, k, v, bias)  # kernels are found and compiled at the first call
    with no_waiting():
        got = answered(q, k, v, bias)
        answered(q, k, v, fresh)
    truth, plain = (textbook(q, k, v, sees, wide) for wide in (torch.float64, dtype))
    for mine, theirs, right in zip(got, plain, truth, strict=True):
        error, allowed = ((x.double() - right).abs().max() for x in (mine, theirs))
        assert error <= 2 * allowed + 4 * torch.finfo(dtype).eps * right.abs().max()


def recorded(run: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    return graph, out


@torch.no_grad()
def test_a_recorded_graph_follows_a_growing_cache() -> None:
    room, lengths = 64, [3, 20, 1]
    bias = ab.BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens([1, 1, 1], room, lengths)
    q, k, v = (rand(1, length, 4, 64) for length in (3, 3 * room, 3 * room))
    graph, out = recorded(lambda: xops.memory_efficient_attention(q, k, v, bias))
    for step in range(3):
        now = [length + step for length in lengths]
        fresh = ab.BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens([1, 1, 1], room, now)
        graph.replay()
        sees = fresh.materialize((3, 3 * room), device="cuda") == 0
        with torch.enable_grad():
            want, *_ = textbook(q, k, v, sees, torch.float64)
        torch.testing.assert_close(out.double(), want, rtol=2e-3, atol=2e-3)
        bias.k_seqinfo.seqlen.add_(1)


@torch.no_grad()
def test_a_recorded_graph_follows_packed_sequences() -> None:
    bias = ab.BlockDiagonalMask.from_seqlens([40, 24]).make_causal()
    q, k, v = (rand(1, 64, 4, 64) for _ in range(3))
    graph, out = recorded(lambda: xops.memory_efficient_attention(q, k, v, bias))
    for lengths in ([40, 24], [30, 34], [24, 40]):
        bias.q_seqinfo.from_seqlens_inplace(lengths)
        graph.replay()
        sees = ab.BlockDiagonalMask.from_seqlens(lengths).make_causal().materialize((64, 64), device="cuda") == 0
        with torch.enable_grad():
            want, *_ = textbook(q, k, v, sees, torch.float64)
        torch.testing.assert_close(out.double(), want, rtol=2e-3, atol=2e-3)

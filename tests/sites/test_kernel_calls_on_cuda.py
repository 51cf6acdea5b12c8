"""On a GPU, with the packages themselves: a model that calls flash-attn-4 or xFormers, swapped, trained and put back.

The two are never on one path: each test runs where its package is.
"""

from __future__ import annotations

import importlib
from importlib import util
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import headway

pytestmark = [
    pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore:warmup, rep, and use_cuda_graph:DeprecationWarning"),  # xFormers', of Triton
]  # fmt: skip
LENGTHS = [100, 28, 128]
flash_attn_func: Any = None
flash_attn_varlen_func: Any = None
memory_efficient_attention: Any = None
LowerTriangularMask: Any = None
fmha: Any = None


class Attention(nn.Module):
    """As their users write it: the function is a global of the module's file."""

    home: str
    functions: tuple[str, ...]

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(128, 384), nn.Linear(128, 128)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        heads = self.attend(*self.qkv(x).unflatten(-1, (3, 2, 64)).unbind(2))
        return x + self.out(heads.flatten(2))


class Flash4(Attention):
    home, functions = "flash_attn.cute", ("flash_attn_func",)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attn_func(q, k, v, causal=True)[0]


class Flash4Packed(Attention):
    home, functions = "flash_attn.cute", ("flash_attn_varlen_func",)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        starts = torch.tensor([0, *LENGTHS], device=q.device).cumsum(0, dtype=torch.int32)
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        out, _ = flash_attn_varlen_func(
            q, k, v, cu_seqlens_q=starts, cu_seqlens_k=starts, max_seqlen_q=128, max_seqlen_k=128
        )
        return out[None]


class XFormers(Attention):
    home, functions = "xformers.ops", ("memory_efficient_attention", "LowerTriangularMask")

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return memory_efficient_attention(q, k, v, attn_bias=LowerTriangularMask())


class XFormersPacked(Attention):
    home, functions = "xformers.ops", ("memory_efficient_attention", "fmha")

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bias = fmha.attn_bias.BlockDiagonalMask.from_seqlens(LENGTHS, device=q.device)
        return memory_efficient_attention(q, k, v, attn_bias=bias)


@pytest.mark.parametrize("kind", [Flash4, Flash4Packed, XFormers, XFormersPacked], ids=lambda kind: kind.__name__)
def test_a_model_that_calls_the_package_itself(kind: type[Attention], monkeypatch: pytest.MonkeyPatch) -> None:
    if util.find_spec(kind.home.split(".")[0]) is None or util.find_spec(kind.home) is None:
        pytest.skip(f"needs {kind.home}")
    package = importlib.import_module(kind.home)
    for each in kind.functions:
        monkeypatch.setitem(globals(), each, getattr(package, each))
    torch.manual_seed(0)
    model = nn.Sequential(kind(), kind()).to("cuda", torch.bfloat16)
    x = torch.randn(1, sum(LENGTHS), 128, device="cuda", dtype=torch.bfloat16)

    def passed() -> dict[str, Any]:
        model.zero_grad()
        out = model(x)
        out.float().square().mean().backward()
        return {"out": out.detach(), **{at: each.grad for at, each in model.named_parameters()}}

    before = passed()
    swap = headway.swap(model, x)
    assert [ticket.name for ticket in swap.census.swapped] == ["0", "1"], str(swap)
    assert swap.certificate is not None
    assert swap.certificate.passed, str(swap)
    after = passed()
    for at, value in before.items():
        assert float((after[at] - value).float().norm() / value.float().norm()) < 2e-2, at
    swap.undo()
    assert torch.equal(model(x), before["out"])

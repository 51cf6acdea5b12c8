"""Code that imports xformers at the top, as it is written elsewhere, runs on Headway and trains."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from forked import fresh
from torch import Tensor, nn

import headway
from headway.shims import installed
from headway.shims.xformers import ops as xops

CROPS = '''
import torch
from torch import nn
import xformers.ops as xops
from xformers.ops import SwiGLU, fmha, index_select_cat, memory_efficient_attention, scaled_index_add, unbind
from xformers.ops.fmha.attn_bias import BlockDiagonalMask

class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x, attn_bias=None):
        q, k, v = unbind(self.qkv(x).unflatten(-1, (3, self.heads, -1)), 2)
        return self.proj(memory_efficient_attention(q, k, v, attn_bias=attn_bias).flatten(2))

def together(crops, kept, memo={}):
    """The picked samples of all crops end to end, and the bias that keeps them apart."""
    sizes = tuple((len(rows), x.shape[1]) for rows, x in zip(kept, crops))
    if sizes not in memo:
        bias = BlockDiagonalMask.from_seqlens([length for count, length in sizes for _ in range(count)])
        bias._batch_sizes = [count for count, _ in sizes]
        memo[sizes] = bias
    packed = index_select_cat([x.flatten(1) for x in crops], kept).view(1, -1, crops[0].shape[-1])
    return memo[sizes], packed

class Block(nn.Module):
    """A block whose branches see some of the samples only, and all crops in one call."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.mlp = Attention(width, heads), SwiGLU(width, 2 * width)
        self.gamma = nn.Parameter(torch.full((width,), 0.5))

    def forward(self, crops, kept):
        for branch in (lambda x, bias: self.attn(self.norm1(x), bias), lambda x, bias: self.mlp(self.norm2(x))):
            bias, packed = together(crops, kept)
            parts = bias.split(branch(packed, bias))
            crops = [
                scaled_index_add(x.clone(), rows, part, scaling=self.gamma, alpha=len(x) / len(rows))
                for x, rows, part in zip(crops, kept, parts)
            ]
        return crops
'''


@pytest.fixture
def xformers() -> Iterator[types.ModuleType]:
    with installed("xformers"):
        yield importlib.import_module("xformers")


def written(source: str) -> types.ModuleType:
    module = types.ModuleType("theirs")
    exec(source, vars(module))
    return module


def plainly(block: nn.Module, crops: list[Tensor], kept: list[Tensor]) -> list[Tensor]:
    """The same block, one crop and one sample at a time, by the formula."""

    def attend(x: Tensor) -> Tensor:
        q, k, v = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, block.attn.heads, -1)).permute(1, 2, 0, 3)
        weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        return block.attn.proj((weights @ v).transpose(0, 1).flatten(1))

    def widen(x: Tensor) -> Tensor:
        one, two = block.mlp.w12(block.norm2(x)).chunk(2, -1)
        return block.mlp.w3(F.silu(one) * two)

    for branch in (attend, widen):
        out = []
        for x, rows in zip(crops, kept, strict=True):
            picked = rows.tolist()
            scale = block.gamma * len(x) / len(rows)
            out.append(torch.stack([s + scale * branch(s) if i in picked else s for i, s in enumerate(x)]))
        crops = out
    return crops


def crops_and_rows() -> tuple[list[Tensor], list[Tensor]]:
    draw = torch.Generator().manual_seed(3)
    crops = [torch.randn(n, length, 16, generator=draw, dtype=torch.float64) for n, length in ((2, 10), (4, 5), (1, 1))]
    return crops, [torch.tensor(rows) for rows in ([1, 0], [3, 1], [0])]


def test_crops_of_several_sizes_train_in_one_call(xformers: types.ModuleType) -> None:
    block = written(CROPS).Block(16, 4).double()
    crops, kept = crops_and_rows()
    mine, theirs = block(crops, kept), plainly(block, crops, kept)
    names = dict(block.named_parameters())
    assert {"mlp.w12.weight", "mlp.w3.bias", "attn.qkv.weight"} <= names.keys()
    losses = [sum(x.square().sum() for x in found) for found in (mine, theirs)]
    torch.testing.assert_close(mine, theirs)
    grads = [torch.autograd.grad(loss, list(names.values())) for loss in losses]
    for name, one, other in zip(names, *grads, strict=True):
        torch.testing.assert_close(one, other, msg=lambda text, name=name: f"{name}: {text}")
    optimizer = torch.optim.AdamW(block.parameters(), lr=1e-2)
    seen = []
    for _ in range(5):
        loss = sum(x.square().mean() for x in block(crops, kept))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    assert seen[-1] < seen[0]


def test_a_swap_takes_such_a_model_too(xformers: types.ModuleType) -> None:
    theirs = written(CROPS)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = theirs.Attention(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.attn(x, theirs.xops.LowerTriangularMask())

    model, x = Model(), torch.randn(2, 6, 16)
    want = model(x)
    swap = headway.swap(model, x)
    assert [ticket.swapped for ticket in swap.census.tickets] == [True]
    torch.testing.assert_close(model(x), want)
    swap.undo()
    assert torch.equal(model(x), want)


def test_names_lead_to_one_module_each(xformers: types.ModuleType) -> None:
    for name in ("ops", "ops.fmha", "ops.fmha.attn_bias", "ops.fmha.cutlass", "ops.swiglu_op", "info"):
        theirs = importlib.import_module(f"xformers.{name}")
        assert theirs is importlib.import_module(f"headway.shims.xformers.{name}")
        assert theirs.__spec__.name == f"headway.shims.xformers.{name}"
    with pytest.raises(ModuleNotFoundError, match="Headway answers for xformers"):
        importlib.import_module("xformers.sparse")
    with pytest.raises(ImportError, match="sparsify24"):
        exec("from xformers.ops import sparsify24")


def test_headway_does_not_compute_with_its_own_shim(xformers: types.ModuleType) -> None:
    q = torch.randn(1, 2, 5, 16)
    decision = headway.explain(q, q, q)
    assert "xformers" not in decision.accepted
    assert [name for name in sys.modules if name.startswith("xformers")] == ["xformers"]  # as only that was imported


def test_info_runs_as_a_program() -> None:
    told = subprocess.run(
        [sys.executable, "-m", "headway.shims.xformers.info"], capture_output=True, text=True, check=True
    ).stdout
    assert told.startswith("xFormers 0.0.35")
    assert "memory_efficient_attention.cutlassF+headway" in told


DIFFUSERS = """
import warnings
warnings.simplefilter("ignore")
import torch, headway.shims
headway.shims.install("xformers", as_distribution=True)
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, XFormersAttnProcessor
from diffusers.utils.import_utils import is_xformers_available
assert is_xformers_available()
layer = Attention(32, heads=4, dim_head=8).double()
x = torch.randn(2, 7, 32, dtype=torch.float64)
padding = torch.zeros(2, 1, 7, dtype=torch.float64)
padding[0, :, 5:] = -10000.0
for mask in (None, padding):
    answers = []
    for processor in (AttnProcessor2_0(), XFormersAttnProcessor()):
        layer.set_processor(processor)
        answers.append(layer(x, attention_mask=mask))
    torch.testing.assert_close(*answers)
q = torch.randn(2, 7, 4, 8)
for causal in (False, True):
    named = [dispatch_attention_fn(q, q, q, is_causal=causal, backend=name) for name in ("native", "xformers")]
    torch.testing.assert_close(*named)
print("as without it")
"""


def test_diffusers_finds_the_shim_and_gives_its_own_answers(tmp_path: Path) -> None:
    status, told = fresh(DIFFUSERS, folder=tmp_path)
    assert status == 0, told
    assert told.endswith("as without it\n")


def test_what_the_page_about_it_lists_is_there() -> None:
    page = (Path(__file__).parents[2] / "docs" / "xformers.md").read_text()
    for name in re.findall(r"`(?:fmha\.)?(\w+)`", page.split("## What there is")[1].split("What else")[0]):
        if name not in ("attn_bias", "materialize", "from_seqlens", "from_tensor_list", "split", "to"):
            assert any(hasattr(place, name) for place in (xops, xops.fmha)) or name == "output_dtype", name

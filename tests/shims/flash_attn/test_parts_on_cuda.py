"""What surrounds flash_attn's functions, on a GPU: without waiting for the device, in CUDA graphs, equal to the CPU."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from deck import Source
from torch import Tensor, nn
from waiting import no_waiting

from headway.shims.flash_attn.layers.rotary import RotaryEmbedding, apply_rotary_emb
from headway.shims.flash_attn.losses.cross_entropy import CrossEntropyLoss
from headway.shims.flash_attn.modules.block import Block
from headway.shims.flash_attn.modules.mha import MHA
from headway.shims.flash_attn.modules.mlp import FusedMLP, GatedMlp
from headway.shims.flash_attn.ops.layer_norm import dropout_add_layer_norm_subset
from headway.shims.flash_attn.ops.triton.layer_norm import RMSNorm, layer_norm_fn

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

LENGTHS, DIM = (5, 1, 10), 64


class Turned(nn.Module):
    """Packed tokens, each from its sequence's own offset."""

    def __init__(self) -> None:
        super().__init__()
        angles = Source("angles").normal(20, 16)
        starts = F.pad(torch.tensor(LENGTHS).cumsum(0), (1, 0)).int()
        for name, each in (("cos", angles.cos()), ("sin", angles.sin()), ("starts", starts)):
            self.register_buffer(name, each)
        self.register_buffer("offsets", torch.tensor([3, 0, 9]))

    def forward(self, x: Tensor) -> Tensor:
        x = (x * 1).view(-1, 2, 32)
        return apply_rotary_emb(x, self.cos, self.sin, False, True, self.offsets, self.starts, max(LENGTHS))


class Subset(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.register_buffer("rows", torch.tensor([1, 0, 2] * 5 + [0]).int().cumsum(0).int() // 2)
        self.register_buffer("first", torch.arange(1, 17).int())

    def forward(self, x: Tensor) -> Tensor:
        return dropout_add_layer_norm_subset(
            x,
            x,
            self.norm.weight,
            self.norm.bias,
            0.0,
            1e-5,
            x0_subset=self.rows,
            out_subset=self.first,
            out_numrows=16,
        )


class Loss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.loss = CrossEntropyLoss(label_smoothing=0.1, lse_square_scale=0.1, ignore_index=3, inplace_backward=True)
        self.register_buffer("labels", torch.arange(16))

    def forward(self, x: Tensor) -> Tensor:
        return self.loss(x * 1, self.labels)


class Packed(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.mha = MHA(DIM, 2, use_flash_attn=True, **options)
        self.register_buffer("starts", F.pad(torch.tensor(LENGTHS).cumsum(0), (1, 0)).int())

    def forward(self, x: Tensor) -> Tensor:
        return self.mha(x, cu_seqlens=self.starts, max_seqlen=max(LENGTHS))


class Padded(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.mha = MHA(DIM, 2, **options)
        self.register_buffer("real", torch.arange(8) < torch.tensor([3, 8])[:, None])

    def forward(self, x: Tensor) -> Tensor:
        return self.mha(x.view(2, 8, DIM), key_padding_mask=self.real)


class Batched(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        return self.inner(x.view(2, 8, DIM))


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = RMSNorm(DIM)

    def forward(self, x: Tensor) -> Any:
        return layer_norm_fn(x, self.norm.weight, None, x, rowscale=x[:, 0], prenorm=True, is_rms_norm=True)


PARTS: dict[str, Callable[[], nn.Module]] = {
    "rotary, packed": Turned,
    "norm of a subset": Subset,
    "norm of a sum": Fused,
    "loss": Loss,
    "mlp": partial(FusedMLP, DIM, checkpoint_lvl=1),
    "attention": lambda: Batched(MHA(DIM, 2, causal=True, rotary_emb_dim=32, use_flash_attn=True)),
    "attention, xpos": lambda: Batched(MHA(DIM, 2, num_heads_kv=1, rotary_emb_dim=16, rotary_emb_scale_base=512)),
    "attention, packed": partial(Packed, causal=True),
    "attention, padded": partial(Padded, causal=True),
    "block": lambda: Batched(
        Block(
            DIM, partial(MHA, num_heads=2, causal=True, use_flash_attn=True), partial(GatedMlp, activation=F.silu),
            RMSNorm, fused_dropout_add_ln=True,
        )
    ),
}  # fmt: skip


def answered(part: nn.Module, x: Tensor) -> list[Tensor]:
    out = part(x)
    ends = list(out) if isinstance(out, tuple) else [out]
    pushes = [torch.arange(each.numel(), device=each.device).to(each.dtype).sin().view_as(each) for each in ends]
    return [*ends, *torch.autograd.grad(ends, [x, *part.parameters()], pushes)]


@pytest.mark.parametrize("name", PARTS)
def test_nothing_waits_for_the_device_and_the_answer_is_the_cpus(name: str) -> None:
    torch.manual_seed(0)
    part = PARTS[name]()
    x = Source("x").normal(16, DIM).requires_grad_()
    truth = answered(copy.deepcopy(part).double(), x)
    mine, there = copy.deepcopy(part).cuda(), x.detach().float().cuda().requires_grad_()
    answered(mine, there)  # kernels are found and compiled at the first call
    with no_waiting():
        got = answered(mine, there)
    for one, true in zip(got, truth, strict=True):
        near = 2e-3 * true.abs().max().item()  # TensorFloat32 may be on
        torch.testing.assert_close(one.double().cpu(), true, rtol=2e-3, atol=near)


@pytest.mark.parametrize("name", PARTS)
def test_parts_go_into_a_cuda_graph(name: str) -> None:
    part, x = PARTS[name]().cuda().half().eval(), torch.randn(16, DIM, device="cuda", dtype=torch.float16)
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                part(x)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = part(x)
        x.copy_(torch.randn_like(x))
        graph.replay()
        torch.testing.assert_close(out, part(x), rtol=1e-2, atol=1e-2)


def test_a_position_past_the_tables_is_caught_on_the_device() -> None:
    """In a process of its own: a failed assertion ends all CUDA work of the process."""
    code = (
        "import torch\n"
        "from headway.shims.flash_attn.layers.rotary import apply_rotary_emb\n"
        "x, table = torch.ones(1, 2, 1, 4, device='cuda'), torch.ones(4, 2, device='cuda')\n"
        "apply_rotary_emb(x, table, table, seqlen_offsets=torch.tensor([3], device='cuda'))\n"
        "torch.cuda.synchronize()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "assert" in done.stderr.lower()


def test_tables_of_the_embedding_follow_the_device() -> None:
    rotary = RotaryEmbedding(16)
    rotary(torch.randn(1, 5, 3, 1, 16))
    rotary.cuda()(torch.randn(1, 5, 3, 1, 16, device="cuda"))
    assert rotary._cos_cached is not None
    assert rotary._cos_cached.is_cuda

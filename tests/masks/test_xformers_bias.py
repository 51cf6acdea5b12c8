"""Masks as xFormers' biases, by its own `materialize` where it is installed and by a stand-in of it everywhere."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import sys
import types
from typing import Any

import by_hand
import pytest
import torch
from drawn import Pair, frames, pairs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from headway.masks import (
    Alibi,
    Bias,
    Causal,
    Dense,
    Documents,
    Frame,
    Full,
    Padding,
    Window,
)  # fmt: skip

# -- a stand-in: the classes of xformers.ops.fmha.attn_bias that are used, as their documentation has them ------------


class Stands:
    def materialize(self, shape: tuple[int, ...]) -> Tensor:
        q_len, kv_len = shape[-2:]
        cells = [[0.0 if self.sees(q, k, kv_len - q_len) else -torch.inf for k in range(kv_len)] for q in range(q_len)]
        return torch.tensor(cells).expand(shape)


class LowerTriangularMask(Stands):
    def sees(self, q: int, k: int, shift: int) -> bool:
        return k <= q


class LowerTriangularFromBottomRightMask(Stands):
    def sees(self, q: int, k: int, shift: int) -> bool:
        return k <= q + shift


@dataclasses.dataclass
class LocalAttentionFromBottomRightMask(Stands):
    window_left: int
    window_right: int

    def sees(self, q: int, k: int, shift: int) -> bool:
        return q + shift - self.window_left <= k <= q + shift + self.window_right


@dataclasses.dataclass
class BlockDiagonalMask(Stands):
    q_lengths: list[int]
    k_lengths: list[int]

    @classmethod
    def from_seqlens(cls, q_seqlen: list[int], kv_seqlen: list[int] | None = None, *, device: object) -> Any:
        assert isinstance(device, torch.device)
        assert all(type(n) is int for n in (*q_seqlen, *(kv_seqlen or ())))
        return cls(q_seqlen, q_seqlen if kv_seqlen is None else kv_seqlen)

    def make_causal(self) -> Any:
        return BlockDiagonalCausalMask(self.q_lengths, self.k_lengths)

    def sees(self, q: int, k: int, shift: int) -> bool:
        (q_doc, q), (k_doc, k) = place(q, self.q_lengths), place(k, self.k_lengths)
        return q_doc == k_doc and self.within(q, k)

    def within(self, q: int, k: int) -> bool:
        return True


class BlockDiagonalCausalMask(BlockDiagonalMask):
    def within(self, q: int, k: int) -> bool:
        return k <= q


def place(token: int, lengths: list[int]) -> tuple[int, int]:
    """A token's document, and its index there."""
    for document, (start, end) in enumerate(itertools.pairwise(itertools.accumulate(lengths, initial=0))):
        if start <= token < end:
            return document, token - start
    raise AssertionError("past the last document")


CLASSES = (
    LowerTriangularMask, LowerTriangularFromBottomRightMask, LocalAttentionFromBottomRightMask, BlockDiagonalMask,
    BlockDiagonalCausalMask,
)  # fmt: skip


@pytest.fixture(params=["stand-in", "installed"] if importlib.util.find_spec("xformers") else ["stand-in"])
def attn_bias(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    if request.param == "stand-in":
        names = ("xformers", "xformers.ops", "xformers.ops.fmha", "xformers.ops.fmha.attn_bias")
        modules = [types.ModuleType(name) for name in names]
        for outer, inner in itertools.pairwise(modules):
            setattr(outer, inner.__name__.rpartition(".")[2], inner)
        for kind in CLASSES:
            setattr(modules[-1], kind.__name__, kind)
        modules[2].flash = types.SimpleNamespace(FwOp=types.SimpleNamespace())
        for module in modules:
            monkeypatch.setitem(sys.modules, module.__name__, module)
    fmha = importlib.import_module("xformers.ops.fmha")
    # As on an H200 where its flash kernels run.
    monkeypatch.setattr(fmha.flash.FwOp, "is_available", lambda: True, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return fmha.attn_bias


# -- tests ------------------------------------------------------------------------------------------------------------


def materialized(bias: Any, frame: Frame) -> Tensor:
    """The bias (batch, heads, queries, keys), however it is said."""
    shape = (frame.batch, frame.heads, frame.q_len, frame.kv_len)
    if bias is None:
        return torch.zeros(shape)
    if isinstance(bias, Tensor):
        assert bias.shape == shape
        return bias.float()
    if "BlockDiagonal" not in type(bias).__name__:
        return bias.materialize(shape).float()
    # Packed: the batch lies end to end, and entries must not see each other.
    rows = bias.materialize((frame.batch * frame.q_len, frame.batch * frame.kv_len))
    rows = rows.view(frame.batch, frame.q_len, frame.batch, frame.kv_len)
    for i, j in itertools.product(range(frame.batch), repeat=2):
        assert i == j or rows[i, :, j].isneginf().all()
    return torch.stack([rows[i, :, i] for i in range(frame.batch)])[:, None].expand(shape)


@given(st.data())
@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_mask(attn_bias: Any, data: st.DataObject) -> None:
    frame = data.draw(frames())
    pair: Pair = data.draw(pairs(frame))
    truth = by_hand.table(frame, pair.sees)
    bias = pair.mask.to_xformers(frame, data.draw(st.sampled_from((torch.float32, torch.bfloat16))))
    assert torch.equal(materialized(bias, frame), torch.zeros(truth.shape).masked_fill(~truth, -torch.inf))


SQUARE, WIDE = Frame(6, 6, 2, 2), Frame(3, 7, 2, 2)
NATIVE = [
    (Full(), SQUARE, None),
    (Causal(), SQUARE, "LowerTriangularMask"),
    (Causal(align="upper-left"), WIDE, "LowerTriangularMask"),
    (Causal(align="lower-right"), WIDE, "LowerTriangularFromBottomRightMask"),
    (Window(1, 2), SQUARE, "LocalAttentionFromBottomRightMask"),
    (Window(1, 0, align="lower-right"), WIDE, "LocalAttentionFromBottomRightMask"),
    (Window(2, None) & Causal(), SQUARE, "LocalAttentionFromBottomRightMask"),
    (Window(None, 1), SQUARE, "LocalAttentionFromBottomRightMask"),
    (Documents([2, 0, 4]), SQUARE, "BlockDiagonalMask"),
    (Documents([1, 2], [3, 4]), WIDE, "BlockDiagonalMask"),
    (Documents([2, 4]) & Causal(), SQUARE, "BlockDiagonalCausalMask"),
    (Documents.from_cu_seqlens(torch.tensor([0, 2, 6]), longest=4, total=6), SQUARE, "BlockDiagonalMask"),
]
TENSOR = [
    (Window(1, 2, align="upper-left"), WIDE),
    (Documents([2, 4], [4, 2]) & Causal(), SQUARE),  # not causal within each document
    (Documents([2, 4]) & Window(2, 0), SQUARE),
    (Causal(align="lower-right"), Frame(7, 3, 2, 2)),  # rows that see nothing
    (Documents([2, 4]) & Documents([3, 3]), SQUARE),
    (Causal() & Padding([3, 6]), SQUARE),
    (Dense(torch.eye(6).bool()), SQUARE),
]


@pytest.mark.parametrize(("mask", "frame", "name"), NATIVE, ids=lambda value: repr(value))
def test_native(attn_bias: Any, mask: Any, frame: Frame, name: str | None) -> None:
    bias = mask.to_xformers(frame, torch.bfloat16)
    assert bias is None if name is None else type(bias) is getattr(attn_bias, name)
    want = mask.to_additive(frame, torch.float32).expand(frame.batch, frame.heads, -1, -1)
    assert torch.equal(materialized(bias, frame), want)


@pytest.mark.parametrize(
    ("dtype", "capability", "native"),
    [
        (torch.bfloat16, (9, 0), True),
        (torch.float16, (8, 0), True),
        (torch.float16, (7, 5), False),
        (torch.float32, (9, 0), False),
    ],
)
def test_windows_where_a_kernel_knows_them(
    attn_bias: Any, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, capability: tuple[int, int], native: bool
) -> None:
    flash = importlib.import_module("xformers.ops.fmha").flash
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    for available in (True, False):
        monkeypatch.setattr(flash.FwOp, "is_available", lambda available=available: available)
        bias = Window(1, 2).to_xformers(SQUARE, dtype)
        assert isinstance(bias, Tensor) is not (native and available)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("mask", "frame"), TENSOR, ids=lambda value: repr(value))
def test_tensor(attn_bias: Any, mask: Any, frame: Frame, dtype: torch.dtype) -> None:
    bias = mask.to_xformers(frame, dtype)
    assert isinstance(bias, Tensor)
    assert bias.dtype == dtype
    assert bias.stride(-1) == 1
    assert all(step % 8 == 0 for step in bias.stride()[:-1])
    want = mask.to_additive(frame, torch.float32).expand(frame.batch, frame.heads, -1, -1)
    assert torch.equal(materialized(bias, frame), want)


@pytest.mark.parametrize("kv_len", [1, 7, 8, 9])
def test_rows_start_on_eight(attn_bias: Any, kv_len: int) -> None:
    frame = Frame(5, kv_len, 2, 3)
    numbers = torch.randn(5, kv_len, requires_grad=True)
    bias = (Bias(numbers) & Alibi(torch.zeros(3), align="upper-left")).to_xformers(frame, torch.float32)
    assert torch.equal(bias, numbers.expand(2, 3, 5, kv_len))
    assert bias.stride(-1) == 1
    assert all(step % 8 == 0 for step in bias.stride()[:-1])
    bias.sum().backward()
    assert torch.equal(numbers.grad, torch.full((5, kv_len), 6.0))

"""Masks inside torch.compile, made there or outside: one graph, and the same answer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from headway import MaskError
from headway.masks import (
    Alibi,
    Bias,
    Causal,
    Dense,
    Documents,
    Frame,
    Full,
    Mask,
    Not,
    Padding,
    Predicate,
    Prefix,
    Tree,
    Window,
)  # fmt: skip

FRAME = Frame(6, 6, batch=2, heads=2)
LENGTHS, SLOPES = torch.tensor([2, 5]), torch.tensor([0.5, 0.25])
MAY, NUMBERS = torch.eye(6).bool(), torch.randn(2, 6, 6)

MAKERS = {
    "full": lambda: Full(),
    "causal": lambda: Causal(),
    "window": lambda: Window(1, 2),
    "prefix": lambda: Causal() | Prefix(2),
    "prefixes": lambda: Prefix(LENGTHS),
    "documents": lambda: Documents([2, 4]) & Causal(),
    "documents, cross": lambda: Documents([2, 4], [3, 3]),
    "cu_seqlens": lambda: Documents.from_cu_seqlens(torch.tensor([0, 2, 6]), longest=4, total=6),
    "padding, list": lambda: Padding([2, 5]),
    "padding": lambda: Not(Padding(LENGTHS, side="left")),  # dynamo has no ~ for objects
    "padding, bool": lambda: Padding(MAY[:2]),
    "tree": lambda: Tree([-1, 0, 0], [2, 3, 1]),
    "dense": lambda: Dense(MAY) & Causal(),
    "bias": lambda: Bias(NUMBERS),
    "bias & causal": lambda: Bias(NUMBERS) & Causal(),
    "alibi": lambda: Alibi(SLOPES) & Causal(),
    "predicate": lambda: Predicate(lambda b, h, q, k: q >= LENGTHS[b]),
}


def lists(mask: Mask, frame: Frame) -> tuple[Tensor, ...]:
    blocks = mask.to_block_mask(frame)
    return (
        blocks.kv_num_blocks, blocks.kv_indices, blocks.full_kv_num_blocks, blocks.full_kv_indices,
        blocks.q_num_blocks, blocks.q_indices, blocks.full_q_num_blocks, blocks.full_q_indices,
    )  # fmt: skip


def become(mask: Mask, frame: Frame) -> tuple[Tensor, ...]:
    return mask.to_bool(frame), mask.to_additive(frame, torch.float32), *lists(mask, frame)


@pytest.mark.parametrize("where", ["inside", "outside"])
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_one_graph(make, where: str) -> None:
    torch._dynamo.reset()
    want = become(make(), FRAME)
    if where == "inside":
        got = torch.compile(lambda: become(make(), FRAME), fullgraph=True, backend="eager")()
    else:
        mask = make()
        traced = torch.compile(lambda mask: become(mask, FRAME), fullgraph=True, backend="eager")
        got = traced(mask)
        assert mask.memo == {}  # what a tracer sees must not be remembered
    for mine, theirs in zip(got, want, strict=True):
        assert torch.equal(mine, theirs)


def test_other_lengths_are_no_other_program() -> None:
    torch._dynamo.reset()
    graphs = 0

    def count(graph, inputs):
        nonlocal graphs
        graphs += 1
        return graph

    @torch.compile(fullgraph=True, backend=count, dynamic=True)
    def shown(x: Tensor, lengths: Tensor) -> Tensor:
        frame = Frame(x.shape[0], x.shape[0], lengths.shape[0])
        return (Causal() & Padding(lengths) & Window(4, 4)).to_bool(frame)

    for length in (10, 13, 24):
        lengths = torch.tensor([2, 5, length])
        want = (Causal() & Padding(lengths) & Window(4, 4)).to_bool(Frame(length, length, 3))
        assert torch.equal(shown(torch.zeros(length), lengths), want)
    assert graphs == 1


def test_lengths_that_would_have_to_be_read() -> None:
    torch._dynamo.reset()
    traced = torch.compile(lambda n: Documents(n).to_bool(FRAME), fullgraph=True, backend="eager")
    with pytest.raises(
        (MaskError, torch._dynamo.exc.Unsupported), match=r"from_cu_seqlens\(\.\.\., longest=, total=\)"
    ):
        traced(torch.tensor([2, 4]))

"""Block masks: sound and tight beside the dense truth, built from structure, in few steps."""

from __future__ import annotations

import itertools
import math

import by_hand
import pytest
import torch
from drawn import Pair, frames, leaves, pairs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils._python_dispatch import TorchDispatchMode
from waiting import no_waiting

from headway.masks import (
    Alibi,
    Bias,
    Causal,
    Dense,
    Documents,
    Frame,
    Full,
    Mask,
    Padding,
    Predicate,
    Prefix,
    Tree,
    Window,
    tiles,
)  # fmt: skip
from headway.masks.block_mask import block_mask


def listed(counts: Tensor, indices: Tensor) -> set[tuple[int, int, int, int]]:
    """(batch, head, row, column) of each tile in a list of tiles to visit."""
    assert counts.dtype == indices.dtype == torch.int32
    assert counts.is_contiguous()
    assert indices.is_contiguous()  # kernels walk it with a stride of one
    width = indices.shape[-1]
    cells = set()
    for at in itertools.product(*map(range, counts.shape)):
        row, count = indices[at].tolist(), int(counts[at])
        assert sorted(row) == list(range(width))  # a prefetch past the count must still be a tile
        assert row[:count] == sorted(row[:count])
        cells |= {(*at, column) for column in row[:count]}
    return cells


def visited(blocks: BlockMask) -> tuple[set, set]:
    """Partial and full tiles, after a check that the lists by key say the same."""
    partial = listed(blocks.kv_num_blocks, blocks.kv_indices)
    full = listed(blocks.full_kv_num_blocks, blocks.full_kv_indices)
    assert not partial & full
    for by_query, counts, indices in (
        (partial, blocks.q_num_blocks, blocks.q_indices),
        (full, blocks.full_q_num_blocks, blocks.full_q_indices),
    ):
        assert {(b, h, q, k) for b, h, k, q in listed(counts, indices)} == by_query
    return partial, full


def in_truth(truth: Tensor, tile: int) -> tuple[set, set]:
    """Tiles in which something is seen, and those inside the edges in which everything is."""
    batch, heads, q_len, kv_len = truth.shape
    seen, whole = set(), set()
    grid = (range(batch), range(heads), range(math.ceil(q_len / tile)), range(math.ceil(kv_len / tile)))
    for b, h, i, j in itertools.product(*grid):
        cell = truth[b, h, i * tile : (i + 1) * tile, j * tile : (j + 1) * tile]
        if cell.any():
            seen.add((b, h, i, j))
        if cell.all() and cell.shape == (tile, tile):
            whole.add((b, h, i, j))
    return seen, whole


def assert_sound(blocks: BlockMask, truth: Tensor, tile: int, tight: bool = False) -> None:
    partial, full = visited(blocks)
    batch, heads = blocks.kv_num_blocks.shape[:2]
    assert all(have in (1, want) for have, want in zip((batch, heads), truth.shape, strict=False))
    seen, whole = in_truth(truth, tile)

    def spread(tiles: set) -> set:
        b, h = range(truth.shape[0]), range(truth.shape[1])
        every = itertools.product(b, h, *(range(n) for n in blocks.kv_indices.shape[-2:]))
        return {(i, j, q, k) for i, j, q, k in every if (i % batch, j % heads, q, k) in tiles}

    partial, full = spread(partial), spread(full)
    assert seen <= partial | full, "a tile with something to see is left out"
    assert full <= whole, "a tile is called full that hides something"
    if tight:
        assert partial | full == seen
        assert full == whole


@given(st.data())
@settings(deadline=None, max_examples=250)
def test_sound_for_any_mask(data: st.DataObject) -> None:
    frame, tile = data.draw(frames(most=11)), data.draw(st.sampled_from((1, 2, 4)))
    pair: Pair = data.draw(pairs(frame))
    blocks = block_mask(pair.mask, frame, tile)
    assert blocks.seq_lengths == (frame.q_len, frame.kv_len)
    assert (tile, tile) == blocks.BLOCK_SIZE
    assert_sound(blocks, by_hand.table(frame, pair.sees), tile)


@given(st.data())
@settings(deadline=None, max_examples=150)
def test_tight_for_one_mask(data: st.DataObject) -> None:
    frame, tile = data.draw(frames(most=11)), data.draw(st.sampled_from((2, 4)))
    pair: Pair = data.draw(leaves(frame))
    # Two packings, and branches of a tree, are only bounded; everything else is judged exactly.
    loose = isinstance(pair.mask, Tree) or (isinstance(pair.mask, Documents) and not pair.mask.one_packing)
    assert_sound(block_mask(pair.mask, frame, tile), by_hand.table(frame, pair.sees), tile, tight=not loose)


def test_branches_of_a_tree_do_not_meet() -> None:
    """A prefix of four tokens and three branches of four: tiles of two branches are skipped."""
    frame, parents, lengths = Frame(16, 16), [-1, 0, 0, 0], [4, 4, 4, 4]
    truth = by_hand.table(frame, by_hand.tree(frame, parents, lengths))
    assert_sound(block_mask(Tree(parents, lengths), frame, 4), truth, 4, tight=True)


SINGLE = {
    "causal": lambda f: Causal(align="lower-right"),
    "causal-upper": lambda f: Causal(align="upper-left"),
    "window": lambda f: Window(100, 30, align="lower-right"),
    "documents": lambda f: Documents([f.q_len - 120, 0, 120], [f.kv_len - 120, 0, 120]),
    "padding-right": lambda f: Padding([f.kv_len - 3, 140]),
    "padding-left": lambda f: Padding([f.kv_len - 3, 140], side="left"),
    "padding-real": lambda f: Padding(torch.arange(f.kv_len) % torch.tensor([[1], [300]]) < 40),
    "prefix": lambda f: Prefix(150),
    "prefixes": lambda f: Prefix(torch.tensor([0, 129])),
    "full": lambda f: Full(),
}


@pytest.mark.parametrize("frame", [Frame(256, 256, 2), Frame(200, 300, 2), Frame(300, 200, 2)], ids=str)
@pytest.mark.parametrize("make", SINGLE.values(), ids=SINGLE)
def test_as_torch_would_build_it(make, frame: Frame) -> None:
    mask: Mask = make(frame)
    mine = mask.to_block_mask(frame)
    theirs = create_block_mask(mask.rule(frame), frame.batch, 1, frame.q_len, frame.kv_len, device="cpu")
    my_partial, my_full = visited(mine)
    their_partial, their_full = (
        listed(theirs.kv_num_blocks, theirs.kv_indices),
        listed(theirs.full_kv_num_blocks, theirs.full_kv_indices),
    )
    batch = mine.kv_num_blocks.shape[0]

    def spread(tiles: set) -> set:
        return {(b, h, q, k) for b in range(frame.batch) for i, h, q, k in tiles if b % batch == i}

    my_partial, my_full = spread(my_partial), spread(my_full)
    assert my_partial == their_partial
    assert my_full == their_full


# -- from structure, and in few steps ---------------------------------------------------------------------------------

LENGTH = 16_384
LARGE = {
    "full": (Full(), 7),
    "causal": (Causal(), 7),
    "window": (Window(1000, 1000), 11),
    "documents": (Documents([LENGTH // 4] * 4), 9),
    "causal & documents": (Causal() & Documents([LENGTH // 4] * 4), 11),
    "padding": (Padding([LENGTH - 5]), 8),
    "padding-left": (Padding([LENGTH - 5], side="left"), 10),
    "padding-real": (Padding(torch.arange(LENGTH)[None] < 100), 9),
    "prefix": (Prefix(100), 7),
    "prefixes": (Prefix(torch.tensor([100])), 7),
    "causal | prefix": (Causal() | Prefix(100), 9),
}
FIRST_TIME = 13
"""More, for what depends on the lengths alone and is kept."""


class Launches(TorchDispatchMode):
    """Counts operators that compute something, which on a GPU is a launch each, and the largest thing computed."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not is_view:
            self.names.append(str(func))
        for made in out if isinstance(out, tuple | list) else (out,):
            if isinstance(made, Tensor) and not is_view:
                self.largest = max(self.largest, made.numel())
        return out


@pytest.mark.parametrize(("mask", "most"), LARGE.values(), ids=LARGE)
def test_few_launches_and_never_every_element(mask: Mask, most: int) -> None:
    frame = Frame(LENGTH, LENGTH)
    tiles._KEPT.clear()
    for allowed in (most + FIRST_TIME, most):
        with Launches() as launches:
            mask.to_block_mask(frame)
        assert len(launches.names) <= allowed, launches.names
        assert launches.largest <= 4 * (LENGTH // 128) ** 2


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_structured_masks_never_evaluate_their_rule(data: st.DataObject) -> None:
    frame = data.draw(frames(most=11))
    mask: Mask = data.draw(pairs(frame, structured=True)).mask

    def refuse(*_: object) -> Tensor:
        raise AssertionError("the rule was evaluated")

    with pytest.MonkeyPatch.context() as patch:
        for kind in (type(mask), Full, Causal, Window, Prefix, Documents, Padding, Tree):
            patch.setattr(kind, "rule", lambda self, frame: refuse)
            patch.setattr(kind, "to_bool", refuse)
            patch.setattr(kind, "keep", refuse)
        mask.to_block_mask(frame)


def test_masks_without_structure_are_evaluated() -> None:
    frame = Frame(5, 5)
    mask = Causal() & Predicate(lambda b, h, q, k: (q + k) % 2 == 0)
    assert_sound(block_mask(mask, frame, 2), mask.to_bool(frame), 2, tight=True)


def test_heads_of_their_own() -> None:
    frame = Frame(300, 200, batch=2, heads=3)
    may = torch.rand(2, 3, 300, 200) < 0.5
    may[0, 1, :128], may[1, 2, 128:256, :128] = False, True
    assert_sound(Dense(may).to_block_mask(frame), may, 128, tight=True)


@pytest.mark.parametrize("frame", [Frame(0, 5), Frame(5, 0), Frame(0, 0)], ids=str)
def test_nothing_to_attend(frame: Frame) -> None:
    masks = (Full(), Causal(align="lower-right"), Window(2, 2, align="upper-left"), Prefix(0))
    masks += (Documents([frame.q_len], [frame.kv_len]), Padding([0]), Dense(torch.ones(1, 1).bool()))
    for mask in masks:
        blocks = mask.to_block_mask(frame)
        assert blocks.kv_num_blocks.sum() == 0
        assert mask.to_bool(frame).shape[-2:] == (frame.q_len, frame.kv_len)


# -- in use -----------------------------------------------------------------------------------------------------------

USED = {
    **SINGLE,
    "tree": lambda f: Tree([-1, 0, 0], [100, 50, f.kv_len - 150], align="lower-right"),
    "dense": lambda f: Dense(torch.rand(2, 2, f.q_len, f.kv_len) < 0.5),
    "predicate": lambda f: Predicate(lambda b, h, q, k: (q + k + h) % 3 != b),
    "bias": lambda f: Bias(torch.randn(2, f.q_len, f.kv_len)),
    "alibi": lambda f: Alibi(torch.tensor([0.5, 0.25]), align="lower-right") & Causal(align="lower-right"),
    "empty rows": lambda f: Prefix(3) & ~Prefix(3) | Window(0, 0, align="upper-left") & Padding([90, 0]),
}


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("frame", [Frame(130, 160, 2, 2), Frame(150, 150, 2, 2)], ids=str)
@pytest.mark.parametrize("make", USED.values(), ids=USED)
def test_flex_attention_agrees_with_softmax(make, frame: Frame, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.nn.attention.flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    torch.manual_seed(0)
    mask: Mask = make(frame)
    q = torch.randn(2, 2, frame.q_len, 8)
    k, v = torch.randn(2, 2, 2, frame.kv_len, 8)
    got = flex_attention(q, k, v, score_mod=mask.score(frame), block_mask=mask.to_block_mask(frame))
    scores = (q.double() @ k.double().mT) / math.sqrt(8) + mask.to_additive(frame, torch.float64)
    want = scores.softmax(-1).nan_to_num(0.0) @ v.double()
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)


if torch.cuda.is_available():

    @pytest.mark.cuda
    @pytest.mark.parametrize("name", [*LARGE, "tree", "dense", "slopes"])
    def test_nothing_waits_for_the_device(name: str) -> None:
        """Built from CPU data or from the device's own: no call reads it back, and the second use copies nothing."""
        few = Frame(256, 256, heads=2, device=torch.device("cuda"))
        more = {
            "tree": Tree([-1, 0, 0], [100, 100, 56]),
            "dense": Dense(torch.ones(256, 256, device="cuda").bool()),
            "slopes": Alibi(torch.ones(2)),
        }
        frame = few if name in more else Frame(LENGTH, LENGTH, device=torch.device("cuda"))
        mask = more[name] if name in more else LARGE[name][0]
        on_device = Documents(torch.tensor([100, 156], device="cuda")), Padding(torch.tensor([7], device="cuda"))
        with no_waiting():
            mask.to_block_mask(frame)
            for each in (more.get(name, Full()), *on_device):
                each.to_block_mask(few)
                each.to_bool(few)
                each.to_additive(few, torch.float32)

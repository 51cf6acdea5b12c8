"""What is made once and kept, and what must not be."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from headway.masks import Alibi, Bias, Causal, Documents, Frame, Padding, Prefix, Tree, memo
from headway.masks.memo import Bounded, Remembers, kept
from headway.sites import packed

CPU, META = torch.device("cpu"), torch.device("meta")


def two() -> tuple[torch.Tensor, ...]:
    return torch.zeros(2), torch.ones(2)


def test_made_once_for_each_device() -> None:
    store = {}
    first = kept(store, "what", CPU, two)
    assert kept(store, "what", CPU, two) is first
    assert kept(store, "else", CPU, two) is not first
    assert kept(store, "what", META, two) is not first
    assert len(store) == 3


def test_what_is_fake_is_not_kept_and_meets_nothing_kept() -> None:
    store = {}
    with FakeTensorMode():
        kept(store, "what", CPU, two)
    assert store == {}
    assert type(kept(store, "what", CPU, two)[0]) is torch.Tensor
    with FakeTensorMode():
        assert type(kept(store, "what", CPU, two)[0]) is not torch.Tensor


def test_what_a_cuda_graph_records_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds nothing until the graph is replayed. One look says so to all that keep anything."""
    store, owner, other = {}, torch.zeros(3), torch.zeros(3)
    with monkeypatch.context() as patch:
        patch.setattr(memo, "is_recorded", lambda device: True)
        kept(store, "what", CPU, two)
        recorded = packed.kept(owner, other, None, CPU, (), object)
        assert packed.kept(owner, other, None, CPU, (), object) is not recorded
    assert store == {}
    eager = packed.kept(owner, other, None, CPU, (), object)
    assert eager is not recorded
    assert packed.kept(owner, other, None, CPU, (), object) is eager


def test_inference_mode_keeps_its_own() -> None:
    """Its tensors cannot be saved for a backward pass."""
    store = {}
    with torch.inference_mode():
        inside = kept(store, "what", CPU, two)
        assert kept(store, "what", CPU, two) is inside
    outside = kept(store, "what", CPU, two)
    assert inside[0].is_inference()
    assert not outside[0].is_inference()


def test_block_masks_are_not_poisoned() -> None:
    frame = Frame(37, 53)
    mask = Documents([10, 27], [20, 33])
    Causal(align="lower-right").to_block_mask(frame)
    with FakeTensorMode():
        Causal(align="lower-right").to_block_mask(frame)
    with torch.inference_mode():
        mask.to_block_mask(frame)
    for each in (mask, Causal(align="lower-right")):
        blocks = each.to_block_mask(frame)
        assert type(blocks.kv_indices) is torch.Tensor
        assert not blocks.kv_indices.is_inference()
        assert not any(
            cell.cell_contents.is_inference()
            for cell in each.rule(frame).__closure__
            if torch.is_tensor(cell.cell_contents)
        )


def test_a_copy_on_a_device_is_made_again_when_its_tensor_changes() -> None:
    held, value = torch.arange(3), Remembers()
    first = value.moved(held, META)
    assert value.moved(held, META) is first
    held += 1
    assert value.moved(held, META) is not first
    assert value.moved(held, CPU) is held


def test_what_learns_is_copied_each_time() -> None:
    held, value = torch.ones(3, requires_grad=True), Remembers()
    assert value.moved(held, META) is not value.moved(held, META)
    assert value.memo == {}


@pytest.mark.parametrize(
    "mask",
    [
        Documents([2, 2]),
        Padding([3]),
        Padding(torch.ones(1, 4).bool()),
        Prefix(torch.tensor([1])),
        Tree([-1, 0], [2, 2]),
        Alibi(torch.ones(2)),
        Bias(torch.zeros(4, 4)),
    ],
    ids=repr,
)
def test_masks_move_once(mask, monkeypatch: pytest.MonkeyPatch) -> None:
    frame = Frame(4, 4, heads=2, device=META)
    mask.to_block_mask(frame), mask.to_additive(frame, torch.float32)
    real = torch.Tensor.to

    def to(tensor: torch.Tensor, *where: object, **how: object) -> torch.Tensor:
        assert tensor.device == META or META not in where, "copied a second time"
        return real(tensor, *where, **how)

    monkeypatch.setattr(torch.Tensor, "to", to)
    mask.to_block_mask(frame), mask.to_additive(frame, torch.float32), mask.to_bool(frame)


def test_a_store_has_a_bound() -> None:
    store = Bounded(3)
    for n in range(10):
        store[n] = n
        assert len(store) <= 3
    assert 9 in store


def test_copies_start_afresh() -> None:
    packing = Documents([1, 2]).queries
    packing.ids(3, CPU)
    assert packing.memo
    for again in (copy.deepcopy(packing), pickle.loads(pickle.dumps(packing))):
        assert again.memo == {}
        assert again.lengths == packing.lengths

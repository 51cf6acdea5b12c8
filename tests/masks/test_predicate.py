"""Predicate: what it takes, and how it refuses the rest before a kernel meets it."""

from __future__ import annotations

import functools

import by_hand
import numpy as np
import pytest
import torch

from headway import MaskError, attention
from headway.masks import Causal, Frame, Predicate

FRAME = Frame(4, 5, batch=2, heads=2)


def shown(mask: Predicate) -> torch.Tensor:
    return mask.to_bool(FRAME).expand(2, 2, 4, 5)


def test_any_function_of_the_four_indices() -> None:
    truth = by_hand.table(FRAME, lambda b, h, q, k: (q + k + b + h) % 3 == 0)
    assert torch.equal(shown(Predicate(lambda b, h, q, k: (q + k + b + h) % 3 == 0)), truth)


def test_captured_tensors() -> None:
    owner = torch.tensor([0, 0, 1, 1, 2])
    mask = Predicate(lambda b, h, q, k: owner[q] == owner[k])
    assert torch.equal(shown(mask), by_hand.table(FRAME, by_hand.documents([2, 2], [2, 2, 1])))
    assert mask.tensors == (owner,)


class Steps:
    """A predicate with a state."""

    def __init__(self, step: object) -> None:
        self.step = step

    def __call__(self, b, h, q, k):
        return (q - k) % self.step == 0

    def method(self, b, h, q, k):
        return (q - k) % self.step == 0


def with_step(b, h, q, k, step):
    return (q - k) % step == 0


def with_default(b, h, q, k, step=3):
    return (q - k) % step == 0


def with_default_tensor(b, h, q, k, step=torch.tensor(3)):  # noqa: B008
    return (q - k) % step == 0


def closing_over(step):
    return lambda b, h, q, k: (q - k) % step == 0


def nested(step):
    inner = closing_over(step)
    return lambda b, h, q, k: inner(b, h, q, k) & (q >= 0)


THREE = torch.tensor(3)
SHAPES = {
    "closure": closing_over,
    "nested": nested,
    "partial": lambda step: functools.partial(with_step, step=step),
    "partial, by place": lambda step: functools.partial(lambda step, b, h, q, k: (q - k) % step == 0, step),
    "object": Steps,
    "method": lambda step: Steps(step).method,
}


@pytest.mark.parametrize("make", SHAPES.values(), ids=SHAPES)
def test_a_captured_number_is_refused_with_the_fix(make) -> None:
    for number in (3, 3.0, np.int64(3), np.float32(3)):
        with pytest.raises(MaskError) as refusal:
            Predicate(make(number))
        assert f"captures step={number!r}, a Python number: each new value would compile a new" in str(refusal.value)
        assert f"step = torch.tensor({number!r}, device=...)" in str(refusal.value)
    # The fix is taken, and means the same.
    mask = Predicate(make(THREE))
    assert torch.equal(shown(mask), by_hand.table(FRAME, lambda b, h, q, k: (q - k) % 3 == 0))
    assert mask.tensors == (THREE,)


class Rated(torch.nn.Module):
    """A module may be a predicate, and its sizes are its own."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 3
        self.register_buffer("step", torch.tensor(3))

    def forward(self, b, h, q, k):
        return (q - k) % self.step == 0


def test_a_module_and_what_torch_offers() -> None:
    module, operator = Rated(), torch.ops.aten.ge.Tensor
    truth = by_hand.table(FRAME, lambda b, h, q, k: (q - k) % 3 == 0)
    assert torch.equal(shown(Predicate(module)), truth)
    assert Predicate(module).tensors == (module.step,)
    wrapped = functools.wraps(module.forward)(lambda *at: module(*at) & operator(at[2], THREE * 0))
    assert torch.equal(shown(Predicate(wrapped)), truth)


def test_a_default_is_captured_too() -> None:
    with pytest.raises(MaskError, match=r"captures step=3, a Python number"):
        Predicate(with_default)
    assert torch.equal(shown(Predicate(with_default_tensor)), by_hand.table(FRAME, lambda b, h, q, k: (q - k) % 3 == 0))


def test_numbers_in_a_list() -> None:
    ends = [1, 4]
    with pytest.raises(MaskError, match=r"captures ends=\[1, 4\], a list of Python numbers.*torch.tensor\(\[1, 4\]"):
        Predicate(lambda b, h, q, k: (q < ends[0]) & (k < ends[1]))


def test_a_flag_is_one_of_two_programs() -> None:
    strict = True
    mask = Predicate(lambda b, h, q, k: q > k if strict else q >= k)
    assert torch.equal(shown(mask), by_hand.table(FRAME, lambda b, h, q, k: q > k))


@pytest.mark.parametrize("make", SHAPES.values(), ids=SHAPES)
def test_a_tensor_on_another_device_is_refused_with_the_fix(make) -> None:
    mask = Predicate(make(torch.tensor(3, device="meta")))
    for use in (mask.to_bool, mask.to_block_mask, (Causal(align="upper-left") & mask).to_bool):
        with pytest.raises(MaskError, match=r"captures step on meta, but the call is on cpu; capture step.to\('cpu'\)"):
            use(FRAME)


def test_tensors_on_two_devices() -> None:
    here, there = torch.zeros(4), torch.zeros(4, device="meta")
    with pytest.raises(
        MaskError, match=r"captures tensors on several devices \(here on cpu, there on meta\); move them"
    ):
        Predicate(lambda b, h, q, k: here[q] == there[k])


@pytest.mark.parametrize("fn", [lambda b, h, q, k: True, lambda b, h, q, k: bool(q >= k)])
def test_a_python_bool_is_refused_with_the_fix(fn) -> None:
    with pytest.raises(MaskError, match=r"Python bool"):
        Predicate(fn)
    with pytest.raises(MaskError, match=r"for 'always' return q >= 0"):
        Predicate(lambda b, h, q, k: True)


def test_a_branch_on_an_index_is_refused_with_the_fix() -> None:
    with pytest.raises(MaskError, match=r"the predicate asks a tensor for a Python bool.*use & \| ~ and torch.where"):
        Predicate(lambda b, h, q, k: (q >= k) if q > 2 else (k >= 0))
    with pytest.raises(MaskError, match=r"use & \| ~ and torch.where"):
        Predicate(lambda b, h, q, k: q > 2 and k > 2)


def test_a_number_for_an_answer() -> None:
    with pytest.raises(MaskError, match=r"returned torch.int32, takes torch.bool; compare, or add .bool\(\)"):
        Predicate(lambda b, h, q, k: q - k)


def test_another_signature() -> None:
    with pytest.raises(MaskError, match=r"the predicate failed on its first index.*takes fn\(b, h, q, k\)"):
        Predicate(lambda q, k: q >= k)


def test_not_a_function() -> None:
    with pytest.raises(MaskError, match=r"got Tensor, takes a function fn\(b, h, q, k\); wrap a bool tensor in Dense"):
        Predicate(torch.ones(2, 2).bool())


def test_repr_names_the_function() -> None:
    assert repr(Predicate(with_default_tensor)) == "Predicate(with_default_tensor)"
    assert repr(Predicate(Steps(THREE))) == "Predicate(Steps)"
    assert repr(Predicate(functools.partial(with_step, step=THREE))) == "Predicate(with_step)"


def test_equal_functions_make_equal_masks() -> None:
    assert Predicate(with_default_tensor) == Predicate(with_default_tensor)
    assert hash(Predicate(with_default_tensor)) == hash(Predicate(with_default_tensor))


WIDTH = torch.tensor(2)


def _near(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return q - k <= WIDTH


@pytest.mark.parametrize(
    "fn", [lambda b, h, q, k: q - k <= WIDTH, lambda b, h, q, k: _near(q, k)], ids=["own", "called"]
)
def test_tensors_in_globals_are_held(fn) -> None:
    """A lowering kept from before the tensor changed would be another mask."""
    mask = Predicate(fn)
    assert any(held is WIDTH for held in mask.tensors)
    q = torch.randn(1, 1, 8, 16)
    before = attention(q, q, q, mask)
    WIDTH.fill_(1)
    try:
        assert not torch.equal(attention(q, q, q, mask), before)
    finally:
        WIDTH.fill_(2)

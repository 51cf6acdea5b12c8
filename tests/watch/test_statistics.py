"""Streamed statistics against the formulas on the whole tensor in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from headway.watch.leaves import leaves
from headway.watch.statistics import PIECE, Statistics, is_finite, measure, pieces

LARGE = 3 * PIECE + 17

TENSORS = {
    "one": torch.tensor(3.0),
    "many": torch.randn(LARGE) * 5 + 100,
    "bfloat16": torch.randn(LARGE).bfloat16(),
    "float16": torch.randn(50).half(),
    "integers": torch.arange(-5, 9),
    "bools": torch.tensor([True, False, False]),
    "transposed": torch.randn(300, 1000).t(),
    "strided": torch.randn(400, 600)[::2, ::3],
    "expanded": torch.randn(7, 1).expand(7, 40000),
    "channels last": torch.randn(2, 8, 100, 100).to(memory_format=torch.channels_last),
    "one long row in many": torch.randn(2, PIECE * 2)[:, :-1],
    "half zeros": torch.relu(torch.randn(1000)),
    "far from 0": torch.randn(LARGE, dtype=torch.float64) + 1e5,
    "largest": torch.full((10,), torch.finfo(torch.float32).max),
}


@pytest.mark.parametrize("tensor", TENSORS.values(), ids=TENSORS.keys())
def test_agrees_with_the_formulas(tensor: Tensor) -> None:
    found, truth = measure(tensor), tensor.double()
    assert found.count == found.finite == tensor.numel()
    assert found.mean == pytest.approx(float(truth.mean()), rel=1e-12, abs=1e-12)
    assert found.std == pytest.approx(float(truth.std(correction=0)), rel=1e-9, abs=1e-12)
    assert (found.least, found.most) == (float(truth.min()), float(truth.max()))
    assert found.zeros == int((truth == 0).sum())
    assert found.norm == pytest.approx(float(truth.norm()), rel=1e-9)
    assert is_finite(tensor)


@pytest.mark.parametrize("at", [0, PIECE, LARGE - 1])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_number_is_counted_and_left_out(bad: float, at: int) -> None:
    tensor = torch.randn(LARGE)
    tensor[at] = bad
    found, rest = measure(tensor), tensor[tensor.isfinite()].double()
    assert (found.nans, found.infs) == (int(math.isnan(bad)), int(math.isinf(bad)))
    assert found.mean == pytest.approx(float(rest.mean()), rel=1e-9)
    assert found.std == pytest.approx(float(rest.std(correction=0)), rel=1e-9)
    assert not is_finite(tensor)


def test_numbers_whose_sum_runs_over_are_finite() -> None:
    tensor = torch.full((4,), torch.finfo(torch.float64).max, dtype=torch.float64)
    assert is_finite(tensor)
    assert measure(tensor).finite == 4
    assert measure(tensor).most == torch.finfo(torch.float64).max


def test_odd_kinds() -> None:
    sparse = torch.sparse_coo_tensor([[0, 2]], [3.0, 4.0], (4,), check_invariants=True)
    assert measure(sparse).norm == 5.0
    assert (measure(sparse).zeros, measure(sparse).count) == (2, 4)
    assert measure(torch.tensor([3 + 4j])).norm == pytest.approx(5.0)
    assert measure(torch.empty(0)) == Statistics()
    assert measure(torch.tensor([math.nan])).std == 0.0


def test_adding_up_is_measuring_the_whole() -> None:
    parts = [torch.randn(n) * n for n in (1, 50, 7)]
    added = Statistics()
    for part in parts:
        added.add(measure(part))
    whole = measure(torch.cat(parts))
    assert added.mean == pytest.approx(whole.mean)
    assert added.std == pytest.approx(whole.std)
    assert (added.least, added.most, added.count) == (whole.least, whole.most, whole.count)


@pytest.mark.parametrize("tensor", TENSORS.values(), ids=TENSORS.keys())
def test_pieces_are_small_and_hold_each_number_once(tensor: Tensor) -> None:
    cut = list(pieces(tensor))
    assert max(piece.numel() for piece in cut) <= PIECE
    assert torch.equal(torch.cat([one.flatten() for one in cut]).sort().values, tensor.flatten().sort().values)


def test_leaves_have_names() -> None:
    named = torch.return_types.max((torch.ones(1), torch.ones(1)))
    found = [name for name, _ in leaves({"a": [torch.ones(1), {"b": torch.ones(1)}], "m": named, "n": None, "s": "x"})]
    assert found[:2] == ["a[0]", "a[1].b"]
    assert len(found) == 4

"""What is seen: every module that ran, operators inside attention, wrapped and parametrised linears, gradients."""

from __future__ import annotations

import csv
import dataclasses
import gc
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from watch.models import MODELS, Mixed, tensors

from headway.errors import HeadwayError
from headway.watch import Recording, watch


def train_step(model: nn.Module, *inputs: Tensor) -> None:
    sum(one.float().square().mean() for one in tensors(model(*inputs))).backward()


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", MODELS)
def test_every_module_that_ran_is_seen(name: str, training: bool, grad: bool) -> None:
    make, shape = MODELS[name]
    model, x = make().train(training), torch.randn(shape)

    def ran(watched: bool) -> tuple[set[str], Any]:
        """By hooks, which is how the unwatched truth is found out: on all modules of the process, for this test."""
        names, found = {module: path for path, module in model.named_modules()}, set()
        handle = torch.nn.modules.module.register_module_forward_hook(lambda m, i, o: found.add(names[m]))
        try:
            with torch.set_grad_enabled(grad):
                if not watched:
                    model(x)
                    return found, None
                with watch(model) as recording:
                    model(x)
        finally:
            handle.remove()
        return found, recording

    truth, _ = ran(watched=False)
    found, recording = ran(watched=True)
    assert truth == found == {path for path, calls in recording.modules.items() if calls.calls}
    assert truth == {row.path for row in recording.of("output")}
    assert all(not row.values.nans for row in recording.of("output"))


def test_wrapped_and_parametrised_linears_and_projections_of_attention() -> None:
    model = Mixed()
    with watch(model) as recording:
        train_step(model, torch.randn(3, 7, 16))
    outputs = {row.path for row in recording.of("output")}
    assert {"wrapped", "halved.parametrizations.weight.0", "normed.parametrizations.weight.0", "attend"} <= outputs
    # Those without a forward of their own, by the operators that took their weights.
    taken = {name for row in recording.of("op") for name in row.parameters}
    assert {"wrapped.linear.weight", "wrapped.sigma", "attend.out_proj.weight", "attend.in_proj_weight"} <= taken
    assert taken == set(recording.parameters)
    reached = {row.path for row in recording.of("parameter gradient")}
    assert reached == set(recording.parameters)
    assert outputs == {row.path for row in recording.of("output gradient")}
    assert {row.path for row in recording.of("backward op")} >= {
        "attend",
        "wrapped",
        "halved",
        "memory",
        "layer.linear1",
    }
    assert "softmax" in " ".join(row.name for row in recording.of("op") if row.path == "attend")


def test_outputs_are_measured_right_and_have_names() -> None:
    model = Mixed().eval()
    with torch.no_grad(), watch(model) as recording:
        out = model(torch.randn(3, 7, 16))
    for name, tensor in (("tokens", out["tokens"]), ("state[0]", out["state"][0]), ("state[1]", out["state"][1])):
        values = recording.row("output", "", f"Mixed.{name}").values
        assert values.mean == pytest.approx(float(tensor.double().mean()), abs=1e-12)
        assert values.std == pytest.approx(float(tensor.double().std(correction=0)))
    assert recording.row("output", "memory", "LSTM[1][0]").shape == (1, 3, 16)


@pytest.mark.parametrize("operators", [True, False])
def test_statistics_follow_tensors_changed_in_place(operators: bool) -> None:
    class Ones(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1

    class Stepwise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ones = nn.ModuleList(Ones() for _ in range(6))

        def forward(self, x: Tensor) -> Tensor:
            for one in self.ones:
                x = one(x.detach()).mul_(2)  # the old memory is free for the next
            return x

    model = Stepwise()
    with watch(model, operators=operators) as recording:
        out = model(torch.zeros(50))
    means, x = [], 0.0
    for _ in range(6):
        means.append(x + 1)
        x = (x + 1) * 2
    assert [recording.row("output", f"ones.{n}", "Ones").values.mean for n in range(6)] == means
    assert recording.row("output", "", "Stepwise").values.mean == float(out.mean()) == x
    assert bool(recording.of("op")) == operators


def test_memory_used_again_is_measured_again() -> None:
    buffer = numpy.ones(50, numpy.float32)

    class Reads(nn.Module):
        def forward(self) -> Tensor:
            return torch.from_numpy(buffer)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Reads(), Reads()

        def forward(self) -> Tensor:
            self.first()
            buffer[:] = 3  # as an allocator gives a dead tensor's memory to the next
            kept = self.second()
            kept.mul_(2)
            return kept

    model = Twice()
    with watch(model, operators=False) as recording:
        model()
    paths = ("output", "first", "Reads"), ("output", "second", "Reads"), ("output", "", "Twice")
    assert [recording.row(*path).values.mean for path in paths] == [1, 3, 6]


def test_gradients_of_each_of_several_outputs() -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 6)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return self.linear(x).unbind(0)

    model = Halves()
    with watch(model) as recording:
        one, two = model(torch.randn(2, 4))
        (one.sum() + 3 * two.sum()).backward()
    norms = [recording.row("output gradient", "", f"Halves[{at}]").norm for at in (0, 1)]
    assert norms == pytest.approx([6**0.5, 3 * 6**0.5])


def test_gradient_norms_are_those_of_autograd() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    hidden: list[Tensor] = []
    x = torch.randn(6, 5)
    handle = model[1].register_forward_hook(lambda m, i, o: (o.retain_grad(), hidden.append(o))[0])
    model(x).square().sum().backward()
    handle.remove()
    truth = {name: float(p.grad.double().norm()) for name, p in model.named_parameters() if p.grad is not None}
    with watch(model) as recording:
        model(x).square().sum().backward()  # adds to the gradients there are; what arrived is reported
    for name, norm in truth.items():
        assert recording.row("parameter gradient", name, "").norm == pytest.approx(norm, rel=1e-6)
    assert hidden[0].grad is not None
    norm = float(hidden[0].grad.double().norm())
    assert recording.row("output gradient", "1", "Tanh").norm == pytest.approx(norm, rel=1e-6)


def test_a_training_loop_with_an_optimizer() -> None:
    model = nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.sparse.check_sparse_tensor_invariants(), watch(model) as recording:
        for _ in range(5):
            optimizer.zero_grad()
            model(torch.randint(0, 10, (3, 2))).square().sum().backward()
            optimizer.step()
    assert (recording.facts.forwards, recording.facts.backwards) == (5, 5)
    assert {one.reached for one in recording.parameters.values()} == {5}
    assert recording.row("output", "1", "Linear").calls == 5
    assert recording.row("parameter gradient", "0.weight", "").values.count == 5 * 40
    assert not any(row.path.startswith("(") for row in recording.rows.values())  # neither loss nor optimizer
    assert not recording.origins


def test_tied_and_shared_parts_are_one() -> None:
    model = nn.Module()
    model.first = nn.Linear(4, 4)
    model.again = model.first
    model.tied = nn.Linear(4, 4)
    model.tied.weight = model.first.weight
    with watch(model) as recording:
        model.tied(model.again(torch.randn(2, 4))).sum().backward()
    assert recording.parameters["first.weight"].names == ("first.weight", "again.weight", "tied.weight")
    assert recording.modules["first"].calls == 1
    assert "unused" not in str(recording.report())


def deep_size(thing: Any, seen: set[int]) -> int:
    """What it holds, found out apart from the ledger: all that the garbage collector and slots lead to."""
    if id(thing) in seen or isinstance(thing, type) or callable(thing):
        return 0
    seen.add(id(thing))
    size = sys.getsizeof(thing)
    if isinstance(thing, Tensor):
        return size + thing.untyped_storage().nbytes()
    if isinstance(thing, dict):
        return size + sum(deep_size(one, seen) for pair in thing.items() for one in pair)
    if isinstance(thing, list | tuple | set):
        return size + sum(deep_size(one, seen) for one in thing)
    if dataclasses.is_dataclass(thing):
        return size + sum(deep_size(getattr(thing, field.name), seen) for field in dataclasses.fields(thing))
    return size + (deep_size(vars(thing), seen) if hasattr(thing, "__dict__") else 0)


@pytest.mark.parametrize("bound", [250_000, 1 << 22], ids=["tight", "wide"])
def test_the_bound_holds_for_many_layers_and_large_activations(bound: int) -> None:
    width, rows = 64, 2048  # 512 KiB an activation, 100 MiB all of them
    model = nn.Sequential(
        *[layer for _ in range(100) for layer in (nn.Linear(width, width, bias=False), nn.Identity())]
    )
    sizes = []

    def largest() -> int:
        return sum(one.numel() * one.element_size() for one in gc.get_objects() if type(one) is Tensor)

    with torch.no_grad(), watch(model, bound=bound) as recording:
        x = torch.randn(rows, width)
        before = largest()
        for at in range(0, 200, 25):
            x = model[at : at + 25](x)
            sizes.append(largest() - before)
    assert max(sizes) < 2 * rows * width * 4  # the activation in hand, and no pile of them
    assert recording.held_bytes <= bound
    assert deep_size(recording, set()) <= bound
    seen = len(recording.of("output"))
    if bound > 1 << 20:
        assert (seen, recording.ledger.refused) == (200, 0)
    else:
        assert 0 < seen < 200
        assert recording.ledger.refused
        assert f"to stay within {bound} bytes" in str(recording.report())


def test_more_steps_hold_no_more() -> None:
    model, held = Mixed(), []
    with watch(model) as recording:
        for _ in range(6):
            train_step(model, torch.randn(3, 7, 16))
            held.append((recording.held_bytes, deep_size(recording, set())))
    assert held[-1][0] == held[1][0]
    assert held[-1][1] <= held[-1][0]


def test_a_bound_too_small_for_the_names_is_refused_with_one_that_is_not() -> None:
    model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(50)])
    with pytest.raises(HeadwayError, match="pass bound=") as refusal, watch(model, bound=1000):
        pass
    assert "forward" not in model.__dict__
    with watch(model, bound=int(str(refusal.value).rsplit("=", 1)[1])) as recording:
        model(torch.ones(1, 2))
    assert recording.modules[""].calls == 1


def test_loops_over_one_module_share_rows() -> None:
    model = nn.LSTMCell(4, 4)

    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = model

        def forward(self, x: Tensor) -> Tensor:
            state = None
            for one in x:
                state = self.cell(one, state)
            assert state is not None
            return (state[0] * 2).sum() + sum((x * n).sum() for n in range(100))

    loop = Loop()
    with watch(loop) as recording:
        loop(torch.randn(40, 2, 4))
    assert recording.row("output", "cell", "LSTMCell[0]").calls == 40
    assert len(recording.of("op")) < 150


def test_json_and_csv(tmp_path: Path) -> None:
    model = Mixed()
    with watch(model) as recording:
        train_step(model, torch.full((3, 7, 16), math.nan))  # numbers that JSON does not have
    path = recording.save_json(tmp_path / "run.json")
    json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    again = Recording.load_json(path)
    assert again.to_dict() == recording.to_dict()
    assert again.diff(recording) == []
    assert again.report() == recording.report()
    with recording.save_csv(tmp_path / "run.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(list(recording.table()))
    assert {line["kind"] for line in lines} >= {"output", "op", "parameter gradient", "attention head"}
    (tmp_path / "other.json").write_text('{"rows": []}')
    with pytest.raises(HeadwayError, match="no recording of format"):
        Recording.load_json(tmp_path / "other.json")


def test_diff() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    x = torch.randn(5, 4)

    def recorded() -> Recording:
        with watch(model) as recording:
            model(x).sum().backward()
        return recording

    before = recorded()
    assert before.diff(recorded()) == []
    with torch.no_grad():
        model[2].weight.mul_(3)
    after = recorded()
    changed = before.diff(after)
    assert {change.path for change in changed if change.kind == "output"} == {"", "2"}
    norm = next(one for one in changed if (one.path, one.field) == ("0.weight", "norm"))
    assert norm.after == pytest.approx(3 * norm.before)
    assert norm.relative == pytest.approx(2 / 3)
    assert all(change.relative >= 0.5 for change in before.diff(after, at_least=0.5))
    model[1] = nn.Identity()
    replaced = [str(change) for change in before.diff(recorded()) if change.field == "seen" and change.kind == "output"]
    assert replaced == ["output 1 ReLU: seen True -> False", "output 1 Identity: seen False -> True"]


def test_a_row_asked_for_that_is_not_there() -> None:
    with watch(nn.Linear(1, 1)) as recording:
        pass
    with pytest.raises(HeadwayError, match="got no row 'output' of 'x'"):
        recording.row("output", "x", "Linear")


def test_figures(tmp_path: Path) -> None:
    model = Mixed()
    with watch(model) as recording:
        train_step(model, torch.randn(3, 7, 16))
    pictures = recording.figures(tmp_path / "new")
    assert [path.name for path in pictures] == ["activations.png", "gradients.png", "entropy.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000 for path in pictures)
    with torch.no_grad(), watch(nn.Linear(2, 2)) as nothing:
        pass
    assert nothing.figures(tmp_path) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_files_and_figures_of_narrow_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    """NumPy knows no bfloat16."""
    model = Mixed().to(dtype)
    with watch(model) as recording:
        train_step(model, torch.randn(3, 7, 16, dtype=dtype))
    assert len(recording.figures(tmp_path)) == 3
    assert Recording.load_json(recording.save_json(tmp_path / "run.json")).to_dict() == recording.to_dict()
    assert recording.save_csv(tmp_path / "run.csv").stat().st_size
    assert recording.outputs
    assert "NaN" not in str(recording.report())


def test_figures_of_odd_numbers(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with watch(model) as recording:
        (model(torch.tensor([[math.nan, 1.0]])) * 0).sum().backward()
    assert len(recording.figures(tmp_path)) == 2

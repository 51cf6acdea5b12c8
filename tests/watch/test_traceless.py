"""A watched run is the unwatched run, bit for bit, and nothing stays behind."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import threading
import warnings
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from watch.models import MODELS, Mixed, encoder, same, state, tensors

from headway.errors import HeadwayError
from headway.watch import watch


def run(name: str, training: bool, grad: bool, dtype: torch.dtype, watched: bool) -> tuple[object, object]:
    """Outputs and state of two steps of a fresh model."""
    make, shape = MODELS[name]
    torch.manual_seed(1)
    model = make().to(dtype).train(training)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.25)  # a gradient from before is to be added to
    outputs = []

    def steps() -> None:
        for _ in range(2):
            with torch.set_grad_enabled(grad):
                out = model(torch.randn(shape, dtype=dtype))
            outputs.append([one.detach().clone() for one in tensors(out)])
            if grad:
                sum(one.float().square().mean() for one in tensors(out)).backward()

    if watched:
        with watch(model) as recording:
            steps()
        assert recording.facts.forwards == 2
        assert recording.facts.backwards == 2 * grad
        assert all(one.reached == 2 * grad for one in recording.parameters.values())
    else:
        steps()
    return outputs, state(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", MODELS)
def test_a_watched_run_is_the_unwatched_run(name: str, training: bool, grad: bool, dtype: torch.dtype) -> None:
    outputs, left = run(name, training, grad, dtype, watched=False)
    watched_outputs, watched_left = run(name, training, grad, dtype, watched=True)
    assert same(outputs, watched_outputs)
    assert isinstance(left, dict)
    assert isinstance(watched_left, dict)
    for what in left:
        if what not in ("objects", "classes"):  # two models: those of parametrised modules are each one's own
            assert same(left[what], watched_left[what]), what


def test_nothing_stays_behind_and_objects_are_the_same() -> None:
    model = Mixed()
    before = state(model)
    with watch(model):
        inside = state(model)
    assert same(before, state(model))
    for what in ("hooks", "parameter hooks", "process hooks", "training", "classes", "objects"):
        assert same(before[what], inside[what]), what  # not even meanwhile


def test_the_fast_path_stays_the_fast_path() -> None:
    model = encoder().eval()
    with torch.no_grad(), watch(model) as recording:
        model(torch.randn(2, 5, 16))
    names = [row.name for row in recording.of("op")]
    assert names == ["_transformer_encoder_layer_fwd"] * 2
    assert sum(heads.count for heads in recording.heads.values()) == 8


def test_an_exception_in_the_block_leaves_nothing_and_is_told() -> None:
    model = Mixed().eval()  # in training the failed batch would be counted
    x = torch.randn(3, 7, 5)
    before = state(model)
    with pytest.raises(RuntimeError), watch(model) as recording:
        model(x)
    assert same(before, state(model))
    assert recording.facts.error.startswith("RuntimeError")
    assert "the block ended in RuntimeError" in str(recording.report())
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


def test_a_backward_after_the_block_is_not_of_the_run() -> None:
    model = nn.Linear(3, 3)
    with watch(model) as recording:
        out = model(torch.randn(2, 3))
    out.sum().backward()
    assert recording.parameters["weight"].reached == recording.facts.backwards == 0


def test_an_exception_caught_inside_does_not_confuse_paths() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with watch(model) as recording:
        with pytest.raises(RuntimeError):
            model(torch.randn(2, 3))
        model(torch.randn(2, 4))
    assert {row.path for row in recording.of("op")} == {"0", "1"}


def test_a_forward_of_the_instance_comes_back() -> None:
    model = nn.Linear(3, 3)
    own = model.forward
    model.forward = patched = lambda x: own(x) + 1
    with watch(model) as recording:
        model(torch.ones(1, 3))
    assert model.__dict__["forward"] is patched
    assert recording.modules[""].calls == 1


def test_copies_and_pickles_made_inside_are_models_of_their_own() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    x = torch.ones(1, 3)
    with watch(model) as recording:
        assert list(inspect.signature(model[0].forward).parameters) == ["input"]
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            with torch.no_grad():
                twin[0].weight.zero_()
                twin[0].bias.zero_()
            assert torch.equal(twin(x), torch.zeros(1, 3))
    assert recording.facts.forwards == 0
    assert not torch.equal(model(x), torch.zeros(1, 3))


def test_two_models_nested() -> None:
    one, other = nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 2))
    with watch(one) as outer, watch(other) as inner:
        other(one(torch.ones(2, 3))).sum().backward()
    assert [row.path for row in outer.of("output")] == [""]
    assert {row.path for row in inner.of("output")} == {"", "0"}
    assert outer.parameters["weight"].reached == inner.parameters["0.weight"].reached == 1
    # What one of them computes for itself, the other must not see.
    assert {row.name for row in outer.of("op")} == {"addmm"} == {row.name for row in inner.of("op")}


def test_one_model_watched_twice_at_once() -> None:
    model = nn.Linear(3, 3)
    with watch(model) as outer, watch(model) as inner:
        model(torch.ones(2, 3))
    assert outer.modules[""].calls == inner.modules[""].calls == 1
    assert "forward" not in model.__dict__


def test_another_mode_counts_the_model_and_not_us() -> None:
    model = nn.MultiheadAttention(8, 2)
    x = torch.randn(4, 2, 8)
    with FlopCounterMode(display=False) as alone:
        model(x, x, x)
    with FlopCounterMode(display=False) as outside, watch(model):
        model(x, x, x)
    with watch(model), FlopCounterMode(display=False) as inside:
        model(x, x, x)
    assert alone.get_total_flops() == outside.get_total_flops() == inside.get_total_flops()


def test_another_thread_is_not_of_this_run() -> None:
    model = nn.Linear(3, 3)
    with watch(model) as recording:
        thread = threading.Thread(target=model, args=(torch.ones(1, 3),))
        thread.start()
        thread.join()
    assert recording.facts.forwards == 0


class Freed:
    """A hook whose end shows that its graph ended."""

    def __call__(self, grad: Tensor) -> None: ...


def test_no_tensor_of_the_run_is_kept() -> None:
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(4)])
    seen: list[weakref.ref[Tensor]] = []
    with watch(model) as recording:
        out = model(torch.randn(2, 8))
        seen.append(weakref.ref(out))
        out.sum().backward()
        del out
        freed = Freed()
        x = torch.randn(2, 8)
        first = model[0](x)  # a graph that no backward frees
        first.register_hook(freed)
        hidden = model[1](first)
        seen += [weakref.ref(hidden), weakref.ref(first)]
        graph = weakref.ref(freed)
        del first, hidden, freed
        gc.collect()
        assert [one() for one in (*seen, graph)] == [None] * 4
    assert recording.facts.backwards == 1


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "saved"])
def test_activation_checkpointing_counts_each_forward_once(reentrant: bool) -> None:
    inner = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))

    class Saved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.inner = nn.Linear(4, 4), inner

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, self.first(x), use_reentrant=reentrant)  # type: ignore[no-any-return]

    model = Saved()
    with watch(model) as recording:
        model(torch.randn(3, 4)).sum().backward()
    assert {calls.calls for calls in recording.modules.values()} == {1}
    assert all(one.reached == 1 and one.used for one in recording.parameters.values())
    assert recording.rows["output gradient", "inner.0", "Linear"].calls == 1


def test_autocast_and_double_backward() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
    x = torch.randn(3, 4, requires_grad=True)

    def step() -> list[Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x)
        (slope,) = torch.autograd.grad(out.float().sum(), x, create_graph=True)
        slope.square().sum().backward()
        return [out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    plain = step()
    with watch(model) as recording:
        watched = step()
    assert same(plain, watched)
    assert recording.row("output", "0", "Linear").dtype == "bfloat16"
    assert recording.parameters["0.weight"].used
    assert recording.facts.backwards == 2


def test_flex_attention_runs_and_transforms_run() -> None:
    class Flex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x)
            return flex_attention(y, y, y)  # type: ignore[return-value]

    model, x = Flex(), torch.randn(1, 2, 8, 4)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # that it is not compiled
        plain = model(x)
        with watch(model):
            watched = model(x)
    assert torch.equal(plain, watched)
    layer, rows = nn.Linear(3, 2), torch.randn(4, 3)
    plain = torch.func.vmap(torch.func.grad(lambda row: layer(row).sum()))(rows)
    with watch(layer):
        watched = torch.func.vmap(torch.func.grad(lambda row: layer(row).sum()))(rows)
    assert torch.equal(plain, watched)


def test_inference_mode() -> None:
    model = Mixed().eval()
    with torch.inference_mode(), watch(model) as recording:
        model(torch.randn(2, 4, 16))
    assert recording.facts.forwards == 1
    assert "gradients were off" in str(recording.report())


def test_what_compile_has_stays_compiled() -> None:
    ran: list[int] = []

    def backend(graph: torch.fx.GraphModule, example: list[Tensor]) -> object:
        ran.append(1)
        return graph.forward

    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    compiled = torch.compile(model, backend=backend)
    x = torch.randn(2, 3)
    plain = compiled(x)
    with watch(compiled) as recording:
        assert torch.equal(compiled(x), plain)
    compiled(x)
    assert len(ran) == 1
    assert recording.modules[""].calls == 1
    assert "compiled by torch.compile" in str(recording.report())


@pytest.mark.parametrize("arguments", [{"bound": 0}, {"rows": 2.5}, {"bound": True}], ids=str)
def test_nonsense_is_refused(arguments: dict[str, object]) -> None:
    with pytest.raises(HeadwayError, match="takes a whole number"):
        watch(nn.Linear(1, 1), **arguments)  # type: ignore[arg-type]


def test_what_is_no_module_and_a_second_block_are_refused() -> None:
    with pytest.raises(HeadwayError, match=r"takes a torch\.nn\.Module"):
        watch(torch.ones(1))  # type: ignore[arg-type]
    once = watch(nn.Linear(1, 1))
    with once:
        pass
    with pytest.raises(HeadwayError, match=r"call headway\.watch again"), once:
        pass

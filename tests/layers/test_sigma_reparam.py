"""σReparam: the function kept at wrapping, σ and its gradient right by float64, and nothing left behind."""

from __future__ import annotations

import copy
import importlib
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deck import Source
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.func import functional_call
from torch.nn.utils.parametrize import is_parametrized, register_parametrization, remove_parametrizations
from torch.utils.checkpoint import checkpoint

from headway import HeadwayError, RequestError
from headway.layers import MultiheadAttention, remove_sigma_reparam, sigma_reparam
from headway.layers.sigma_reparam import SigmaReparam, first_singular_vectors

home = importlib.import_module("headway.layers.sigma_reparam")  # the package has the function of that name
EPS = 1e-5
"""How much wrapping may change a function."""


@pytest.fixture(autouse=True)
def _no_programs_left() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def drawn(*shape: int, name: str = "x") -> Tensor:
    return Source(name).normal(*shape).float()


def attend(module: nn.MultiheadAttention) -> Callable[[], Tensor]:
    x, context = drawn(2, 5, 16), drawn(2, 7, module.kdim, name="context")
    return lambda: module(x, context, context, need_weights=False)[0]


def encoder(**options: Any) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True, **options)


MAKE: dict[str, Callable[[], tuple[nn.Module, Callable[[nn.Module], Tensor]]]] = {
    "Linear": lambda: (nn.Linear(16, 8), lambda m: m(drawn(3, 16))),
    "Linear to one": lambda: (nn.Linear(16, 1), lambda m: m(drawn(3, 16))),
    "Linear from one": lambda: (nn.Linear(1, 9), lambda m: m(drawn(3, 1))),
    "Conv1d": lambda: (nn.Conv1d(4, 6, 3, groups=2), lambda m: m(drawn(2, 4, 9))),
    "Conv2d": lambda: (nn.Conv2d(3, 5, 3), lambda m: m(drawn(2, 3, 6, 6))),
    "ConvTranspose1d": lambda: (nn.ConvTranspose1d(4, 6, 3, groups=2), lambda m: m(drawn(2, 4, 9))),
    "MHA": lambda: (nn.MultiheadAttention(16, 4, batch_first=True), lambda m: attend(m)()),
    "MHA, kdim": lambda: (nn.MultiheadAttention(16, 4, batch_first=True, kdim=6, vdim=6), lambda m: attend(m)()),
    "encoder": lambda: (encoder(), lambda m: m(drawn(2, 5, 16))),
    "ours": lambda: (MultiheadAttention(16, 4, kv_heads=2), lambda m: m(drawn(2, 5, 16))),
}


def wrappers(module: nn.Module) -> list[SigmaReparam]:
    return [part for part in module.modules() if isinstance(part, SigmaReparam)]


def wrapper(module: nn.Module, name: str = "weight") -> SigmaReparam:
    found = module.parametrizations[name][0]  # type: ignore[index]
    assert isinstance(found, SigmaReparam)
    return found


def original(module: nn.Module, name: str = "weight") -> nn.Parameter:
    found = module.parametrizations[name].original  # type: ignore[index, union-attr]
    assert isinstance(found, nn.Parameter)
    return found


def buffers(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.named_buffers()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def train(module: nn.Module, run: Callable[[nn.Module], Tensor], steps: int = 20, lr: float = 1e-2) -> None:
    optimizer = torch.optim.SGD(module.parameters(), lr)
    for _ in range(steps):
        optimizer.zero_grad()
        (run(module) - 1).square().mean().backward()
        optimizer.step()


def norm(matrix: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(matrix.detach().double().flatten(1), ord=2)


# -- the function -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", MAKE)
def test_wrapping_keeps_the_function(name: str, mode: bool) -> None:
    module, run = MAKE[name]()
    train(module, run)
    module.train(mode)
    before = run(module).detach()
    assert sigma_reparam(module) is module
    assert wrappers(module)
    assert (run(module) - before).abs().max() <= EPS
    with torch.no_grad():
        assert (run(module) - before).abs().max() <= EPS  # an encoder's fast path reads weights by itself


@pytest.mark.parametrize("name", MAKE)
def test_training_moves_weights_and_gammas_and_the_norm_follows_gamma(name: str) -> None:
    module, run = MAKE[name]()
    sigma_reparam(module)
    before = {key: value.detach().clone() for key, value in module.named_parameters()}
    train(module, run, steps=25)
    still = {key for key, value in module.named_parameters() if torch.equal(value, before[key])}
    assert not {key for key in still if "original" in key or "gamma" in key}  # a softmax does not hear a key's bias
    module.eval()
    for part in module.modules():
        for key in getattr(part, "parametrizations", {}):
            held = wrapper(part, key)
            effective = getattr(part, key).movedim(held.axis, 0)
            assert norm(effective).item() == pytest.approx(held.gamma.item(), rel=1e-3)


def test_no_weight_of_an_attention_is_left_out() -> None:
    layer = sigma_reparam(encoder())
    names = {name.removesuffix(".original") for name, _ in layer.named_parameters() if name.endswith("original")}
    assert names == {
        "self_attn.parametrizations.in_proj_weight",
        "self_attn.out_proj.parametrizations.weight",
        "linear1.parametrizations.weight",
        "linear2.parametrizations.weight",
    }
    separate = sigma_reparam(nn.MultiheadAttention(16, 4, kdim=6, vdim=5))
    assert set(separate.parametrizations) == {"q_proj_weight", "k_proj_weight", "v_proj_weight"}  # type: ignore[arg-type]


# -- σ ----------------------------------------------------------------------------------------------------------------


def matrix_with(values: Tensor, rows: int | None = None) -> Tensor:
    columns = len(values)
    left = torch.linalg.qr(Source("left").normal(rows or columns, rows or columns))[0][:, :columns]
    right = torch.linalg.qr(Source("right").normal(columns, columns))[0]
    return (left * values) @ right


MATRICES: dict[str, Callable[[], Tensor]] = {
    "random": lambda: Source("w").normal(40, 30),
    "wide": lambda: Source("w").normal(30, 90),
    "row": lambda: Source("w").normal(1, 9),
    "column": lambda: Source("w").normal(9, 1),
    "one number": lambda: torch.tensor([[-3.0]], dtype=torch.float64),
    "all the same": lambda: matrix_with(torch.ones(60, dtype=torch.float64)),
    "nearly the same": lambda: matrix_with(torch.linspace(1, 0.9999, 200, dtype=torch.float64)),
    "crowded at the top": lambda: matrix_with(1 - torch.logspace(-10, -0.3, 150, dtype=torch.float64)),
    "two firsts": lambda: matrix_with(torch.tensor([2.0, 2.0, 1.0, 0.0], dtype=torch.float64), rows=8),
    "rank one": lambda: torch.outer(Source("a").normal(20), Source("b").normal(10)),
    "rows sum to 0": lambda: (w := Source("w").normal(20, 20)) - w.mean(1, keepdim=True),
    "huge": lambda: 1e300 * Source("w").normal(12, 10),
    "small": lambda: 1e-300 * Source("w").normal(12, 10),
}


@pytest.mark.parametrize("name", MATRICES)
def test_sigma_is_the_spectral_norm(name: str) -> None:
    matrix = MATRICES[name]()
    u, v = first_singular_vectors(matrix)
    largest = matrix.abs().max()
    assert (u @ (matrix / largest) @ v).item() == pytest.approx(norm(matrix / largest).item(), rel=1e-10)
    assert torch.linalg.vector_norm(u).item() == pytest.approx(1)
    assert torch.linalg.vector_norm(v).item() == pytest.approx(1)


@pytest.mark.parametrize("name", MATRICES)
def test_power_iteration_stays_at_the_spectral_norm(name: str) -> None:
    matrix = MATRICES[name]()
    layer = sigma_reparam(linear(matrix))
    for _ in range(5):
        effective = layer.weight
    gamma = wrapper(layer).gamma
    assert (gamma / matrix.abs().max()).item() == pytest.approx(norm(matrix / matrix.abs().max()).item(), rel=1e-10)
    torch.testing.assert_close(effective, matrix, rtol=1e-10, atol=0)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [1e-36, 1e36])
def test_norms_at_the_ends_of_float32(size: float) -> None:
    layer = linear((size * Source("w").normal(12, 10)).float())
    before = layer.weight.detach().clone()
    sigma_reparam(layer)
    effective = layer.weight
    torch.testing.assert_close(effective, before, rtol=1e-6, atol=0)
    effective.mul(1 / size).sum().backward()
    for parameter in layer.parameters():
        assert parameter.grad is None or bool(parameter.grad.isfinite().all())


def linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
    return layer


def test_power_iteration_finds_a_new_norm() -> None:
    layer = sigma_reparam(linear(Source("w").normal(12, 10)))
    with torch.no_grad():
        original(layer).copy_(matrix_with(torch.linspace(3, 1, 10, dtype=torch.float64), rows=12))
    for _ in range(200):
        effective = layer.weight
    assert norm(effective).item() == pytest.approx(wrapper(layer).gamma.item(), rel=1e-9)  # type: ignore[arg-type]


def test_a_zero_matrix_stays_zero_and_can_learn() -> None:
    layer, x = nn.Linear(6, 4, bias=False), drawn(8, 6)
    nn.init.zeros_(layer.weight)
    sigma_reparam(layer)
    assert torch.equal(layer(x), torch.zeros(8, 4))
    target = x @ drawn(6, 4, name="w")
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        loss = (layer(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(bool(value.isfinite().all()) for value in layer.state_dict().values())


def test_a_nan_does_not_stay_in_the_buffers() -> None:
    layer = sigma_reparam(nn.Linear(6, 4))
    kept = original(layer).detach().clone()
    with torch.no_grad():
        original(layer)[0, 0] = float("nan")
        assert layer(drawn(2, 6)).isnan().any()
        original(layer).copy_(kept)
    assert layer(drawn(2, 6)).isfinite().all()


# -- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_gradients_are_those_of_the_exact_formula(dtype: torch.dtype) -> None:
    matrix, push = matrix_with(torch.linspace(3, 1, 10, dtype=torch.float64), rows=12), Source("push").normal(12, 10)
    layer = sigma_reparam(linear(matrix.to(dtype)))
    gamma = wrapper(layer).gamma
    with torch.no_grad():
        gamma.mul_(1.7)
    grads = torch.autograd.grad(layer.weight, (original(layer), gamma), push.to(dtype))  # type: ignore[arg-type]

    exact = (matrix.clone().requires_grad_(), gamma.detach().double().requires_grad_())
    weight = exact[1] / torch.linalg.svdvals(exact[0])[0] * exact[0]
    truth = torch.autograd.grad(weight, exact, push)
    for got, true in zip(grads, truth, strict=True):
        torch.testing.assert_close(
            got.double(), true, rtol=100 * torch.finfo(dtype).eps, atol=100 * torch.finfo(dtype).eps
        )


def test_two_forward_passes_before_one_backward() -> None:
    layer, x = sigma_reparam(nn.Linear(6, 4)), drawn(2, 6)
    (layer(x).square().mean() + layer(2 * x).square().mean()).backward()
    assert original(layer).grad is not None


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_recomputes_the_same_weight(reentrant: bool) -> None:
    layer = sigma_reparam(nn.Linear(6, 4, dtype=torch.float64))
    with torch.no_grad():
        original(layer).normal_()  # far from the kept vectors, so each step changes the weight
    plain = copy.deepcopy(layer)
    x = Source("x").normal(2, 6).requires_grad_()
    plain(x).square().sum().backward()
    checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
    assert same(buffers(layer), buffers(plain))
    for (name, got), (_, true) in zip(layer.named_parameters(), plain.named_parameters(), strict=True):
        assert got.grad is not None, name
        assert torch.equal(got.grad, true.grad), name  # type: ignore[arg-type]


# -- state ------------------------------------------------------------------------------------------------------------


def moved(layer: nn.Module) -> nn.Module:
    """The layer, its weight no longer where its buffers were made for."""
    with torch.no_grad():
        original(layer).add_(drawn(*original(layer).shape, name="moved"))
    return layer


def test_eval_never_changes_a_buffer_and_train_does() -> None:
    layer = moved(sigma_reparam(nn.Linear(6, 4)))
    before = buffers(layer)
    layer.eval()
    layer(drawn(2, 6)).sum().backward()
    assert same(buffers(layer), before)
    layer.train()
    layer(drawn(2, 6))
    assert not same(buffers(layer), before)


def test_frozen_stays_frozen() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))
    model[0].requires_grad_(False)
    kept = model[0].weight
    sigma_reparam(model)
    assert original(model[0]) is kept
    assert [name for name, value in model.named_parameters() if value.requires_grad] == [
        "1.bias",
        "1.parametrizations.weight.original",
        "1.parametrizations.weight.0.gamma",
    ]
    before = buffers(moved(model[0]))
    model.train()(drawn(2, 6)).sum().backward()
    assert same(buffers(model[0]), before)
    remove_sigma_reparam(model)
    assert not model[0].weight.requires_grad


def test_an_optimizer_from_before_still_moves_the_weight() -> None:
    layer = nn.Linear(6, 4)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    sigma_reparam(layer)
    before = layer(drawn(2, 6)).detach()
    layer(drawn(2, 6)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(layer(drawn(2, 6)), before)


@pytest.mark.parametrize("name", MAKE)
def test_state_dict_into_a_fresh_wrapped_model(name: str) -> None:
    module, run = MAKE[name]()
    train(sigma_reparam(module), run, steps=3)
    module.eval()
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    fresh, _ = MAKE[name]()
    sigma_reparam(fresh).load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(run(fresh.eval()), run(module))


def test_state_dict_into_a_model_without_memory() -> None:
    layer = sigma_reparam(nn.Linear(6, 4))
    with torch.device("meta"):
        fresh = sigma_reparam(nn.Linear(6, 4))
    fresh.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(fresh.eval()(drawn(2, 6)), layer.eval()(drawn(2, 6)))


def test_an_assigned_weight_acts_as_it_is() -> None:
    layer, weight = sigma_reparam(nn.Linear(6, 4)), drawn(4, 6, name="w")
    layer.weight = weight
    torch.testing.assert_close(layer.weight, weight, rtol=1e-6, atol=0)  # type: ignore[arg-type]
    assert wrapper(layer).gamma.item() == pytest.approx(norm(weight).item(), rel=1e-6)


# -- going back -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", MAKE)
def test_removal_leaves_a_plain_model_of_the_same_function(name: str, mode: bool) -> None:
    module, run = MAKE[name]()
    parameters, keys = dict(module.named_parameters()), list(module.state_dict())
    classes, attributes = [type(part) for part in module.modules()], [set(vars(part)) for part in module.modules()]
    sigma_reparam(module)
    train(module, run, steps=3)
    now = run(module.eval()).detach()
    assert remove_sigma_reparam(module.train(mode)) is module
    assert (run(module.eval()) - now).abs().max() <= EPS
    assert list(module.state_dict()) == keys
    found = dict(module.named_parameters())
    assert list(found) == list(parameters)
    assert all(found[key] is parameters[key] for key in parameters)
    assert [type(part) for part in module.modules()] == classes
    assert [set(vars(part)) for part in module.modules()] == attributes


def test_removal_of_nothing_is_refused() -> None:
    with pytest.raises(RequestError, match="got a Linear without σReparam; takes one that sigma_reparam wrapped"):
        remove_sigma_reparam(nn.Linear(2, 2))


def test_wrapping_twice_is_wrapping_once() -> None:
    model = sigma_reparam(encoder())
    keys, parts = list(model.state_dict()), list(model.modules())
    sigma_reparam(model)
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.modules(), parts, strict=True))
    remove_sigma_reparam(model)
    assert not wrappers(model)
    sigma_reparam(model)
    assert list(model.state_dict()) == keys


def test_removal_of_a_part() -> None:
    model = sigma_reparam(encoder())
    remove_sigma_reparam(model.self_attn)
    assert len(wrappers(model)) == 2
    assert type(model.self_attn) is nn.MultiheadAttention


def test_removal_beneath_another_class_is_refused() -> None:
    layer = sigma_reparam(nn.Linear(4, 4))
    wrapped = type(layer)
    layer.__class__ = type("Other", (wrapped,), {})
    with pytest.raises(RequestError, match="undo what came later first"):
        remove_sigma_reparam(layer)
    layer.__class__ = wrapped
    remove_sigma_reparam(layer)


def test_removal_beneath_another_parametrization_is_refused() -> None:
    layer = sigma_reparam(nn.Linear(4, 4))
    register_parametrization(layer, "weight", nn.Identity())
    with pytest.raises(RequestError, match="Identity on top of σReparam"):
        remove_sigma_reparam(layer)


def test_another_parametrization_of_the_bias_stays() -> None:
    layer = nn.Linear(4, 4)
    register_parametrization(layer, "bias", nn.Tanh())
    keys = set(layer.state_dict())
    sigma_reparam(layer)
    pickle.loads(pickle.dumps(layer))
    remove_sigma_reparam(layer)
    assert set(layer.state_dict()) == keys
    assert is_parametrized(layer, "bias")


# -- copies -----------------------------------------------------------------------------------------------------------


def by_pickle(module: nn.Module) -> nn.Module:
    made: nn.Module = pickle.loads(pickle.dumps(module))
    return made


def by_torch(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    made: nn.Module = torch.load(file, weights_only=False)
    return made


@pytest.mark.parametrize("by", [copy.deepcopy, by_pickle, by_torch])
@pytest.mark.parametrize("name", MAKE)
def test_copies_are_whole_and_apart(name: str, by: Callable[[nn.Module], nn.Module]) -> None:
    module, run = MAKE[name]()
    keys = list(module.state_dict())
    train(sigma_reparam(module), run, steps=3)
    module.eval()
    now = run(module).detach()
    other = by(module)
    assert torch.equal(run(other), now)
    assert not {id(value) for value in other.parameters()} & {id(value) for value in module.parameters()}
    other = by(other)
    remove_sigma_reparam(other)
    assert list(other.state_dict()) == keys
    assert torch.equal(run(module), now)
    train(module.train(), run, steps=1)


def test_torch_may_remove_it_from_a_copy() -> None:
    layer, x = sigma_reparam(nn.Linear(4, 3)).eval(), drawn(2, 4)
    before = layer(x)
    remove_parametrizations(copy.deepcopy(layer), "weight")
    assert torch.equal(layer(x), before)


def test_rows_are_outputs() -> None:
    assert len(wrapper(sigma_reparam(nn.Conv1d(4, 6, 3))).u) == 6
    assert len(wrapper(sigma_reparam(nn.ConvTranspose1d(4, 6, 3))).u) == 6


def test_a_shallow_copy() -> None:
    layer = sigma_reparam(nn.Linear(4, 3))
    assert original(copy.copy(layer)) is original(layer)


# -- shared parameters ------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.head = nn.Linear(6, 9)
        self.head.weight = self.embed.weight
        self.again = self.head

    def forward(self, tokens: Tensor) -> Tensor:
        hidden: Tensor = self.embed(tokens)
        out: Tensor = self.head(hidden)
        return out


@pytest.mark.parametrize("by", [lambda model: model, copy.deepcopy, by_pickle], ids=["itself", "deepcopy", "pickle"])
@pytest.mark.parametrize("names", [None, "embed", "head.weight", "again", nn.Embedding], ids=str)
def test_a_shared_parameter_is_wrapped_once_for_all_who_hold_it(names: Any, by: Callable[[Tied], Tied]) -> None:
    model, tokens = Tied(), torch.arange(9)
    keys, before = list(model.state_dict()), model(tokens).detach()
    model = by(sigma_reparam(model, names))  # type: ignore[arg-type]
    assert len(wrappers(model)) == 1
    assert model.embed.parametrizations.weight is model.head.parametrizations.weight  # type: ignore[union-attr]
    assert (model(tokens) - before).abs().max() <= EPS
    train(model, lambda m: m(tokens), steps=3)
    model.eval()
    assert torch.equal(model.embed.weight, model.head.weight)
    now = model(tokens).detach()
    remove_sigma_reparam(model)
    assert model.embed.weight is model.head.weight
    assert (model(tokens) - now).abs().max() <= EPS
    assert list(model.state_dict()) == keys
    assert list(dict(model.head.named_parameters())) == ["weight", "bias"]


def test_a_module_held_twice() -> None:
    layer = nn.Linear(4, 4)
    model = sigma_reparam(nn.Sequential(layer, layer), "1")
    assert len(wrappers(model)) == 1
    remove_sigma_reparam(model)
    assert type(layer) is nn.Linear


# -- which weights ----------------------------------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(5, 4)
        self.places = nn.Parameter(torch.randn(1, 7, 4))
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)) for _ in range(2)])
        self.patch = nn.Conv1d(4, 4, 1)


@pytest.mark.parametrize(
    "names, wrapped",
    [
        (None, {"blocks.0.0", "blocks.1.0", "patch"}),
        ("*", {"blocks.0.0", "blocks.1.0", "patch"}),
        ("blocks.0.*", {"blocks.0.0"}),
        ("blocks.*.weight", {"blocks.0.0", "blocks.1.0"}),
        ("patch", {"patch"}),
        ("tokens", {"tokens"}),
        ("tokens.weight", {"tokens"}),
        ("places", {""}),
        (nn.Conv1d, {"patch"}),
        (nn.Embedding, {"tokens"}),
        ([nn.Conv1d, "blocks.1.*"], {"patch", "blocks.1.0"}),
    ],
    ids=lambda value: ",".join(sorted(value)) if isinstance(value, set) else str(value),
)
def test_names_choose(names: Any, wrapped: set[str]) -> None:
    model = sigma_reparam(Model(), names)
    assert {name for name, module in model.named_modules() if is_parametrized(module)} == wrapped


@pytest.mark.parametrize(
    "names, words",
    [
        ("encoder.*", "got names='encoder.*', which matches no weight"),
        (["patch", "norm"], "got names='norm', which matches no weight"),
        ("blocks.0.1.weight", "the weights are 'places', 'tokens.weight', 'blocks.0.0.weight'"),
        (nn.Conv2d, "got names=Conv2d"),
        ([], "got names with nothing in it"),
        ([3], "got names with 3; takes globs"),
    ],
    ids=str,
)
def test_names_that_match_nothing_are_refused(names: Any, words: str) -> None:
    model = Model()
    with pytest.raises(RequestError) as refused:
        sigma_reparam(model, names)
    assert words in str(refused.value)
    assert not wrappers(model)


@pytest.mark.parametrize("make", [lambda: nn.LayerNorm(4), lambda: nn.Linear(0, 4)], ids=["norm", "empty"])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_model_without_matrices_is_refused(make: Callable[[], nn.Module]) -> None:
    with pytest.raises(RequestError, match="without weights of Linear, Conv or nn.MultiheadAttention"):
        sigma_reparam(make())


def test_weights_that_are_not_plain_are_refused_and_nothing_is_wrapped() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    with pytest.raises(HeadwayError, match="got '1.weight' with a parametrization already, _WeightNorm"):
        sigma_reparam(model)
    assert not wrappers(model)
    with pytest.raises(HeadwayError, match="run the model once"):
        sigma_reparam(nn.LazyLinear(4))


def test_a_weight_of_a_kind_of_its_own_is_refused() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    layer = nn.Linear(4, 3)
    layer.weight = nn.Parameter(TwoTensor(drawn(3, 4), drawn(3, 4)))
    with pytest.raises(RequestError, match="got 'weight' as a TwoTensor; .* before the model is sharded or quantised"):
        sigma_reparam(layer)


def test_a_class_changed_in_between_is_refused() -> None:
    module = sigma_reparam(nn.MultiheadAttention(4, 1, kdim=3), "q_proj_weight")
    module.__class__ = type("Other", (type(module),), {})
    with pytest.raises(RequestError, match="got 'k_proj_weight', whose module's class was changed"):
        sigma_reparam(module)
    assert len(wrappers(module)) == 1


def test_a_failure_half_way_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = encoder()
    before, classes = dict(model.named_parameters()), [type(part) for part in model.modules()]
    calls = []

    def fails(matrix: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(matrix)
        if len(calls) == 3:
            raise RuntimeError("no memory")
        return first_singular_vectors(matrix)

    monkeypatch.setattr(home, "first_singular_vectors", fails)
    with pytest.raises(RuntimeError, match="no memory"):
        sigma_reparam(model)
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert [type(part) for part in model.modules()] == classes


# -- dtypes, compilers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_weights_are_kept_to_the_bit(dtype: torch.dtype) -> None:
    layer, x = nn.Linear(64, 48).to(dtype), drawn(5, 64).to(dtype)
    before, weight = layer(x), layer.weight.detach().clone()
    sigma_reparam(layer)
    assert torch.equal(layer.weight, weight)
    assert torch.equal(layer(x), before)
    assert {value.dtype for value in wrapper(layer).state_dict().values()} == {torch.float32}
    layer(x).float().square().mean().backward()
    assert original(layer).grad is not None
    assert wrapper(layer).gamma.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_must_be_exact_stays_wide_when_a_model_is_narrowed(dtype: torch.dtype) -> None:
    layer = sigma_reparam(nn.Linear(64, 48))
    weight = layer.weight.detach().clone()
    before = {name: value.clone() for name, value in wrapper(layer).state_dict().items()}
    layer.to(dtype)
    assert same(wrapper(layer).state_dict(), before)
    assert original(layer).dtype == layer.weight.dtype == dtype
    torch.testing.assert_close(layer.weight, weight.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=0)
    assert wrapper(layer.double()).u.dtype == torch.float64
    assert wrapper(layer.float()).u.dtype == torch.float32


def test_a_narrow_weight_is_rounded_once() -> None:
    layer = sigma_reparam(nn.Linear(64, 48).bfloat16()).eval()
    with torch.no_grad():
        wrapper(layer).gamma.mul_(1.003)
    assert torch.equal(layer.weight, (original(layer).float() * 1.003).bfloat16())  # type: ignore[arg-type]


def test_autocast_does_not_narrow_the_norm(device: str) -> None:
    layer, x = moved(sigma_reparam(nn.Linear(64, 48))).to(device), drawn(5, 64).to(device)
    other = copy.deepcopy(layer)
    with torch.autocast(device, torch.bfloat16):
        out = layer(x)
        assert out.dtype == torch.bfloat16
    other(x)
    assert same(buffers(layer), buffers(other))
    with torch.autocast(device, torch.bfloat16):
        weight = layer.eval().weight
    assert torch.equal(weight, other.eval().weight)  # type: ignore[arg-type]
    out.float().sum().backward()


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_compiles_in_one_graph(mode: bool) -> None:
    module = sigma_reparam(nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))).train(mode)
    moved(module[0])  # type: ignore[index]
    other, x = copy.deepcopy(module), drawn(2, 6)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        compiled(x).square().sum().backward()
        other(x).square().sum().backward()
    torch.testing.assert_close(buffers(module), buffers(other))
    for got, true in zip(module.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(got.grad, true.grad)


def test_attention_compiles_in_one_graph() -> None:
    module = sigma_reparam(MultiheadAttention(16, 4))
    x = drawn(2, 5, 16)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="eager")(x), module(x))


def test_exports() -> None:
    layer, x = sigma_reparam(nn.Linear(6, 4)).eval(), drawn(2, 6)
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), layer(x))


def test_parameters_given_from_outside() -> None:
    layer, x = sigma_reparam(nn.Linear(6, 4)).eval(), drawn(2, 6)
    gamma = "parametrizations.weight.0.gamma"
    half = {name: value.detach() * (0.5 if name in (gamma, "bias") else 1) for name, value in layer.named_parameters()}
    torch.testing.assert_close(functional_call(layer, half, (x,)), layer(x) / 2)


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")
def test_sharded_after_wrapping() -> None:
    model, x = nn.Sequential(MultiheadAttention(16, 4), nn.Linear(16, 8)), drawn(2, 5, 16)
    before = model(x).detach()
    sigma_reparam(model)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        assert (model(x) - before).abs().max() <= EPS
        train(model, lambda m: m(x), steps=2)
        with pytest.raises(RequestError, match="got '0.q_proj.weight' as a DTensor"):
            remove_sigma_reparam(model)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    "backend, outside",
    [("eager", True), ("aot_eager", True), ("aot_eager", False)],
    ids=["checkpoint of eager", "checkpoint of compiled", "compiled checkpoint"],
)
def test_checkpointing_and_compiling(backend: str, outside: bool) -> None:
    layer, x = moved(sigma_reparam(nn.Linear(6, 4))), drawn(2, 6)
    other = copy.deepcopy(layer)
    if outside:
        compiled = torch.compile(layer, backend=backend, fullgraph=True)
        out = checkpoint(compiled, x, use_reentrant=False)
    else:
        out = torch.compile(lambda x: checkpoint(layer, x, use_reentrant=False), backend=backend, fullgraph=True)(x)
    out.square().sum().backward()
    other(x).square().sum().backward()
    for got, true in zip(layer.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(got.grad, true.grad)
    assert same(buffers(layer), buffers(other))


def test_no_random_number_is_drawn() -> None:
    layer, state = nn.Linear(6, 4), torch.get_rng_state()
    sigma_reparam(layer)(drawn(2, 6))
    assert torch.equal(torch.get_rng_state(), state)


def test_hooks_and_mode_stay() -> None:
    layer = nn.Linear(6, 4).eval()
    seen: list[str] = []
    layer.register_forward_hook(lambda *_: seen.append("ran"))
    sigma_reparam(layer)(drawn(2, 6))
    remove_sigma_reparam(layer)(drawn(2, 6))
    assert seen == ["ran", "ran"]
    assert not layer.training

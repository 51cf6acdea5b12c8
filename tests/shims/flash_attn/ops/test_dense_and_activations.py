"""flash_attn.ops.{fused_dense, activations}: against their definition in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from deck import Source
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from headway.errors import RequestError
from headway.shims.flash_attn.ops import activations
from headway.shims.flash_attn.ops.fused_dense import (
    ColumnParallelLinear,
    FusedDense,
    FusedMLP,
    ParallelFusedMLP,
    RowParallelLinear,
    fused_dense_func,
    fused_mlp_func,
)


def drawn(*shape: int, name: str = "x") -> Tensor:
    return Source(name).normal(*shape).requires_grad_()


DEFINITIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_approx": lambda x: x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: x * (x > 0),
    "sqrelu": lambda x: x**2 * (x > 0),
}


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("biases", [(True, True), (False, True), (False, False)], ids=str)
@pytest.mark.parametrize("activation", DEFINITIONS)
def test_the_mlp_is_its_definition(
    activation: str, biases: tuple[bool, bool], residual: bool, training: bool, level: int
) -> None:
    mlp = FusedMLP(6, 10, 5, *biases, activation, residual, level).double().train(training)
    assert list(mlp.state_dict()) == [
        f"fc{i}.{part}" for i in (1, 2) for part in ("weight", "bias") if part == "weight" or biases[i - 1]
    ]
    x = drawn(2, 3, 6)
    out = mlp(x)
    if residual:
        out, given = out
        assert given is x
    zero = torch.zeros(())
    hidden = DEFINITIONS[activation](x @ mlp.fc1.weight.T + (mlp.fc1.bias if biases[0] else zero))
    truth = hidden @ mlp.fc2.weight.T + (mlp.fc2.bias if biases[1] else zero)
    inputs = (x, *mlp.parameters())
    grads = (torch.autograd.grad(end, inputs, drawn(2, 3, 5, name="cotangent").detach()) for end in (out, truth))
    torch.testing.assert_close(out, truth)
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


class Counted(TorchDispatchMode):
    """How often each operator runs."""

    def __init__(self) -> None:
        super().__init__()
        self.runs: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.runs[func.overloadpacket.__name__] = self.runs.get(func.overloadpacket.__name__, 0) + 1
        return func(*args, **kwargs or {})


@pytest.mark.parametrize(("level", "again"), [(0, (0, 0)), (1, (1, 0)), (2, (1, 1))])
def test_each_level_computes_again_what_it_says(level: int, again: tuple[int, int]) -> None:
    mlp, x = FusedMLP(6, checkpoint_lvl=level), torch.randn(4, 6, requires_grad=True)
    out = mlp(x)
    with Counted() as counted:
        out.sum().backward()
    plain = mlp.train(True)
    plain.checkpoint_lvl = 0
    out = plain(x)
    with Counted() as without:
        out.sum().backward()
    more = tuple(counted.runs.get(name, 0) - without.runs.get(name, 0) for name in ("gelu", "addmm"))
    assert more == again


def test_sizes_are_flash_attns() -> None:
    assert (FusedMLP(6).fc1.out_features, FusedMLP(6).fc2.out_features) == (24, 6)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
def test_dense_is_linear(residual: bool, bias: bool) -> None:
    layer, x = FusedDense(6, 4, bias, residual).double(), drawn(2, 6)
    truth = x @ layer.weight.T + (layer.bias if bias else 0)
    out = layer(x)
    if residual:
        out, given = out
        assert given is x
    torch.testing.assert_close(out, truth)
    torch.testing.assert_close(fused_dense_func(x, layer.weight, layer.bias), truth)


def test_the_mlp_compiles_whole() -> None:
    torch._dynamo.reset()
    x = torch.randn(4, 6, requires_grad=True)
    for level in (0, 2):
        mlp = FusedMLP(6, checkpoint_lvl=level)
        out = torch.compile(mlp, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(out, mlp(x))
        out.sum().backward()
    torch._dynamo.reset()


X, W = torch.zeros(2, 6), torch.zeros(6, 6)
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "ParallelFusedMLP": (lambda: ParallelFusedMLP(6, process_group=object()), "got ParallelFusedMLP, which splits"),
    "ColumnParallelLinear": (lambda: ColumnParallelLinear(6, 6, object()), "got ColumnParallelLinear"),
    "RowParallelLinear": (lambda: RowParallelLinear(6, 6, object()), "got RowParallelLinear"),
    "a group to FusedDense": (lambda: FusedDense(6, 6)(X, object()), "got fused_dense_func with a process_group"),
    "a group to FusedMLP": (lambda: FusedMLP(6)(X, object()), "got fused_mlp_func with a process_group"),
    "an activation": (lambda: FusedMLP(6, activation="gelu"), "takes 'gelu_approx', 'relu', 'sqrelu'"),
    "an activation of the function": (lambda: fused_mlp_func(X, W, W, activation="silu"), "got activation='silu'"),
    "a level": (lambda: FusedMLP(6, checkpoint_lvl=3), "got checkpoint_lvl=3"),
    "a heuristic": (lambda: fused_mlp_func(X, W, W, heuristic=5), "got heuristic=5"),
}


@pytest.mark.parametrize(("call", "words"), REFUSED.values(), ids=REFUSED)
def test_is_refused_in_words(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(RequestError) as refusal:
        call()
    assert words in str(refusal.value)


@pytest.mark.parametrize(
    ("forward", "backward", "definition"),
    [
        (activations.gelu_fwd, activations.gelu_bwd, DEFINITIONS["gelu_approx"]),
        (activations.fast_gelu_impl, activations.gelu_bwd, DEFINITIONS["gelu_approx"]),
        (activations.sqrelu_fwd, activations.sqrelu_bwd, DEFINITIONS["sqrelu"]),
        (torch.relu, activations.relu_bwd, DEFINITIONS["relu"]),
    ],
    ids=["gelu", "fast gelu", "sqrelu", "relu"],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_activations_and_their_derivatives(
    dtype: torch.dtype, forward: Callable[[Tensor], Tensor], backward: Callable[..., Tensor], definition: Any
) -> None:
    x, g = drawn(40).detach().to(dtype).requires_grad_(), drawn(40, name="g").detach().to(dtype)
    wide = x.detach().double().requires_grad_()
    (truth,) = torch.autograd.grad(definition(wide), wide, g.double())
    (own,) = torch.autograd.grad(forward(x), x, g)
    assert forward(x).dtype == backward(g, x).dtype == dtype
    near: dict[str, float] = (
        {} if dtype == torch.float64 else {"rtol": 4 * torch.finfo(dtype).eps, "atol": torch.finfo(dtype).eps}
    )
    for mine, true in ((forward(x), definition(wide)), (own, truth), (backward(g, x), truth)):
        torch.testing.assert_close(mine.double(), true, **near)


def test_relu_passes_its_gradient_at_0_as_in_flash_attn() -> None:
    assert activations.relu_bwd(torch.ones(1), torch.zeros(1)) == 1


def test_gelu_of_a_sum_with_a_bias() -> None:
    y, bias, g = drawn(5, 4), drawn(4, name="bias"), drawn(5, 4, name="g").detach()
    truth = DEFINITIONS["gelu_approx"](y + bias)
    torch.testing.assert_close(activations.bias_gelu(y, bias), truth)
    grads = torch.autograd.grad(truth, (y, bias), g)
    torch.testing.assert_close(activations.bias_gelu_back(g, y, bias), grads)
    torch.testing.assert_close(torch.autograd.grad(activations.bias_gelu_impl(y, bias), (y, bias), g), grads)


def test_swiglu_and_its_derivatives() -> None:
    x, y, g = drawn(5, 4), drawn(5, 4, name="y"), drawn(5, 4, name="g").detach()
    truth = x / (1 + torch.exp(-x)) * y
    torch.testing.assert_close(activations.swiglu(x, y), truth)
    grads = torch.autograd.grad(truth, (x, y), g)
    torch.testing.assert_close(activations.swiglu_bwd(x, y, g), grads)
    torch.testing.assert_close(torch.autograd.grad(activations.swiglu(x, y), (x, y), g), grads)

"""flash_attn.ops.{layer_norm, rms_norm, triton.layer_norm}: against their definition in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from deck import Source
from torch import Tensor

from headway.errors import RequestError
from headway.shims.flash_attn.ops import layer_norm as layers
from headway.shims.flash_attn.ops import rms_norm as rms
from headway.shims.flash_attn.ops.triton import layer_norm as fused

ROWS, SIZE, EPS = (3, 5), 12, 1e-3
DROP = 0.4


def drawn(*shape: int, name: str = "x") -> Tensor:
    return Source(name).normal(*shape).requires_grad_()


def by_definition(total: Tensor, weight: Tensor, bias: Tensor | None, is_rms: bool) -> Tensor:
    centred = total if is_rms else total - total.mean(-1, keepdim=True)
    out = centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt() * weight
    return out if bias is None else out + bias


def judged(run: Callable[[dict[str, Tensor]], Any], truth: Callable[..., Any], inputs: dict[str, Tensor]) -> None:
    """All results that are numbers, and the gradients of all inputs, are those of the definition.

    What was dropped is drawn by the run, so the definition is given its masks.
    """
    mine = run(inputs)
    mine = mine if isinstance(mine, tuple) else (mine,)
    masks = [each for each in mine if each is not None and not each.is_floating_point()]
    ours = [each for each in mine if each is not None and each.is_floating_point()]
    true = truth(inputs, *masks)
    assert len(ours) == len(true)
    for one, other in zip(ours, true, strict=True):
        torch.testing.assert_close(one, other)
    pushes = [drawn(*each.shape, name=f"cotangent {i}").detach() for i, each in enumerate(ours)]
    for one, other in zip(
        *(torch.autograd.grad(ends, list(inputs.values()), pushes) for ends in (ours, true)), strict=True
    ):
        torch.testing.assert_close(one, other)


def tensors(**shapes: tuple[int, ...] | None) -> dict[str, Tensor]:
    return {name: drawn(*shape, name=name) for name, shape in shapes.items() if shape is not None}


FULL = (*ROWS, SIZE)


# -- triton.layer_norm ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("p", [0.0, DROP])
@pytest.mark.parametrize("prenorm", [False, True], ids=["post", "pre"])
@pytest.mark.parametrize("second", ["none", "x1", "weight1", "both"])
@pytest.mark.parametrize("has_residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("centred", [False, True], ids=["weight", "1 + weight"])
@pytest.mark.parametrize("rowscale", [None, torch.rand(ROWS).double()], ids=["", "rowscale"])
def test_the_fused_norm_is_its_definition(
    rowscale: Tensor | None, centred: bool, has_residual: bool, second: str, prenorm: bool, p: float, is_rms: bool
) -> None:
    if rowscale is not None and second in ("x1", "both"):
        rowscale = None  # refused together, see below
    inputs = tensors(
        x=FULL,
        weight=(SIZE,),
        bias=None if is_rms else (SIZE,),
        residual=FULL if has_residual else None,
        x1=FULL if second in ("x1", "both") else None,
        weight1=(SIZE,) if second in ("weight1", "both") else None,
        bias1=(SIZE,) if second == "both" else None,
    )
    options: dict[str, Any] = {"eps": EPS, "dropout_p": p, "rowscale": rowscale, "prenorm": prenorm}
    options |= {"zero_centered_weight": centred, "return_dropout_mask": p > 0}

    def run(inputs: dict[str, Tensor]) -> Any:
        given = {"bias": None} | inputs | options
        return fused.rms_norm_fn(**given) if is_rms else fused.layer_norm_fn(**given)

    def truth(given: dict[str, Tensor], mask: Tensor | None = None, mask1: Tensor | None = None) -> list[Tensor]:
        total = given["x"] * (1 if rowscale is None else rowscale[..., None])
        total = total if mask is None else total * mask / (1 - p)
        if "x1" in given:
            total = total + (given["x1"] if mask1 is None else given["x1"] * mask1 / (1 - p))
        total = total + given.get("residual", torch.zeros(()))
        shift = 1 if centred else 0
        due = [by_definition(total, given["weight"] + shift, given.get("bias"), is_rms)]
        if "weight1" in given:
            due.append(by_definition(total, given["weight1"] + shift, given.get("bias1"), is_rms))
        return [*due, total] if prenorm else due

    judged(run, truth, inputs)


def test_layer_norm_fn_with_is_rms_norm_is_rms_norm_fn() -> None:
    x, weight = drawn(*FULL), drawn(SIZE, name="weight")
    assert torch.equal(fused.layer_norm_fn(x, weight, None, is_rms_norm=True), fused.rms_norm_fn(x, weight, None))


def test_masks_say_what_was_dropped_and_none_where_nothing_was() -> None:
    x, weight = torch.ones(200, 100), torch.ones(100)
    _, total, mask, mask1 = fused.layer_norm_fn(
        x, weight, None, x1=2 * x, dropout_p=DROP, prenorm=True, return_dropout_mask=True
    )
    assert mask.dtype == mask1.dtype == torch.bool
    torch.testing.assert_close(total, (mask * 1.0 + mask1 * 2.0) / (1 - DROP))
    for each in (mask, mask1):
        assert abs(each.float().mean() - (1 - DROP)) < 0.02
    assert abs((mask & mask1).float().mean() - (1 - DROP) ** 2) < 0.02  # drawn apart
    assert fused.layer_norm_fn(x, weight, None, return_dropout_mask=True)[1:] == (None, None)
    assert fused.layer_norm_fn(x, weight, None, dropout_p=DROP, return_dropout_mask=True)[2] is None


def test_the_same_seed_drops_the_same() -> None:
    x, weight = drawn(*FULL), drawn(SIZE, name="weight")
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(fused.layer_norm_fn(x, weight, None, dropout_p=DROP))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


HALF = torch.bfloat16
DTYPES: dict[str, tuple[dict[str, Any], tuple[torch.dtype, torch.dtype]]] = {
    "as x": ({}, (HALF, HALF)),
    "sum in float32": ({"residual_in_fp32": True}, (HALF, torch.float32)),
    "as the residual": ({"residual": torch.float32}, (HALF, torch.float32)),
    "the residual's own": ({"residual": HALF, "residual_in_fp32": True}, (HALF, HALF)),
    "asked for": ({"out_dtype": torch.float32}, (torch.float32, HALF)),
}


@pytest.mark.parametrize(("options", "dtypes"), DTYPES.values(), ids=DTYPES)
def test_dtypes_are_those_of_flash_attn(options: dict[str, Any], dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    x, weight = drawn(*FULL).detach().to(HALF), torch.ones(SIZE)
    if "residual" in options:
        options = options | {"residual": drawn(*FULL, name="residual").to(options["residual"])}
    out, total = fused.layer_norm_fn(x, weight, None, prenorm=True, **options)
    assert (out.dtype, total.dtype) == dtypes
    wide = x.double() + options.get("residual", torch.zeros(())).double()
    torch.testing.assert_close(out.double(), by_definition(wide, weight.double(), None, False), rtol=0.02, atol=0.02)


def test_results_are_put_where_they_are_wanted() -> None:
    x, weight = drawn(*FULL), drawn(SIZE, name="weight")
    out, total = torch.empty(FULL, dtype=torch.float64), torch.empty(15, SIZE, dtype=torch.float64)
    mine = fused.layer_norm_fn(x, weight, None, residual=x, prenorm=True, out=out, residual_out=total)
    torch.testing.assert_close(out, fused.layer_norm_fn(x, weight, None, residual=x))
    torch.testing.assert_close(total.view(FULL), 2 * x)
    assert [each.data_ptr() for each in mine] == [out.data_ptr(), total.data_ptr()]
    mine[0].sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("is_rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("has_residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_the_norm_and_the_linear_after_it(bias: bool, has_residual: bool, is_rms: bool) -> None:
    inputs = tensors(
        x=FULL, norm_weight=(SIZE,), norm_bias=(SIZE,) if bias else None, linear_weight=(7, SIZE),
        linear_bias=(7,) if bias else None, residual=FULL if has_residual else None,
    )  # fmt: skip

    def truth(given: dict[str, Tensor]) -> list[Tensor]:
        total = given["x"] + given.get("residual", torch.zeros(()))
        y = by_definition(total, given["norm_weight"], given.get("norm_bias"), is_rms)
        out = y @ given["linear_weight"].T
        return [out + given["linear_bias"] if bias else out, total]

    given = {"norm_bias": None, "linear_bias": None, "eps": EPS, "prenorm": True, "is_rms_norm": is_rms}
    judged(lambda inputs: fused.layer_norm_linear_fn(**given | inputs), truth, inputs)
    assert isinstance(fused.layer_norm_linear_fn(**given | inputs | {"prenorm": False}), Tensor)


def test_the_module_drops_in_training_alone() -> None:
    norm = fused.RMSNorm(SIZE, eps=EPS, dropout_p=DROP).double()
    assert dict(norm.state_dict()).keys() == {"weight"}
    x = drawn(*FULL)
    assert not torch.equal(norm(x), norm(x))
    norm.eval()
    torch.testing.assert_close(norm(x), by_definition(x, torch.ones(SIZE), None, True))
    out, total = norm(x, x, True)
    torch.testing.assert_close((out, total), (by_definition(2 * x, torch.ones(SIZE), None, True), 2 * x))
    assert norm.bfloat16()(x.bfloat16(), prenorm=True, residual_in_fp32=True)[1].dtype == torch.float32
    zeroed = fused.RMSNorm(SIZE, zero_centered_weight=True)
    assert not zeroed.weight.any()
    torch.testing.assert_close(zeroed(x), fused.RMSNorm(SIZE)(x))


# -- layer_norm and rms_norm ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("p", [0.0, DROP])
@pytest.mark.parametrize("prenorm", [False, True], ids=["post", "pre"])
@pytest.mark.parametrize("has_residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("scales", ["", "rows", "columns", "rows and columns"])
def test_dropout_add_norm_is_its_definition(
    scales: str, has_residual: bool, prenorm: bool, p: float, is_rms: bool
) -> None:
    rowscale = torch.rand(ROWS).double() if "rows" in scales else None
    inputs = tensors(
        x0=FULL, weight=(SIZE,), bias=(SIZE,), residual=FULL if has_residual else None,
        layerscale=(SIZE,) if "columns" in scales else None,
    )  # fmt: skip
    ours = rms.dropout_add_rms_norm if is_rms else layers.dropout_add_layer_norm

    def truth(given: dict[str, Tensor], mask: Tensor) -> list[Tensor]:
        total = given["x0"] * (1 if rowscale is None else rowscale[..., None]) * mask / (1 - p)
        total = total * given.get("layerscale", torch.ones(())) + given.get("residual", torch.zeros(()))
        out = by_definition(total, given["weight"], given["bias"], is_rms)
        return [out, total] if prenorm else [out]

    options: dict[str, Any] = {"dropout_p": p, "epsilon": EPS, "rowscale": rowscale, "prenorm": prenorm}
    judged(lambda inputs: ours(**{"residual": None} | inputs | options, return_dropout_mask=True), truth, inputs)


@pytest.mark.parametrize("is_rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("p", [0.0, DROP])
@pytest.mark.parametrize("prenorm", [False, True], ids=["post", "pre"])
@pytest.mark.parametrize("has_x1", [False, True], ids=["x0", "x0 and x1"])
@pytest.mark.parametrize("weights", [1, 2])
def test_two_norms_of_one_sum(weights: int, has_x1: bool, prenorm: bool, p: float, is_rms: bool) -> None:
    inputs = tensors(
        x0=FULL, residual=FULL, weight0=(SIZE,), bias0=(SIZE,), x1=FULL if has_x1 else None,
        weight1=(SIZE,) if weights == 2 else None, bias1=(SIZE,) if weights == 2 else None,
    )  # fmt: skip
    ours = rms.dropout_add_rms_norm_parallel_residual if is_rms else layers.dropout_add_layer_norm_parallel_residual
    missing = {"x1": None, "weight1": None, "bias1": None}

    def truth(given: dict[str, Tensor], mask0: Tensor, mask1: Tensor) -> list[Tensor]:
        total = given["x0"] * mask0 / (1 - p) + given["residual"]
        total = total + given["x1"] * mask1 / (1 - p) if has_x1 else total
        due = [by_definition(total, given[f"weight{i}"], given[f"bias{i}"], is_rms) for i in range(weights)]
        return [*due, total] if prenorm else due

    def run(inputs: dict[str, Tensor]) -> Any:
        return ours(**missing | inputs, dropout_p=p, epsilon=EPS, prenorm=prenorm, return_dropout_mask=True)

    judged(run, truth, inputs)
    assert (run(inputs)[1] is None) == (weights == 1)


@pytest.mark.parametrize("is_rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("p", [0.0, DROP])
@pytest.mark.parametrize("prenorm", [False, True], ids=["post", "pre"])
@pytest.mark.parametrize("has_residual", [False, True], ids=["alone", "residual"])
def test_rows_without_x0_and_rows_nobody_asks_for(has_residual: bool, prenorm: bool, p: float, is_rms: bool) -> None:
    x0_subset, out_subset = torch.tensor([1, 0, 2, 3, 0]).int(), torch.tensor([0, 1, 3, 2, 0]).int()
    inputs = tensors(
        x0=(3, SIZE), weight=(SIZE,), bias=(SIZE,), layerscale=(SIZE,), residual=(5, SIZE) if has_residual else None
    )
    ours = rms.dropout_add_rms_norm_subset if is_rms else layers.dropout_add_layer_norm_subset

    def truth(given: dict[str, Tensor], mask: Tensor) -> list[Tensor]:
        rows = given["x0"] * mask / (1 - p) * 1.5 * given["layerscale"]
        total = torch.stack([rows[i - 1] if i else torch.zeros(SIZE).double() for i in x0_subset.tolist()])
        total = total + given.get("residual", torch.zeros(()))
        asked = [out_subset.tolist().index(i + 1) for i in range(3)]
        out = by_definition(total[asked], given["weight"], given["bias"], is_rms)
        return [out, total] if prenorm else [out]

    options: dict[str, Any] = {
        "dropout_p": p, "epsilon": EPS, "x0_subset": x0_subset, "out_subset": out_subset, "rowscale_const": 1.5,
        "out_numrows": 3, "prenorm": prenorm, "return_dropout_mask": True,
    }  # fmt: skip
    judged(lambda inputs: ours(**{"residual": None} | inputs | options), truth, inputs)


@pytest.mark.parametrize("module", [layers.DropoutAddLayerNorm, rms.DropoutAddRMSNorm])
def test_modules_of_dropout_and_norm(module: Any) -> None:
    is_rms = module is rms.DropoutAddRMSNorm
    norm = module(SIZE, prenorm=True, p=DROP, eps=EPS, residual_in_fp32=True).double()
    assert dict(norm.state_dict()).keys() == ({"weight"} if is_rms else {"weight", "bias"})
    x = drawn(*FULL)
    assert not torch.equal(norm(x)[0], norm(x)[0])
    torch.testing.assert_close(norm.eval()(x, x), (by_definition(2 * x, norm.weight, norm.bias, is_rms), 2 * x))
    assert norm.bfloat16()(x.bfloat16())[1].dtype == torch.float32


def test_plain_norms() -> None:
    x, weight, bias = drawn(*FULL), drawn(SIZE, name="weight"), drawn(SIZE, name="bias")
    torch.testing.assert_close(layers.layer_norm(x, weight, bias, EPS), by_definition(x, weight, bias, False))
    torch.testing.assert_close(rms.rms_norm(x, weight, EPS), by_definition(x, weight, None, True))
    torch.testing.assert_close(rms.RMSNorm(SIZE, EPS).double()(x), by_definition(x, torch.ones(SIZE), None, True))


@pytest.mark.parametrize("run", [layers.dropout_add_layer_norm, rms.dropout_add_rms_norm], ids=["layer", "rms"])
def test_norms_compile_whole(run: Any) -> None:
    torch._dynamo.reset()
    x, weight = drawn(*FULL), drawn(SIZE, name="weight")
    compiled = torch.compile(
        lambda x: run(x, x, weight, None, 0.0, EPS, prenorm=True), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(x), run(x, x, weight, None, 0.0, EPS, prenorm=True))
    torch._dynamo.reset()


# -- what is refused --------------------------------------------------------------------------------------------------

X, W = torch.zeros(FULL), torch.ones(SIZE)
SUBSET = torch.tensor([1, 2, 3])
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "rowscale and x1": (lambda: fused.layer_norm_fn(X, W, None, x1=X, rowscale=X[..., 0]), "got rowscale with x1"),
    "bias1 alone": (lambda: fused.layer_norm_fn(X, W, None, bias1=W), "got bias1 without weight1"),
    "bias1 alone, parallel": (
        lambda: layers.dropout_add_layer_norm_parallel_residual(X, X, X, W, None, None, W, 0.0, EPS),
        "got bias1 without weight1",
    ),
    "all dropped": (lambda: fused.layer_norm_fn(X, W, None, dropout_p=1.0), "got dropout_p=1.0"),
    "negative dropout": (lambda: layers.dropout_add_layer_norm(X, None, W, None, -0.1, EPS), "got dropout_p=-0.1"),
    "a residual that would spread": (
        lambda: fused.layer_norm_fn(X, W, None, residual=X[:1]),
        "got residual [1, 5, 12]",
    ),
    "an x1 that would spread": (lambda: fused.layer_norm_fn(X, W, None, x1=X[:, :1]), "got x1 [3, 1, 12]"),
    "a rowscale that would spread": (lambda: fused.layer_norm_fn(X, W, None, rowscale=X[0, 0, :5]), "one number a row"),
    "a weight that would spread": (lambda: fused.layer_norm_fn(X, W[:1], None), "got weight [1] for 12 features"),
    "a bias that would spread": (lambda: fused.rms_norm_fn(X, W, W[:1]), "got bias [1] for 12 features"),
    "residual_out without prenorm": (
        lambda: fused.layer_norm_fn(X, W, None, residual_out=X),
        "got residual_out without",
    ),
    "two dtypes": (
        lambda: fused.layer_norm_fn(X, W, None, out=X.clone(), out_dtype=torch.float64),
        "got out of torch.float32 with out_dtype=torch.float64",
    ),
    "one subset": (
        lambda: layers.dropout_add_layer_norm_subset(X[0], None, W, None, 0.0, EPS, x0_subset=SUBSET),
        "got a subset of None",
    ),
    "subset of rows that are not there": (
        lambda: rms.dropout_add_rms_norm_subset(
            X[0, :2], None, W, None, 0.0, EPS, x0_subset=SUBSET, out_subset=SUBSET, out_numrows=3
        ),
        "got x0_subset with rows that are not there, takes 1 to 2",
    ),
    "results nobody makes": (
        lambda: rms.dropout_add_rms_norm_subset(
            X[0, :3], None, W, None, 0.0, EPS, x0_subset=SUBSET, out_subset=SUBSET, out_numrows=4
        ),
        "got out_numrows=4",
    ),
}


@pytest.mark.parametrize(("call", "words"), REFUSED.values(), ids=REFUSED)
def test_is_refused_in_words(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(RequestError) as refusal:
        call()
    assert words in str(refusal.value)


def test_subset_functions_without_subsets_are_the_others() -> None:
    x, weight = drawn(*FULL), drawn(SIZE, name="weight")
    whole = layers.dropout_add_layer_norm(x, x, weight, None, 0.0, EPS)
    assert torch.equal(layers.dropout_add_layer_norm_subset(x, x, weight, None, 0.0, EPS), whole)

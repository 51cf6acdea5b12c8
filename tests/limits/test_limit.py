"""Each limit takes what lies at its edges, refuses what lies just beyond, and says so in these words."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest
from choice.machines import A10, A100, B200, CPU, H100, MI300, MPS, RTX5090, V100, with_packages

from headway.limits import limit as limits
from headway.limits.limit import (
    Backward,
    Batch,
    Capability,
    Contracts,
    Devices,
    DTypes,
    Feature,
    Flash2Training,
    HeadDim,
    LargeHeads,
    Limit,
    Masks,
    NeedsPackage,
    NotOneByOne,
    Options,
    PlainScale,
    Transforms,
)
from headway.limits.machine import Machine, Package
from headway.limits.request import Request


@dataclasses.dataclass(frozen=True)
class Case:
    """A limit, how the support table words it, what it takes, and what it refuses in which words."""

    limit: Limit
    takes: str
    accepts: tuple[tuple[Request, Machine], ...]
    refuses: tuple[tuple[Request, Machine, str], ...]


def ask(**given: Any) -> Request:
    return Request(**given)


def heads(size: int, values: int | None = None, **more: Any) -> Request:
    return Request(head_dim=size, value_dim=size if values is None else values, **more)


def masked(*words: str, **more: Any) -> Request:
    return Request(mask=frozenset(words), **more)


PLAIN = ask()
NO_GRAD = "wrap the call in torch.no_grad() if no gradient is wanted"
GRAPHLESS = dataclasses.replace(CPU, features=frozenset())
BROKEN = with_packages(H100, broken=("flash-attn",))
UNTRIED = dataclasses.replace(CPU, packages=(("flash-attn", Package("2.8.3", tried=False)),))
STRICT = dataclasses.replace(CPU, deterministic=True)
FLASHLIKE = Masks((frozenset({"causal"}), frozenset({"documents", "causal"})))

CASES = [
    Case(
        Devices(("cuda", "rocm")),
        "cuda or rocm",
        ((PLAIN, V100), (PLAIN, MI300)),
        (
            (PLAIN, CPU, "got cpu tensors, takes cuda or rocm; move q, k and v to cuda"),
            (PLAIN, MPS, "got mps tensors, takes cuda or rocm; move q, k and v to cuda"),
        ),
    ),
    Case(
        Capability((8, 0)),
        "cuda 8.0 or newer",
        ((PLAIN, A100), (PLAIN, RTX5090), (PLAIN, MI300), (PLAIN, CPU)),
        (
            (
                PLAIN,
                dataclasses.replace(V100, capability=(7, 9)),
                "got cuda 7.9, takes cuda 8.0 or newer; choose a backend for older GPUs",
            ),
        ),
    ),
    Case(
        Capability((9, 0), below=(10, 0)),
        "cuda 9.0 to before 10.0",
        ((PLAIN, H100), (PLAIN, dataclasses.replace(H100, capability=(9, 9)))),
        (
            (PLAIN, A100, "got cuda 8.0, takes cuda 9.0 to before 10.0; choose a backend for older GPUs"),
            (PLAIN, B200, "got cuda 10.0, takes cuda 9.0 to before 10.0; choose a backend for newer GPUs"),
        ),
    ),
    Case(
        Feature("_scaled_dot_product_flash_attention", "install a torch built with flash attention"),
        "a torch with scaled_dot_product_flash_attention",
        ((PLAIN, A100),),
        (
            (
                PLAIN,
                GRAPHLESS,
                "got torch 2.13.0 without it, takes a torch with scaled_dot_product_flash_attention;"
                " install a torch built with flash attention",
            ),
        ),
    ),
    Case(
        Feature("varlen", "update torch to 2.11 or newer"),
        "a torch with varlen attention",
        ((PLAIN, A100),),
        (
            (
                PLAIN,
                Machine(),
                "got torch without it, takes a torch with varlen attention; update torch to 2.11 or newer",
            ),
        ),
    ),
    Case(
        Feature("c++", "install a C++ compiler", only_on="cpu"),
        "a C++ compiler on cpu",
        ((PLAIN, CPU), (PLAIN, dataclasses.replace(A100, features=frozenset()))),
        ((PLAIN, GRAPHLESS, "got this machine without it, takes a C++ compiler; install a C++ compiler"),),
    ),
    Case(
        NeedsPackage("flash-attn"),
        "the package flash-attn",
        ((PLAIN, with_packages(A100)), (PLAIN, UNTRIED)),
        (
            (PLAIN, A100, "got no such package, takes the package flash-attn; pip install flash-attn"),
            (
                PLAIN,
                BROKEN,
                "got flash-attn 2.8.3, which does not run: ImportError: undefined symbol, takes one that runs;"
                " reinstall flash-attn for this torch and CUDA, then run `headway doctor`",
            ),
        ),
    ),
    Case(
        DTypes(("float16", "bfloat16")),
        "float16 or bfloat16",
        (
            (ask(dtype="float16"), V100),
            (ask(dtype="bfloat16"), A100),
            (ask(dtype="bfloat16"), CPU),
            (ask(dtype="bfloat16"), MI300),
        ),
        (
            (
                ask(dtype="float32"),
                A100,
                "got float32, takes float16 or bfloat16; cast q, k and v to bfloat16, and the result back",
            ),
            (
                ask(dtype="float32"),
                V100,
                "got float32, takes float16 on cuda 7.0; cast q, k and v to float16, and the result back",
            ),
            (
                ask(dtype="bfloat16"),
                V100,
                "got bfloat16, takes float16 on cuda 7.0; cast q, k and v to float16, and the result back",
            ),
        ),
    ),
    Case(
        DTypes(("bfloat16", "float16", "float32")),
        "bfloat16 or float16 or float32",
        ((ask(dtype="float32"), V100),),
        (
            (
                ask(dtype="bfloat16"),
                V100,
                "got bfloat16, takes float16 or float32 on cuda 7.0; cast q, k and v to float32, and the result back",
            ),
            (
                ask(dtype="float64"),
                A100,
                "got float64, takes bfloat16 or float16 or float32; cast q, k and v to float32, and the result back",
            ),
        ),
    ),
    Case(
        HeadDim(multiple_of=8, at_most=256, values_differ=False),
        "multiples of 8 up to 256, the same for values",
        ((heads(8), A100), (heads(256), A100)),
        (
            (
                heads(76),
                A100,
                "got head_dim 76, takes multiples of 8 up to 256, the same for values;"
                " pad q, k and v to 80, keep the scale (76**-0.5 by default), cut the result to 76",
            ),
            (
                heads(255),
                A100,
                "got head_dim 255, takes multiples of 8 up to 256, the same for values;"
                " pad q, k and v to 256, keep the scale (255**-0.5 by default), cut the result to 255",
            ),
            (
                heads(257),
                A100,
                "got head_dim 257, takes multiples of 8 up to 256, the same for values; choose another backend",
            ),
            (
                heads(264),
                A100,
                "got head_dim 264, takes multiples of 8 up to 256, the same for values; choose another backend",
            ),
            (
                heads(64, values=32),
                A100,
                "got head_dim 64 with values of 32, takes multiples of 8 up to 256, the same for values;"
                " pad v to 64, cut the result to 32",
            ),
            (
                heads(32, values=64),
                A100,
                "got head_dim 32 with values of 64, takes multiples of 8 up to 256, the same for values;"
                " pad q and k to 64, keep the scale (32**-0.5 by default)",
            ),
            (
                heads(20, values=36),
                A100,
                "got head_dim 20 with values of 36, takes multiples of 8 up to 256, the same for values;"
                " pad q, k and v to 40, keep the scale (20**-0.5 by default), cut the result to 36",
            ),
        ),
    ),
    Case(
        HeadDim(multiple_of=8),
        "multiples of 8",
        ((heads(8, values=512), A100),),
        (
            (
                heads(20, values=36),
                A100,
                "got head_dim 20 with values of 36, takes multiples of 8;"
                " pad q and k to 24, pad v to 40, keep the scale (20**-0.5 by default), cut the result to 36",
            ),
        ),
    ),
    Case(
        HeadDim(at_least=16),
        "any from 16",
        ((heads(16), A100), (heads(17, values=999), A100)),
        (
            (
                heads(15, values=16),
                A100,
                "got head_dim 15 with values of 16, takes any from 16;"
                " pad q and k to 16, keep the scale (15**-0.5 by default)",
            ),
        ),
    ),
    Case(
        LargeHeads(over=128, at_least=(9, 0), below=(10, 0)),
        "over 128 on cuda 9.0 to before 10.0",
        ((heads(128), A100), (heads(129), H100), (heads(256), CPU)),
        (
            (heads(129), A100, "got head_dim 129 on cuda 8.0, takes up to 128 there; choose another backend"),
            (
                heads(64, values=136),
                B200,
                "got head_dim 136 on cuda 10.0, takes up to 128 there; choose another backend",
            ),
        ),
    ),
    Case(
        Flash2Training(),
        "193 to 224 (to 256 with dropout) for gradients not on cuda 8.6 to 8.9 and 12",
        (
            (heads(192, needs_grad=True), A10),
            (heads(200), A10),
            (heads(225, needs_grad=True), A10),
            (heads(256, needs_grad=True, dropout=True), A100),
            (heads(200, needs_grad=True), B200),
            (heads(200, needs_grad=True), MI300),
        ),
        (
            (
                heads(200, needs_grad=True),
                A10,
                "got head_dim 200 with gradients on cuda 8.6, takes up to 192, or 225 to 256, there;"
                " pad q, k and v to 232, keep the scale (200**-0.5 by default), cut the result to 200",
            ),
            (
                heads(256, needs_grad=True, dropout=True),
                RTX5090,
                "got head_dim 256 with gradients and dropout on cuda 12.0, takes up to 192 there;"
                " choose another backend",
            ),
        ),
    ),
    Case(
        Batch(),
        "up to 65535",
        ((ask(batch=65535), A100),),
        (
            (
                ask(batch=65536),
                A100,
                "got batch 65536, takes up to 65535; split the batch in 2 and join the results",
            ),
        ),
    ),
    Case(
        NotOneByOne(),
        "more than one query or key",
        ((ask(q_len=1, kv_len=2), H100), (ask(q_len=2, kv_len=1), H100)),
        (
            (
                ask(q_len=1, kv_len=1),
                H100,
                "got 1 query and 1 key, takes more than one query or key; choose another backend",
            ),
        ),
    ),
    Case(
        PlainScale(),
        "a positive, finite scale",
        ((PLAIN, CPU),),
        (
            (
                ask(plain_scale=False),
                CPU,
                "got a scale of 0 or less, or not finite, takes a positive, finite scale;"
                " multiply q by the scale and pass scale=1.0",
            ),
        ),
    ),
    Case(
        FLASHLIKE,
        "none, causal, causal & documents",
        ((PLAIN, CPU), (masked("causal"), CPU), (masked("documents"), CPU), (masked("causal", "documents"), CPU)),
        (
            (
                masked("causal", "padding"),
                CPU,
                "got mask causal & padding, takes masks without padding; choose another backend",
            ),
            (
                masked("bias"),
                CPU,
                "got mask bias, takes masks without bias;"
                " give its tensor to headway.recognise, which may find a typed mask in it, or choose another backend",
            ),
        ),
    ),
    Case(
        Masks((frozenset({"documents", "causal"}), frozenset({"documents", "window"})), needs=("documents",)),
        "causal & documents, documents & window",
        ((masked("documents"), CPU), (masked("documents", "window"), CPU)),
        (
            (PLAIN, CPU, "got mask none, takes masks with documents; choose another backend"),
            (masked("causal"), CPU, "got mask causal, takes masks with documents; choose another backend"),
            (
                masked("causal", "documents", "window"),
                CPU,
                "got mask causal & documents & window, takes causal & documents, documents & window;"
                " choose another backend",
            ),
        ),
    ),
    Case(Masks(dense=True), "none, any other as a dense tensor", ((PLAIN, CPU), (masked("not", "bias"), CPU)), ()),
    Case(
        Masks((frozenset({"a", "b", "c", "d", "e"}),)),
        "none, any combination of a, b, c, d, e",
        ((masked("a", "e"), CPU),),
        ((masked("a", "f"), CPU, "got mask a & f, takes masks without f; choose another backend"),),
    ),
    Case(
        Options(),
        "none",
        ((PLAIN, CPU),),
        (
            (
                ask(dropout=True),
                CPU,
                "got dropout, takes no options;"
                " pass dropout=0.0 if none is wanted, as in evaluation, or choose another backend",
            ),
            (ask(softcap=True), CPU, "got softcap, takes no options; choose another backend"),
            (ask(sinks=True), CPU, "got sinks, takes no options; choose another backend"),
            (ask(returns_lse=True), CPU, "got lse, takes no options; choose another backend"),
        ),
    ),
    Case(
        Options(dropout=True, softcap=True, sinks="forward", lse="forward"),
        "dropout, softcap, sinks without gradients, lse without gradients",
        ((ask(dropout=True, softcap=True, sinks=True, returns_lse=True), CPU), (ask(rows_may_be_empty=True), CPU)),
        (
            (
                ask(sinks=True, needs_grad=True),
                CPU,
                "got sinks with gradients,"
                f" takes only dropout, softcap, sinks without gradients, lse without gradients; {NO_GRAD}",
            ),
            (
                ask(returns_lse=True, needs_grad=True),
                CPU,
                "got lse with gradients,"
                f" takes only dropout, softcap, sinks without gradients, lse without gradients; {NO_GRAD}",
            ),
            (
                ask(returns_lse=True, rows_may_be_empty=True),
                CPU,
                "got lse of rows that may see nothing, takes lse where each query surely sees a key;"
                " choose another backend",
            ),
        ),
    ),
    Case(
        Options(sinks="yes", lse="yes", lse_of_empty_rows=True),
        "sinks, lse",
        ((ask(sinks=True, returns_lse=True, needs_grad=True, rows_may_be_empty=True), CPU),),
        (),
    ),
    Case(
        Backward(),
        "gradients of q, k and v",
        ((ask(needs_grad=True), CPU),),
        (
            (
                ask(needs_grad=True, mask_needs_grad=True),
                CPU,
                "got a mask with gradient, takes gradients of q, k and v;"
                " detach the mask's tensor if its gradient is not wanted, or choose another backend",
            ),
        ),
    ),
    Case(
        Backward(mask=True, only_on=("cuda", "rocm")),
        "gradients of q, k, v and bias on cuda or rocm",
        ((ask(needs_grad=True, mask_needs_grad=True), A100), (PLAIN, CPU)),
        (
            (
                ask(needs_grad=True),
                CPU,
                f"got gradients on, takes gradients of q, k, v and bias on cuda or rocm; {NO_GRAD}",
            ),
        ),
    ),
    Case(
        Backward(inputs=False),
        "calls without gradients",
        ((PLAIN, CPU),),
        ((ask(needs_grad=True), CPU, f"got gradients on, takes calls without gradients; {NO_GRAD}"),),
    ),
    Case(
        Transforms(compile=False),
        "eager calls",
        ((PLAIN, CPU),),
        (
            (
                ask(transformed=True),
                CPU,
                "got a torch.func transform, takes eager calls;"
                " fold vmap's axis into the batch, and take gradients by torch.autograd",
            ),
            (
                ask(compiled=True),
                CPU,
                "got a call inside torch.compile, takes eager calls;"
                " keep the call out of the graph by torch.compiler.disable",
            ),
        ),
    ),
    Case(
        Transforms(func=True),
        "eager calls, torch.compile, torch.func",
        ((ask(transformed=True, compiled=True), CPU),),
        (),
    ),
    Case(
        Contracts(frozenset({"no-sync"})),
        "no-sync",
        (
            (ask(require=frozenset({"no-sync"})), CPU),
            (ask(require=frozenset({"deterministic"})), CPU),
            (PLAIN, STRICT),
        ),
        (
            (
                ask(require=frozenset({"maps"})),
                CPU,
                "got require maps, takes only no-sync; drop 'maps' from require if it may be broken,"
                " or choose another backend",
            ),
            (
                ask(require=frozenset({"deterministic"}), needs_grad=True),
                STRICT,
                "got require deterministic, takes only no-sync; drop 'deterministic' from require if it may be broken,"
                " or choose another backend",
            ),
            (
                ask(needs_grad=True),
                STRICT,
                "got torch.use_deterministic_algorithms(True), takes only no-sync;"
                " call torch.use_deterministic_algorithms(False) if runs may differ, or choose another backend",
            ),
        ),
    ),
    Case(
        Contracts(frozenset({"float32", "deterministic"})),
        "deterministic, float32",
        (
            (ask(require=frozenset({"float32"})), CPU),
            (ask(require=frozenset({"float32"}), dtype="float64"), CPU),
            (ask(needs_grad=True), STRICT),
        ),
        (
            (
                ask(require=frozenset({"float32"}), dtype="bfloat16"),
                CPU,
                "got require float32 with bfloat16, takes float32 or float64;"
                " cast q, k and v to float32, and the result back",
            ),
        ),
    ),
    Case(
        Contracts(frozenset()),
        "none",
        ((PLAIN, CPU),),
        (
            (
                ask(require=frozenset({"fullgraph"})),
                CPU,
                "got require fullgraph, takes no contracts; drop 'fullgraph' from require if it may be broken,"
                " or choose another backend",
            ),
        ),
    ),
]


def named(case: Case) -> str:
    return f"{type(case.limit).__name__}: {case.takes}"


@pytest.mark.parametrize("case", CASES, ids=named)
def test_takes(case: Case) -> None:
    assert case.limit.takes == case.takes
    for request, machine in case.accepts:
        assert list(case.limit.refusals(request, machine)) == [], f"{request} on {machine}"


@pytest.mark.parametrize("case", CASES, ids=named)
def test_refuses_in_these_words(case: Case) -> None:
    for request, machine, said in case.refuses:
        assert [str(refusal) for refusal in case.limit.refusals(request, machine)] == [said]


def test_every_limit_has_a_case() -> None:
    declared = {
        thing
        for _, thing in inspect.getmembers(limits, inspect.isclass)
        if thing.__module__ == limits.__name__ and hasattr(thing, "refusals") and thing is not Limit
    }
    assert declared == {type(case.limit) for case in CASES}


@pytest.mark.parametrize("case", CASES, ids=named)
def test_says_what_is_a_fact_about_the_machine(case: Case) -> None:
    about_machine = isinstance(case.limit, Devices | Capability | Feature | NeedsPackage)
    for request, machine, _ in case.refuses:
        assert all(refusal.machine_wide == about_machine for refusal in case.limit.refusals(request, machine))


def test_says_all_at_once() -> None:
    everything = ask(dropout=True, softcap=True, sinks=True, returns_lse=True, needs_grad=True, mask_needs_grad=True)
    assert [refusal.got for refusal in Options().refusals(everything, CPU)] == ["dropout", "softcap", "sinks", "lse"]
    assert [refusal.got for refusal in Backward(inputs=False).refusals(everything, CPU)] == [
        "gradients on",
        "a mask with gradient",
    ]
    traced = ask(transformed=True, compiled=True)
    assert len(list(Transforms(compile=False).refusals(traced, CPU))) == 2
    strict = ask(require=frozenset({"maps", "double-backward", "float32"}), dtype="float16")
    assert [refusal.got for refusal in Contracts(frozenset()).refusals(strict, CPU)] == [
        "require double-backward",
        "require float32",
        "require maps",
        "require float32 with float16",
    ]

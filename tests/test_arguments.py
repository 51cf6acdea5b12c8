"""Argument conservation: every argument of `headway.attention`, off its default, changes the result or is refused."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accepts import ACCEPTS, PACKAGES
from deck import DEVICES, Source
from test_agreement import H200, TABLES, installed
from torch import Tensor

import headway
from headway import (
    Alibi,
    Bias,
    Causal,
    Dense,
    Documents,
    NoBackendError,
    Padding,
    Prefix,
    Tree,
    UnknownNameError,
    Window,
)
from headway.backends.kernel import Extras
from headway.backends.registry import NAMES, named
from headway.choice.choose import choose
from headway.limits.request import CONTRACTS, Request

LENGTH, SIZE, HEADS = 64, 64, 2
ON_EACH = [
    pytest.param(device, backend, marks=pytest.mark.cuda if device == "cuda" else ())
    for device in DEVICES
    for backend in NAMES
    if ACCEPTS[TABLES[device]][backend].dtypes and installed(backend)
]
MASKS: dict[str, Callable[[str], headway.Mask]] = {
    "alibi": lambda device: Alibi(torch.tensor([0.5, 0.25], device=device)),
    "bias": lambda device: Bias(Source("flip").normal(LENGTH, LENGTH).to(device, torch.float32)),
    "causal": lambda device: Causal(),
    "dense": lambda device: Dense(Source("flip").yes(LENGTH, LENGTH).to(device)),
    "documents": lambda device: Documents([20, 44]),
    "padding": lambda device: Padding([LENGTH, 9]),
    "prefix": lambda device: Prefix(5),
    "tree": lambda device: Tree([-1, 0, 0], lengths=[20, 20, 24]),
    "window": lambda device: Window(3, 3),
}
FLIPS: dict[str, list[Callable[[str], Any]]] = {
    "mask": list(MASKS.values()),
    "scale": [lambda device: 0.5, lambda device: -0.125, lambda device: 0.0],
    "dropout": [lambda device: 0.5],
    "softcap": [lambda device: 0.5],
    "sinks": [lambda device: torch.tensor([0.5, 3.0], device=device)],
    "return_lse": [lambda device: True],
    "require": [lambda device, word=word: (word,) for word in CONTRACTS],
    "backend": [lambda device, name=name: name for name in NAMES],
}
"""Values off the default, for every argument beside q, k and v."""

CHANGES_NUMBERS = ("mask", "scale", "dropout", "softcap", "sinks")


def draw(device: str, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.bfloat16 if "bfloat16" in ACCEPTS[TABLES[device]][backend].dtypes else torch.float32
    dtype = torch.float32 if device == "cpu" else dtype
    made = (Source(name).normal(2, HEADS, LENGTH, SIZE).to(device, dtype) for name in "qkv")
    return tuple(made)  # type: ignore[return-value]  # three of them


def base(backend: str) -> dict[str, Any]:
    """Where arguments start from: their defaults, and a mask for the kernel that does nothing without."""
    return {"backend": backend} | ({"mask": Documents([30, 34])} if backend == "torch-varlen" else {})


def flips(*names: str) -> list[object]:
    return [pytest.param(name, i, id=f"{name}-{i}") for name in names for i in range(len(FLIPS[name]))]


def test_no_argument_is_forgotten() -> None:
    """A new argument of `attention` must get its flip here."""
    arguments = list(inspect.signature(headway.attention).parameters)
    assert arguments[:3] == ["q", "k", "v"]
    assert set(arguments[3:]) == set(FLIPS)


def test_explain_takes_what_attention_takes() -> None:
    one, other = (inspect.signature(f).parameters for f in (headway.attention, headway.explain))
    assert [str(p) for p in one.values()] == [str(p) for p in other.values()]


def test_there_is_no_catch_all() -> None:
    for parameter in inspect.signature(headway.attention).parameters.values():
        assert parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    q = torch.randn(1, 1, 4, 8)
    with pytest.raises(TypeError, match="attn_mask"):
        headway.attention(q, q, q, attn_mask=None)  # type: ignore[call-overload]  # the point of the test


@pytest.mark.usefixtures("flex_uncompiled")
@pytest.mark.parametrize(("argument", "which"), flips(*CHANGES_NUMBERS))
@pytest.mark.parametrize(("device", "backend"), ON_EACH)
def test_changes_the_result_or_is_refused(device: str, backend: str, argument: str, which: int) -> None:
    q, k, v = draw(device, backend)
    before = headway.attention(q, k, v, **base(backend))
    flipped = base(backend) | {argument: FLIPS[argument][which](device)}
    try:
        after = headway.attention(q, k, v, **flipped)
    except NoBackendError as refusal:
        assert "; " in str(refusal), "a refusal has a remedy"
        assert headway.explain(q, k, v, **flipped).chosen is None
        return
    assert (after - before).abs().max() > 0.05, f"{argument} was ignored"


@pytest.mark.usefixtures("flex_uncompiled")
@pytest.mark.parametrize(("device", "backend"), ON_EACH)
def test_lse_is_given_or_refused(device: str, backend: str) -> None:
    q, k, v = draw(device, backend)
    try:
        out, lse = headway.attention(q, k, v, **base(backend), return_lse=True)
    except NoBackendError:
        assert "lse" not in ACCEPTS[TABLES[device]][backend].infers | ACCEPTS[TABLES[device]][backend].learns
        return
    frame = headway.masks.Frame(LENGTH, LENGTH, 2, HEADS, q.device)
    scores = q.double() @ k.double().transpose(-1, -2) / SIZE**0.5
    mask = base(backend).get("mask")
    scores = scores if mask is None else scores.masked_fill(~mask.to_bool(frame), float("-inf"))
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(out, headway.attention(q, k, v, **base(backend)))


@pytest.mark.usefixtures("flex_uncompiled")
@pytest.mark.parametrize("word", CONTRACTS)
@pytest.mark.parametrize(("device", "backend"), ON_EACH)
def test_a_contract_is_kept_or_refused(device: str, backend: str, word: str) -> None:
    """tests/accepts.py says who promises what."""
    q, k, v = draw(device, backend)
    accepts = ACCEPTS[TABLES[device]][backend]
    promised = f"require {word}" in accepts.learns | accepts.infers and not (
        word == "float32" and q.dtype != torch.float32
    )
    decision = headway.explain(q, k, v, **base(backend), require=(word,))
    if backend != "torch-varlen":  # its cases in the deck are about documents
        assert (decision.chosen is not None) == promised, str(decision)
    if decision.chosen is None:
        with pytest.raises(NoBackendError, match=f"require {word}"):
            headway.attention(q, k, v, **base(backend), require=(word,))


@pytest.mark.usefixtures("flex_uncompiled")
@pytest.mark.parametrize(("device", "backend"), ON_EACH)
def test_a_backend_by_name_is_the_one_that_runs(device: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = draw(device, backend)
    ran = []
    for name in NAMES:
        if name in PACKAGES:
            continue
        kernel = named(name, device).load()
        attend = kernel.attend
        spy = lambda *a, name=name, attend=attend: (ran.append(name), attend(*a))[1]  # noqa: E731
        monkeypatch.setattr(kernel, "attend", spy)
    headway.attention(q, k, v, **base(backend))
    assert ran == ([] if backend in PACKAGES else [backend])


@pytest.mark.parametrize("require", ["exact", ("deterministic", "exact"), ["nondeterministic"]])
def test_an_unknown_contract_is_an_error(require: Any) -> None:
    q = torch.randn(1, 1, 4, 8)
    with pytest.raises(UnknownNameError, match="unknown contract .*; known: deterministic"):
        headway.attention(q, q, q, require=require)


@pytest.mark.parametrize(
    "make", [tuple, list, set, frozenset, iter, lambda words: (w for w in words)], ids=lambda m: m.__name__
)
def test_contracts_come_in_any_iterable(make: Callable[[Any], Any]) -> None:
    q = torch.randn(1, 1, 4, 8)
    with pytest.raises(NoBackendError, match="require maps"):
        headway.attention(q, q, q, backend="sdpa-flash", require=make(["maps"]))
    with pytest.raises(NoBackendError, match="require maps"):
        headway.attention(q, q, q, backend="sdpa-flash", require="maps")


# -- kernels that cannot run here -------------------------------------------------------------------------------------

ASKED: dict[str, dict[str, Any]] = {
    "dropout": {"dropout": True},
    "softcap": {"softcap": True},
    "sinks": {"sinks": True},
    "lse": {"returns_lse": True},
    "deterministic": {"require": frozenset({"deterministic"}), "needs_grad": True},
}


@pytest.mark.parametrize("option", ASKED)
@pytest.mark.parametrize("backend", NAMES)
def test_an_option_that_a_kernel_never_reads_is_refused(backend: str, option: str) -> None:
    """Asked of an H200 that is only described: a file that does not name `extras.softcap` cannot honour it."""
    assert option in {field.name for field in dataclasses.fields(Extras)}
    one = named(backend, "cuda")
    source = inspect.getsource(inspect.getmodule(one.load().attend))  # type: ignore[arg-type]  # it has a module
    if f"extras.{option}" in source or (option == "lse" and ", lse = torch." in source):
        return
    mask = frozenset({"documents"}) if backend == "torch-varlen" else frozenset()
    plain = Request(device="cuda", dtype="bfloat16", mask=mask)
    assert choose(plain, H200, backend).chosen is not None
    refused = choose(dataclasses.replace(plain, **ASKED[option]), H200, backend).chosen is None
    # The kernels that are deterministic whatever they are told need not be told.
    assert refused or (option == "deterministic" and backend in ("reference", "sdpa-math", "flex"))

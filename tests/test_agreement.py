"""Every backend, on every case of the deck: it agrees with float64, or it refuses, as tests/accepts.py says."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import itertools

import pytest
import torch
from accepts import ACCEPTS, EVERYTHING, FLOATS, PACKAGES, words
from agreement import Call, Judge, by_formula, run
from deck import DECK, DEVICES, Case

import headway
from headway import NoBackendError
from headway.backends.registry import BACKENDS, NAMES
from headway.choice.choose import Decision, choose
from headway.limits.machine import Machine, Package
from headway.limits.request import Request

H200 = Machine(
    device="cuda",
    name="NVIDIA H200",
    capability=(9, 0),
    features=frozenset(
        {
            "_scaled_dot_product_attention_math",
            "_scaled_dot_product_flash_attention",
            "_scaled_dot_product_efficient_attention",
            "_scaled_dot_product_cudnn_attention",
            *("flex", "varlen", "triton", "c++"),
        }
    ),
    packages=tuple((name, Package("1.0")) for name in PACKAGES.values()),
    versions=(("torch", "2.11.0"), ("cuda", "13.0"), ("cudnn", "9.19.0")),
)
TABLES = {"cpu": "cpu", "cuda": "h200"}

SAMPLES = {
    "flex": words(
        """
        length 1x77; length 130x130; length 320x320; heads 8:2; heads 6:1; size 40; size 76; size 128
        size 64, values 32; layout tokens-first; layout every-other; mask causal; mask causal-lower-right-tall
        mask window; mask documents-some-empty; mask documents-cross-no-keys; mask padding-all; mask padding-holes
        mask causal | prefix; mask prefix-per-entry; mask tree; mask dense-per-head; mask dense-empty-rows; mask bias
        mask bias-lowest-row
        mask bias-learnt; mask bias-learnt-over-keys; mask bias-learnt-blocks; mask bias & bias; mask alibi & causal
        mask predicate-captures; mask ~(window & documents); mask (window | prefix) & padding; mask nothing
        softcap, causal; softcap, heads 8:2, alibi; scale negative, causal; sinks, causal; sinks, lse, padding-all
        lse, padding-all; lse, heads 8:2
        """
    ),
    "flash4": words(
        """
        length 1x77; length 130x130; length 320x320; heads 8:2; heads 6:1; size 16; size 128; size 256; size 40
        layout tokens-first; layout every-other; mask causal; mask causal-lower-right-tall; mask window
        mask documents-some-empty; mask documents & causal; mask documents-cross-no-keys; heads 8:2, documents
        softcap, causal; sinks, causal; lse, causal; lse, documents; sinks, documents
        """
    ),
}
"""Kernels that are compiled for each new kind of call, which takes seconds, and the cases they are run for on CUDA:
in bfloat16, with gradients where they have them. All other cases are only asked about."""


def is_run(device: str, backend: str, case: Case, dtype: str, *, learns: bool) -> bool:
    if device != "cuda" or backend not in SAMPLES:
        return True
    once = learns or case.name not in ACCEPTS["h200"][backend].learns
    return once and dtype == "bfloat16" and case.name in SAMPLES[backend]


def installed(backend: str) -> bool:
    package = PACKAGES.get(backend)
    try:
        return package is None or bool(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return False


def deals() -> list[object]:
    """A test per device, backend that takes something there, case and dtype."""
    return [
        pytest.param(device, name, case, dtype, marks=pytest.mark.cuda if device == "cuda" else ())
        for device in DEVICES
        for name in NAMES
        if ACCEPTS[TABLES[device]][name].dtypes
        for case in DECK.values()
        for dtype in case.dtypes
    ]


def name_of(value: object) -> str | None:
    return value.name if isinstance(value, Case) else None


@pytest.mark.usefixtures("flex_uncompiled")
@pytest.mark.parametrize(("device", "backend", "case", "dtype"), deals(), ids=name_of)
def test_agrees_or_refuses(device: str, backend: str, case: Case, dtype: str) -> None:
    if device == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the table is for a Hopper GPU")
    accepts = ACCEPTS[TABLES[device]][backend]
    takes = dtype in accepts.dtypes and installed(backend)
    for learns, listed in ((True, accepts.learns), (False, accepts.learns | accepts.infers)):
        call = case.draw(dtype, device, learns=learns)
        if not (takes and case.name in listed):
            assert_refused(call, case, backend, learns=learns)
        elif is_run(device, backend, case, dtype, learns=learns):
            assert_agrees(call, case, backend, learns=learns)
        else:
            assert_accepted(call, case, backend, learns=learns)


def assert_agrees(call: Call, case: Case, backend: str, *, learns: bool) -> None:
    assert_accepted(call, case, backend, learns=learns)
    if case.dropout:
        return  # tests/test_dropout.py has the statistics
    got = run(call, backend, learns=learns)
    assert not any(x._version for x in (call.q, call.k, call.v)), "inputs, which all backends share, were written into"
    if backend != "sage":
        judge_of(case.name, str(call.q.dtype).removeprefix("torch."), call.q.device.type, learns).verdict(got)
        return
    truth = by_formula(call, torch.float64, learns=False).out
    assert (got.out.double() - truth).norm() < 0.1 * truth.norm(), "not even near"


@functools.cache
def judge_of(case: str, dtype: str, device: str, learns: bool) -> Judge:
    """One for all backends, of a call of its own: each draw of a case is the same."""
    return Judge(DECK[case].draw(dtype, device, learns=learns), learns=learns)


def assert_accepted(call: Call, case: Case, backend: str, *, learns: bool) -> None:
    with torch.set_grad_enabled(learns):
        decision = explain(call, case, backend)
    assert decision.chosen is not None, f"lost a feature:\n{decision}"
    assert decision.chosen.name == backend


def assert_refused(call: Call, case: Case, backend: str, *, learns: bool) -> None:
    """By attention itself, with what it got, what it takes and what to do."""
    with torch.set_grad_enabled(learns):
        decision = explain(call, case, backend)
        assert decision.chosen is None, "accepted, although tests/accepts.py does not list it"
        with pytest.raises(NoBackendError, match=r"got .*, takes .*; ."):
            headway.attention(call.q, call.k, call.v, dropout=case.dropout, backend=backend, **call.options())


def explain(call: Call, case: Case, backend: str) -> Decision:
    return headway.explain(call.q, call.k, call.v, dropout=case.dropout, backend=backend, **call.options())


# -- the table itself -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", ACCEPTS)
def test_the_table_names_every_backend_and_every_case(table: str) -> None:
    assert set(ACCEPTS[table]) == set(NAMES)
    assert set(DECK) == EVERYTHING
    assert all(set(DECK) >= sample for sample in SAMPLES.values())
    for accepts in ACCEPTS[table].values():
        assert accepts.learns | accepts.infers <= set(DECK)
        assert not accepts.learns & accepts.infers, "with gradients includes without"
    assert {backend.name: backend.package for backend in BACKENDS if backend.package} == PACKAGES


@pytest.mark.parametrize("backend", NAMES)
def test_nothing_is_taken_on_cpu_by_kernels_for_other_devices(backend: str) -> None:
    if ACCEPTS["cpu"][backend].dtypes:
        return
    for case in DECK.values():
        assert_refused(case.draw("float32", "cpu", learns=False), case, backend, learns=False)


@pytest.mark.parametrize("backend", NAMES)
def test_a_described_h200_accepts_what_the_table_says(backend: str) -> None:
    """The choice is pure, so a feature lost for a GPU is found on a machine without one."""
    accepts, wrong = ACCEPTS["h200"][backend], []
    for (name, dtype, learns), request in requests_on_cuda().items():
        listed = name in (accepts.learns if learns else accepts.learns | accepts.infers)
        if (choose(request, H200, backend).chosen is not None) != (listed and dtype in accepts.dtypes):
            wrong.append(f"{name}, {dtype}, {learns=}: listed is {listed}")
    assert not wrong, "\n".join(wrong)


@functools.cache
def requests_on_cuda() -> dict[tuple[str, str, bool], Request]:
    """What the deck would ask of a GPU."""
    found = {}
    for case in DECK.values():
        for dtype, learns in itertools.product(case.dtypes, (True, False)):
            with torch.set_grad_enabled(learns):
                request = explain(case.draw(dtype, "cpu", learns=learns), case, "reference").request
            found[case.name, dtype, learns] = dataclasses.replace(request, device="cuda")
    return found


@pytest.mark.parametrize("backend", NAMES)
def test_float32_is_refused_to_those_who_ask_for_it_in_half_precision(backend: str) -> None:
    call = DECK["require float32"].draw("bfloat16", "cpu", learns=False)
    assert_refused(call, DECK["require float32"], backend, learns=False)


@pytest.mark.usefixtures("flex_uncompiled")
@pytest.mark.parametrize("case", DECK.values(), ids=name_of)
def test_auto_takes_every_call(case: Case, device: str) -> None:
    for dtype in set(case.dtypes) & (FLOATS - {"float16"}):
        call = case.draw(dtype, device)
        chosen = explain(call, case, "auto").chosen
        assert chosen is not None
        assert chosen.exact
        if is_run(device, chosen.name, case, dtype, learns=True):
            assert_agrees(call, case, chosen.name, learns=True)

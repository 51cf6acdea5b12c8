"""The choice, on machines that nobody here owns."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from choice.machines import (
    A10,
    A100,
    B200,
    CPU,
    H100,
    H200,
    MACHINES,
    MI300,
    MPS,
    PACKAGES,
    RTX5090,
    T4,
    V100,
    with_packages,
    with_version,
)

from headway.backends.registry import BACKENDS, NAMES
from headway.choice import choose as choosing
from headway.choice.choose import Decision, choose
from headway.choice.quarantine import QUARANTINE
from headway.choice.timings import Time
from headway.errors import NoBackendError, UnknownNameError
from headway.limits.machine import Machine, Package
from headway.limits.request import CONTRACTS, Request

HALF: dict[str, Any] = {"dtype": "float16"}
BF16: dict[str, Any] = {"dtype": "bfloat16"}
FLOAT: dict[str, Any] = {"dtype": "float32"}
LEARN: dict[str, Any] = {"needs_grad": True}


def heads_of(size: int) -> dict[str, Any]:
    return {"head_dim": size, "value_dim": size}


def seen_by(*words: str) -> dict[str, Any]:
    return {"mask": frozenset(words)}


def ask(**given: Any) -> Request:
    """16 heads over 1,024 tokens, but for what is given."""
    return Request(**{"heads": 16, "kv_heads": 16, "q_len": 1024, "kv_len": 1024, **given})


CHOICES: list[tuple[Machine, Request, str]] = [
    (V100, ask(**HALF), "sdpa-efficient flex sdpa-math reference"),
    (V100, ask(**BF16), "sdpa-math reference"),
    (V100, ask(**FLOAT), "sdpa-efficient flex sdpa-math reference"),
    (with_packages(V100), ask(**HALF), "xformers sdpa-efficient flex sdpa-math reference"),
    (T4, ask(**HALF, **LEARN, **seen_by("causal")), "sdpa-efficient flex sdpa-math reference"),
    (T4, ask(**BF16), "sdpa-math reference"),
    (A100, ask(**BF16, **seen_by("causal")), "sdpa-flash sdpa-efficient flex sdpa-cudnn sdpa-math reference"),
    (A100, ask(**FLOAT), "sdpa-efficient flex sdpa-math reference"),
    (A100, ask(**BF16, **heads_of(256)), "sdpa-flash sdpa-efficient flex sdpa-math reference"),
    (
        with_packages(A100),
        ask(**BF16, **seen_by("causal")),
        "flash2 sdpa-flash xformers sdpa-efficient flex sdpa-cudnn sdpa-math reference",
    ),
    (A10, ask(**BF16, **LEARN, **heads_of(192)), "sdpa-flash sdpa-efficient flex sdpa-math reference"),
    (A10, ask(**BF16, **LEARN, **heads_of(200)), "sdpa-efficient flex sdpa-math reference"),
    (H100, ask(**FLOAT), "sdpa-efficient flex sdpa-math reference"),
    (H100, ask(**BF16), "sdpa-cudnn sdpa-flash sdpa-efficient flex sdpa-math reference"),
    (H100, ask(dtype="float64"), "sdpa-math reference"),
    (
        H100,
        ask(**BF16, **seen_by("documents", "causal")),
        "torch-varlen flex sdpa-cudnn sdpa-efficient sdpa-math reference",
    ),
    (H100, ask(**BF16, softcap=True), "flex reference"),
    (H100, ask(**BF16, transformed=True), "sdpa-math reference"),
    (H100, ask(**BF16, require=frozenset({"maps"})), "reference"),
    (
        with_packages(H100),
        ask(**BF16, **seen_by("causal")),
        "sdpa-cudnn flash4 flash3 flash2 sdpa-flash xformers sdpa-efficient flex sdpa-math reference",
    ),
    (with_packages(H100), ask(**BF16, softcap=True), "flash4 flash3 flash2 flex reference"),
    (
        with_packages(H100, broken=PACKAGES),
        ask(**BF16),
        "sdpa-cudnn sdpa-flash sdpa-efficient flex sdpa-math reference",
    ),
    (
        with_packages(H200, broken=("flash-attn",)),
        ask(**BF16, **seen_by("documents")),
        "flash4 flash3 torch-varlen xformers flex sdpa-cudnn sdpa-efficient sdpa-math reference",
    ),
    (B200, ask(**BF16), "sdpa-cudnn sdpa-flash sdpa-efficient flex sdpa-math reference"),
    (B200, ask(**BF16, **heads_of(256)), "sdpa-flash sdpa-efficient flex sdpa-math reference"),
    (
        with_packages(B200),
        ask(**BF16, **LEARN),
        "sdpa-cudnn flash4 flash2 sdpa-flash sdpa-efficient flex sdpa-math reference",
    ),
    (RTX5090, ask(**BF16), "sdpa-flash sdpa-efficient flex sdpa-cudnn sdpa-math reference"),
    (MI300, ask(**BF16, **seen_by("causal")), "sdpa-flash sdpa-math reference"),
    (MI300, ask(**FLOAT), "sdpa-math reference"),
    (with_packages(MI300), ask(**BF16, **seen_by("causal")), "flash2 sdpa-flash sdpa-math reference"),
    (MPS, ask(**HALF, **seen_by("causal")), "sdpa-math reference"),
    (with_packages(MPS), ask(**FLOAT), "sdpa-math reference"),
    (CPU, ask(**FLOAT, **LEARN, **seen_by("causal")), "sdpa-flash sdpa-math reference"),
    (CPU, ask(**BF16), "sdpa-flash sdpa-math reference flex"),
    (with_packages(CPU), ask(**FLOAT, **LEARN, softcap=True), "reference"),
]


@pytest.mark.parametrize("machine, request_, accepted", CHOICES, ids=lambda value: getattr(value, "name", None))
def test_choice(machine: Machine, request_: Request, accepted: str) -> None:
    decision = choose(request_, machine)
    assert decision.accepted == tuple(accepted.split())
    assert decision.chosen is not None
    assert decision.chosen.name == decision.accepted[0]
    assert {*decision.accepted, *(name for name, _ in decision.refusals)} == set(NAMES)
    assert all(refusals for _, refusals in decision.refusals)


@pytest.mark.parametrize("machine, request_, accepted", CHOICES, ids=lambda value: getattr(value, "name", None))
def test_by_name_takes_what_auto_accepts_and_refuses_the_rest(
    machine: Machine, request_: Request, accepted: str
) -> None:
    for name in set(NAMES) - {"sage"}:
        decision = choose(request_, machine, name)
        assert (decision.chosen is not None) == (name in accepted.split())
        if decision.chosen is None:
            with pytest.raises(NoBackendError, match=f"{name} was asked for by name and does not take it"):
                decision.backend()
        else:
            assert decision.backend().name == name
            assert decision.why == "asked for by name"


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
def test_auto_never_chooses_what_approximates(machine: Machine) -> None:
    decision = choose(ask(**BF16), with_packages(machine))
    assert "sage" not in decision.accepted
    assert "pass backend='sage' if an approximation is good enough" in str(decision)


def test_what_approximates_runs_by_name() -> None:
    decision = choose(ask(**BF16), with_packages(A100), "sage")
    assert decision.backend().name == "sage"
    assert not dict(decision.refusals).get("sage")


@pytest.mark.parametrize(
    "wants", (seen_by("dense"), seen_by("padding"), {"dropout": True}, {"returns_lse": True}, {"softcap": True}, LEARN)
)
def test_what_sageattention_would_swallow_is_refused(wants: dict[str, Any]) -> None:
    """Its function takes any keyword, and drops masks and dropout (SageAttention#99)."""
    with pytest.raises(NoBackendError, match="sage was asked for by name and does not take it"):
        choose(ask(**BF16, **wants), with_packages(A100), "sage").backend()


def test_an_unknown_name_is_told_the_known_ones() -> None:
    with pytest.raises(UnknownNameError, match="unknown backend 'flash'; known: auto, flash2, flash3"):
        choose(ask(), CPU, "flash")


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
@pytest.mark.parametrize("word", CONTRACTS)
def test_the_reference_keeps_every_contract(machine: Machine, word: str) -> None:
    assert "reference" in choose(ask(**FLOAT, **LEARN, require=frozenset({word})), machine).accepted


def test_deterministic_algorithms_are_a_contract_of_the_whole_process() -> None:
    strict = dataclasses.replace(H100, deterministic=True)
    assert choose(ask(**BF16, **LEARN), strict).accepted == ("flex", "sdpa-math", "reference")
    assert (
        choose(ask(**BF16), strict).accepted == choose(ask(**BF16), H100).accepted
    )  # without gradients sums keep their order
    assert "call torch.use_deterministic_algorithms(False)" in str(choose(ask(**BF16, **LEARN), strict, "sdpa-cudnn"))


def test_a_large_structured_mask_is_not_spread_out() -> None:
    padded = seen_by("causal", "padding")
    assert choose(ask(**BF16, **padded, q_len=1023), H100).accepted[0] == "sdpa-cudnn"
    assert choose(ask(**BF16, **padded), H100).accepted[0] == "flex"


@pytest.mark.parametrize("machine", (H100, A100, B200), ids=lambda machine: machine.name)
@pytest.mark.parametrize("wants", (seen_by("bias"), seen_by("dense"), seen_by("causal"), heads_of(288), heads_of(512)))
@pytest.mark.parametrize("learns", (False, True))
def test_heads_that_share_keys_stay_on_a_fused_kernel(machine: Machine, wants: dict[str, Any], learns: bool) -> None:
    """By torch's own choice such calls go to math without a word, and write all scores (diffusers#14518)."""
    decision = choose(ask(**BF16, kv_heads=4, needs_grad=learns, **wants), machine)
    assert decision.accepted[0] not in ("sdpa-math", "reference")


def test_measured_times_go_before_the_declared_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        choosing, "measured", lambda *_: {"sdpa-flash": Time(0.5, False), "sdpa-cudnn": Time(0.75, False)}
    )
    decision = choose(ask(**BF16), H100)
    assert decision.accepted[:2] == ("sdpa-flash", "sdpa-cudnn")
    assert decision.why == "fastest measured on H100 near this call (0.5 ms)"


# -- quarantine -------------------------------------------------------------------------------------------------------

LONG = {"q_len": 70_000, "kv_len": 70_000, "kv_heads": 16}
BLIND = seen_by("documents-cross") | {"rows_may_be_empty": True}
STRUCK: dict[str, tuple[Machine, Request]] = {
    "cudnn-backward-half-tile": (H100, ask(**BF16, **LEARN, **seen_by("padding"), q_len=192, kv_len=192)),
    "cudnn-backward-one-query": (with_version(H200, cudnn="9.26.0"), ask(**BF16, **LEARN, q_len=1)),
    "cudnn-ragged-lengths": (with_version(H100, cudnn="9.10.2"), ask(**BF16)),
    "cudnn-dropout": (H100, ask(**BF16, dropout=True)),
    "cudnn-few-kv-heads": (B200, ask(**BF16, kv_heads=4)),
    "efficient-long-mask": (A100, ask(**BF16, **LONG, **seen_by("dense"))),
    "flash-long-gradient": (A100, ask(**BF16, **LEARN, q_len=(1 << 21) + 1)),
    "flash4-documents-without-keys": (with_packages(H200), ask(**BF16, **LEARN, **BLIND)),
    "flash4-hopper-odd-heads": (with_packages(H200), ask(**BF16, **LEARN, **heads_of(72))),
    "flash4-blackwell-odd-heads": (
        dataclasses.replace(B200, packages=(("flash-attn-4", Package("4.0.0b24")),)),
        ask(**BF16, **LEARN, **heads_of(48)),
    ),
    "mps-large-scores": (MPS, ask(**FLOAT, q_len=32_768, kv_len=32_768)),
}
SPARED: dict[str, tuple[Machine, Request]] = {
    "cudnn-backward-half-tile": (H100, ask(**BF16, **seen_by("padding"), q_len=192, kv_len=192)),
    "cudnn-backward-one-query": (H200, ask(**BF16, **LEARN, q_len=1)),
    "cudnn-ragged-lengths": (with_version(H100, cudnn="9.15.1"), ask(**BF16)),
    "cudnn-dropout": (H100, ask(**BF16)),
    "cudnn-few-kv-heads": (RTX5090, ask(**BF16, kv_heads=4)),
    "efficient-long-mask": (A100, ask(**BF16, **LONG, **seen_by("causal"))),
    "flash-long-gradient": (A100, ask(**BF16, **LEARN, q_len=1 << 21)),
    "flash4-documents-without-keys": (with_packages(H200), ask(**BF16, **BLIND)),
    "flash4-hopper-odd-heads": (with_packages(H200), ask(**BF16, **LEARN, **heads_of(80))),
    "flash4-blackwell-odd-heads": (with_packages(B200), ask(**BF16, **LEARN, **heads_of(48))),
    "mps-large-scores": (MPS, ask(**FLOAT, q_len=16_384, kv_len=16_384)),
}


def test_every_defect_has_a_case() -> None:
    assert set(STRUCK) == set(SPARED) == {entry.name for entry in QUARANTINE}


@pytest.mark.parametrize("entry", QUARANTINE, ids=lambda entry: entry.name)
def test_quarantine_holds_until_acquitted(entry: Any) -> None:
    machine, request = STRUCK[entry.name]
    acquitted = dataclasses.replace(machine, acquitted=frozenset({entry.name}))
    for backend in entry.backends:
        for held in (request, request.rounded()):
            assert backend not in choose(held, machine).accepted
            assert backend in choose(held, acquitted).accepted
        with pytest.raises(NoBackendError) as error:
            choose(request, machine, backend).backend()
        assert f"takes calls outside the quarantine {entry.name}" in str(error.value)
        assert entry.thread in str(error.value)
        assert "run `headway doctor --acquit` to look for the defect here" in str(error.value)


@pytest.mark.parametrize("entry", QUARANTINE, ids=lambda entry: entry.name)
def test_quarantine_strikes_no_other_call(entry: Any) -> None:
    machine, request = SPARED[entry.name]
    for backend in entry.backends:
        assert backend in choose(request, machine).accepted
        assert backend in choose(request.rounded(), machine).accepted


@pytest.mark.parametrize("entry", QUARANTINE, ids=lambda entry: entry.name)
def test_quarantine_strikes_no_other_machine(entry: Any) -> None:
    _, request = STRUCK[entry.name]
    other = MPS if entry.device == "cuda" else H100
    assert not list(entry.refusals(request, with_packages(other)))


def test_software_of_unknown_version_counts_as_affected() -> None:
    unknown = dataclasses.replace(H100, versions=())
    assert "sdpa-cudnn" not in choose(ask(**BF16), unknown).accepted


# -- how it reads -----------------------------------------------------------------------------------------------------


def test_reads_well_when_chosen() -> None:
    decision = choose(
        ask(**FLOAT), dataclasses.replace(with_packages(T4, only=("xformers",)), features=T4.features - {"flex"})
    )
    assert str(decision) == (
        "xformers: first in order that takes the call\n"
        "  asked         batch 1, heads 16, length 1024, head_dim 64, float32 on cpu, mask none\n"
        "  machine       T4, cuda 7.5\n"
        "  also          sdpa-efficient, sdpa-math, reference\n"
        "  sdpa-cudnn, flash2, sdpa-flash, torch-varlen, sage\n"
        "                got cuda 7.5, takes cuda 8.0 or newer; choose a backend for older GPUs\n"
        "  flash4        got cuda 7.5, takes cuda 9.0 or newer; choose a backend for older GPUs\n"
        "  flash4        got no such package, takes the package flash-attn-4; pip install flash-attn-4\n"
        "  flash3        got cuda 7.5, takes cuda 9.0 to before 10.0; choose a backend for older GPUs\n"
        "  flash3        got no such package, takes the package flash-attn-3; pip install flash-attn-3\n"
        "  flash2        got no such package, takes the package flash-attn; pip install flash-attn\n"
        "  flex          got torch 2.13.0+cu130 without it, takes a torch with flex attention; update torch\n"
        "  sage          got no such package, takes the package sageattention; pip install sageattention\n"
        "  sdpa-cudnn, flash4, flash3, flash2, sdpa-flash, torch-varlen, sage\n"
        "                got float32, takes float16 on cuda 7.5; cast q, k and v to float16, and the result back\n"
        "  torch-varlen  got mask none, takes masks with documents or documents-cross; choose another backend\n"
        "  sage          got a call that does not name it, takes calls that do;"
        " pass backend='sage' if an approximation is good enough"
    )


def test_reads_well_when_asked_by_name_and_refused() -> None:
    with pytest.raises(NoBackendError) as error:
        choose(ask(**FLOAT, **heads_of(76), **LEARN, sinks=True), with_packages(T4), "flash2").backend()
    assert str(error.value) == (
        "no backend can run this attention call: flash2 was asked for by name and does not take it\n"
        "  asked    batch 1, heads 16, length 1024, head_dim 76, float32 on cpu, mask none, sinks, gradients on\n"
        "  machine  T4, cuda 7.5\n"
        "  flash2   got cuda 7.5, takes cuda 8.0 or newer; choose a backend for older GPUs\n"
        "  flash2   got float32, takes float16 on cuda 7.5; cast q, k and v to float16, and the result back\n"
        "  flash2   got head_dim 76, takes multiples of 8 up to 256, the same for values;"
        " pad q, k and v to 80, keep the scale (76**-0.5 by default), cut the result to 76\n"
        "  flash2   got sinks with gradients,"
        " takes only dropout, softcap, sinks without gradients, lse without gradients;"
        " wrap the call in torch.no_grad() if no gradient is wanted\n"
        "  or       backend='flex' or 'sdpa-math' takes the call as it is\n"
        "  or       backend='reference' takes every call, slowly"
    )


def test_reads_well_when_nothing_takes_it() -> None:
    with pytest.raises(NoBackendError) as error:
        choose(ask(**BF16, require=frozenset({"float32", "double-backward"})), MPS).backend()
    first, _, _, *rest = str(error.value).splitlines()
    assert first == "no backend can run this attention call: every one refuses"
    cast = (
        "got require float32 with bfloat16, takes float32 or float64; cast q, k and v to float32, and the result back"
    )
    assert any(line.endswith(cast) for line in rest)
    assert "slowly" not in str(error.value)


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
@pytest.mark.parametrize("backend", [*NAMES, "auto"])
def test_a_fact_is_said_once(machine: Machine, backend: str) -> None:
    lines = str(choose(ask(**FLOAT, **LEARN, **heads_of(300), softcap=True), machine, backend)).splitlines()
    facts = [line[line.index("got ") :] for line in lines if "  got " in line]
    assert len(facts) == len(set(facts))


def test_the_machine_is_told_before_the_call() -> None:
    decision = choose(ask(**FLOAT, **heads_of(300)), A100)
    said = str(decision)
    assert said.index("got no such package") < said.index("got head_dim 300")


def test_every_refusal_is_told() -> None:
    for name, refusals in (decision := choose(ask(**FLOAT, **heads_of(300)), CPU)).refusals:
        for refusal in refusals:
            assert str(refusal) in str(decision), name


def test_a_decision_is_a_value() -> None:
    first, second = (choose(ask(**BF16), H100) for _ in range(2))
    assert isinstance(first, Decision)
    assert first == second
    assert hash(first.request) == hash(second.request)


def test_registry_declares_each_backend_and_device_once() -> None:
    seen = [
        (backend.name, device) for device in ("cpu", "cuda", "rocm", "mps") for backend in choosing.candidates(device)
    ]
    assert len(seen) == len(set(seen)) == 4 * len({backend.name for backend in BACKENDS})


def test_flex_on_cpu_comes_last() -> None:
    """It compiles for seconds at each new shape: a growing cache would at every token."""
    assert choose(Request(softcap=True, head_dim=64, value_dim=64), CPU).chosen.name == "reference"

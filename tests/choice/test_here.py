"""What this machine is said to be, and that nothing is said to run which does not."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from choice.machines import CPU, H100, MPS

from headway.choice import child, here, memory
from headway.choice.child import Outcome
from headway.choice.choose import choose
from headway.limits.machine import Machine, Package
from headway.limits.request import Request

GOOD_FLASH = """
import torch
def flash_attn_func(q, k, v, softmax_scale, causal, **others):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    sdpa = torch.nn.functional.scaled_dot_product_attention
    return sdpa(q, k, v, is_causal=causal, scale=softmax_scale).transpose(1, 2)
def flash_attn_varlen_func(): ...
"""


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.platformdirs, "user_cache_path", lambda name: tmp_path / "cache" / name)
    here._here.cache_clear()


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str, str], None]:
    """Puts a distribution on the path: its metadata, and a package that holds what is given."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(site)

    def add(distribution: str, version: str, text: str) -> None:
        info = site / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        package = site / "flash_attn"
        package.mkdir(exist_ok=True)
        (package / "__init__.py").write_text(text)
        importlib.invalidate_caches()

    return add


class Children:
    """Answers for child processes, and counts them."""

    def __init__(self, *outcomes: Outcome) -> None:
        self.outcomes, self.asked = list(outcomes), []

    def __call__(self, module: str, *arguments: str, seconds: float) -> Outcome:
        self.asked: list[tuple[str, ...]]
        self.asked.append((module, *arguments))
        return self.outcomes.pop(0)


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Children]:
    def answer(*outcomes: Outcome) -> Children:
        made = Children(*outcomes)
        monkeypatch.setattr(child, "run", made)
        return made

    return answer


# -- this machine ---------------------------------------------------------------------------------------------------


def test_this_cpu() -> None:
    machine = here.here(torch.device("cpu"))
    assert (machine.device, machine.name, machine.capability) == ("cpu", "CPU", None)
    assert machine.version("torch") == torch.__version__
    assert {"_scaled_dot_product_attention_math", "flex"} <= machine.features
    assert not machine.deterministic


def test_the_deterministic_flag_is_read_at_each_call() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        assert here.here(torch.device("cpu")).deterministic
    finally:
        torch.use_deterministic_algorithms(False)
    assert not here.here(torch.device("cpu")).deterministic


def test_it_is_found_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first = here.here(torch.device("cpu"))
    monkeypatch.setattr(here, "bare", None)
    assert here.here(torch.device("cpu")) is first


# -- packages -------------------------------------------------------------------------------------------------------


def test_flash_generations_are_told_apart_by_distribution(install: Any) -> None:
    before = here.installed()
    install("flash-attn-4", "4.0.0b36", "")
    assert importlib.util.find_spec("flash_attn") is not None
    assert here.installed() == {**before, "flash-attn-4": "4.0.0b36"}
    install("flash-attn", "2.8.3", "")
    assert here.installed() == {**before, "flash-attn-4": "4.0.0b36", "flash-attn": "2.8.3"}


def test_what_is_installed_is_not_said_to_run_where_nobody_ran_it(install: Any) -> None:
    install("flash-attn", "2.8.3", GOOD_FLASH)
    machine = here.here(torch.device("cpu"))
    assert machine.package("flash-attn") == Package("2.8.3", tried=False)
    assert not machine.package("flash-attn").runs
    (refusal,) = (r for r in dict(choose(Request(), machine).refusals)["flash2"] if r.machine_wide)
    assert str(refusal) == "got cpu tensors, takes cuda or rocm; move q, k and v to cuda"


@pytest.mark.parametrize("machine", [CPU, MPS])
def test_no_child_is_started_for_other_devices(machine: Machine, children: Any) -> None:
    ran = children()
    assert here.tried("xformers", "0.0.35", machine, machine.device) == Package("0.0.35", tried=False)
    assert ran.asked == []


def test_a_trial_is_made_once_and_remembered(install: Any, children: Any) -> None:
    install("flash-attn", "2.8.3", "")
    ran = children(Outcome(None))
    for _ in range(3):
        assert here.tried("flash-attn", "2.8.3", H100, "cuda:1").runs
    assert ran.asked == [("headway.backends.trial", "flash2", "cuda:1")]


def test_a_failure_is_remembered_with_its_reason(install: Any, children: Any) -> None:
    install("flash-attn", "2.8.3", "")
    ran = children(Outcome("ImportError: undefined symbol"))
    for _ in range(3):
        package = here.tried("flash-attn", "2.8.3", H100, "cuda:0")
        assert not package.runs
        assert package.broken == "ImportError: undefined symbol"
    assert len(ran.asked) == 1


def test_what_may_pass_is_tried_again(install: Any, children: Any) -> None:
    install("flash-attn", "2.8.3", "")
    children(Outcome("no answer within 300 s", lasting=False), Outcome(None))
    assert not here.tried("flash-attn", "2.8.3", H100, "cuda:0").runs
    assert here.tried("flash-attn", "2.8.3", H100, "cuda:0").runs


def test_a_new_version_is_tried_anew(install: Any, children: Any) -> None:
    install("flash-attn", "2.8.4", "")
    children(Outcome("it crashed"))
    memory.remember(H100, "flash-attn 2.8.3", None)
    assert not here.tried("flash-attn", "2.8.4", H100, "cuda:0").runs


def test_a_corrupt_memory_costs_a_trial(install: Any, children: Any) -> None:
    install("flash-attn", "2.8.3", "")
    ran = children(Outcome(None), Outcome(None))
    here.tried("flash-attn", "2.8.3", H100, "cuda:0")
    (file,) = memory.folder(H100).iterdir()
    file.write_bytes(b"\x00")
    assert here.tried("flash-attn", "2.8.3", H100, "cuda:0").runs
    assert len(ran.asked) == 2


def test_an_unwritable_memory_costs_a_trial_in_each_process(install: Any, children: Any, tmp_path: Path) -> None:
    install("flash-attn", "2.8.3", "")
    (tmp_path / "cache").write_text("a file where the folder should be")
    ran = children(Outcome(None), Outcome(None))
    assert here.tried("flash-attn", "2.8.3", H100, "cuda:0").runs
    assert here.tried("flash-attn", "2.8.3", H100, "cuda:0").runs
    assert len(ran.asked) == 2


def test_a_real_trial_of_an_install_that_works_and_of_one_that_lies(install: Any) -> None:
    """In true child processes. Importable is not usable: flash-attn-4 alone makes `import flash_attn` succeed."""
    install("flash-attn", "2.8.3", GOOD_FLASH)
    assert here.trial("flash2", CPU, "cpu") is None
    install("flash-attn-4", "4.0.0b36", "")
    broken = here.trial("flash2", CPU, "cpu")
    assert broken is not None
    assert broken == "AttributeError: module 'flash_attn' has no attribute 'flash_attn_func'"
    assert memory.recall(CPU, "flash-attn 2.8.3") == (True, broken)


# -- quarantine -----------------------------------------------------------------------------------------------------

DEFECT = "flash4-hopper-odd-heads"


def test_a_defect_not_found_is_acquitted_and_one_found_is_held_again(children: Any) -> None:
    ran = children(Outcome(None), Outcome("flash4 errs by 1.1 in the dq"))
    assert here.acquitted(H100) == frozenset()
    assert here.probe(DEFECT, H100, "cuda:0") is None
    assert here.acquitted(H100) == {DEFECT}
    assert here.probe(DEFECT, H100, "cuda:0") == "flash4 errs by 1.1 in the dq"
    assert here.acquitted(H100) == frozenset()
    assert ran.asked[0] == ("headway.choice.probes", DEFECT, "cuda:0")


def test_a_probe_that_could_not_look_changes_nothing(children: Any) -> None:
    busy = Outcome("OutOfMemoryError: CUDA out of memory", lasting=False)
    children(busy, Outcome(None), busy)
    here.probe(DEFECT, H100, "cuda:0")
    assert here.acquitted(H100) == frozenset()
    here.probe(DEFECT, H100, "cuda:0")
    here.probe(DEFECT, H100, "cuda:0")
    assert here.acquitted(H100) == {DEFECT}


def test_an_acquittal_holds_for_these_versions_only(children: Any) -> None:
    children(Outcome(None))
    here.probe(DEFECT, H100, "cuda:0")
    newer = Machine(H100.device, H100.name, H100.capability, versions=(("torch", "2.14.0"),))
    assert here.acquitted(newer) == frozenset()


def test_an_acquittal_is_seen_by_the_next_call(children: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    children(Outcome(None))
    first = here.here(torch.device("cpu"))
    here.probe(DEFECT, first, "cpu")
    assert DEFECT in here.here(torch.device("cpu")).acquitted


def test_what_a_function_takes_is_read_without_importing_it() -> None:
    from torch.nn.attention.varlen import varlen_attn

    assert here._arguments("torch.nn.attention.varlen", "varlen_attn") == set(inspect.signature(varlen_attn).parameters)
    assert here._arguments("torch.nn.attention.varlen", "no_such") == set()
    assert here._arguments("torch.nn.attention.no_such", "varlen_attn") == set()

"""What every test starts from: one thread, a fixed seed, no remembered plans, and nobody's settings or caches."""

from __future__ import annotations

import gc
import importlib
import os
from collections.abc import Iterator

import pytest
import torch
from deck import DEVICES

from headway.backends import flex

door = importlib.import_module("headway.attention")  # `headway.attention` itself is the function of that name

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it deterministic algorithms refuse on CUDA
os.environ.pop("HEADWAY_BACKEND", None)
torch.set_num_threads(1)  # the tensors are tiny, and the workers of pytest-xdist share the cores


# How long a program's guards take is measured at each compilation, for a log, with the caches emptied for it.
assert callable(torch._dynamo.guards.profile_guard_manager)
torch._dynamo.guards.profile_guard_manager = lambda *_: 0.0


def pytest_collection_finish() -> None:
    """What was imported stays: collecting garbage, as many tests do, need not look at it each time. It is looked for
    less often than in processes that live long."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def pytest_sessionfinish() -> None:
    gc.unfreeze()


@pytest.fixture(params=[pytest.param(kind, marks=pytest.mark.cuda if kind == "cuda" else ()) for kind in DEVICES])
def device(request: pytest.FixtureRequest) -> str:
    """Each kind of device that is here, one test for each."""
    return str(request.param)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Trials of kernel packages are remembered in a folder of this run's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def pytest_runtest_setup() -> None:
    """No plan or random state is left over from another test. A fixture for it would take longer than it does."""
    door._PLANS.clear()
    # torch.manual_seed writes down a stack for a GPU that may come: half the time of a small test.
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(0)


@pytest.fixture
def flex_uncompiled(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Flex attention by its plain path on CPU, where compiling each of hundreds of masks would take hours.

    On CUDA it is compiled, and what other tests had compiled does not count towards the budget.
    """
    params = getattr(request.node, "callspec", None)
    if params is not None and params.params.get("device") == "cuda":
        flex.compiled.cache_clear()
        return
    monkeypatch.setattr("torch.nn.attention.flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(flex, "compiled", lambda *_: flex._flex)

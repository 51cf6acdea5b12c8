"""What the package promises from outside: its names, its imports, its version, its pins and its contracts."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from forked import fresh

import headway
from headway.backends.registry import BACKENDS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
OPTIONAL = {"flash_attn", "flash_attn_interface", "xformers", "sageattention", "matplotlib", "transformers"}


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_all_is_the_public_surface() -> None:
    members = vars(headway).items()
    public = {name for name, value in members if not name.startswith("_") and not isinstance(value, ModuleType)}
    assert set(headway.__all__) == public
    assert headway.__all__ == sorted(headway.__all__)


IMPORT_ALL = """
import importlib, pkgutil, headway
for module in pkgutil.walk_packages(headway.__path__, "headway."):
    if not module.name.endswith(("__main__", "masks.visits")):  # that one is Triton's
        importlib.import_module(module.name)
"""


@pytest.mark.parametrize("code", ["import headway", IMPORT_ALL], ids=["headway", "every module of it"])
def test_imports_no_optional_package(code: str, tmp_path: Path) -> None:
    status, told = fresh(f"import sys\n{code}\nprint(*sys.modules)", folder=tmp_path)
    assert status == 0, told
    loaded = {name.partition(".")[0] for name in told.split()}
    assert "headway" in loaded
    assert loaded & (OPTIONAL | {"headway_apps"}) == set()


SETTINGS = """
import os, sys, warnings, logging, signal, random, torch
def settings():
    b = torch.backends
    return (dict(os.environ), list(sys.path), sys.excepthook, list(warnings.filters), logging.root.level,
        list(logging.root.handlers), signal.getsignal(signal.SIGINT), random.getstate(),
        torch.get_rng_state().tolist(), torch.get_default_dtype(), torch.get_num_threads(),
        torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled(), torch.is_grad_enabled(),
        b.cuda.matmul.allow_tf32, b.cudnn.allow_tf32, b.cudnn.benchmark, b.cudnn.deterministic,
        b.cuda.flash_sdp_enabled(), b.cuda.mem_efficient_sdp_enabled(), b.cuda.math_sdp_enabled(),
        b.cuda.cudnn_sdp_enabled(), b.mha.get_fastpath_enabled(), torch.cuda.is_initialized(),
        torch.nn.functional.scaled_dot_product_attention, torch.nn.MultiheadAttention.forward)
# What others set when they are imported is theirs.
import typer, rich.console, rich.table, torch._dynamo, torch.nn.attention.flex_attention, torch.utils.checkpoint
before = settings()
"""


A_SWAP = """
import headway
with torch.random.fork_rng():
    model, x = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval(), torch.randn(1, 4, 16)
with headway.swap(model, x):
    model(x).sum().backward()
"""


@pytest.mark.parametrize(
    "code", ["import headway", IMPORT_ALL, A_SWAP], ids=["headway", "every module of it", "a swap"]
)
def test_an_import_or_a_swap_sets_nothing_for_the_process(code: str, tmp_path: Path) -> None:
    """No environment variable, flag of PyTorch, handler, filter or random number; and it prints nothing."""
    # Not the environment of this process, where what an import would set is set already.
    check = "after = settings()\nassert not [(a, b) for a, b in zip(before, after) if a != b]"
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "XDG_CACHE_HOME") if name in os.environ}
    assert fresh(f"{SETTINGS}{code}\n{check}", folder=tmp_path, environment=environment) == (0, "")


def test_changelog_ends_at_this_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text()
    headings = re.findall(r"^## \[(.+?)\]", changelog, flags=re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert headings[1:2] in ([], [headway.__version__])


@pytest.mark.parametrize("package", ["headway", "headway_apps"])
def test_ships_its_types(package: str) -> None:
    assert (ROOT / "src" / package / "py.typed").is_file()


def test_constraints_pin_every_requirement(project: dict[str, Any]) -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.partition("==")[0] for line in lines if re.match(r"[\w-]+==[\d.]+(;|$)", line)}
    extras = project["project"]["optional-dependencies"].values()
    asked = [*project["build-system"]["requires"], *project["project"]["dependencies"], *(x for e in extras for x in e)]
    names = {re.split(r"[^\w-]", requirement, maxsplit=1)[0] for requirement in asked} - {"headway"}
    assert "torch" in names
    assert names <= pinned


def test_every_backend_stands_under_the_import_contract(project: dict[str, Any]) -> None:
    contracts = project["tool"]["importlinter"]["contracts"]
    (kernels,) = (one["modules"] for one in contracts if one["type"] == "independence")
    assert {backend.entry.partition(":")[0] for backend in BACKENDS} == set(kernels)

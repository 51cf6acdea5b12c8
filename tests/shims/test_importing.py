"""Shims are installed where a package is absent or does not run, said so, and taken out without a trace."""

from __future__ import annotations

import gc
import importlib
import importlib.metadata
import importlib.util
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from headway import packages
from headway.choice import here
from headway.errors import UnknownNameError
from headway.limits.machine import Machine, Package
from headway.shims import install, installed, uninstall

importing = importlib.import_module("headway.shims.importing")
command = importlib.import_module("headway.shims.__main__")
SRC = Path(__file__).parents[2] / "src"


def state() -> tuple[Any, ...]:
    """All that an import leaves behind, under these names."""
    names = {at: module for at, module in sys.modules.items() if at.partition(".")[0] in importing.NAMES}
    ours = vars(sys.modules["headway.shims.flash_attn"]) if "headway.shims.flash_attn" in sys.modules else {}
    return names, list(sys.meta_path), dict(packages.ASIDE), "cute" in ours


@pytest.fixture(autouse=True)
def _left_as_found() -> Iterator[None]:
    before = state()
    yield
    uninstall()
    assert state() == before


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Puts a package on the path: files by name, and a distribution if it has a version."""

    def make(files: dict[str, str], distribution: str = "", version: str = "") -> Path:
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        if version:
            folder = tmp_path / f"{distribution.replace('-', '_')}-{version}.dist-info"
            folder.mkdir()
            (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        importlib.invalidate_caches()
        return tmp_path

    monkeypatch.syspath_prepend(str(tmp_path))
    here._here.cache_clear()
    yield make
    uninstall()
    for at in list(sys.modules):
        if at.partition(".")[0] in importing.NAMES:
            del sys.modules[at]
    here._here.cache_clear()


REAL = {
    "flash_attn/__init__.py": "__version__ = '2.8.3'\nfrom flash_attn.flash_attn_interface import flash_attn_func\n",
    "flash_attn/flash_attn_interface.py": "def flash_attn_func(*args, **kwargs): return 'real'\n",
}
CUTE = {"flash_attn/cute/__init__.py": "from flash_attn.cute import deep\nflash_attn_func = 'real cute'\n"}
CUTE |= {"flash_attn/cute/deep.py": "", "flash_attn/cute/later.py": ""}


def runs(monkeypatch: pytest.MonkeyPatch, distribution: str, package: Package) -> None:
    monkeypatch.setattr(importing, "here", lambda _: Machine(packages=((distribution, package),)))


# -- where nothing is installed ---------------------------------------------------------------------------------------


def test_names_lead_to_headways_modules_as_they_are() -> None:
    ours = importlib.import_module("headway.shims.flash_attn.bert_padding")
    spec = ours.__spec__
    (answer,) = install("flash_attn")
    assert str(answer) == "flash_attn: Headway answers, as flash-attn is not installed"
    import flash_attn
    import flash_attn.bert_padding as by_name
    from flash_attn.flash_attn_interface import flash_attn_func

    assert flash_attn.__version__.endswith("+headway")
    assert by_name is ours is flash_attn.bert_padding
    assert flash_attn_func is flash_attn.flash_attn_func
    assert (ours.__spec__, ours.__name__) == (spec, "headway.shims.flash_attn.bert_padding")
    q = torch.randn(1, 3, 2, 8)
    assert flash_attn_func(q, q, q, causal=True).shape == q.shape


def test_all_names_without_any() -> None:
    assert [answer.name for answer in install()] == ["flash_attn", "xformers"]
    import flash_attn  # noqa: F401
    import xformers.ops

    assert xformers.ops.memory_efficient_attention.__module__.startswith("headway.shims.xformers")


def test_a_class_is_one_under_both_names_and_survives_the_shim() -> None:
    with installed("flash_attn"):
        from flash_attn.layers.rotary import RotaryEmbedding
    from headway.shims.flash_attn.layers import rotary

    assert RotaryEmbedding is rotary.RotaryEmbedding
    assert pickle.loads(pickle.dumps(RotaryEmbedding(8))).dim == 8


def test_a_pickle_of_flash_attns_own_class_loads() -> None:
    there = b"cflash_attn.layers.rotary\nRotaryEmbedding\n."
    with pytest.raises(ModuleNotFoundError):
        pickle.loads(there)
    with installed("flash_attn"):
        assert pickle.loads(there).__name__ == "RotaryEmbedding"


def test_uninstalled_names_are_gone_and_what_was_imported_works_on() -> None:
    install("flash_attn")
    import flash_attn

    uninstall()
    with pytest.raises(ModuleNotFoundError, match="No module named 'flash_attn'"):
        importlib.import_module("flash_attn")
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("flash_attn.bert_padding")
    q = torch.randn(1, 3, 2, 8)
    assert flash_attn.flash_attn_func(q, q, q).shape == q.shape
    uninstall()


@pytest.mark.parametrize(
    "code",
    ["import xformers.components", "from xformers.ops import sparse24", "import xformers.ops as x; x.tiled_matmul"],
)
def test_what_a_shim_has_not_names_its_own_page(code: str) -> None:
    with installed("xformers"):
        with pytest.raises((ImportError, AttributeError), match=r"what it has is in docs/xformers.md"):
            exec(code, {})
        assert not hasattr(importlib.import_module("xformers.ops"), "tiled_matmul")


def test_what_a_shim_has_not_is_no_module_and_says_so() -> None:
    with installed("flash_attn"):
        with pytest.raises(
            ModuleNotFoundError, match="Headway answers for flash_attn, .* has no such module"
        ) as caught:
            import flash_attn.models.gpt  # noqa: F401
        assert caught.value.name == "flash_attn.models"
        with pytest.raises(ImportError, match=r"No module .*\.nothing.* what it has is in docs/flash_attn.md"):
            from flash_attn import nothing
        with pytest.raises(ImportError, match=r"No module .*\.nothing.* what it has is in docs/flash_attn.md"):
            from flash_attn.ops import nothing  # noqa: F401


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="unknown shim 'sageattention'; known: flash_attn, xformers"):
        install("flash_attn", "sageattention")


# -- who looks before importing ---------------------------------------------------------------------------------------


def looked_for(name: str) -> list[bool]:
    """By find_spec, by version under either spelling, and by the map from modules to distributions."""
    found = [importlib.util.find_spec(name) is not None]
    for spelling in (name, name.replace("_", "-")):
        try:
            found.append(importlib.metadata.version(spelling).endswith("+headway"))
        except importlib.metadata.PackageNotFoundError:
            found.append(False)
    return [*found, name in importlib.metadata.packages_distributions()]


@pytest.mark.parametrize("name", importing.NAMES)
def test_who_only_looks_is_answered_only_where_that_was_asked_for(name: str) -> None:
    assert looked_for(name) == [False] * 4
    with installed(name):
        assert looked_for(name) == [False] * 4
        assert importlib.import_module(name).__version__.endswith("+headway")
    with installed(name, as_distribution=True):
        assert looked_for(name) == [True] * 4
        version = importlib.metadata.version(name)
        assert importlib.metadata.packages_distributions()[name] == [name.replace("_", "-")]
        assert version == importlib.import_module(name).__version__
        assert importlib.util.find_spec(f"{name}.nothing") is None
    assert looked_for(name) == [False] * 4


def test_headway_itself_does_not_take_a_shim_for_a_package() -> None:
    with installed(as_distribution=True):
        assert here.installed().keys().isdisjoint({"flash-attn", "xformers"})


# -- holds ------------------------------------------------------------------------------------------------------------


def test_a_name_goes_with_the_last_that_holds_it() -> None:
    with installed("flash_attn"):
        with installed("flash_attn", "xformers", as_distribution=True):
            assert looked_for("flash_attn")[1]
        assert not looked_for("flash_attn")[1]
        import flash_attn  # noqa: F401

        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("xformers")
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("flash_attn")


def test_an_install_outlives_a_with_block_and_uninstall_ends_both() -> None:
    install("flash_attn")
    with installed("flash_attn"):
        pass
    importlib.import_module("flash_attn")
    with installed("flash_attn"):
        uninstall()
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("flash_attn")


def test_an_error_inside_takes_the_shim_out() -> None:
    with pytest.raises(ZeroDivisionError), installed("flash_attn"):
        raise ZeroDivisionError
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("flash_attn")


def test_threads_may_hold_it_at_once() -> None:
    failed: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(30):
                with installed("flash_attn", "xformers"):
                    importlib.import_module("flash_attn.bert_padding")
                    importlib.import_module("xformers.ops")
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_a_blocked_import_is_blocked_again() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "flash_attn", None)
        with installed("flash_attn"):
            assert importlib.import_module("flash_attn").__version__.endswith("+headway")
        assert sys.modules["flash_attn"] is None


# -- where something is installed -------------------------------------------------------------------------------------


def test_an_install_that_runs_is_left_alone(monkeypatch: pytest.MonkeyPatch, package: Any) -> None:
    package(REAL, "flash-attn", "2.8.3")
    runs(monkeypatch, "flash-attn", Package("2.8.3"))
    (answer,) = install("flash_attn", as_distribution=True)
    assert str(answer) == "flash_attn: left alone, as flash-attn 2.8.3 runs here; force=True answers all the same"
    import flash_attn

    assert flash_attn.__version__ == "2.8.3" == importlib.metadata.version("flash_attn")


@pytest.mark.parametrize("imported_before", [False, True])
def test_by_force_it_answers_and_headways_own_backends_keep_the_real_one(
    monkeypatch: pytest.MonkeyPatch, package: Any, imported_before: bool
) -> None:
    """Else they would call the shim, which calls them."""
    package(REAL, "flash-attn", "2.8.3")
    runs(monkeypatch, "flash-attn", Package("2.8.3"))
    if imported_before:
        importlib.import_module("flash_attn")
    with installed("flash_attn", force=True, as_distribution=True) as (answer,):
        assert answer.shimmed
        import flash_attn

        assert flash_attn.flash_attn_func.__module__ == "headway.shims.flash_attn.flash_attn_interface"
        assert importlib.metadata.version("flash_attn") == flash_attn.__version__
        assert packages.real("flash_attn").flash_attn_func() == "real"
        assert packages.version("flash-attn") == "2.8.3"
    import flash_attn as again

    assert again.flash_attn_func() == "real"


@pytest.mark.parametrize(
    "state_of_it, why",
    [
        (Package("2.7.0", broken="ImportError: undefined symbol"), "flash-attn 2.7.0 is installed, and ImportError"),
        (Package("2.7.0", tried=False), "flash-attn 2.7.0 is installed, and it was not made for cpu"),
    ],
)
def test_an_install_that_does_not_run_is_told(
    monkeypatch: pytest.MonkeyPatch, package: Any, state_of_it: Package, why: str
) -> None:
    package(REAL, "flash-attn", "2.7.0")
    runs(monkeypatch, "flash-attn", state_of_it)
    theirs = importlib.import_module("flash_attn")
    with pytest.warns(RuntimeWarning, match=f"{why}.*Headway answers for flash_attn instead") as caught:
        answers = install("flash_attn", as_distribution=True)
    assert caught[0].filename == __file__
    assert answers[0].shimmed
    assert importlib.metadata.version("flash_attn").endswith("+headway")
    assert importlib.import_module("flash_attn") is not theirs
    uninstall()
    assert importlib.import_module("flash_attn") is theirs
    assert sys.modules["flash_attn.flash_attn_interface"].flash_attn_func() == "real"


@pytest.mark.parametrize("when", ["never", "before", "meanwhile"])
def test_flash_attn_4_alone_stays_beside_the_shim(package: Any, when: str) -> None:
    package(CUTE, "flash-attn-4", "4.0.0")
    theirs: ModuleType | None = importlib.import_module("flash_attn.cute") if when == "before" else None
    parent = sys.modules.get("flash_attn")
    with pytest.warns(RuntimeWarning, match="only flash-attn-4, which is flash_attn.cute, is installed"):
        install("flash_attn")
    import flash_attn

    assert flash_attn.__version__.endswith("+headway")
    if when == "before":
        assert flash_attn.cute is theirs
    if when != "never":
        theirs = importlib.import_module("flash_attn.cute")
        importlib.import_module("flash_attn.cute.later")
        assert theirs.flash_attn_func == "real cute"
        assert sys.modules["flash_attn.cute"] is theirs
    uninstall()
    import flash_attn as again

    assert not hasattr(again, "__version__")
    assert parent in (None, again)
    if theirs is not None:
        assert again.cute is theirs is importlib.import_module("flash_attn.cute")


def test_a_checkout_that_cannot_be_imported_is_told(package: Any) -> None:
    """As of a repository cloned beside the script, and never built."""
    package({"flash_attn/__init__.py": "import flash_attn_2_cuda_that_nobody_built\n"})
    with pytest.warns(RuntimeWarning, match="of no distribution at .*cannot be imported: ModuleNotFoundError"):
        (answer,) = install("flash_attn")
    assert answer.shimmed


@pytest.mark.parametrize("used", [False, True])
def test_somebody_elses_stand_in_is_left_alone(package: Any, used: bool) -> None:
    package(REAL)
    if used:
        importlib.import_module("flash_attn")
    (answer,) = install("flash_attn")
    assert not answer.shimmed
    assert "of no distribution" in str(answer)


# -- a whole process --------------------------------------------------------------------------------------------------


def python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", *arguments], cwd=cwd, capture_output=True, text=True, timeout=300,
        env={**__import__("os").environ, "PYTHONPATH": str(SRC)},
    )  # fmt: skip


SCRIPT = """
import sys
from flash_attn import flash_attn_func
import xformers.ops
import beside
if __name__ == "__main__":
    print(sys.argv, flash_attn_func.__module__, beside.here)
    sys.exit(3)
"""


def test_a_script_and_a_module_run_under_the_shims(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "train.py").write_text(SCRIPT)
    (tmp_path / "sub" / "beside.py").write_text("here = 'beside'\n")
    script = python("-m", "headway.shims", "run", "sub/train.py", "--lr", "-m", cwd=tmp_path)
    assert script.returncode == 3, script.stderr
    expected = "headway.shims.flash_attn.flash_attn_interface beside\n"
    assert script.stdout == f"['sub/train.py', '--lr', '-m'] {expected}"
    assert "flash_attn: Headway answers, as flash-attn is not installed" in script.stderr
    module = python("-m", "headway.shims", "run", "-m", "train", "--lr", cwd=tmp_path / "sub")
    assert module.returncode == 3, module.stderr
    assert module.stdout.endswith(expected)


@pytest.mark.parametrize(
    "arguments", [[], ["run"], ["run", "-m"], ["walk", "x.py"], ["run", "nosuch.py"], ["--help"]], ids=" ".join
)
def test_the_command_says_what_it_takes(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        command.main(arguments)
    told = capsys.readouterr()
    assert left.value.code == (0 if "--help" in arguments else 2)
    assert "usage: python -m headway.shims run" in told.out + told.err


def test_importing_the_shims_package_changes_nothing_and_a_first_call_is_quick(tmp_path: Path) -> None:
    code = """
import sys, torch, headway
before = list(sys.meta_path)
import headway.shims
assert before == sys.meta_path
headway.shims.install()
from flash_attn import flash_attn_func
x = torch.randn(1, 3, 2, 8)
flash_attn_func(x, x, x)
assert "torch._dynamo" not in sys.modules, "which takes seconds"
"""
    assert python("-c", code, cwd=tmp_path).returncode == 0
    gc.collect()

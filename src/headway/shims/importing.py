"""Answers imports of flash_attn and xformers with Headway's modules, while asked to; and puts everything back.

A finder, first on `sys.meta_path` while anything is installed, leads `flash_attn.x` to `headway.shims.flash_attn.x`:
one module object under two names, so that its classes are one under both. What names led to before is kept aside.

A name is held by each `install` and each `with installed(...)`, and goes with the last of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from types import ModuleType

import torch

from headway.choice import child
from headway.choice.here import here
from headway.errors import UnknownNameError

NAMES = ("flash_attn", "xformers")
SUFFIX = "+headway"
"""What the shims' versions end in."""
_DISTRIBUTIONS = {"flash_attn": "flash-attn", "xformers": "xformers"}
_MAIN = {"flash_attn": "flash_attn.flash_attn_interface", "xformers": "xformers.ops"}
"""Modules without which there is no package to speak of."""
_THEIRS = ("flash_attn.cute",)
"""Modules of other distributions under these names: they stay what they are."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """What `install` did about one name, and why."""

    name: str
    shimmed: bool
    because: str

    def __str__(self) -> str:
        return f"{self.name}: {'Headway answers' if self.shimmed else 'left alone'}, as {self.because}"


def install(*names: str, force: bool = False, as_distribution: bool = False) -> tuple[Answer, ...]:
    """Make `import flash_attn` and `import xformers`, or only those named, lead to Headway, until `uninstall`.

    A package that is installed and runs here is left alone, but for `force=True`. With `as_distribution=True`
    `importlib.metadata` and `importlib.util.find_spec` answer for the names too, as libraries ask before they import.
    """
    return _hold(names, _Hold(as_distribution), force)


def uninstall() -> None:
    """Give every name back; `sys.modules` has for them what it had before."""
    with _LOCK:
        for name in list(_SHIMS):
            _take_out(name)


@contextlib.contextmanager
def installed(*names: str, force: bool = False, as_distribution: bool = False) -> Iterator[tuple[Answer, ...]]:
    """`install` for the length of a with block."""
    hold = _Hold(as_distribution)
    answers = _hold(names, hold, force)
    try:
        yield answers
    finally:
        with _LOCK:
            for name, shim in list(_SHIMS.items()):
                if hold in shim.holds:
                    shim.holds.remove(hold)
                    if not shim.holds:
                        _take_out(name)


# -- what is held -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(eq=False)
class _Hold:
    """One wish that names be answered."""

    as_distribution: bool


@dataclasses.dataclass
class _Shim:
    """A name that is answered: who wishes it, and what it led to before."""

    holds: list[_Hold]
    answer: Answer
    aside: dict[str, ModuleType | None]


_SHIMS: dict[str, _Shim] = {}
_LOCK = threading.RLock()


def _hold(names: tuple[str, ...], hold: _Hold, force: bool) -> tuple[Answer, ...]:
    for name in names:
        if name not in NAMES:
            raise UnknownNameError("shim", name, NAMES)
    with _LOCK:
        return tuple(_hold_one(name, hold, force) for name in names or NAMES)


def _hold_one(name: str, hold: _Hold, force: bool) -> Answer:
    shim = _SHIMS.get(name)
    if shim is None:
        answer = _answer(name, force)
        if not answer.shimmed:
            return answer
        shim = _put_in(name, answer)
    shim.holds.append(hold)
    return shim.answer


def _put_in(name: str, answer: Answer) -> _Shim:
    importlib.import_module(_ours(name))
    aside: dict[str, ModuleType | None] = {at: sys.modules[at] for at in _under(name)}
    for at in aside:
        if not _is_theirs(at):
            del sys.modules[at]
    shim = _SHIMS[name] = _Shim([], answer, aside)
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)
    return shim


def _take_out(name: str) -> None:
    shim = _SHIMS.pop(name)
    if not _SHIMS:
        with contextlib.suppress(ValueError):  # somebody else may have taken it out
            sys.meta_path.remove(_FINDER)
    for at in _under(name):
        if not _is_theirs(at):
            del sys.modules[at]
    sys.modules.update(shim.aside)  # type: ignore[arg-type]  # None blocks an import, and is put back too


def _under(name: str) -> list[str]:
    return [at for at in list(sys.modules) if at == name or at.startswith(f"{name}.")]


def _ours(name: str) -> str:
    return f"{__package__}.{name}"


def _is_theirs(at: str) -> bool:
    return any(at == name or at.startswith(f"{name}.") for name in _THEIRS)


# -- what is installed ------------------------------------------------------------------------------------------------


def _answer(name: str, force: bool) -> Answer:
    """Whether a name is Headway's to answer: not where a package runs, or may run for all anybody knows."""
    distribution, spec = _DISTRIBUTIONS[name], _spec(name)
    package = here(_device()).package(distribution)
    if package.version is None and spec is None:
        return Answer(name, True, f"{distribution} is not installed")
    what = f"{distribution} {package.version}"
    if package.version is None:
        what, runs, why = _of_no_distribution(name, spec)
    else:
        runs = package.runs
        why = f"says {package.broken}" if package.tried else f"computes nothing on {_device().type}"
    if not runs:
        warnings.warn(f"{what} is installed, but {why}: Headway answers for {name}", RuntimeWarning, stacklevel=5)
        return Answer(name, True, f"{what} {why}")
    if force:
        return Answer(name, True, f"{what} runs here, and force=True")
    return Answer(name, False, f"{what} runs here; force=True answers all the same")


def _of_no_distribution(name: str, spec: importlib.machinery.ModuleSpec | None) -> tuple[str, bool, str]:
    """(what it is, whether it runs, else why not) of a package that is not from its own distribution."""
    others = [theirs for theirs in _THEIRS if theirs.startswith(f"{name}.") and _spec(theirs) is not None]
    if others and _spec(_MAIN[name]) is None:
        return f"only {', '.join(others)}", False, f"it has nothing else of {name}, and stays as it is"
    at = spec.origin if spec is not None and spec.origin else "a place of its own"
    broken = None if name in sys.modules else child.run("headway.shims.trial", _MAIN[name], seconds=60.0).broken
    return f"a {name} at {at}", broken is None, f"says {broken}"


def _spec(name: str) -> importlib.machinery.ModuleSpec | None:
    """Where a name leads without Headway."""
    try:
        return importlib.util.find_spec(name)
    except (ModuleNotFoundError, ValueError):  # no such parent; blocked, or made by hand
        return None


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# -- the finder -------------------------------------------------------------------------------------------------------


class _Loader(importlib.abc.Loader):
    """Gives an import the module that Headway has for it: the very object, left as it is."""

    def __init__(self, ours: str) -> None:
        self.ours = ours

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = importlib.import_module(self.ours)
        self.spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec  # the import system has put in its own meanwhile


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        name = fullname.partition(".")[0]
        shim = _SHIMS.get(name)
        if shim is None:
            return None
        asked = sys._getframe(2).f_globals.get("__name__") == "importlib.util"  # by its find_spec, to look and not load
        if asked and not any(hold.as_distribution for hold in shim.holds):
            return None
        if _is_theirs(fullname):
            return None
        ours = _spec(_ours(fullname))
        if ours is not None:
            return importlib.machinery.ModuleSpec(
                fullname,
                _Loader(ours.name),
                origin=ours.origin,
                is_package=ours.submodule_search_locations is not None,
            )
        if asked:
            return None
        raise ModuleNotFoundError(
            f"No module named {fullname!r}: Headway answers for {name} ({shim.answer.because}), and has no such module",
            name=fullname,
        )


_FINDER = _Finder()

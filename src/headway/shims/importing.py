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
from collections.abc import Iterable, Iterator, Sequence
from types import ModuleType

import torch

from headway import packages
from headway.choice import child
from headway.choice.here import here
from headway.errors import UnknownNameError
from headway.shims import hugging_face
from headway.shims.distribution import Distribution, is_same

NAMES = ("flash_attn", "xformers")
_DISTRIBUTIONS = {"flash_attn": "flash-attn", "xformers": "xformers"}
_MAIN = {"flash_attn": "flash_attn.flash_attn_interface", "xformers": "xformers.ops.fmha"}
"""Modules without which there is no package to speak of."""
_THEIRS = "flash_attn.cute"
"""Of another distribution under the same name, flash-attn-4: it stays what it is."""


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
    """Give every name back; `sys.modules` has for them what it had before.

    Warns if transformers has loaded flash_attention_2 from here: its models ask for the package at each call.
    """
    with _LOCK:
        stranded = hugging_face.in_use()
        for shim in list(_SHIMS.values()):
            _let_go(shim, list(shim.holds))
    if stranded:
        warnings.warn(
            "transformers has loaded flash_attention_2 from Headway: models that run it raise from now on, unless"
            " flash_attn runs here; model.set_attn_implementation('sdpa'), or install the shim again",
            RuntimeWarning,
            stacklevel=2,
        )


@contextlib.contextmanager
def installed(*names: str, force: bool = False, as_distribution: bool = False) -> Iterator[tuple[Answer, ...]]:
    """`install` for the length of a with block."""
    hold = _Hold(as_distribution)
    answers = _hold(names, hold, force)
    try:
        yield answers
    finally:
        with _LOCK:
            for shim in list(_SHIMS.values()):
                _let_go(shim, [hold])


# -- what is held -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(eq=False)
class _Hold:
    """One wish that names be answered."""

    as_distribution: bool


@dataclasses.dataclass
class _Shim:
    """A name that is answered: who wishes it, and what it led to before."""

    answer: Answer
    paths: list[str]
    """Where the package itself is, if it is anywhere."""
    aside: dict[str, ModuleType | None]
    holds: list[_Hold] = dataclasses.field(default_factory=list)

    @property
    def name(self) -> str:
        return self.answer.name

    @property
    def as_distribution(self) -> bool:
        return any(hold.as_distribution for hold in self.holds)


_SHIMS: dict[str, _Shim] = {}
_LOCK = threading.RLock()


def _hold(names: tuple[str, ...], hold: _Hold, force: bool) -> tuple[Answer, ...]:
    for name in names:
        if name not in NAMES:
            raise UnknownNameError("shim", name, NAMES)
    answers: list[Answer] = []
    with _LOCK:
        for name in dict.fromkeys(names or NAMES):
            answers.append(_hold_one(name, hold, force))  # a warning names the caller by depth
    return tuple(answers)


def _hold_one(name: str, hold: _Hold, force: bool) -> Answer:
    shim = _SHIMS.get(name)
    if shim is None:
        spec = _spec(name)
        answer = _answer(name, spec, force)
        if not answer.shimmed:
            return answer
        shim = _put_in(answer, spec)
    shim.holds.append(hold)
    _tell_libraries()
    return shim.answer


def _let_go(shim: _Shim, holds: list[_Hold]) -> None:
    shim.holds = [hold for hold in shim.holds if hold not in holds]
    if not shim.holds:
        _take_out(shim)
    _tell_libraries()


def _put_in(answer: Answer, spec: importlib.machinery.ModuleSpec | None) -> _Shim:
    name = answer.name
    ours = importlib.import_module(_ours(name))
    aside: dict[str, ModuleType | None] = {at: sys.modules[at] for at in _under(name) if not _is_theirs(at)}
    shim = _SHIMS[name] = _Shim(answer, list(spec.submodule_search_locations or ()) if spec else [], aside)
    for at in aside:
        del sys.modules[at]
    if _THEIRS in sys.modules and _is_theirs_of(name):
        _attach(ours)
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)
    return shim


def _take_out(shim: _Shim) -> None:
    del _SHIMS[shim.name]
    if not _SHIMS:
        with contextlib.suppress(ValueError):  # somebody else may have taken it out
            sys.meta_path.remove(_FINDER)
    for at in _under(shim.name):
        if not _is_theirs(at):
            del sys.modules[at]
            packages.ASIDE.pop(at, None)
    for at in shim.aside:
        packages.ASIDE.pop(at, None)
    sys.modules.update(shim.aside)  # type: ignore[arg-type]  # None blocks an import, and is put back too
    if _is_theirs_of(shim.name):
        vars(sys.modules[_ours(shim.name)]).pop(_THEIRS.rpartition(".")[2], None)
        if _THEIRS in sys.modules:  # loaded meanwhile, and real: it stays, below its own parent
            _attach(importlib.import_module(shim.name))


def _attach(parent: ModuleType) -> None:
    setattr(parent, _THEIRS.rpartition(".")[2], sys.modules[_THEIRS])


def _under(name: str) -> list[str]:
    return [at for at in list(sys.modules) if at == name or at.startswith(f"{name}.")]


def _ours(name: str) -> str:
    return f"{__package__}.{name}"


def _is_theirs(at: str) -> bool:
    return at == _THEIRS or at.startswith(f"{_THEIRS}.")


def _is_theirs_of(name: str) -> bool:
    return _THEIRS.startswith(f"{name}.")


def _tell_libraries() -> None:
    shim = _SHIMS.get("flash_attn")
    hugging_face.tell(shim is not None and shim.as_distribution)


# -- what is installed ------------------------------------------------------------------------------------------------


def _answer(name: str, spec: importlib.machinery.ModuleSpec | None, force: bool) -> Answer:
    """Whether a name is Headway's to answer: not where a package runs, or may run for all that can be told."""
    what, broken = _found(name, spec)
    if what is None:
        return Answer(name, True, f"{_DISTRIBUTIONS[name]} is not installed")
    if broken is not None:
        because = f"{what} is installed, and {broken}"
        warnings.warn(f"{because}: Headway answers for {name} instead", RuntimeWarning, stacklevel=5)
        return Answer(name, True, because)
    if not force:
        return Answer(name, False, f"{what} runs here; force=True answers all the same")
    importlib.import_module(_MAIN[name])  # whole, before its name leads elsewhere: Headway's own backends call it
    loaded = {at: sys.modules[at] for at in _under(name) if not _is_theirs(at)}
    packages.ASIDE.update(loaded)
    return Answer(name, True, f"{what} runs here, and force=True")


def _found(name: str, spec: importlib.machinery.ModuleSpec | None) -> tuple[str | None, str | None]:
    """What is installed under a name, and why it does not run; None for nothing of either."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    distribution = _DISTRIBUTIONS[name]
    package = here(device).package(distribution)
    if package.version is not None:
        broken = package.broken if package.tried else f"it was not made for {device.type}"
        return f"{distribution} {package.version}", broken
    if spec is None and sys.modules.get(name) is None:
        return None, None
    if _is_theirs_of(name) and _spec(_MAIN[name]) is None and _spec(_THEIRS) is not None:
        return f"only flash-attn-4, which is {_THEIRS},", f"it has no {_MAIN[name]}"
    at = f"a {name} of no distribution at {getattr(spec, 'origin', None) or 'a place of its own'}"
    if name in sys.modules:
        return at, None  # somebody uses it
    broken = child.run("headway.shims.trial", _MAIN[name], seconds=60.0).broken
    return at, None if broken is None else f"cannot be imported: {broken}"


def _spec(name: str) -> importlib.machinery.ModuleSpec | None:
    """Where a name leads."""
    try:
        return importlib.util.find_spec(name)
    except (ImportError, ValueError):  # no such parent, or one that fails; blocked, or made by hand
        return None


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
        module.__spec__ = self.spec  # the import system has put its own in there meanwhile


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname == hugging_face.MODULE:
            return hugging_face.followed(self, fullname, path, _tell_libraries)
        to_look = sys._getframe(2).f_globals.get("__name__") == "importlib.util"  # find_spec's, and not an import
        asked = fullname.removeprefix(f"{__package__}.")
        shim = _SHIMS.get(asked.partition(".")[0])
        if shim is None:
            return None
        if asked != fullname:  # our own, as Python looks for it when `from flash_attn import x` finds no x
            if to_look or importlib.machinery.PathFinder.find_spec(fullname, path) is not None:
                return None
            raise _nothing(shim, asked)
        if _is_theirs(fullname):
            return importlib.machinery.PathFinder.find_spec(fullname, shim.paths) if fullname == _THEIRS else None
        if to_look and not shim.as_distribution:
            return None
        ours = _spec(_ours(fullname))
        if ours is not None:
            is_package = ours.submodule_search_locations is not None
            return importlib.machinery.ModuleSpec(
                fullname, _Loader(ours.name), origin=ours.origin, is_package=is_package
            )
        if to_look:
            return None
        raise _nothing(shim, fullname)

    def find_distributions(
        self, context: importlib.metadata.DistributionFinder.Context | None = None
    ) -> Iterable[importlib.metadata.Distribution]:
        wanted = None if context is None else context.name
        for shim in list(_SHIMS.values()):
            if shim.as_distribution and is_same(wanted, _DISTRIBUTIONS[shim.name]):
                yield Distribution(_DISTRIBUTIONS[shim.name], importlib.import_module(_ours(shim.name)))


def _nothing(shim: _Shim, name: str) -> ModuleNotFoundError:
    return ModuleNotFoundError(
        f"No module named {name!r}: Headway answers for {shim.name}, as {shim.answer.because}, and has no such module,"
        f" nor anything else of that name; what it has is in docs/{shim.name}.md",
        name=name,
    )


_FINDER = _Finder()

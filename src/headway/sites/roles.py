"""A module given another class in place: same object, parameters, names, hooks and flags, another forward."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from headway.errors import SwapError
from headway.sites.site import HELD, Site, site_of


def set_role(model: nn.Module, sites: Mapping[str, Site | None], role: type) -> None:
    """Give each named module its site, if it gets one, and a class with `role` in it; or none of them."""
    modules = dict(model.named_modules(remove_duplicate=False))
    try:
        for name, site in sites.items():
            module = modules[name]
            module.__class__ = _playing(role, module)
            if site is not None:
                module.__dict__[HELD] = site
    except BaseException:
        take_role(model, role, sites)
        raise


def take_role(model: nn.Module, role: type, names: Collection[str] | None = None) -> None:
    """The named modules of `role`, or all, get back the class they had, and keep no trace of their site."""
    playing = [
        (name, module)
        for name, module in model.named_modules(remove_duplicate=names is None)
        if getattr(type(module), "_role", None) is role and (names is None or name in names)
    ]
    for name, module in playing:
        made = type(module).__bases__[0] if _is_parametrized(module) else type(module)
        if "_original" not in made.__dict__:
            raise SwapError(
                f"got {name!r} of a class {type(module).__name__} that another tool made of the swapped one;"
                " undo that first"
            )
    for _, module in playing:
        if getattr(type(module), "_role", None) is role:  # the same module may be here by several names
            module.__class__ = _before(module)
            module.__dict__.pop(HELD, None)


def _playing(role: type, module: nn.Module) -> type:
    """The class of a module once it plays a role."""
    kind = type(module)
    if not _is_parametrized(module):
        return class_with(role, kind)  # type: ignore[arg-type]  # types are hashable
    return _parametrized(kind, class_with(role, kind.__bases__[0]), {"_parametrized": kind})


def _before(module: nn.Module) -> type:
    """The class of a module that plays no role any more."""
    kind = type(module)
    if not _is_parametrized(module):
        return kind.__dict__["_original"]  # type: ignore[no-any-return]
    was: type | None = kind.__dict__.get("_parametrized")
    if was is not None and was.__dict__.keys() | {"_parametrized"} == kind.__dict__.keys():
        return was
    return _parametrized(kind, kind.__bases__[0].__dict__["_original"], {})  # it was parametrized otherwise meanwhile


def _is_parametrized(module: nn.Module) -> bool:
    """Whether its class is one that torch.nn.utils.parametrize made, for it and its copies, of its own class.

    PyTorch wants that class on top: when the last parametrization is removed it goes on with the one below.
    """
    kind = type(module)
    mine = {"_original", "_role"} & kind.__dict__.keys()
    return parametrize.is_parametrized(module) and kind.__name__.startswith("Parametrized") and not mine


def _parametrized(like: type, base: type, more: dict[str, Any]) -> type:
    """The same parametrizations over another class."""
    theirs = "__dict__", "__weakref__", "_parametrized"
    held = {name: value for name, value in vars(like).items() if name not in theirs}
    return type(like.__name__, (base,), held | more)


@functools.cache
def class_with(role: type, original: type) -> type:
    """A class of the same name with `role` in it.

    A role that is a module's class goes below `original`, so that what a subclass adds around super().forward() still
    runs. One that is not goes above it.
    """
    if issubclass(role, original):
        bases: tuple[type, ...] = (role,)
    else:
        bases = (original, role) if issubclass(role, nn.Module) else (role, original)

    def load(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        """With other weights every kind of call is a new one."""
        if (site := site_of(self)) is not None:
            site.ticket.decisions.clear()
        super(made, self)._load_from_state_dict(*args, **kwargs)

    own = {"_original": original, "_role": role, "__module__": original.__module__, "_load_from_state_dict": load}
    made: Any = type(original.__name__, bases, own)
    return made  # type: ignore[no-any-return]


def rejoin(module: nn.Module, protocol: Any) -> Any:
    """How a swapped module is copied and pickled: its class is made again where it arrives."""
    made = type(module).__dict__
    if "_role" not in made:  # another tool's subclass of it, which is that tool's to copy
        return object.__reduce_ex__(module, protocol)
    own = getattr(made["_original"], "__getstate__", None)
    state = module.__dict__ if own is getattr(object, "__getstate__", None) else module.__getstate__()
    return _again, (made["_role"], made["_original"]), state


def _again(role: type, original: type) -> nn.Module:
    made: Any = class_with(role, original)
    module: nn.Module = made.__new__(made)
    return module

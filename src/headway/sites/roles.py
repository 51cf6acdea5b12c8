"""A module given another class in place: same object, parameters, names, hooks and flags, another forward."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from headway.errors import SwapError
from headway.sites.site import HELD, Site


def set_role(model: nn.Module, sites: Mapping[str, Site | None], role: type) -> None:
    """Give each named module its site, if it gets one, and a class with `role` in it; or none of them."""
    modules = dict(model.named_modules(remove_duplicate=False))
    try:
        for name, site in sites.items():
            module = modules[name]
            module.__class__ = class_with(role, type(module))  # type: ignore[arg-type]  # types are hashable
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
        if "_original" not in type(module).__dict__:
            raise SwapError(
                f"got {name!r} of a class {type(module).__name__} that another tool made of the swapped one;"
                " undo that first (for parametrizations: torch.nn.utils.parametrize.remove_parametrizations)"
            )
    for _, module in playing:
        if "_original" in type(module).__dict__:  # the same module may be here by several names
            module.__class__ = type(module).__dict__["_original"]
            module.__dict__.pop(HELD, None)


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
    return type(original.__name__, bases, {"_original": original, "_role": role, "__module__": original.__module__})


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

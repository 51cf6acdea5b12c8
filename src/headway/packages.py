"""Kernel packages' own modules, also while Headway's shims answer to their names."""

from __future__ import annotations

import importlib
import importlib.metadata
from types import ModuleType

SHIM = "+headway"
"""What the version of a shim ends in."""

ASIDE: dict[str, ModuleType] = {}
"""Modules of packages that run here, while a shim has their names all the same."""


def real(name: str) -> ModuleType:
    """The module as it is without a shim."""
    return ASIDE.get(name) or importlib.import_module(name)


def version(distribution: str) -> str | None:
    """Of what is installed under that name; a shim that answers for it is nothing installed."""
    found = (each.version for each in importlib.metadata.distributions(name=distribution))
    return next((each for each in found if each and not each.endswith(SHIM)), None)

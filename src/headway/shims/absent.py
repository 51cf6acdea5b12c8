"""What a shim says to a name that it has not: an AttributeError, so that `hasattr` finds nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def absent(module: str) -> Callable[[str], Any]:
    """A `__getattr__` for a module of a shim."""
    name = module.removeprefix(f"{__package__}.")

    def missing(asked: str) -> Any:
        page = f"docs/{name.partition('.')[0]}.md"
        raise AttributeError(f"{name} has no {asked!r} in Headway; what it has is in {page}", name=asked)

    return missing

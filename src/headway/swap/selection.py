"""Which sites a swap is about: by name pattern, by type, or by a predicate; each must match something."""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import TypeAlias

from torch import nn

from headway.backends.registry import NAMES
from headway.errors import SwapError, UnknownNameError
from headway.limits.request import CONTRACTS
from headway.sites.site import Found, Ticket

One: TypeAlias = str | type[nn.Module] | Callable[[str, nn.Module], bool]
Selection: TypeAlias = One | Iterable[One]
"""A glob on the site's path, a module class, a predicate of path and module, or several of them."""


def matching(selection: Selection, sites: list[Found], word: str, left: Iterable[Ticket] = ()) -> set[str]:
    """The names of the sites that any of the selection matches; SwapError for one that matches none.

    `left` are places of attention that are no sites, and why.
    """
    wanted = each(selection, word)
    matched = [{site.name for site in sites if matches(one, site)} for one in wanted]
    empty = [one for one, names in zip(wanted, matched, strict=True) if not names]
    for ticket in left:
        if any(isinstance(one, str) and fnmatch.fnmatchcase(ticket.name, one) for one in empty):
            raise SwapError(f"got {word}, which names {ticket.name!r}, left alone because {ticket.because}")
    if empty or (word == "only" and not wanted):
        known = ", ".join(repr(site.name) for site in sites) or "none"
        raise SwapError(f"got {word}={empty[0] if empty else []!r}, which matches no site; the sites are: {known}")
    return set().union(*matched)


def each(selection: Selection, word: str) -> list[One]:
    """What a selection is made of."""
    several = isinstance(selection, Iterable) and not isinstance(selection, str | type) and not callable(selection)
    parts: list[One] = list(selection) if several else [selection]  # type: ignore[arg-type, list-item]
    for one in parts:
        if not (isinstance(one, str | type) or (callable(one) and _takes_two(one))):
            raise SwapError(
                f"got {word}={one!r}, takes a glob on names, a module class, a predicate of two"
                " (lambda name, module: ...), or several of these"
            )
    return parts


def _takes_two(predicate: Callable[..., object]) -> bool:
    try:
        inspect.signature(predicate).bind("name", None)
    except TypeError:
        return False
    except ValueError:  # a function that does not say what it takes
        return True
    return True


def matches(one: One, site: Found) -> bool:
    if isinstance(one, str):
        return any(fnmatch.fnmatchcase(name, one) for name in (site.name, *site.aliases))
    if isinstance(one, type):
        return isinstance(site.module, one)
    return bool(one(site.name, site.module))


def backends(asked: str | Mapping[str, str], sites: list[Found]) -> dict[str, str]:
    """The backend asked for at each site. Of several patterns that match, the last one counts."""
    if not isinstance(asked, str | Mapping):
        raise SwapError(f"got backend={asked!r}, takes a name, or names by glob: {{'encoder.*': 'flex'}}")
    patterns = {"*": asked} if isinstance(asked, str) else {"*": "auto", **asked}
    for name in patterns.values():
        if name not in ("auto", *NAMES):
            raise UnknownNameError("backend", name, ("auto", *NAMES))
    answer: dict[str, str] = {}
    for pattern, name in patterns.items():
        names = {site.name for site in sites} if pattern == "*" else matching(pattern, sites, "backend")
        answer |= dict.fromkeys(names, name)
    return answer


def contracts(require: str | Iterable[str]) -> tuple[str, ...]:
    """The contracts asked for, each a known word."""
    words = (require,) if isinstance(require, str) else tuple(require)
    for word in words:
        if word not in CONTRACTS:
            raise UnknownNameError("contract", word, CONTRACTS)
    return words

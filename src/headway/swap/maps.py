"""Attention maps on demand: the weights of chosen sites, heads and rows, beside a run that stays fused."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from operator import index
from typing import TypeAlias

import torch
from torch import Tensor, nn

from headway.attention import casts
from headway.backends import reference
from headway.backends.kernel import Extras
from headway.errors import RequestError, SwapError
from headway.limits.request import mask_words
from headway.masks.base import Mask
from headway.masks.frame import Frame
from headway.masks.terms import terms
from headway.sites.noted import Call, noted
from headway.sites.site import Found, Ticket, site_of
from headway.swap.selection import One, Selection, each, matches, matching
from headway.swap.still import unchanged
from headway.swap.swap import KINDS, Example, Swap, gone, runner

Chosen: TypeAlias = int | slice | Iterable[int] | None
"""Which of a call's rows, or heads: None is all, and negative numbers count from the end."""


@dataclasses.dataclass(frozen=True, eq=False)
class Map:
    """The attention weights of one call of one site."""

    site: str
    weights: Tensor
    """(batch, chosen heads, chosen rows, keys), in float32, or float64 where the model is."""
    rows: tuple[int, ...]
    """The queries that were chosen, by their position in the call."""
    heads: tuple[int, ...]
    mask: str
    """The kinds of the mask's terms, as requests name them; 'none' without a mask."""


def maps(
    model: nn.Module | Swap,
    example: Example,
    sites: Selection | None = None,
    rows: Chosen = None,
    heads: Chosen = None,
) -> dict[str, list[Map]]:
    """Run `example` once through a swapped model, and return the attention weights of each call of its sites.

    Every site computes by its kernel as ever. Beside it the weights of the chosen rows are computed again, of these
    alone: exactly what the kernel uses, with scale, biases, softcap and sinks (which take their share, so that rows add
    up to less than 1), and zeros in rows that see nothing. Dropout is left out: a kernel's draws are its own.

    - `sites`: by glob on their names, module class or predicate, as `only` of `swap`; all swapped sites by default.
    - `rows`, `heads`: of each call, a number, a slice or several numbers; all by default.

    The run is in the model's own mode and without gradients. Mode, buffers, random state and the census stay as they
    were. Given the Swap in place of its model, errors can say why a site was left alone.

    >>> from headway import swap
    >>> model, x = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), torch.randn(1, 4, 16)
    >>> done = swap(model, x)
    >>> (first,) = maps(model, x, rows=[0, -1])["self_attn"]
    >>> first.weights.shape, first.rows
    (torch.Size([1, 2, 2, 4]), (0, 3))
    """
    swapped, model = (model, model.model) if isinstance(model, Swap) else (None, model)
    run = runner(example)
    if run is None:
        raise RequestError("got no example, takes what the model is run with")
    rows, heads = _numbers("rows", rows), _numbers("heads", heads)
    _refuse_compiled(model)
    with torch.inference_mode(False), unchanged(model), torch.no_grad():
        names = _choose(model, sites, swapped)
        found: dict[str, list[Map]] = {name: [] for name in names.values()}

        def note(module: nn.Module, call: Call) -> None:
            if module in names:
                found[names[module]].append(_map(names[module], call, rows, heads))

        with noted(model, note, counted=False):
            run(model)
    return found


# -- which sites ------------------------------------------------------------------------------------------------------


def _refuse_compiled(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None:
            raise SwapError(
                f"got {path or 'a model'} compiled by torch.compile, whose calls cannot be seen; takes it as it was:"
                " the module inside (_orig_mod), or a model before its compile()"
            )


def _choose(model: nn.Module, sites: Selection | None, swapped: Swap | None) -> dict[nn.Module, str]:
    """The names of the chosen sites, by module."""
    found = list(_swapped(model))
    if not found:
        raise SwapError("got a model that is not swapped, takes one that is: headway.swap(model, example) first")
    chosen: set[str] = {site.name for site in found} if sites is None else set()
    for one in () if sites is None else each(sites, "sites"):
        names = {site.name for site in found if matches(one, site)}
        if not names:
            _refuse(one, found, list(_left_alone(model, found, swapped)))
        chosen |= names
    picked = [site for site in found if site.name in chosen]
    said = gone(model, [Ticket(site.name, site.kind) for site in picked])
    if said:
        raise SwapError(f"got a model of which {said}")
    return {site.module: site.name for site in picked}


def _swapped(model: nn.Module) -> Iterator[Found]:
    """The swapped sites, once each, with all their paths in this model."""
    paths: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        site = site_of(module)
        if site is not None and site.ticket.swapped:
            paths.setdefault(module, []).append(name)
    for module, (name, *aliases) in paths.items():
        yield Found(name, module, "", aliases=tuple(aliases))


def _left_alone(model: nn.Module, swapped: list[Found], swap: Swap | None) -> Iterator[Found]:
    """The sites that were not swapped, with the reason as far as it is known."""
    if swap is not None:
        for ticket in swap.census.tickets:
            if not ticket.swapped:
                module = model.get_submodule(ticket.name)
                yield Found(ticket.name, module, ticket.kind, ticket.because, ticket.aliases)
        return
    seen = {site.module for site in swapped}
    for kind in KINDS:
        for site in kind.find(model, None):
            if site.module not in seen:
                seen.add(site.module)
                unknown = "the swap's own reason: print the Swap, or give it in the model's place"
                yield dataclasses.replace(site, because=site.because or unknown)


def _refuse(one: One, swapped: list[Found], left: list[Found]) -> None:
    """The selection met no swapped site."""
    site = next((site for site in left if matches(one, site)), None)
    if site is None:
        matching(one, swapped, "sites")  # raises, and lists them
        return
    raise SwapError(
        f"got sites={one!r}, which is {site.name or 'the model itself'!r}, left alone because {site.because};"
        f" takes swapped sites: {', '.join(repr(other.name) for other in swapped)}"
    )


# -- which rows and heads ---------------------------------------------------------------------------------------------


def _numbers(what: str, asked: Chosen) -> slice | tuple[int, ...] | None:
    """What was asked for, read once."""
    if asked is None or isinstance(asked, slice):
        return asked
    try:
        several = tuple(asked) if isinstance(asked, Iterable) and _has_axes(asked) else (asked,)
        if any(isinstance(one, bool) or getattr(one, "dtype", None) == torch.bool for one in several):
            raise TypeError
        return tuple(map(index, several))  # type: ignore[arg-type]  # what is no number, index refuses
    except TypeError:
        raise RequestError(f"got {what}={asked!r}, takes None, an int, a slice or a sequence of ints") from None


def _has_axes(asked: Iterable[int]) -> bool:
    """False for a tensor that is one number: it calls itself iterable too."""
    return not isinstance(asked, Tensor) or asked.dim() > 0


def _positions(what: str, asked: slice | tuple[int, ...] | None, count: int, site: str) -> tuple[int, ...]:
    """The numbers asked for, of a call that has `count`."""
    if asked is None or isinstance(asked, slice):
        return tuple(range(count)[asked or slice(None)])
    for one in asked:
        if not -count <= one < count:
            takes = f"{-count} to {count - 1}" if count else "none, as there are none"
            raise RequestError(f"got {what}={one} for a call of {site!r} with {count} {what}, takes {takes}")
    return tuple(one % count for one in asked)


# -- the weights ------------------------------------------------------------------------------------------------------


def _map(site: str, call: Call, rows: slice | tuple[int, ...] | None, heads: slice | tuple[int, ...] | None) -> Map:
    chosen = _positions("rows", rows, call.frame.q_len, site)
    among = _positions("heads", heads, call.frame.heads, site)
    words = mask_words(terms(call.mask, call.frame).kinds(call.frame))
    return Map(site, _weights(call, chosen, among), chosen, among, words)


def _weights(call: Call, rows: tuple[int, ...], heads: tuple[int, ...]) -> Tensor:
    """(batch, chosen heads, chosen rows, keys), of the numbers that the kernel saw and in float32 at least."""
    frame, kind = call.frame, call.q.device.type
    at, head = (torch.tensor(numbers, device=frame.device, dtype=torch.int32) for numbers in (rows, heads))
    q, k = call.q.index_select(2, at), call.k
    if len(heads) < frame.heads or heads != tuple(range(frame.heads)):
        q, k = q.index_select(1, head), k.index_select(1, head // (frame.heads // k.shape[1]))
    if not frame.kv_len:
        return q.new_zeros(*q.shape[:3], 0, dtype=torch.promote_types(q.dtype, torch.float32))
    if not casts(q):
        return _weigh(q, k, call, at, head)
    dtype = torch.get_autocast_dtype(kind)
    with torch.autocast(kind, enabled=False):  # it would narrow the weights too
        return _weigh(q.to(dtype), k.to(dtype), call, at, head)


def _weigh(q: Tensor, k: Tensor, call: Call, rows: Tensor, heads: Tensor) -> Tensor:
    lowered = (None, None) if call.mask is None else _lowered(call.mask, call.frame, rows, heads, q.dtype)
    sinks = None if call.sinks is None else call.sinks.flatten().index_select(0, heads)
    return reference.weigh(q, k, lowered, Extras(call.scale, softcap=call.softcap, sinks=sinks))[0]


def _lowered(mask: Mask, frame: Frame, rows: Tensor, heads: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """`reference.lower` for some rows and heads: asked where they are in the call, so that diagonals stay in place."""
    mask.check(frame)
    batch, _, _, keys = frame.indices()
    at = batch, heads.view(-1, 1, 1), rows.view(-1, 1), keys
    score = mask.score(frame)
    zero = torch.zeros((1, 1, 1, 1), dtype=torch.promote_types(dtype, torch.float32), device=frame.device)
    return mask.rule(frame)(*at), None if score is None else score(zero, *at)

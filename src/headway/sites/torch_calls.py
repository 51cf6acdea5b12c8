"""Modules whose forward calls F.scaled_dot_product_attention: the call is redirected, for that module alone."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from types import FunctionType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.overrides import TorchFunctionMode

from headway.errors import RequestError
from headway.masks import Causal, Mask, from_sdpa
from headway.masks.base import shape_of
from headway.sites.roles import rejoin, set_role, take_role
from headway.sites.seen import Seen
from headway.sites.site import HELD, Found, Site
from headway.sites.unseen import SDPA

KIND = "F.scaled_dot_product_attention"


class Redirected:
    """What the class of a swapped module starts with: its forward runs with the call redirected."""

    __dict__: dict[str, Any]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with Redirect(self.__dict__[HELD]):
            return super().forward(*args, **kwargs)  # type: ignore[misc]  # the module's own class comes next

    def __reduce_ex__(self, protocol: Any) -> Any:
        return rejoin(self, protocol)  # type: ignore[arg-type]  # it is a module


class Apart:
    """What the class of a module starts with that is left alone inside a swapped one, whose Redirect would take it."""

    __dict__: dict[str, Any]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with _PastRedirects():
            return super().forward(*args, **kwargs)  # type: ignore[misc]  # the module's own class comes next

    def __reduce_ex__(self, protocol: Any) -> Any:
        return rejoin(self, protocol)  # type: ignore[arg-type]  # it is a module


class _PastRedirects(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is SDPA:
            func = torch.ops.aten.scaled_dot_product_attention  # the same by a name that no Redirect looks for
        return _call(func, args, kwargs or {})


class Redirect(TorchFunctionMode):
    """Sends each call of F.scaled_dot_product_attention inside it to a site. Of this thread and block alone."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site = site

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is SDPA:
            return attend(self.site, *args, **(kwargs or {}))
        return _call(func, args, kwargs or {})


METHODS = frozenset(name for name, func in vars(Tensor).items() if isinstance(func, FunctionType))
"""Tensor's methods that are written in Python."""


def _call(func: Any, args: Any, kwargs: Any) -> Any:
    """`func` as if no mode had seen it."""
    name = getattr(func, "__name__", "") if is_compiling() else ""
    if name in METHODS and func is getattr(Tensor, name):
        # A tracer knows these as methods of a tensor, but cannot look into them.
        return getattr(args[0], name)(*args[1:], **kwargs)
    return func(*args, **kwargs)


def attend(
    site: Site,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """F.scaled_dot_product_attention by a site, with its very signature."""
    if attn_mask is not None and is_causal:
        raise RuntimeError("Explicit attn_mask should not be set when is_causal=True")  # as PyTorch has it
    if query.is_nested:
        raise RequestError(
            "got nested tensors in F.scaled_dot_product_attention, takes padded ones;"
            " leave this site out (skip=...), or pack documents and use headway.attention with Documents(lengths)"
        )
    if min(query.dim(), key.dim(), value.dim()) < 2:
        shapes = ", ".join(map(shape_of, (query, key, value)))
        raise RequestError(f"got query, key and value {shapes}, takes (..., length, head_dim) for each")
    if enable_gqa and query.dim() >= 3:
        if key.shape[-3] != value.shape[-3]:
            key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
        heads: tuple[int, ...] = (query.shape[-3],)
    else:
        heads = ()
    # PyTorch broadcasts the axes in front, as for any matrix product; with enable_gqa not the heads.
    at = -2 - len(heads)
    outer = torch.broadcast_shapes(*(x.shape[:at] for x in (query, key, value)))
    query, key, value = (x if x.shape[:at] == outer else x.expand(*outer, *x.shape[at:]) for x in (query, key, value))
    front = (*outer, *heads)
    mask: Mask | None = Causal("upper-left") if is_causal else None
    if type(attn_mask).__name__ == "CausalBias":  # by name, as to import the class takes a second
        mask = Causal("upper-left" if attn_mask.variant.name == "UPPER_LEFT" else "lower-right")  # type: ignore[union-attr]
    elif attn_mask is not None:
        deep = query.dim() > 4
        mask = from_sdpa(attn_mask.expand(*front, -1, -1).flatten(0, -4) if deep else attn_mask)
    q, k, v = (_four_axes(x) for x in (query, key, value))
    out = site.attend(q, k, v, mask, scale=scale, dropout=dropout_p)
    return out if out.shape[:-2] == front else out.reshape(*front, *out.shape[-2:])


def _four_axes(x: Tensor) -> Tensor:
    """(batch, heads, length, size); of more axes in front all but the last are the batch."""
    if x.dim() < 4:
        return x[(None,) * (4 - x.dim())]
    return x if x.dim() == 4 else x.flatten(0, -4)


def find(model: nn.Module, seen: Seen | None) -> Iterator[Found]:
    """The modules that were seen to make the call themselves, once each, with all their paths."""
    paths: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(name)
    called = set() if seen is None else seen.sdpa.keys()
    for module, (name, *aliases) in paths.items():
        if called & {name, *aliases}:
            yield Found(name, module, KIND, _why_not(module), tuple(aliases))


def _why_not(module: nn.Module) -> str:
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance, which no class can override"
    codes = (getattr(value, "__code__", None) for kind in type(module).__mro__ for value in vars(kind).values())
    if any("checkpoint" in name for code in codes if code is not None for name in code.co_names):
        return f"{type(module).__name__} checkpoints inside its forward, and what that computes again is out of reach"
    return ""


def apply(model: nn.Module, sites: Mapping[str, Site]) -> None:
    """Give each named module its site and its new class, or none of them.

    Of sites that are left alone, those inside a swapped one get a class that keeps them so.
    """
    set_role(model, {name: site for name, site in sites.items() if site.ticket.swapped}, Redirected)
    modules = dict(model.named_modules(remove_duplicate=False))
    outer = [module for module in modules.values() if isinstance(module, Redirected)]
    inside = {inner for module in outer for inner in nn.Module.modules(cast(nn.Module, module))} - set(outer)
    apart = {name: site for name, site in sites.items() if not site.ticket.swapped and modules[name] in inside}
    set_role(model, apart, Apart)


def restore(model: nn.Module, names: Collection[str] | None = None) -> None:
    """Give back the classes, of all sites or of the named; the very objects are as before."""
    take_role(model, Redirected, names)
    take_role(model, Apart, names)

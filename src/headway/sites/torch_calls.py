"""Modules whose forward calls F.scaled_dot_product_attention: the call is redirected, for that module alone."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from headway.errors import RequestError
from headway.masks import Causal, Mask, from_sdpa
from headway.sites.roles import rejoin, set_role, take_role
from headway.sites.seen import Seen
from headway.sites.site import HELD, Found, Site

KIND = "F.scaled_dot_product_attention"


class Redirected:
    """What the class of a swapped module starts with: its forward runs with the call redirected."""

    __dict__: dict[str, Any]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with Redirect(self.__dict__[HELD]):
            return super().forward(*args, **kwargs)  # type: ignore[misc]  # the module's own class comes next

    def __reduce_ex__(self, protocol: Any) -> Any:
        return rejoin(self, protocol)  # type: ignore[arg-type]  # it is a module


class Redirect(TorchFunctionMode):
    """Sends each call of F.scaled_dot_product_attention inside it to a site. Of this thread and block alone."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site = site

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return attend(self.site, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


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
    front = query.shape[:-2]
    heads_apart = enable_gqa and query.dim() >= 3 and key.shape[-3] != query.shape[-3]
    if not heads_apart:
        # PyTorch broadcasts the axes in front, as for any matrix product.
        front = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2])
        query, key, value = (
            x if x.shape[:-2] == front else x.expand(*front, *x.shape[-2:]) for x in (query, key, value)
        )
    mask: Mask | None = Causal("upper-left") if is_causal else None
    if attn_mask is not None:
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
            patched = "forward" in module.__dict__
            because = "its forward was replaced on the instance, which no class can override" if patched else ""
            yield Found(name, module, KIND, because, tuple(aliases))


def apply(model: nn.Module, sites: Mapping[str, Site]) -> None:
    """Give each named module its site and its new class, or none of them."""
    set_role(model, sites, Redirected)


def restore(model: nn.Module, names: Collection[str] | None = None) -> None:
    """Give back the classes, of all sites or of the named; the very objects are as before."""
    take_role(model, Redirected, names)

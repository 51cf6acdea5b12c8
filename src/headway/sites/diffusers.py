"""diffusers' attention registry: a backend named `headway`, for the models that ask for it.

`register()` enters it where `dispatch_attention_fn` looks backends up. Their names are members of an enum that nobody
can add to but by its internals, and `model.set_attention_backend` takes members only, and makes what it is given every
other model's default too. So the name here is a value of the enum's type that is no member, and `use(model)` gives it
to that model alone.
"""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import torch
from torch import Tensor, nn

from headway.attention import attention
from headway.errors import RequestError, SwapError
from headway.masks import Causal, Mask, Padding, Window, from_sdpa
from headway.masks.base import shape_of

NAME = "headway"

_CHOSEN = "_attention_backend"
"""Where a processor of diffusers keeps the backend it asks for; None asks for the default."""


def register() -> Any:
    """Enter `headway` in diffusers' registry, for this process; nothing that is there changes.

    Returns its name as diffusers takes it: `dispatch_attention_fn(backend=...)`, `with attention_backend(...)`.
    """
    dispatch = importlib.import_module("diffusers.models.attention_dispatch")  # since 0.35
    registry = dispatch._AttentionBackendRegistry
    name = next((known for known in registry.list_backends() if known == NAME), None)
    if name is None:
        name = _named(dispatch.AttentionBackendName)
        registry.register(name)(attend)
    return name


def _named(names: Any) -> Any:
    """`headway` as a value of the enum's type; the enum itself stays as it is."""
    name = str.__new__(names, NAME)
    name._name_, name._value_ = NAME.upper(), NAME
    # As an enum's value it would be looked up among the members when a model is copied or loaded.
    name.__deepcopy__ = lambda memo: name
    name.__reduce_ex__ = lambda protocol: (register, ())
    return name


@dataclasses.dataclass(frozen=True)
class Use:
    """What `use` did."""

    names: tuple[str, ...]
    """The attention modules that ask for `headway` now."""
    left_alone: dict[str, str]
    """The others, and why."""
    before: tuple[tuple[Any, dict[str, Any]], ...] = dataclasses.field(repr=False)

    def undo(self) -> None:
        """The processors that still ask for `headway` ask for what they asked for before."""
        for processor, held in self.before:
            if getattr(processor, _CHOSEN) != NAME:
                continue  # somebody chose otherwise since
            vars(processor).pop(_CHOSEN, None)
            vars(processor).update(held)


def use(model: nn.Module) -> Use:
    """Let the attention of a diffusers model run by Headway, as `model.set_attention_backend` would.

    Of this model alone: diffusers' method also sets the default of all others. `reset_attention_backend()` takes it out
    too. A pipeline is not a model: give its parts, such as `pipe.transformer`. `headway.swap` needs none of this.
    """
    if not isinstance(model, nn.Module):
        raise SwapError(
            f"got a {type(model).__name__}, takes a model of diffusers, such as pipe.transformer or pipe.unet"
        )
    name = register()
    modules = {path: one for path, one in model.named_modules() if getattr(one, "processor", None) is not None}
    left_alone = {path: why for path, one in modules.items() if (why := _why_not(one.processor))}
    names = tuple(path for path in modules if path not in left_alone)
    if not names:
        why = "; ".join(sorted({*left_alone.values()})) or "it has no attention of diffusers"
        raise SwapError(
            f"got a {type(model).__name__}: {why}; takes a model that asks diffusers' registry: use headway.swap"
        )
    processors = {id(modules[path].processor): modules[path].processor for path in names}  # some share one
    asking = [one for one in processors.values() if getattr(one, _CHOSEN) != name]  # the others are an earlier use's
    before = tuple((one, {k: v for k, v in vars(one).items() if k == _CHOSEN}) for one in asking)
    for processor, _ in before:
        setattr(processor, _CHOSEN, name)
    return Use(names, left_alone, before)


def _why_not(processor: Any) -> str:
    """Why a processor cannot be told to ask for `headway`, or ''."""
    kind = type(processor)
    if not hasattr(processor, _CHOSEN):
        return f"{kind.__name__} does not ask diffusers' registry"
    if hasattr(kind, "_SUPPORTED_BACKENDS"):
        return f"{kind.__name__} takes {', '.join(map(str, kind._SUPPORTED_BACKENDS))} only"
    return ""


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    _parallel_config: Any = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention as diffusers' models ask for it, (B, L, H, D); the log of the denominators is (B, L, H)."""
    if _parallel_config is not None:
        raise RequestError(
            "got a parallel config, takes whole sequences: Headway does not split them over devices;"
            " leave context parallelism off, or set_attention_backend('native')"
        )
    if query.dim() != 4 or key.dim() != 4 or value.dim() != 4:
        shapes = ", ".join(map(shape_of, (query, key, value)))
        raise RequestError(f"got query, key and value {shapes}, takes (batch, length, heads, head_dim) for each")
    if key.shape[2] != query.shape[2] and not enable_gqa:
        raise RequestError(
            f"got {query.shape[2]} query heads and {key.shape[2]} key heads, takes as many of each:"
            " pass enable_gqa=True if heads share keys"
        )
    mask = _mask(query, key, attn_mask, is_causal, window_size)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if not return_lse:
        return attention(q, k, v, mask, scale=scale, dropout=dropout_p).transpose(1, 2)
    out, lse = attention(q, k, v, mask, scale=scale, dropout=dropout_p, return_lse=True)
    return out.transpose(1, 2), lse.transpose(1, 2)


def _mask(query: Tensor, key: Tensor, attn_mask: Any, is_causal: bool, window: tuple[int, int]) -> Mask | None:
    """Who sees whom; causal is aligned as diffusers' native backend has it."""
    if attn_mask is not None and is_causal:
        raise RequestError("got attn_mask and is_causal=True, takes one of them: join the two in attn_mask")
    made = None if attn_mask is None else _given(attn_mask, query.shape[0], key.shape[1])
    if is_causal:
        made = Causal(None if query.shape[1] == key.shape[1] else "upper-left")
    if tuple(window) == (-1, -1):
        return made
    left, right = (None if side < 0 else side for side in window)
    band = Window(left, right)  # of unequal lengths it raises, as nobody says how they are aligned
    return band if made is None else made & band


def _given(attn_mask: Any, batch: int, keys: int) -> Mask:
    if not isinstance(attn_mask, Tensor):
        raise RequestError(
            f"got attn_mask of type {type(attn_mask).__name__}, takes a tensor;"
            " keep this model's own backend, or call headway.attention with a typed mask"
        )
    if attn_mask.dim() == 2 and attn_mask.shape == (batch, keys):  # as diffusers has it, also if batch == queries
        return Padding(attn_mask) if attn_mask.dtype == torch.bool else from_sdpa(attn_mask[:, None, None])
    if attn_mask.dim() not in (2, 4):
        raise RequestError(
            f"got attn_mask {shape_of(attn_mask)}, which diffusers' backends read in two ways;"
            " takes (batch, keys), (queries, keys) or (batch, heads, queries, keys), with 1 for an axis that is shared"
        )
    return from_sdpa(attn_mask)

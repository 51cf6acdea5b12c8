"""What flash_attn's and xFormers' functions are called with, as a site takes it: every argument honoured or refused.

Arguments come by the names that the called function itself has for them, so its version settles their order and their
defaults. What a newer version has and nobody here knows must be at its default.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor

from headway.errors import RequestError
from headway.masks import Bias, Causal, Documents, Mask
from headway.masks.base import shape_of
from headway.masks.causal import Align
from headway.masks.documents import Packing
from headway.sites.packed import Attends, Wanted, attend_packed, attend_rows, band, kept, packing, within
from headway.sites.site import Site

Translate = Callable[[Site, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""(site, the function that was called, its arguments by position and by keyword) -> what it would have returned."""

_TUNING = frozenset({"op", "num_splits", "pack_gqa", "sm_margin", "min_seqlen_k"})
"""They choose or steer a kernel and never say what is computed; the kernel is Headway's to choose."""

_OPERANDS = frozenset({"q", "k", "v", "qkv", "kv"})
_LENGTHS = frozenset(
    {"cu_seqlens", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen", "max_seqlen_q", "max_seqlen_k"},
)
_FLASH = frozenset(
    {"dropout_p", "softmax_scale", "causal", "window_size", "softcap", "alibi_slopes", "deterministic"}
    | {"learnable_sink"}
    | _OPERANDS
    | _LENGTHS
)
_XFORMERS = frozenset({"query", "key", "value", "attn_bias", "p", "scale", "output_dtype"})

_REMEDIES = {
    "return_attn_probs": "take headway.maps(...) for weights, or leave this module out (skip=...)",
    "return_lse": "call headway.attention(..., return_lse=True) there, or leave this module out (skip=...)",
    "block_table": "gather the pages into k and v first, or leave this module out (skip=...)",
    "page_table": "gather the pages into k and v first, or leave this module out (skip=...)",
}
_LEAVE_OUT = "leave this module out (skip=...)"


def _given(
    real: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], honours: frozenset[str]
) -> dict[str, Any]:
    """All arguments of a call of `real` by name; RequestError for one that would have to be ignored."""
    names, defaults = _parameters(real)
    by_position = names[: len(args)]
    given = {**defaults, **dict(zip(by_position, args, strict=False)), **kwargs}
    # inspect's own binding takes many times as long, so it only says what is wrong.
    if len(args) > len(names) or given.keys() != defaults.keys() or not kwargs.keys().isdisjoint(by_position):
        inspect.signature(real).bind(*args, **kwargs)
        raise RequestError(f"got {real.__name__} of a signature that does not name its arguments; {_LEAVE_OUT}")
    for name in (*by_position, *kwargs):
        if name not in honours and name not in _TUNING and not _is(given[name], defaults[name]):
            shown = shape_of(given[name]) if isinstance(given[name], Tensor) else repr(given[name])
            raise RequestError(
                f"got {name}={shown} in {real.__name__}, takes only its default {defaults[name]!r}:"
                f" {_REMEDIES.get(name, _LEAVE_OUT)}"
            )
    if any(value is inspect.Parameter.empty for value in given.values()):
        inspect.signature(real).bind(*args, **kwargs)
    return given


@functools.cache
def _parameters(real: Callable[..., Any]) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Names that may be given by position, and all with their defaults; *args and **kwargs make it fit no call."""
    parameters = inspect.signature(real).parameters
    known = {name: each.default for name, each in parameters.items()}
    if any(each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD) for each in parameters.values()):
        known["*"] = None
    return tuple(name for name, each in parameters.items() if each.kind == each.POSITIONAL_OR_KEYWORD), known


def _is(value: Any, default: Any) -> bool:
    return value is default or (isinstance(value, bool | int | float) and bool(value == default))


# -- flash_attn -------------------------------------------------------------------------------------------------------


def flash(site: Site, real: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """flash_attn's functions, version 2: (B, L, H, D), or (tokens, H, D) with cumulative lengths."""
    given = _given(real, args, kwargs, _FLASH)
    return _attend_flash(site, given, (unbounded(side) for side in given["window_size"]))


def flash4(
    site: Site, real: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """flash_attn.cute's functions: they return the output, and None in place of the lse that was not asked for."""
    given = _given(real, args, kwargs, _FLASH)
    left, right = given["window_size"]
    if left is not None and right is not None and left + right < 0:
        left = right = None  # as there
    if min(left or 0, right or 0) < 0:
        raise RequestError(f"got window_size={given['window_size']}, takes 0 or more, or None for no bound on a side")
    return _attend_flash(site, given, (left, right)), None


def unbounded(side: int) -> int | None:
    return None if side < 0 else int(side)


def _attend_flash(site: Site, given: Mapping[str, Any], window: Iterable[int | None]) -> Tensor:
    if given.get("deterministic"):
        site = copy.copy(site)
        site.require = (*site.require, "deterministic")
    return attend_flash(site, given, window)[0]


def attend_flash(site: Attends, given: Mapping[str, Any], window: Iterable[int | None]) -> tuple[Tensor, ...]:
    """The result, and the lse if the site tells it, both as flash_attn lays them out."""
    starts = _starts(given)
    q, k, v = _operands(given, packed=starts is not None)
    if starts is None:
        out, *lse = attend_rows(site, q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), wanted(given, window))
        return (out.transpose(1, 2).contiguous(), *lse)  # contiguous, as there: callers view the heads as one axis
    queries, keys = _packings(given, starts, q, k)
    out, *lse = attend_packed(site, q, k, v, queries, keys, wanted(given, window))
    return (out.contiguous(), *lse)


def wanted(given: Mapping[str, Any], window: Iterable[int | None]) -> Wanted:
    """What is asked for beside the operands, from flash_attn's names for it."""
    left, right = window
    softcap = given.get("softcap", 0.0)
    return Wanted(
        left,
        0 if given["causal"] else right,
        slopes=given.get("alibi_slopes"),
        scale=given["softmax_scale"],
        dropout=given.get("dropout_p", 0.0),
        softcap=softcap if softcap > 0 else None,
        sinks=given.get("learnable_sink"),
    )


def _packings(given: Mapping[str, Any], starts: tuple[Tensor, Tensor], q: Tensor, k: Tensor) -> tuple[Packing, Packing]:
    """Two tensors of one content are one packing where nothing waits to read them."""
    (q_name, q_most), (k_name, k_most) = (
        ("cu_seqlens", "max_seqlen") if "cu_seqlens" in given else (f"cu_seqlens_{side}", f"max_seqlen_{side}")
        for side in "qk"
    )
    queries = packing(q_name, starts[0], q.shape[0], given.get(q_most), q.device)
    if starts[0] is starts[1] and q.shape[0] == k.shape[0]:
        return queries, queries
    keys = packing(k_name, starts[1], k.shape[0], given.get(k_most), k.device)
    return queries, queries if queries.lengths is not None and queries.lengths == keys.lengths else keys


def _starts(given: Mapping[str, Any]) -> tuple[Tensor, Tensor] | None:
    """Cumulative lengths of queries and keys, if the call has them."""
    if "cu_seqlens" in given:
        return given["cu_seqlens"], given["cu_seqlens"]
    q_starts, k_starts = given.get("cu_seqlens_q"), given.get("cu_seqlens_k")
    if q_starts is None and k_starts is None:
        return None
    if q_starts is None or k_starts is None:
        raise RequestError("got cu_seqlens_q or cu_seqlens_k alone, takes both or none: pack queries and keys alike")
    return q_starts, k_starts


def _operands(given: Mapping[str, Any], packed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, which may share a tensor, as flash_attn lays them out."""
    takes, axes = ("(tokens, heads, head_dim)", 3) if packed else ("(batch, length, heads, head_dim)", 4)
    shared = next((name for name in ("qkv", "kv") if name in given), None)
    if shared is not None:
        both, parts = given[shared], len(shared)
        if both.dim() != axes + 1 or both.shape[-3] != parts:
            raise RequestError(f"got {shared} {list(both.shape)}, takes {takes} with an axis of {parts} before heads")
        rest = both.unbind(-3)
        q, k, v = rest if parts == 3 else (given["q"], *rest)
    else:
        q, k, v = given["q"], given["k"], given["v"]
    check_operands(q, k, v, packed)
    return q, k, v


def check_operands(q: Tensor, k: Tensor, v: Tensor, packed: bool) -> None:
    """In flash_attn's own layout, before any of it is laid out otherwise."""
    takes, axes = ("(tokens, heads, head_dim)", 3) if packed else ("(batch, length, heads, head_dim)", 4)
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if not q.dim() == k.dim() == v.dim() == axes:
        raise RequestError(f"got {shapes}, takes {takes} for each: reshape them")
    if k.shape[:-1] != v.shape[:-1] or q.shape[-1] != k.shape[-1]:
        raise RequestError(f"got {shapes}, takes {takes}: k and v alike, q and k of one head_dim")
    if k.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
        raise RequestError(
            f"got {q.shape[-2]} query heads and {k.shape[-2]} key heads, takes a whole number of the first to each"
        )
    if not (q.dtype == k.dtype == v.dtype and q.is_floating_point()):
        raise RequestError(f"got q {q.dtype}, k {k.dtype}, v {v.dtype}, takes one floating-point dtype for all")


# -- xFormers ---------------------------------------------------------------------------------------------------------


def xformers(site: Site, real: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """memory_efficient_attention: (B, M, K), (B, M, H, K), or (B, M, G, H, K) where H heads may share a key head."""
    given = _given(real, args, kwargs, _XFORMERS)
    query, value = given["query"], given["value"]
    q, k, v = (x.transpose(1, 2) for x in xformers_heads(query, given["key"], value))
    mask = xformers_mask(given["attn_bias"], query, q, k)
    out = site.attend(q, k, v, mask, scale=given["scale"], dropout=given["p"])
    out = out.transpose(1, 2).reshape(*query.shape[:-1], value.shape[-1]).contiguous()  # as there
    wide = given.get("output_dtype")
    return out if wide is None else out.to(wide)


def xformers_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, L, H, D) each; heads that share a key head by stride are given it once."""
    if query.dim() not in (3, 4, 5) or not query.dim() == key.dim() == value.dim():
        raise RequestError(
            f"got query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)},"
            " takes (B, M, K), (B, M, H, K) or (B, M, G, H, K) for all three: reshape them"
        )
    if key.shape[2:-1] != query.shape[2:-1] or value.shape[2:-1] != query.shape[2:-1]:
        raise RequestError(
            f"got query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)},"
            " takes the same heads in each, as xFormers does: expand key and value"
        )
    if query.dim() == 4:
        return query, key, value
    if query.dim() == 3:
        return query.unsqueeze(2), key.unsqueeze(2), value.unsqueeze(2)
    if all(x.stride(3) == 0 or x.shape[3] == 1 for x in (key, value)):
        return query.flatten(2, 3), key[:, :, :, 0], value[:, :, :, 0]
    return query.flatten(2, 3), key.flatten(2, 3), value.flatten(2, 3)


def xformers_mask(bias: Any, query: Tensor, q: Tensor, k: Tensor) -> Mask | None:
    """An attn_bias as a typed mask. Its classes are known by their names: nothing here imports xFormers."""
    if bias is None:
        return None
    if isinstance(bias, Tensor):
        if not bias.is_floating_point():
            raise RequestError(
                f"got an attn_bias of {bias.dtype}, takes numbers to add, as xFormers does:"
                " torch.zeros_like(keep, dtype=query.dtype).masked_fill(~keep, -math.inf)"
            )
        return Bias(_four_axes(bias, query))
    name = type(bias).__name__
    if name == "LowerTriangularMaskWithTensorBias":
        return Causal("upper-left") & Bias(_four_axes(bias._bias, query))
    if name in _BANDS:
        left, right, align = _BANDS[name](bias)
        return band(left, right, align)
    if name in _BLOCKS:
        return _blocks(bias, q, k)
    known = ", ".join(("None", "a tensor", "LowerTriangularMaskWithTensorBias", *_BANDS, *_BLOCKS))
    raise RequestError(
        f"got attn_bias of {name}, takes {known}: pack keys without filler (BlockDiagonalMask.from_seqlens),"
        f" give bias.materialize(...) as a tensor, or {_LEAVE_OUT}"
    )


def _four_axes(bias: Tensor, query: Tensor) -> Tensor:
    """(B, H, M, N), from the axes that go with those of the query."""
    if bias.dim() != query.dim():
        raise RequestError(
            f"got attn_bias {list(bias.shape)} for query {list(query.shape)}, takes (B, M, N) for 3 axes,"
            " (B, H, M, N) for 4, (B, G, H, M, N) for 5: expand it"
        )
    return bias.unsqueeze(1) if bias.dim() == 3 else bias.flatten(1, -3)


Sides = tuple[int | None, int | None, Align]

_BANDS: Mapping[str, Callable[[Any], Sides]] = MappingProxyType(
    {
        "LowerTriangularMask": lambda bias: (None, 0, "upper-left"),
        "LowerTriangularFromBottomRightMask": lambda bias: (None, 0, "lower-right"),
        "LowerTriangularFromBottomRightLocalAttentionMask": lambda bias: (bias._window_size - 1, 0, "lower-right"),
        "LocalAttentionFromBottomRightMask": lambda bias: (bias.window_left, bias.window_right, "lower-right"),
    }
)
_BLOCKS: Mapping[str, Callable[[Any], Sides]] = MappingProxyType(
    {
        "BlockDiagonalMask": lambda bias: (None, None, "upper-left"),
        "BlockDiagonalCausalMask": lambda bias: (None, 0, "upper-left"),
        "BlockDiagonalCausalFromBottomRightMask": lambda bias: (None, 0, "lower-right"),
        "BlockDiagonalCausalLocalAttentionMask": lambda bias: (bias._window_size - 1, 0, "upper-left"),
        "BlockDiagonalCausalLocalAttentionFromBottomRightMask": lambda bias: (
            bias._window_size - 1,
            0,
            "lower-right",
        ),
    }
)
"""Bounds to the left and right, and how the diagonal is aligned, in all or in each block."""


def _blocks(bias: Any, q: Tensor, k: Tensor) -> Mask:
    """Packed sequences, whose lengths such a bias has on the host; the mask is made once for all layers."""
    if q.shape[0] != 1:
        raise RequestError(
            f"got a batch of {q.shape[0]} with {type(bias).__name__}, takes 1 with all sequences end to end: pack them"
        )
    left, right, align = _BLOCKS[type(bias).__name__](bias)
    q_starts, k_starts = (tuple(info.seqstart_py) for info in (bias.q_seqinfo, bias.k_seqinfo))

    def make() -> Mask:
        q_lengths, k_lengths = (
            [end - start for start, end in itertools.pairwise(starts)] for starts in (q_starts, k_starts)
        )
        return within(Documents(q_lengths, k_lengths), left, right, align, q)

    state = (q_starts, k_starts, left, right)
    return kept(bias, bias.k_seqinfo, state, q.device, (q.shape[2], k.shape[2]), make)

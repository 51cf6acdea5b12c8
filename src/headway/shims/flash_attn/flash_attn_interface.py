"""flash_attn's functions, version 2.8: (batch, length, heads, head_dim), or (tokens, heads, head_dim) packed.

Their meaning is flash-attn's: causal and windows are counted from the lower right, windows include both ends, queries
that see nothing give 0, query heads share key heads where those are fewer. Any floating-point dtype, any head_dim and
any device are taken. What differs: `return_attn_probs` with dropout is refused, as no kernel tells what it dropped.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from headway.errors import RequestError
from headway.masks.base import shape_of
from headway.shims.cache import Cache
from headway.shims.flash_attn.layers.rotary import apply_rotary_emb
from headway.shims.plain import Plain
from headway.sites.kernel_arguments import attend_flash, check_operands, unbounded, wanted
from headway.sites.packed import attend_padded, attend_rows, packing

Window: TypeAlias = tuple[int, int]
Bounds: TypeAlias = tuple[int | None, int | None]


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Self-attention of qkv (batch, length, 3, heads, head_dim)."""
    given = {"qkv": qkv}
    return _attend(
        given, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Attention of q (batch, length, heads, head_dim) to kv (batch, length, 2, key heads, head_dim)."""
    given = {"q": q, "kv": kv}
    return _attend(
        given, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Attention of q to k and v, each (batch, length, heads, head_dim)."""
    given = {"q": q, "k": k, "v": v}
    return _attend(
        given, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Self-attention within each packed sequence of qkv (tokens, 3, heads, head_dim)."""
    given = {"qkv": qkv, "cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen}
    return _attend(
        given, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Attention of q (tokens, heads, head_dim) to kv (tokens, 2, key heads, head_dim), sequence by sequence."""
    given = {
        "q": q, "kv": kv, "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k,
        "max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k,
    }  # fmt: skip
    return _attend(
        given, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Any:
    """Attention of q to k and v, (tokens, heads, head_dim) each, sequence by sequence.

    With `block_table` (sequences, pages) k and v are pages, (pages, page length, key heads, head_dim).
    """
    given = {
        "q": q, "k": k, "v": v, "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k,
        "max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k,
    }  # fmt: skip
    return _attend(
        given, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
        block_table,
    )  # fmt: skip


def _attend(
    operands: Mapping[str, Any],
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: Window,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    return_attn_probs: bool,
    block_table: Tensor | None = None,
) -> Any:
    """(result, lse, weights) if asked for: the weights are a tensor of nothing, as in flash_attn without dropout."""
    if return_attn_probs and dropout_p:
        raise RequestError(
            f"got return_attn_probs with dropout_p={dropout_p}, takes it without dropout: no kernel tells which weights"
            " it dropped; pass dropout_p=0.0 there, or take headway.maps(...) for weights"
        )
    site = Plain(("deterministic",) if deterministic else (), lse=return_attn_probs)
    given = {
        **operands, "dropout_p": dropout_p, "softmax_scale": softmax_scale, "causal": causal, "softcap": softcap,
        "alibi_slopes": alibi_slopes,
    }  # fmt: skip
    window = _bounds(window_size)
    if block_table is None:
        out, *lse = attend_flash(site, given, window)
    else:
        out, *lse = _attend_pages(site, given, window, block_table)
    return (out, _as_there(lse[0]), out.new_empty(0)) if return_attn_probs else out


def _bounds(window_size: Window) -> Bounds:
    if not isinstance(window_size, tuple | list) or len(window_size) != 2:
        raise RequestError(f"got window_size={window_size!r}, takes (left, right), -1 for no bound on a side: (256, 0)")
    left, right = window_size
    return unbounded(left), unbounded(right)


def _as_there(lse: Tensor) -> Tensor:
    """flash_attn says inf where a query sees nothing."""
    return lse.masked_fill(lse == float("-inf"), float("inf")).contiguous()


# -- pages and caches -------------------------------------------------------------------------------------------------


def _attend_pages(site: Plain, given: Mapping[str, Any], window: Bounds, block_table: Tensor) -> tuple[Tensor, ...]:
    """Packed queries, and keys in pages."""
    q = given["q"]
    if not given["k"].dim() == given["v"].dim() == 4:
        raise RequestError(
            f"got block_table with k {list(given['k'].shape)} and v {list(given['v'].shape)}, takes pages,"
            " (pages, page length, key heads, head_dim); or leave out block_table for keys laid end to end"
        )
    check_operands(q[None], given["k"], given["v"], packed=False)
    queries = packing("cu_seqlens_q", given["cu_seqlens_q"], len(q), given["max_seqlen_q"], q.device)
    keys = packing("cu_seqlens_k", given["cu_seqlens_k"], None, given["max_seqlen_k"], q.device)
    k, v, _ = Cache(given["k"], given["v"], pages=block_table).read(len(block_table), keys.on(q.device).diff())
    return attend_padded(site, q, k, v, queries, keys, wanted(given, window))


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """Attention of q (batch, length, heads, head_dim) to a cache (rows, length, key heads, head_dim); no gradients.

    New k and v are written into the cache first, in place, where `cache_seqlens` says that it ends. With `block_table`
    (batch, pages) the cache is pages, (pages, page length, key heads, head_dim). `num_splits` steers a kernel, and that
    is Headway's to choose.
    """
    del num_splits
    cache = Cache(k_cache, v_cache, cache_batch_idx, block_table)
    _check_cache(q, cache, k, v, rotary_cos, rotary_sin, cache_seqlens, cache_leftpad)
    given = {
        "causal": causal, "softmax_scale": softmax_scale, "softcap": softcap, "alibi_slopes": alibi_slopes
    }  # fmt: skip
    window = _bounds(window_size)
    ends = cache_seqlens
    with torch.no_grad():
        if k is not None and v is not None and ends is not None:
            if rotary_cos is not None and rotary_sin is not None:
                turn = functools.partial(
                    apply_rotary_emb,
                    cos=rotary_cos,
                    sin=rotary_sin,
                    interleaved=rotary_interleaved,
                    seqlen_offsets=ends,
                )
                # Without an order all queries stand where the cache ended.
                in_order = causal or window != (None, None)
                q, k = turn(q) if in_order else turn(q.flatten(1, 2)[:, None]).view_as(q), turn(k)
            ends = cache.append(k, v, ends)
        keys, values, filler = cache.read(len(q), ends, cache_leftpad)
        site = Plain(lse=return_softmax_lse)
        q, keys, values = (x.transpose(1, 2) for x in (q, keys, values))
        out, *lse = attend_rows(site, q, keys, values, wanted(given, window), filler)
    out = out.transpose(1, 2).contiguous()
    return (out, _as_there(lse[0])) if return_softmax_lse else out


def _check_cache(
    q: Tensor, cache: Cache, k: Tensor | None, v: Tensor | None, cos: Tensor | None, sin: Tensor | None,
    ends: int | Tensor | None, firsts: Tensor | None,
) -> None:  # fmt: skip
    check_operands(q, cache.k, cache.v, packed=False)
    if (k is None) is not (v is None):
        raise RequestError("got new k or v alone, takes both or none")
    if k is not None and v is not None:
        check_operands(q, k, v, packed=False)
        if ends is None:
            raise RequestError("got new k and v without cache_seqlens, takes where the cache ends, which they follow")
        if k.shape[2:] != cache.k.shape[2:] or len(k) != len(q):
            raise RequestError(
                f"got new k {list(k.shape)} for a cache {list(cache.k.shape)} and q {list(q.shape)}, takes the heads"
                " and head_dim of the cache, and the batch of q"
            )
    if (cos is None) is not (sin is None) or (cos is not None and k is None):
        raise RequestError("got rotary_cos or rotary_sin, takes both, and new k and v to turn: turn q and k before")
    if cos is not None and len(cos) < cache.length:
        raise RequestError(
            f"got rotary_cos for {len(cos)} positions, takes as many as the cache has room: {cache.length}"
        )
    if cache.pages is not None and (cache.rows is not None or firsts is not None):
        raise RequestError(
            "got block_table with cache_batch_idx or cache_leftpad, takes it alone, as flash_attn does: choose the rows"
            " of block_table, and start at their first page"
        )
    if cache.rows is None and cache.pages is None and len(cache.k) < len(q):
        raise RequestError(f"got a cache of {len(cache.k)} rows for a batch of {len(q)}, takes a row for each entry")
    named = {"cache_seqlens": ends, "cache_leftpad": firsts, "cache_batch_idx": cache.rows}
    for name, each in named.items():
        if isinstance(each, Tensor) and (each.dtype != torch.int32 or each.shape != q.shape[:1]):
            raise RequestError(f"got {name} {shape_of(each)}, takes int32 [{len(q)}]: one for each batch entry")

"""flash_attn.modules.mha: multi-head attention under flash-attn's parameter names, on any device and in any dtype."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from headway.errors import RequestError
from headway.masks import Causal, Mask, Padding, Predicate
from headway.masks.base import shape_of
from headway.shims.flash_attn.flash_attn_interface import (
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from headway.shims.flash_attn.layers.rotary import RotaryEmbedding
from headway.shims.flash_attn.ops.fused_dense import refuse_parallel
from headway.shims.plain import Plain

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Window = tuple[int, int]


def get_alibi_slopes(nheads: int) -> list[float]:
    """2^(-8 i / nheads) for each head i; where nheads is no power of 2, every other slope of the next one fills up.

    >>> get_alibi_slopes(3)
    [0.0625, 0.00390625, 0.25]
    """
    power = 2 ** math.floor(math.log2(nheads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    return slopes if power == nheads else slopes + get_alibi_slopes(2 * power)[0::2][: nheads - power]


# -- attention without projections ------------------------------------------------------------------------------------


class _Inner(nn.Module):
    alibi_slopes: Tensor | None

    def __init__(
        self,
        causal: bool,
        softmax_scale: float | None,
        attention_dropout: float,
        window_size: Window = (-1, -1),
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
    ) -> None:
        super().__init__()
        self.causal = causal
        self.softmax_scale = softmax_scale
        self.drop = nn.Dropout(attention_dropout)
        self.register_buffer("alibi_slopes", alibi_slopes, persistent=False)
        self.window_size = window_size
        self.deterministic = deterministic

    def _dropout(self) -> float:
        return self.drop.p if self.training else 0.0

    def _causal(self, causal: bool | None) -> bool:
        return self.causal if causal is None else causal

    def _options(self, causal: bool | None) -> dict[str, Any]:
        return {
            "dropout_p": self._dropout(),
            "softmax_scale": self.softmax_scale,
            "causal": self._causal(causal),
            "window_size": self.window_size,
            "alibi_slopes": None if self.alibi_slopes is None else self.alibi_slopes.float(),
            "deterministic": self.deterministic,
        }

    def _masked(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None) -> Tensor:
        """(batch, length, heads, head_dim) each."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = Plain().attend(
            q, k, v, mask,
            scale=self.softmax_scale or None, dropout=self._dropout(), softcap=None, sinks=None,
        )  # fmt: skip
        assert isinstance(out, Tensor)
        return out.transpose(1, 2)


class FlashSelfAttention(_Inner):
    """Attention of qkv (batch, length, 3, heads, head_dim), or (tokens, 3, heads, head_dim) with cu_seqlens."""

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        window_size: Window = (-1, -1),
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
    ) -> None:
        super().__init__(causal, softmax_scale, attention_dropout, window_size, alibi_slopes, deterministic)

    def forward(
        self, qkv: Tensor, causal: bool | None = None, cu_seqlens: Tensor | None = None, max_seqlen: int | None = None
    ) -> Tensor:
        options = self._options(causal)
        _check_all_or_none(cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
        out: Tensor
        if cu_seqlens is None or max_seqlen is None:
            out = flash_attn_qkvpacked_func(qkv, **options)
        else:
            out = flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, max_seqlen, **options)
        return out


class FlashCrossAttention(_Inner):
    """Attention of q (batch, length, heads, head_dim) to kv (batch, length, 2, key heads, head_dim), or both packed.

    Causal is counted from the lower right, as everywhere in flash-attn.
    """

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        alibi_slopes: Tensor | None = None,
        window_size: Window = (-1, -1),
        deterministic: bool = False,
    ) -> None:
        super().__init__(causal, softmax_scale, attention_dropout, window_size, alibi_slopes, deterministic)

    def forward(
        self,
        q: Tensor,
        kv: Tensor,
        causal: bool | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_k: int | None = None,
    ) -> Tensor:
        options = self._options(causal)
        lengths = {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen}
        lengths |= {"cu_seqlens_k": cu_seqlens_k, "max_seqlen_k": max_seqlen_k}
        _check_all_or_none(**lengths)
        out: Tensor
        if cu_seqlens is None or cu_seqlens_k is None or max_seqlen is None or max_seqlen_k is None:
            out = flash_attn_kvpacked_func(q, kv, **options)
        else:
            out = flash_attn_varlen_kvpacked_func(q, kv, cu_seqlens, cu_seqlens_k, max_seqlen, max_seqlen_k, **options)
        return out


class SelfAttention(_Inner):
    """Attention of qkv (batch, length, 3, heads, head_dim) with a mask (batch, length) that is True for real keys.

    A query that sees no real key gives 0. (flash-attn adds -10,000 to what is masked, so such a query takes from what
    it should not see.)
    """

    def __init__(
        self, causal: bool = False, softmax_scale: float | None = None, attention_dropout: float = 0.0
    ) -> None:
        super().__init__(causal, softmax_scale, attention_dropout)

    def forward(self, qkv: Tensor, causal: bool | None = None, key_padding_mask: Tensor | None = None) -> Tensor:
        if qkv.dim() != 5 or qkv.shape[2] != 3:
            raise RequestError(f"got qkv {list(qkv.shape)}, takes (batch, length, 3, heads, head_dim)")
        band = Causal() if self._causal(causal) else None
        q, k, v = qkv.unbind(2)
        return self._masked(q, k, v, _and_padding(band, key_padding_mask))


class CrossAttention(_Inner):
    """Attention of q (batch, length, heads, head_dim) to kv (batch, length, 2, key heads, head_dim), with such a mask.

    Causal lines the last query up with the last real key: with key number `key_padding_mask.sum(-1)` of each entry.
    """

    def __init__(
        self, causal: bool = False, softmax_scale: float | None = None, attention_dropout: float = 0.0
    ) -> None:
        super().__init__(causal, softmax_scale, attention_dropout)

    def forward(
        self, q: Tensor, kv: Tensor, causal: bool | None = None, key_padding_mask: Tensor | None = None
    ) -> Tensor:
        if kv.dim() != 5 or q.dim() != 4 or kv.shape[2] != 2:
            raise RequestError(
                f"got q {list(q.shape)} and kv {list(kv.shape)}, takes (batch, length, heads, head_dim) and"
                " (batch, length, 2, key heads, head_dim)"
            )
        band: Mask | None = None
        if self._causal(causal):
            band = Causal("lower-right") if key_padding_mask is None else _up_to_real(q, key_padding_mask)
        k, v = kv.unbind(2)
        return self._masked(q, k, v, _and_padding(band, key_padding_mask))


def _up_to_real(q: Tensor, key_padding_mask: Tensor) -> Mask:
    shift = (key_padding_mask.sum(-1) - q.shape[1]).to(torch.int32)

    def near(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return k <= q + shift[b]

    return Predicate(near)


def _and_padding(band: Mask | None, key_padding_mask: Tensor | None) -> Mask | None:
    if key_padding_mask is None:
        return band
    if key_padding_mask.dtype != torch.bool:
        raise RequestError(f"got key_padding_mask {shape_of(key_padding_mask)}, takes bool, True for real keys")
    padding = Padding(key_padding_mask)
    return padding if band is None else band & padding


def _check_all_or_none(**given: Any) -> None:
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < len(given):
        raise RequestError(f"got no {' and no '.join(missing)}, takes {', '.join(given)} together, or none of them")


# -- attention with projections ---------------------------------------------------------------------------------------


class MHA(nn.Module):
    """Multi-head self- or cross-attention under flash-attn's names: Wqkv, or Wq and Wkv, and out_proj.

    `use_flash_attn` says what masks come as (cu_seqlens, or key_padding_mask without it), and lets windows and ALiBi
    in; the kernel is chosen by Headway either way. `fused_bias_fc` is of no effect, as in flash-attn.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_heads_kv: int | None = None,
        cross_attn: bool = False,
        qkv_proj_bias: bool = True,
        out_proj_bias: bool = True,
        dropout: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        layer_idx: int | None = None,
        dwconv: bool = False,
        rotary_emb_dim: int = 0,
        rotary_emb_base: float = 10000.0,
        rotary_emb_scale_base: float | None = None,
        rotary_emb_interleaved: bool = False,
        use_alibi: bool = False,
        window_size: Window = (-1, -1),
        fused_bias_fc: bool = False,
        use_flash_attn: bool = False,
        return_residual: bool = False,
        checkpointing: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_heads_kv = num_heads if num_heads_kv is None else num_heads_kv
        if num_heads % num_heads_kv or embed_dim % num_heads:
            raise RequestError(
                f"got embed_dim={embed_dim}, num_heads={num_heads}, num_heads_kv={num_heads_kv}, takes an embed_dim"
                " divisible by num_heads, and that by num_heads_kv"
            )
        if not use_flash_attn and (use_alibi or tuple(window_size) != (-1, -1)):
            raise RequestError(
                "got use_alibi or window_size without use_flash_attn, takes use_flash_attn=True with them"
            )
        if cross_attn and rotary_emb_dim > 0:
            raise RequestError(f"got rotary_emb_dim={rotary_emb_dim} with cross_attn, takes 0: turn q and k outside")
        self.embed_dim = embed_dim
        self.cross_attn = cross_attn
        self.causal = causal
        self.layer_idx = layer_idx
        self.dwconv = dwconv
        self.rotary_emb_dim = rotary_emb_dim
        self.use_flash_attn = use_flash_attn
        self.return_residual = return_residual
        self.checkpointing = checkpointing
        self.num_heads, self.num_heads_kv, self.head_dim = num_heads, num_heads_kv, embed_dim // num_heads
        if rotary_emb_dim > 0:
            self.rotary_emb = RotaryEmbedding(
                rotary_emb_dim, rotary_emb_base, rotary_emb_interleaved, rotary_emb_scale_base, device
            )
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        kv_dim = 2 * self.head_dim * num_heads_kv
        if cross_attn:
            self.Wq = nn.Linear(embed_dim, embed_dim, bias=qkv_proj_bias, **made)
            self.Wkv = nn.Linear(embed_dim, kv_dim, bias=qkv_proj_bias, **made)
        else:
            self.Wqkv = nn.Linear(embed_dim, embed_dim + kv_dim, bias=qkv_proj_bias, **made)
        if dwconv and num_heads_kv == num_heads:
            self.dwconv_qkv = _conv(embed_dim + kv_dim, **made)
        elif dwconv:
            self.dwconv_q, self.dwconv_kv = _conv(embed_dim, **made), _conv(kv_dim, **made)
        slopes = torch.tensor(get_alibi_slopes(num_heads), device=device) if use_alibi else None
        inner: dict[str, Any] = {"causal": causal, "softmax_scale": softmax_scale, "attention_dropout": dropout}
        if use_flash_attn:
            inner |= {"alibi_slopes": slopes, "window_size": window_size}
        self.inner_attn: _Inner = FlashSelfAttention(**inner) if use_flash_attn else SelfAttention(**inner)
        self.inner_cross_attn: _Inner = FlashCrossAttention(**inner) if use_flash_attn else CrossAttention(**inner)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=out_proj_bias, **made)

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None) -> Tensor:
        weight = self.out_proj.weight
        shape = (batch_size, max_seqlen, 2, self.num_heads_kv, self.head_dim)
        return torch.empty(shape, dtype=dtype or weight.dtype, device=weight.device)

    def forward(
        self,
        x: Tensor,
        x_kv: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        mixer_subset: Any = None,
        inference_params: Any = None,
        **kwargs: Any,
    ) -> Any:
        """x (batch, length, embed_dim), or (tokens, embed_dim) with cu_seqlens.

        - `key_padding_mask`: bool (batch, keys), True for real keys; `cu_seqlens`, `max_seqlen`: packed sequences.
        - `x_kv`, `mixer_subset`: for cross-attention, what keys and values are made of, and which of x ask.
        - `inference_params`: the cache to write to and to read from, and how long it is.
        - What else is given goes to the inner attention.
        """
        self._check_call(x_kv, key_padding_mask, cu_seqlens, max_seqlen, mixer_subset, inference_params, kwargs)
        masks: dict[str, Any] = {"key_padding_mask": key_padding_mask}
        if self.use_flash_attn:
            masks = {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen}
        masks |= kwargs
        if not self.cross_attn and self.num_heads_kv == self.num_heads:
            qkv = self._convolved("dwconv_qkv", self.Wqkv(x)).unflatten(-1, (3, self.num_heads, self.head_dim))
            if self.rotary_emb_dim > 0:
                qkv = self.rotary_emb(qkv, **_rotary_options(inference_params))
            if inference_params is None:
                context = self._inner(self.inner_attn, qkv, **masks)
            else:
                context = self._with_cache(qkv[:, :, 0], qkv[:, :, 1:], inference_params)
        else:
            q, kv = self._q_and_kv(x, x_kv, mixer_subset)
            if cu_seqlens is not None and not self.cross_attn:
                masks = {"cu_seqlens_k": cu_seqlens, "max_seqlen_k": max_seqlen} | masks
            if self.rotary_emb_dim > 0:
                q, kv = self.rotary_emb(q, kv, **_rotary_options(inference_params))
            if inference_params is None:
                context = self._inner(self.inner_cross_attn, q, kv, **masks)
            else:
                context = self._with_cache(q, kv, inference_params)
        out = self.out_proj(context.flatten(-2))
        return (out, x) if self.return_residual else out

    def _q_and_kv(self, x: Tensor, x_kv: Tensor | None, mixer_subset: Any) -> tuple[Tensor, Tensor]:
        if self.cross_attn:
            q = self.Wq(x if mixer_subset is None else x[:, mixer_subset])
            kv = self.Wkv(x if x_kv is None else x_kv)
        else:
            qkv = self.Wqkv(x)
            q, kv = qkv[..., : self.embed_dim], qkv[..., self.embed_dim :]
        q = self._convolved("dwconv_q", q).unflatten(-1, (self.num_heads, self.head_dim))
        kv = self._convolved("dwconv_kv", kv).unflatten(-1, (2, self.num_heads_kv, self.head_dim))
        return q, kv

    def _convolved(self, name: str, x: Tensor) -> Tensor:
        """Each feature of each token mixed with those of the two tokens before it, if asked for."""
        return getattr(self, name)(x.transpose(1, 2))[..., :-2].transpose(1, 2) if self.dwconv else x

    def _inner(self, attention: _Inner, *inputs: Tensor, **masks: Any) -> Tensor:
        out: Tensor
        if self.checkpointing:
            out = checkpoint(attention, *inputs, use_reentrant=False, **masks)
        else:
            out = attention(*inputs, **masks)
        return out

    def _with_cache(self, q: Tensor, kv: Tensor, params: Any) -> Tensor:
        """Keys and values are put into the cache, and queries attend to all that it holds for them."""
        cache = self._cache(kv, params)
        inner = self.inner_cross_attn
        if params.seqlen_offset == 0:
            cache[:, : kv.shape[1]] = kv.detach()
            return cast(Tensor, inner(q, kv))
        lengths = params.lengths_per_sample
        options = inner._options(None)
        out = flash_attn_with_kvcache(
            q,
            cache[:, :, 0],
            cache[:, :, 1],
            kv[:, :, 0],
            kv[:, :, 1],
            cache_seqlens=params.seqlen_offset if lengths is None else lengths[: len(q)],
            softmax_scale=options["softmax_scale"],
            causal=options["causal"],
            window_size=options["window_size"],
            alibi_slopes=options["alibi_slopes"],
        )
        return cast(Tensor, out)

    def _cache(self, kv: Tensor, params: Any) -> Tensor:
        """The cache's rows for this batch, made at the first call."""
        known = params.key_value_memory_dict
        if self.layer_idx not in known:
            shape = (params.max_batch_size, params.max_seqlen, *kv.shape[2:])
            known[self.layer_idx] = torch.empty(shape, dtype=kv.dtype, device=kv.device)
        cache: Tensor = known[self.layer_idx]
        first, last = params.batch_size_offset, params.batch_size_offset + len(kv)
        if last > cache.shape[0] or params.seqlen_offset + kv.shape[1] > cache.shape[1]:
            raise RequestError(
                f"got {kv.shape[1]} tokens after {params.seqlen_offset} for batch entries {first} to {last}, takes what"
                f" a cache {list(cache.shape)} holds: make max_batch_size or max_seqlen larger"
            )
        return cache[first:last]

    def _check_call(
        self, x_kv: Any, key_padding_mask: Any, cu_seqlens: Any, max_seqlen: Any, mixer_subset: Any,
        inference_params: Any, others: dict[str, Any],
    ) -> None:  # fmt: skip
        grouped = not self.cross_attn and self.num_heads_kv != self.num_heads
        causal = self.causal if others.get("causal") is None else others["causal"]
        packed, masked, cached = cu_seqlens is not None, key_padding_mask is not None, inference_params is not None
        for wrong, got, takes in (
            ((cu_seqlens is None) != (max_seqlen is None), "cu_seqlens or max_seqlen alone", "both or none"),
            (packed and masked, "cu_seqlens and key_padding_mask", "one of them"),
            (packed and not self.use_flash_attn, "cu_seqlens", "it with use_flash_attn=True"),
            (packed and self.dwconv, "cu_seqlens with dwconv", "batches, as the convolution would mix sequences"),
            (packed and self.rotary_emb_dim > 0, "cu_seqlens with rotary_emb_dim", "batches, or rotary_emb_dim=0"),
            (masked and self.use_flash_attn, "key_padding_mask with use_flash_attn=True", "cu_seqlens there"),
            (masked and grouped and causal, "key_padding_mask with causal and fewer key heads", "cu_seqlens with"
             " use_flash_attn=True: flash-attn shifts the diagonal by what is padded here"),
            (not self.cross_attn and x_kv is not None, "x_kv without cross_attn", "cross_attn=True with it"),
            (not self.cross_attn and mixer_subset is not None, "mixer_subset without cross_attn", "cross_attn=True"),
            (cached and (packed or masked or others), "inference_params beside masks", "inference_params alone"),
            (cached and self.dwconv, "inference_params with dwconv", "dwconv=False: no cache holds what it mixes"),
            (cached and self.layer_idx is None, "inference_params without layer_idx", "a layer_idx in the constructor"),
        ):  # fmt: skip
            if wrong:
                raise RequestError(f"got {got} in MHA, takes {takes}")


def _rotary_options(params: Any) -> dict[str, Any]:
    if params is None:
        return {}
    lengths = params.lengths_per_sample
    return {"seqlen_offset": params.seqlen_offset if lengths is None else lengths, "max_seqlen": params.max_seqlen}


def _conv(channels: int, device: Any, dtype: Any) -> nn.Conv1d:
    return nn.Conv1d(channels, channels, kernel_size=3, padding=2, groups=channels, device=device, dtype=dtype)


class ParallelMHA(nn.Module):
    """Refused: its weights would lie on several processes."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        process_group: ProcessGroup,
        num_heads_kv: int | None = None,
        qkv_proj_bias: bool = True,
        out_proj_bias: bool = True,
        dropout: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        layer_idx: int | None = None,
        rotary_emb_dim: int = 0,
        rotary_emb_base: float = 10000.0,
        rotary_emb_scale_base: float | None = None,
        rotary_emb_interleaved: bool = False,
        use_alibi: bool = False,
        window_size: Window = (-1, -1),
        use_flash_attn: bool = False,
        checkpointing: bool = False,
        sequence_parallel: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        refuse_parallel("ParallelMHA")

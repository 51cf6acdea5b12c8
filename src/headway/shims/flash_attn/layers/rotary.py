"""flash_attn.layers.rotary: rotary position embeddings, also in place, and XPos."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from headway.errors import RequestError
from headway.shims.flash_attn.ops.triton.rotary import apply_rotary, at_positions, in_place, rotated, turn_


def rotate_half(x: Tensor, interleaved: bool = False) -> Tensor:
    """Each pair (a, b) as (-b, a)."""
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    one, other = x.chunk(2, dim=-1)
    return torch.cat((-other, one), dim=-1)


def apply_rotary_emb_torch(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """As `apply_rotary_emb` without offsets; cos and sin may also be (batch, length, rotary_dim / 2)."""
    turned = 2 * cos.shape[-1]
    if turned > x.shape[-1]:
        raise RequestError(f"got rotary_dim {turned} for head_dim {x.shape[-1]}, takes at most that: cut cos and sin")
    out = rotated(x[..., :turned], cos, sin, interleaved, conjugate=False)
    return torch.cat((out, x[..., turned:]), dim=-1)


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """x (batch, length, heads, head_dim), or (tokens, heads, head_dim) with cu_seqlens; cos and sin are tables.

    >>> x = torch.tensor([1.0, 0.0, 1.0, 0.0]).expand(1, 2, 1, 4)
    >>> angles = torch.tensor([[0.0], [torch.pi]])
    >>> apply_rotary_emb(x, angles.cos(), angles.sin(), interleaved=True)[0, 1, 0, [0, 2]]
    tensor([-1.,  1.])
    """
    return apply_rotary(x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen, interleaved, inplace)


apply_rotary_emb_func = apply_rotary_emb


def apply_rotary_emb_qkv_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_k: Tensor | None = None,
    sin_k: Tensor | None = None,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
    num_heads_q: int | None = None,
) -> Tensor:
    """Queries and keys turned in place; qkv is (batch, length, 3, heads, head_dim), or with num_heads_q
    (batch, length, num_heads_q + 2 * key heads, head_dim)."""
    queries, keys = _parts(qkv, num_heads_q)
    if cos_k is None and sin_k is None:
        queries, keys = slice(0, keys.stop), slice(0, 0)
    q_tables = at_positions(qkv, cos, sin, seqlen_offsets)
    k_tables = at_positions(qkv, cos if cos_k is None else cos_k, sin if sin_k is None else sin_k, seqlen_offsets)

    def turn(whole: Tensor) -> None:
        turn_(whole[:, :, queries], *q_tables, interleaved)
        if keys.stop:
            turn_(whole[:, :, keys], *k_tables, interleaved)

    return in_place(qkv, turn)


def _parts(qkv: Tensor, num_heads_q: int | None) -> tuple[slice, slice]:
    """Where on the third axis queries and keys are."""
    if qkv.dim() == 5 and qkv.shape[2] == 3:
        return slice(0, 1), slice(1, 2)
    others = -1 if qkv.dim() != 4 or num_heads_q is None else qkv.shape[2] - num_heads_q
    if num_heads_q is not None and others >= 0 and others % 2 == 0:
        return slice(0, num_heads_q), slice(num_heads_q, num_heads_q + others // 2)
    raise RequestError(
        f"got qkv {list(qkv.shape)} with num_heads_q={num_heads_q}, takes (batch, length, 3, heads, head_dim), or"
        " (batch, length, num_heads_q + 2 * key heads, head_dim) with num_heads_q"
    )


def apply_rotary_emb_kv_(
    kv: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, seqlen_offsets: int | Tensor = 0
) -> Tensor:
    """Keys turned in place; kv is (batch, length, 2, heads, head_dim)."""
    if kv.dim() != 5 or kv.shape[2] != 2:
        raise RequestError(f"got kv {list(kv.shape)}, takes (batch, length, 2, heads, head_dim)")
    tables = at_positions(kv, cos, sin, seqlen_offsets)
    return in_place(kv, lambda whole: turn_(whole[:, :, 0], *tables, interleaved))


class RotaryEmbedding(nn.Module):
    """Rotary embeddings whose tables grow with the longest text seen; XPos with `scale_base`.

    Called with qkv it turns that in place; called with q and kv it turns both and returns both.
    """

    inv_freq: Tensor
    scale: Tensor | None

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        scale_base: float | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.base = float(base)
        self.interleaved = interleaved
        self.scale_base = scale_base
        self.register_buffer("inv_freq", self._compute_inv_freq(device), persistent=False)
        scale = None if scale_base is None else (self._steps(device) + 0.4 * dim) / (1.4 * dim)
        self.register_buffer("scale", scale, persistent=False)
        self._seq_len_cached = 0
        self._cos_cached: Tensor | None = None
        self._sin_cached: Tensor | None = None
        self._cos_k_cached: Tensor | None = None
        self._sin_k_cached: Tensor | None = None

    def _steps(self, device: torch.device | str | None) -> Tensor:
        return torch.arange(0, self.dim, 2, device=device, dtype=torch.float32)

    def _compute_inv_freq(self, device: torch.device | str | None = None) -> Tensor:
        return 1.0 / (self.base ** (self._steps(device) / self.dim))

    def _update_cos_sin_cache(
        self, seqlen: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """Tables of at least `seqlen` rows. Angles are float32 whatever the module was cast to, as in flash-attn."""
        known = self._cos_cached
        if (
            known is not None
            and seqlen <= self._seq_len_cached
            and known.device == device
            and known.dtype == dtype
            and not (self.training and known.is_inference())
        ):
            return
        self._seq_len_cached = seqlen
        positions = torch.arange(seqlen, device=device, dtype=torch.float32)
        inv_freq = self.inv_freq if self.inv_freq.dtype == torch.float32 else self._compute_inv_freq(device)
        angles = torch.outer(positions, inv_freq)
        cos, sin = angles.cos(), angles.sin()
        if self.scale is None or self.scale_base is None:
            self._cos_cached, self._sin_cached = cos.to(dtype), sin.to(dtype)
            return
        power = (positions - seqlen // 2) / self.scale_base
        scale = self.scale.to(device) ** power[:, None]
        self._cos_cached, self._sin_cached = (cos * scale).to(dtype), (sin * scale).to(dtype)
        self._cos_k_cached, self._sin_k_cached = (cos / scale).to(dtype), (sin / scale).to(dtype)

    def forward(
        self,
        qkv: Tensor,
        kv: Tensor | None = None,
        seqlen_offset: int | Tensor = 0,
        max_seqlen: int | None = None,
        num_heads_q: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        if max_seqlen is not None:
            self._update_cos_sin_cache(max_seqlen, device=qkv.device, dtype=qkv.dtype)
        elif not isinstance(seqlen_offset, Tensor):
            self._update_cos_sin_cache(qkv.shape[1] + seqlen_offset, device=qkv.device, dtype=qkv.dtype)
        cos, sin, cos_k, sin_k = self._cos_cached, self._sin_cached, self._cos_k_cached, self._sin_k_cached
        if cos is None or sin is None:
            raise RequestError("got seqlen_offset as a tensor before any table was made, takes max_seqlen with it")
        if kv is None:
            return apply_rotary_emb_qkv_(qkv, cos, sin, cos_k, sin_k, self.interleaved, seqlen_offset, num_heads_q)
        if num_heads_q is not None:
            raise RequestError(f"got num_heads_q={num_heads_q} beside kv, takes it for qkv in one tensor: leave it out")
        q = apply_rotary_emb(qkv, cos, sin, self.interleaved, inplace=True, seqlen_offsets=seqlen_offset)
        k_tables = (cos, sin) if cos_k is None or sin_k is None else (cos_k, sin_k)
        return q, apply_rotary_emb_kv_(kv, *k_tables, self.interleaved, seqlen_offset)

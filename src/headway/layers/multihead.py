"""Multi-head attention to build models from: four projections that are called, and the door between them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Literal, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.parametrize import type_before_parametrizations

from headway.attention import attention
from headway.backends.registry import NAMES
from headway.errors import RequestError, UnknownNameError
from headway.limits.request import CONTRACTS
from headway.masks.base import Mask

Context: TypeAlias = Tensor | tuple[Tensor, Tensor]

QK_NORMS: dict[str, Callable[..., nn.Module]] = {
    "rms": functools.partial(nn.RMSNorm, eps=1e-6),
    "layer": functools.partial(nn.LayerNorm, eps=1e-6),
}
"""What may norm each head's queries and keys, by name."""


class MultiheadAttention(nn.Module):
    """Self-attention of x, or cross-attention of x to a context, (B, L, C) or unbatched (L, C).

    - `kv_heads`: key and value heads, each shared by num_heads / kv_heads query heads. `head_dim`: of each head, by
      default embed_dim / num_heads.
    - `dropout`: share of attention weights dropped, in training only.
    - `qk_norm`: 'rms' or 'layer' norms each head's queries and keys, with weights of their own, before they meet.
    - `backend`, `require`: as in `headway.attention`.
    - `kdim`, `vdim`: sizes of what keys and values are made from, where these are not embed_dim.

    Masks are typed: `forward(x, mask=Causal())`. A query that may see nothing gives the output projection of 0.

    >>> from headway import Causal
    >>> layer = MultiheadAttention(32, num_heads=4, kv_heads=2)
    >>> layer(torch.randn(2, 5, 32), mask=Causal()).shape
    torch.Size([2, 5, 32])
    >>> layer
    MultiheadAttention(
      embed_dim=32, num_heads=4, kv_heads=2, head_dim=8
      (q_proj): Linear(in_features=32, out_features=32, bias=True)
      (k_proj): Linear(in_features=32, out_features=16, bias=True)
      (v_proj): Linear(in_features=32, out_features=16, bias=True)
      (out_proj): Linear(in_features=32, out_features=32, bias=True)
    )
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        qk_norm: Literal["rms", "layer"] | None = None,
        backend: str = "auto",
        require: Iterable[str] = (),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        kdim: int | None = None,
        vdim: int | None = None,
    ) -> None:
        super().__init__()
        kv_heads = num_heads if kv_heads is None else kv_heads
        require = (require,) if isinstance(require, str) else tuple(require)
        _check(embed_dim, num_heads, kv_heads, head_dim, dropout, qk_norm, backend, require)
        self.embed_dim, self.num_heads, self.kv_heads = embed_dim, num_heads, kv_heads
        self.head_dim = embed_dim // num_heads if head_dim is None else head_dim
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        self.dropout, self.qk_norm, self.backend, self.require = dropout, qk_norm, backend, require
        wide, narrow = num_heads * self.head_dim, kv_heads * self.head_dim
        self.q_proj = nn.Linear(embed_dim, wide, bias, device, dtype)
        self.k_proj = nn.Linear(self.kdim, narrow, bias, device, dtype)
        self.v_proj = nn.Linear(self.vdim, narrow, bias, device, dtype)
        self.out_proj = nn.Linear(wide, embed_dim, bias, device, dtype)
        self.q_norm: nn.Module | None = None
        self.k_norm: nn.Module | None = None
        if qk_norm is not None:
            self.q_norm, self.k_norm = (QK_NORMS[qk_norm](self.head_dim, device=device, dtype=dtype) for _ in range(2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            nn.init.xavier_uniform_(projection.weight)
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)
        for norm in (self.q_norm, self.k_norm):
            if isinstance(norm, nn.RMSNorm | nn.LayerNorm):
                norm.reset_parameters()

    def forward(self, x: Tensor, context: Context | None = None, mask: Mask | None = None) -> Tensor:
        """What each token of x takes from the tokens of the context, or of x itself.

        A context is one tensor for keys and values, or a pair (for keys, for values) of equal length.
        """
        keys, values = context if isinstance(context, tuple) else (context, context)
        keys, values = x if keys is None else keys, x if values is None else values
        self._check_inputs(x, keys, values)
        if x.ndim == 2:
            return self._attend(x[None], keys[None], values[None], mask)[0]
        return self._attend(x, keys, values, mask)

    def _attend(self, x: Tensor, keys: Tensor, values: Tensor, mask: Mask | None) -> Tensor:
        q, k, v = self._heads(self.q_proj(x)), self._heads(self.k_proj(keys)), self._heads(self.v_proj(values))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = _normed(self.q_norm, q), _normed(self.k_norm, k)
        dropout = self.dropout if self.training else 0.0
        out = attention(q, k, v, mask, dropout=dropout, backend=self.backend, require=self.require)
        return cast(Tensor, self.out_proj(out.transpose(1, 2).flatten(2)))

    def _heads(self, x: Tensor) -> Tensor:
        heads: Tensor = x.unflatten(-1, (-1, self.head_dim))
        return heads.transpose(1, 2)

    def _check_inputs(self, x: Tensor, keys: Tensor, values: Tensor) -> None:
        shapes = f"x {list(x.shape)}, keys {list(keys.shape)}, values {list(values.shape)}"
        if not (x.ndim == keys.ndim == values.ndim and x.ndim in (2, 3)):
            raise RequestError(f"got {shapes}; takes (B, L, C) for each, or (L, C) for each without a batch")
        sizes = (x.shape[-1], keys.shape[-1], values.shape[-1])
        if sizes != (self.embed_dim, self.kdim, self.vdim):
            raise RequestError(
                f"got {shapes}; takes {self.embed_dim} features for x, {self.kdim} for keys, {self.vdim} for values:"
                " give kdim and vdim to the layer, and a pair (keys, values) as context where they differ"
            )
        if keys.shape[:-1] != values.shape[:-1] or x.shape[:-2] != keys.shape[:-2]:
            raise RequestError(f"got {shapes}; takes one batch for all, and as many values as keys")

    @classmethod
    def from_torch(
        cls, module: nn.MultiheadAttention, *, backend: str = "auto", require: Iterable[str] = ()
    ) -> MultiheadAttention:
        """A layer that computes what an nn.MultiheadAttention computes, with copies of its weights.

        Copied as they act now, and with them dtype, device, mode and which of them are frozen; hooks are not. Batches
        come first, whatever `batch_first` was. A query that may see nothing gives 0 to the output projection, where
        PyTorch gives NaN. To change a model in place, and its weights not at all, see `headway.swap`.
        """
        _check_stock(module)
        size, out_proj = module.embed_dim, module.out_proj
        stacked = module.in_proj_weight
        weights = (
            (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
            if stacked is None
            else stacked.split(size)
        )
        bias = module.in_proj_bias
        made = torch.nn.utils.skip_init(
            cls,
            size,
            module.num_heads,
            bias=bias is not None,
            dropout=module.dropout,
            backend=backend,
            require=require,
            kdim=module.kdim,
            vdim=module.vdim,
            device=weights[0].device,
            dtype=weights[0].dtype,
        )
        biases = (None, None, None) if bias is None else bias.split(size)
        projections = (made.q_proj, made.k_proj, made.v_proj, made.out_proj)
        sources = zip((*weights, out_proj.weight), (*biases, out_proj.bias), projections, strict=True)
        with torch.no_grad():
            for weight, bias_, projection in sources:
                for source, target in ((weight, projection.weight), (bias_, projection.bias)):
                    if source is not None:
                        target.copy_(source)
                        target.requires_grad_(source.requires_grad)
        return cast(MultiheadAttention, made.train(module.training))

    def extra_repr(self) -> str:
        words = [f"embed_dim={self.embed_dim}, num_heads={self.num_heads}"]
        words += [f"kv_heads={self.kv_heads}"] if self.kv_heads != self.num_heads else []
        words += [f"head_dim={self.head_dim}"]
        words += [f"kdim={self.kdim}, vdim={self.vdim}"] if {self.kdim, self.vdim} != {self.embed_dim} else []
        words += [f"dropout={self.dropout}"] if self.dropout else []
        words += [f"qk_norm={self.qk_norm!r}"] if self.qk_norm is not None else []
        words += [f"backend={self.backend!r}"] if self.backend != "auto" else []
        words += [f"require={self.require}"] if self.require else []
        return ", ".join(words)


def _normed(norm: nn.Module, x: Tensor) -> Tensor:
    """In the dtype of the norm's weight: under autocast x is narrower, and the fused kernels want one dtype."""
    weight = getattr(norm, "weight", None)
    return cast(Tensor, norm(x if weight is None else x.to(weight.dtype)).to(x.dtype))


def _check(
    embed_dim: int, num_heads: int, kv_heads: int, head_dim: int | None, dropout: float, qk_norm: str | None,
    backend: str, require: tuple[str, ...],
) -> None:  # fmt: skip
    if min(embed_dim, num_heads, kv_heads, 1 if head_dim is None else head_dim) < 1:
        raise RequestError(
            f"got embed_dim={embed_dim}, num_heads={num_heads}, kv_heads={kv_heads}, head_dim={head_dim};"
            " takes 1 or more of each"
        )
    if head_dim is None and embed_dim % num_heads:
        raise RequestError(
            f"got embed_dim={embed_dim} for num_heads={num_heads}; takes a multiple of num_heads: or give head_dim"
        )
    if num_heads % kv_heads:
        raise RequestError(
            f"got num_heads={num_heads} and kv_heads={kv_heads}; takes a whole number of query heads to each key head"
        )
    if not 0 <= dropout < 1:
        raise RequestError(f"got dropout={dropout}; takes a share from 0 to below 1")
    if qk_norm is not None and qk_norm not in QK_NORMS:
        raise RequestError(f"got qk_norm={qk_norm!r}; takes {', '.join(map(repr, QK_NORMS))} or None")
    if backend not in ("auto", *NAMES):
        raise UnknownNameError("backend", backend, ("auto", *NAMES))
    for word in require:
        if word not in CONTRACTS:
            raise UnknownNameError("contract", word, tuple(CONTRACTS))


def _check_stock(module: nn.MultiheadAttention) -> None:
    """What a copy of the weights would not say must not be there."""
    if not isinstance(module, nn.MultiheadAttention):
        raise RequestError(f"got a {type(module).__name__}; takes an nn.MultiheadAttention")
    for is_there, adds in ((module.bias_k is not None, "add_bias_kv"), (module.add_zero_attn, "add_zero_attn")):
        if is_there:
            raise RequestError(
                f"got {adds}=True, which adds a key that no mask speaks of; takes modules without:"
                " headway.swap keeps them as they are"
            )
    if type(module).forward is not nn.MultiheadAttention.forward or "forward" in module.__dict__:
        raise RequestError(
            f"got {type(module).__name__} with a forward of its own; takes nn.MultiheadAttention's:"
            " undo what replaced it first"
        )
    kind = type_before_parametrizations(module.out_proj)
    if kind not in (nn.Linear, NonDynamicallyQuantizableLinear):
        raise RequestError(
            f"got out_proj wrapped as {kind.__name__}, whose weight alone is not what it computes;"
            " takes a Linear: merge or unwrap it first"
        )

"""flash_attn.modules.block: transformer blocks of a mixer, an MLP and norms, under flash-attn's parameter names."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from headway.errors import RequestError
from headway.shims.flash_attn.modules.mha import MHA
from headway.shims.flash_attn.modules.mlp import Mlp
from headway.shims.flash_attn.ops.triton.layer_norm import RMSNorm, layer_norm_fn

Make = Callable[..., Any]


class StochasticDepth(nn.Module):
    """Drops whole rows, of the first axis, in training, and scales the others up."""

    def __init__(self, p: float) -> None:
        super().__init__()
        if not 0 <= p <= 1:
            raise RequestError(f"got drop_path={p}, takes a share from 0 to 1")
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if self.p == 0 or not self.training:
            return x
        keep = torch.rand(len(x), *(1,) * (x.dim() - 1), device=x.device) >= self.p
        return x * keep / (1 - self.p or 1)  # none is left to scale where all are dropped


class _Blocks(nn.Module):
    """What both blocks have: the sum of branches and residual, and its norm."""

    fused_dropout_add_ln: bool
    residual_in_fp32: bool

    def _add_norm(
        self, x: Tensor, residual: Tensor | None, norm: Any, dropout: Any, drop_path: StochasticDepth | None = None
    ) -> tuple[Tensor, Tensor]:
        """The norm of what is added up, and the sum."""
        if self.fused_dropout_add_ln:
            ones = torch.ones(x.shape[:-1], device=x.device, dtype=x.dtype)
            added: tuple[Tensor, Tensor] = layer_norm_fn(
                x,
                norm.weight,
                norm.bias,
                residual=residual,
                eps=norm.eps,
                dropout_p=dropout.p if self.training else 0.0,
                rowscale=drop_path(ones) if drop_path is not None and drop_path.p and self.training else None,
                prenorm=True,
                residual_in_fp32=self.residual_in_fp32,
                is_rms_norm=isinstance(norm, RMSNorm),
            )
            return added
        x = dropout(x)
        x = x if drop_path is None else drop_path(x)
        return self._norm(x if residual is None else x + residual, norm)

    def _norm(self, total: Tensor, norm: Any) -> tuple[Tensor, Tensor]:
        return norm(total.to(norm.weight.dtype)), total.float() if self.residual_in_fp32 else total

    def _check_fused(self, *norms: Any, dropout: Any) -> None:
        if self.fused_dropout_add_ln and not (
            all(isinstance(norm, nn.LayerNorm | RMSNorm) for norm in norms) and isinstance(dropout, nn.Dropout)
        ):
            raise RequestError(
                f"got fused_dropout_add_ln with {type(norms[0]).__name__} and {type(dropout).__name__}, takes"
                " nn.LayerNorm or flash_attn's RMSNorm, and nn.Dropout: or fused_dropout_add_ln=False"
            )

    def _mark(self, sequence_parallel: bool, mark_shared_params: bool) -> None:
        """Flags on the norms' parameters, for those who train over several processes."""
        marks = {"_sequence_parallel": sequence_parallel, "_shared_params": mark_shared_params}
        for name, module in self.named_children():
            if name in ("norm1", "norm2"):
                for parameter in module.parameters():
                    for mark, wanted in marks.items():
                        if wanted:
                            setattr(parameter, mark, True)

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> Any:
        return self.mixer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)  # type: ignore[operator, union-attr]


class Block(_Blocks):
    """A transformer block, whose norms come after the sums (prenorm=False), or before its branches.

    With `prenorm` a block is dropout, add, norm, mixer, dropout, add, norm, MLP, and returns what its MLP gave and the
    residual, for the next block to add up.
    """

    def __init__(
        self,
        dim: int,
        mixer_cls: Make | None = None,
        mlp_cls: Make | None = None,
        norm_cls: Make = nn.LayerNorm,
        dropout_cls: Make = nn.Dropout,
        prenorm: bool = True,
        resid_dropout1: float = 0.0,
        resid_dropout2: float = 0.0,
        drop_path1: float = 0.0,
        drop_path2: float = 0.0,
        fused_dropout_add_ln: bool = False,
        return_residual: bool = False,
        residual_in_fp32: bool = False,
        sequence_parallel: bool = False,
        mark_shared_params: bool = False,
    ) -> None:
        super().__init__()
        if residual_in_fp32 and not prenorm:
            raise RequestError("got residual_in_fp32 with prenorm=False, takes prenorm=True: it hands no residual on")
        self.prenorm = prenorm
        self.fused_dropout_add_ln = fused_dropout_add_ln
        self.return_residual = return_residual
        self.residual_in_fp32 = residual_in_fp32
        mixer_cls = functools.partial(MHA, num_heads=dim // 64) if mixer_cls is None else mixer_cls
        mlp_cls = functools.partial(Mlp, hidden_features=4 * dim) if mlp_cls is None else mlp_cls
        self.mixer = mixer_cls(dim)
        self.dropout1 = dropout_cls(resid_dropout1)
        self.drop_path1 = StochasticDepth(drop_path1)
        self.norm1 = norm_cls(dim)
        self.mlp = mlp_cls(dim)
        norms = [self.norm1]
        if not isinstance(self.mlp, nn.Identity):
            self.dropout2 = dropout_cls(resid_dropout2)
            self.drop_path2 = StochasticDepth(drop_path2)
            self.norm2 = norm_cls(dim)
            norms.append(self.norm2)
        self._check_fused(*norms, dropout=self.dropout1)
        self._mark(sequence_parallel, mark_shared_params)

    def forward(
        self,
        hidden_states: Tensor,
        residual: Tensor | None = None,
        mixer_subset: Any = None,
        mixer_kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """`mixer_subset` says which tokens ask, where the mixer is cross-attention; only they are handed on."""
        options = dict(mixer_kwargs or {})
        if not self.prenorm:
            if residual is not None or mixer_subset is not None:
                raise RequestError("got a residual or mixer_subset with prenorm=False, takes neither: leave them out")
            return self._after(hidden_states, options)
        hidden_states, residual = self._add_norm(hidden_states, residual, self.norm1, self.dropout1, self.drop_path1)
        if mixer_subset is not None:
            options["mixer_subset"] = mixer_subset
            residual = residual[:, mixer_subset]
        hidden_states = self.mixer(hidden_states, **options)
        if not isinstance(self.mlp, nn.Identity):
            hidden_states, residual = self._add_norm(
                hidden_states, residual, self.norm2, self.dropout2, self.drop_path2
            )
            hidden_states = self.mlp(hidden_states)
        return hidden_states, residual

    def _after(self, x: Tensor, options: dict[str, Any]) -> Tensor:
        out = self.mixer(x, **options)
        out, x = out if self.return_residual else (out, x)
        x, _ = self._add_norm(out, x, self.norm1, self.dropout1, self.drop_path1)
        if isinstance(self.mlp, nn.Identity):
            return x
        out = self.mlp(x)
        out, x = out if self.return_residual else (out, x)
        return self._add_norm(out, x, self.norm2, self.dropout2, self.drop_path2)[0]


class ParallelBlock(_Blocks):
    """A block whose mixer and MLP read the same sum, as in GPT-J, GPT-NeoX and PaLM.

    It returns what both gave and the residual, for the next block to add up.
    """

    def __init__(
        self,
        dim: int,
        mixer_cls: Make | None = None,
        mlp_cls: Make | None = None,
        norm_cls: Make = nn.LayerNorm,
        dropout_cls: Make = nn.Dropout,
        resid_dropout1: float = 0.0,
        resid_dropout2: float = 0.0,
        tied_norm: bool = False,
        fused_dropout_add_ln: bool = False,
        residual_in_fp32: bool = False,
        sequence_parallel: bool = False,
        mark_shared_params: bool = False,
    ) -> None:
        super().__init__()
        if fused_dropout_add_ln and resid_dropout1 != resid_dropout2:
            raise RequestError(
                f"got resid_dropout1={resid_dropout1} and resid_dropout2={resid_dropout2} with fused_dropout_add_ln,"
                " takes one share for both there: or fused_dropout_add_ln=False"
            )
        self.tied_norm = tied_norm
        self.fused_dropout_add_ln = fused_dropout_add_ln
        self.residual_in_fp32 = residual_in_fp32
        mixer_cls = functools.partial(MHA, num_heads=dim // 64) if mixer_cls is None else mixer_cls
        mlp_cls = functools.partial(Mlp, hidden_features=4 * dim) if mlp_cls is None else mlp_cls
        self.mixer = mixer_cls(dim)
        self.dropout1 = dropout_cls(resid_dropout1)
        self.norm1 = norm_cls(dim)
        self.mlp = mlp_cls(dim)
        self.dropout2 = dropout_cls(resid_dropout2)
        if not tied_norm:
            self.norm2 = norm_cls(dim)
        self._check_fused(self.norm1, dropout=self.dropout1)
        self._mark(sequence_parallel, mark_shared_params)

    def forward(
        self,
        hidden_states1: Tensor,
        hidden_states2: Tensor | None = None,
        residual: Tensor | None = None,
        mixer_kwargs: Mapping[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What the mixer and the MLP of the block before gave; the first block is given one tensor."""
        if self.fused_dropout_add_ln:
            hidden_states1, hidden_states2, residual = self._fused(hidden_states1, hidden_states2, residual)
        else:
            total = self.dropout1(hidden_states1)
            total = total if residual is None else residual + total
            total = total if hidden_states2 is None else total + self.dropout2(hidden_states2)
            hidden_states1, residual = self._norm(total, self.norm1)
            hidden_states2 = hidden_states1 if self.tied_norm else self._norm(total, self.norm2)[0]
        return self.mixer(hidden_states1, **(mixer_kwargs or {})), self.mlp(hidden_states2), residual

    def _fused(self, x: Tensor, x1: Tensor | None, residual: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The first norm, the second, and the sum."""
        norm2 = None if self.tied_norm else self.norm2
        first, *second, residual = layer_norm_fn(
            x,
            self.norm1.weight,
            self.norm1.bias,
            residual=residual,
            x1=x1,
            weight1=None if norm2 is None else norm2.weight,
            bias1=None if norm2 is None else norm2.bias,
            eps=self.norm1.eps,
            dropout_p=self.dropout1.p if self.training else 0.0,
            prenorm=True,
            residual_in_fp32=self.residual_in_fp32,
            is_rms_norm=isinstance(self.norm1, RMSNorm),
        )
        return first, (second[0] if second else first), residual

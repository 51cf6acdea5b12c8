"""How tokens divide into sequences, and how a model is asked about them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from headway import RequestError
from headway_apps.proteins.diffusion.given import insist, tokens_given

Model: TypeAlias = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""model(tokens, sigma_bar, lengths) -> log scores: tokens (T,), sigma_bar (N,), lengths (N,) -> (T, V), sequences
packed end to end; or tokens (B, L), sigma_bar (B,), lengths None -> (B, L, V)."""


@dataclasses.dataclass(frozen=True, eq=False)
class Sequences:
    """Tokens (B, L), or (T,) with the lengths of the sequences packed in them. Inside, all are flat: (T,)."""

    shape: torch.Size
    lengths: Tensor | None
    document: Tensor
    """The sequence of each token."""
    count: int

    @classmethod
    def of(cls, tokens: Tensor, lengths: Tensor | None) -> Sequences:
        ndim = 2 if lengths is None else 1
        if tokens_given(tokens).ndim != ndim:
            raise RequestError(
                f"got tokens {tuple(tokens.shape)} {'without' if lengths is None else 'with'} lengths;"
                " takes (B, L) without lengths, or (T,) with the lengths of the sequences packed in them"
            )
        if (tokens if lengths is None else lengths).shape[0] == 0:
            raise RequestError("got no sequence; takes one or more")
        if lengths is None:
            count, each = len(tokens), torch.full((len(tokens),), tokens.shape[1], device=tokens.device)
        else:
            if lengths.dtype != torch.int64 or lengths.ndim != 1:
                raise RequestError(f"got lengths {tuple(lengths.shape)} in {lengths.dtype}; takes int64 (N,)")
            count, each = len(lengths), lengths.to(tokens.device)
            insist(
                ((each >= 0).all() & (each.sum() == len(tokens))),
                f"takes lengths of 0 or more that add up to the {len(tokens)} tokens",
            )
        document = torch.arange(count, device=tokens.device).repeat_interleave(each, output_size=tokens.numel())
        return cls(tokens.shape, lengths, document, count)

    def ask(self, model: Model, tokens: Tensor, sigma_bar: Tensor) -> Tensor:
        """The model's log scores (T, V) of flat tokens (T,) at each sequence's `sigma_bar` (N,), given in float32."""
        scores = model(tokens.view(self.shape), sigma_bar.to(tokens.device, torch.float32), self.lengths)
        if scores.shape[:-1] != self.shape:
            raise RequestError(f"got log scores {tuple(scores.shape)} of tokens {tuple(self.shape)}; takes (..., V)")
        return scores.flatten(0, -2)

    def split(self, values: Tensor) -> list[Tensor]:
        """Flat values (T,), one tensor a sequence, on the CPU."""
        counts = torch.bincount(self.document.cpu(), minlength=self.count)
        return list(values.cpu().split(counts.tolist()))

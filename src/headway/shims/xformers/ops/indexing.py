"""Rows picked and added by index: what drops whole samples from a residual branch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def scaled_index_add(
    input: Tensor, index: Tensor, source: Tensor, scaling: Tensor | None = None, alpha: float = 1.0
) -> Tensor:
    """input[index] += alpha * scaling * source, in place, for indices that are all different."""
    return input.index_add_(0, index, (source if scaling is None else source * scaling).to(input.dtype), alpha=alpha)


def index_select_cat(sources: Sequence[Tensor], indices: Sequence[Tensor]) -> Tensor:
    """The picked rows of all sources, each (rows, columns), end to end in one axis.

    >>> index_select_cat([torch.eye(2), torch.ones(3, 1)], [torch.tensor([1]), torch.tensor([0, 2])])
    tensor([0., 1., 1., 1.])
    """
    return torch.cat([source[index.long()].flatten() for source, index in zip(sources, indices, strict=True)])

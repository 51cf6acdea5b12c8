"""flash_attn.bert_padding: filler taken out of padded batches, and put back.

What is left of a padded batch has a size that only its mask knows, so `unpad_input` and its kin wait for the device,
as they do there.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from headway.errors import RequestError
from headway.shims.insist import insist


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """The rows of `input` that `indices` names."""
    return input.index_select(0, indices)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """`values` as those rows of `first_axis_dim` rows, of which the others are 0."""
    return values.new_zeros(first_axis_dim, *values.shape[1:]).index_copy(0, indices.long(), values)


def index_first_axis_residual(input: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of `input` that `indices` names, and `input` itself."""
    return input.index_select(0, indices), input.view_as(input)


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """(batch, length, ...) without filler: the tokens, their indices, cu_seqlens, max_seqlen, tokens in use per row.

    `attention_mask` (batch, length) is 1 for a token; `unused_mask` is 1 for one that is kept but not in use.

    >>> unpad_input(torch.tensor([[7, 8, 0], [9, 0, 0]])[..., None], torch.tensor([[1, 1, 0], [1, 0, 0]]))[1:4]
    (tensor([0, 1, 3]), tensor([0, 2, 3], dtype=torch.int32), 2)
    """
    for name, mask in (("attention_mask", attention_mask), ("unused_mask", unused_mask)):
        if mask is not None and mask.shape != hidden_states.shape[:2]:
            raise RequestError(
                f"got {name} {list(mask.shape)} for hidden_states {list(hidden_states.shape)}, takes (batch, length)"
            )
        if mask is not None and mask.dtype != torch.bool:
            said = "-10000 or -inf for filler adds to scores; this is 1 for a token and 0 for filler: mask == 0"
            insist(((mask == 0) | (mask == 1)).all(), f"got {name} with other numbers than 0 and 1 ({said})")
    all_masks = attention_mask if unused_mask is None else attention_mask + unused_mask
    used = attention_mask.sum(-1, dtype=torch.int32)
    return (*_unpadded(hidden_states, all_masks, all_masks.sum(-1, dtype=torch.int32)), used)


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """As `unpad_input`, for rows that hold several sequences, whose lengths stand in the mask from the left.

    >>> rows = torch.zeros(2, 6, 1)
    >>> unpad_input_for_concatenated_sequences(rows, torch.tensor([[2, 3, 0, 0, 0, 0], [4, 0, 0, 0, 0, 0]]))[2:]
    (tensor([0, 2, 5, 9], dtype=torch.int32), 4)
    """
    if attention_mask_in_length.shape != hidden_states.shape[:2]:
        raise RequestError(
            f"got attention_mask_in_length {list(attention_mask_in_length.shape)} for hidden_states"
            f" {list(hidden_states.shape)}, takes (batch, length): the lengths of each row's sequences, then zeros"
        )
    lengths = attention_mask_in_length.flatten()
    at = torch.arange(attention_mask_in_length.shape[1], device=lengths.device)
    real = at < attention_mask_in_length.sum(-1, keepdim=True)
    return _unpadded(hidden_states, real, lengths[lengths != 0].to(torch.int32))


def _unpadded(hidden_states: Tensor, mask: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    indices = torch.nonzero(mask.flatten()).flatten()
    starts = pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    longest = int(lengths.max()) if lengths.numel() else 0
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices, starts, longest


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """(tokens, ...) as (batch, seqlen, ...), where `indices` say; filler is 0."""
    rows = index_put_first_axis(hidden_states, indices, batch * seqlen)
    return rows.view(batch, seqlen, *hidden_states.shape[1:])

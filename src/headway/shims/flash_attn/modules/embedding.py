"""flash_attn.modules.embedding: token, position and type embeddings under flash-attn's parameter names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from headway.shims.flash_attn.ops.fused_dense import check_one_process, refuse_parallel

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Device = torch.device | str | None


class GPT2Embeddings(nn.Module):
    """Tokens, and positions if max_position_embeddings > 0; with word_embed_proj_dim tokens are projected up."""

    def __init__(
        self,
        embed_dim: int,
        vocab_size: int,
        max_position_embeddings: int,
        padding_idx: int | None = None,
        word_embed_proj_dim: int | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        size = embed_dim if word_embed_proj_dim is None else word_embed_proj_dim
        self.word_embeddings = nn.Embedding(vocab_size, size, padding_idx=padding_idx, device=device, dtype=dtype)
        self.project_in = (
            None if word_embed_proj_dim is None else nn.Linear(size, embed_dim, bias=False, device=device, dtype=dtype)
        )
        self.max_position_embeddings = max_position_embeddings
        if max_position_embeddings > 0:
            self.position_embeddings = nn.Embedding(max_position_embeddings, embed_dim, device=device, dtype=dtype)

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """(batch, length) each; positions count from 0 unless given."""
        embeddings: Tensor = self.word_embeddings(input_ids)
        if self.project_in is not None:
            embeddings = self.project_in(embeddings)
        return _with_positions(self, embeddings, input_ids, position_ids)


class BertEmbeddings(nn.Module):
    """Tokens, positions if max_position_embeddings > 0, and types if type_vocab_size > 0."""

    def __init__(
        self,
        embed_dim: int,
        vocab_size: int,
        max_position_embeddings: int,
        type_vocab_size: int,
        padding_idx: int | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(vocab_size, embed_dim, padding_idx=padding_idx, device=device, dtype=dtype)
        self.max_position_embeddings = max_position_embeddings
        self.type_vocab_size = type_vocab_size
        if max_position_embeddings > 0:
            self.position_embeddings = nn.Embedding(max_position_embeddings, embed_dim, device=device, dtype=dtype)
        if type_vocab_size > 0:
            self.token_type_embeddings = nn.Embedding(type_vocab_size, embed_dim, device=device, dtype=dtype)

    def forward(
        self, input_ids: Tensor, position_ids: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """(batch, length) each; positions count from 0 and types are 0 unless given."""
        embeddings = _with_positions(self, self.word_embeddings(input_ids), input_ids, position_ids)
        if self.type_vocab_size > 0:
            types = torch.zeros_like(input_ids[:1]) if token_type_ids is None else token_type_ids
            embeddings = embeddings + self.token_type_embeddings(types)
        return embeddings


def _with_positions(module: Any, embeddings: Tensor, input_ids: Tensor, position_ids: Tensor | None) -> Tensor:
    """Without position embeddings position_ids are of no use, and may be given all the same, as in flash-attn."""
    if module.max_position_embeddings <= 0:
        return embeddings
    if position_ids is None:
        position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)
    return embeddings + module.position_embeddings(position_ids)  # type: ignore[no-any-return]


class VocabParallelEmbedding(nn.Embedding):
    """An embedding; refused with a process group, as its rows would lie on several processes."""

    def __init__(
        self,
        num_embeddings: int,
        *args: Any,
        process_group: ProcessGroup | None = None,
        padding_idx: int | None = None,
        **kwargs: Any,
    ) -> None:
        check_one_process("VocabParallelEmbedding", process_group)
        super().__init__(num_embeddings, *args, padding_idx=padding_idx, **kwargs)  # type: ignore[misc]
        self.process_group = process_group


class ColumnParallelEmbedding(nn.Embedding):
    """An embedding; refused with a process group, as its columns would lie on several processes."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *args: Any,
        process_group: ProcessGroup | None = None,
        **kwargs: Any,
    ) -> None:
        check_one_process("ColumnParallelEmbedding", process_group)
        super().__init__(num_embeddings, embedding_dim, *args, **kwargs)
        self.process_group = process_group


class ParallelGPT2Embeddings(nn.Module):
    """Refused: its weights would lie on several processes."""

    def __init__(
        self,
        embed_dim: int,
        vocab_size: int,
        max_position_embeddings: int,
        process_group: ProcessGroup,
        padding_idx: int | None = None,
        sequence_parallel: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        refuse_parallel("ParallelGPT2Embeddings")

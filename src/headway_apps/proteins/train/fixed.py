"""Fixed: batches one after the other in the same tensors, of one shape whatever the batch."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from headway import Documents, RequestError
from headway_apps.proteins.model.packed import Packed
from headway_apps.proteins.train.objective import Noised


@dataclasses.dataclass(frozen=True, eq=False)
class Fixed:
    """Room for `tokens` tokens in `documents` documents. Filler stands in documents of its own and costs nothing."""

    noised: Noised
    """Views of nothing else: what is written here stays in place."""
    starts: Tensor
    """(documents + 1,) where each begins; those that are not used are empty, at the end."""
    longest: int
    """No document is longer, filler neither."""

    @classmethod
    def room(cls, tokens: int, documents: int, longest: int, like: Noised) -> Fixed:
        """For batches such as `like`, on its device."""
        return cls(
            Noised(
                tokens=like.tokens.new_zeros(tokens),
                clean=like.clean.new_zeros(tokens),
                free=like.free.new_zeros(tokens),
                level=like.level.new_ones(documents),
                weights=tuple(each.new_zeros(tokens) for each in like.weights),
            ),
            torch.zeros(documents + 1, dtype=torch.int32, device=like.tokens.device),
            longest,
        )

    @property
    def documents(self) -> int:
        return self.starts.numel() - 1

    def fill(self, batch: Noised, lengths: Tensor) -> None:
        """Put a batch in; its lengths are on the host, and nothing waits for the device."""
        starts = self._starts(lengths)
        room = self.noised
        tokens, documents = batch.tokens.numel(), lengths.numel()
        for to, values in zip(room.of_tokens, batch.of_tokens, strict=True):
            to[:tokens].copy_(values)
            to[tokens:].zero_()
        room.level[:documents].copy_(batch.level)
        room.level[documents:].fill_(1.0)
        self.starts.copy_(starts.pin_memory() if self.starts.is_cuda else starts, non_blocking=True)

    def _starts(self, lengths: Tensor) -> Tensor:
        total = self.noised.tokens.numel()
        ends = lengths.cumsum(0)
        filler = torch.tensor(range(int(ends[-1]), total, self.longest), dtype=torch.int32)
        needed = lengths.numel() + filler.numel()
        if needed > self.documents or int(ends[-1]) > total or int(lengths.max()) > self.longest:
            raise RequestError(
                f"got {lengths.numel()} documents of {int(ends[-1])} tokens, the longest {int(lengths.max())}, takes"
                f" {self.documents} with their filler, of {total} tokens in all and of {self.longest} at most"
            )
        starts = torch.full((self.documents + 1,), total, dtype=torch.int32)
        starts[0] = 0
        starts[1 : lengths.numel() + 1] = ends
        starts[lengths.numel() : needed] = filler
        return starts

    def packed(self) -> Packed:
        """Where each token belongs, by what stands in `starts` when this runs."""
        total = self.noised.tokens.numel()
        mask = Documents.from_cu_seqlens(self.starts, longest=self.longest, total=total)
        document = mask.queries.ids(total, self.starts.device).long()
        return Packed(
            document=document,
            positions=torch.arange(total, device=self.starts.device) - self.starts[document],
            documents=self.documents,
            longest=self.longest,
            mask=mask,
            places=None,
            is_rows=False,
        )

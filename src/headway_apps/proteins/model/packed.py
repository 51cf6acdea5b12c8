"""Packed: documents laid end to end, as all layers of the network share them."""

from __future__ import annotations

import dataclasses
import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

import headway
from headway import Documents, Mask, Padding, RequestError


@dataclasses.dataclass(frozen=True, eq=False)
class Packed:
    """Where each token of a packed batch belongs. Made once a batch, of lengths on the host, and used by every layer.

    >>> packed = Packed.of(torch.tensor([2, 3]), torch.empty(1, 1, 5, 8))
    >>> packed.document, packed.positions
    (tensor([0, 0, 1, 1, 1]), tensor([0, 1, 0, 1, 2]))
    """

    document: Tensor
    """The document of each token, (T,)."""
    positions: Tensor
    """Each token's place in its document, (T,)."""
    documents: int
    longest: int
    mask: Mask
    places: Tensor | None
    """Each token's place in rows of a batch, (T,), where attention runs over rows."""
    is_rows: bool
    """Whether all documents are of one length, and so rows of a batch as they lie."""
    filler: int = 0
    """Tokens of more documents for attention, where its kernel is compiled for each length: it meets few lengths."""

    @classmethod
    def of(cls, lengths: Tensor, like: Tensor, *, traced: bool = False) -> Packed:
        """For queries such as `like`, (1, heads, T, size). Lengths on a GPU are read once here, which waits for it.
        `traced` says that attention will be part of a larger program, in which T is a symbol.

        Where no kernel knows documents, as on CPU and on GPUs before sm80, a mask of them would be a square of all
        tokens. There they meet as rows of a batch with filler, unless some are so much longer that this were more work.
        """
        total = like.shape[2]
        counts = _counts(lengths, total)
        longest, device = max(counts), like.device
        host = torch.tensor(counts)
        starts = host.cumsum(0) - host
        # Made on the host and sent in one piece each: nothing waits for the device.
        document = torch.arange(len(counts)).repeat_interleave(host)
        positions = torch.arange(total) - starts[document]
        documents = Documents(counts)
        knows = _knowing(documents, like)
        mask: Mask = documents
        places, filler = None, 0
        if knows == "flex" and total and not traced:
            filler = _rounded(total) - total
            mask = Documents([*counts, *([longest] * (filler // longest)), filler % longest])
        elif knows is None and len(counts) * longest**2 <= total**2:
            mask, places = Padding(host), (document * longest + positions).to(device, non_blocking=True)
        document, positions = (x.to(device, non_blocking=True) for x in (document, positions))
        return cls(document, positions, len(counts), longest, mask, places, min(counts) == longest, filler)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(1, heads, T, size) each; a token sees its own document alone."""
        if self.places is None:
            if self.filler:
                q, k, v = (F.pad(x, (0, 0, 0, self.filler)) for x in (q, k, v))
            return headway.attention(q, k, v, self.mask)[:, :, : len(self.document)]
        q, k, v = (self._rows(x, self.places) for x in (q, k, v))
        rows = headway.attention(q, k, v, self.mask).transpose(1, 2)
        return rows.flatten(0, 1).index_select(0, self.places).transpose(0, 1)[None]

    def _rows(self, x: Tensor, places: Tensor) -> Tensor:
        """(1, heads, T, size) as (documents, heads, longest, size), with zeros for filler."""
        tokens = x[0].transpose(0, 1)
        rows = tokens.new_zeros(self.documents * self.longest, *tokens.shape[1:]).index_copy(0, places, tokens)
        return rows.view(self.documents, self.longest, *tokens.shape[1:]).transpose(1, 2)

    def spread(self, values: Tensor) -> Tensor:
        """What each document has, (documents, ...), at each of its tokens, (1, T, ...)."""
        return _Spread.apply(values, self.document)[None]  # type: ignore[no-untyped-call, no-any-return]


def _counts(lengths: Tensor, total: int) -> list[int]:
    """The lengths as numbers, checked."""
    if lengths.ndim != 1 or lengths.dtype not in (torch.int64, torch.int32) or not lengths.numel():
        raise RequestError(f"got lengths {list(lengths.shape)} {lengths.dtype}, takes one int64 per document, (N,)")
    counts = cast(list[int], lengths.tolist())
    if min(counts) < 0:
        raise RequestError(f"got a document of length {min(counts)}, takes lengths of 0 or more")
    if sum(counts) != total:
        raise RequestError(f"got documents of {sum(counts)} tokens in all for {total} tokens, takes all of them")
    return counts


def _knowing(documents: Documents, like: Tensor) -> str | None:
    """The backend attention over these tokens would run on, if it takes documents as they are."""
    decision = headway.explain(like, like, like, documents)
    native = decision.chosen is not None and decision.chosen.masks.is_native(decision.request.mask)
    return decision.chosen.name if decision.chosen is not None and native else None


def _rounded(tokens: int) -> int:
    """64, 128, 192, 256, 384 ...: few numbers, and of many tokens no more than half as many again."""
    step = max(LEAST_STEP, 1 << max(tokens.bit_length() - 2, 0))
    return step * math.ceil(tokens / step)


LEAST_STEP = 64
PACKED = frozenset({"flash2", "flash3", "flash4", "torch-varlen"})
"""Kernels that read where documents begin from the device, at each call. Others compile for it, or read it first."""


def not_recordable(documents: Documents, like: Tensor) -> str | None:
    """Why attention over these tokens cannot be part of a CUDA graph that is used for other documents too."""
    decision = headway.explain(like, like, like, documents)
    if decision.chosen is not None and decision.chosen.name in PACKED:
        return None
    chosen = "no backend" if decision.chosen is None else decision.chosen.name
    dtype = str(decision.request.dtype).removeprefix("torch.")
    return f"in {dtype} by {chosen} ({decision.why}), takes one of {', '.join(sorted(PACKED))}"


class _Spread(torch.autograd.Function):
    """values[document], whose gradient is one product with the documents' indicator.

    Summed so it is accumulated in float32 and in one order, where an indexing's own gradient adds each token's to one
    of few rows: slow where many threads meet there, in any order, and in bfloat16 no more than 256 of them count.
    """

    @staticmethod
    def forward(values: Tensor, document: Tensor) -> Tensor:
        return values.index_select(0, document)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        values, document = inputs
        ctx.save_for_backward(document)
        ctx.count = values.shape[0]  # type: ignore[attr-defined]

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        (document,) = ctx.saved_tensors  # type: ignore[attr-defined]
        belongs = document == torch.arange(ctx.count, device=document.device)[:, None]  # type: ignore[attr-defined]
        return (belongs.to(grad.dtype) @ grad.flatten(1)).unflatten(1, grad.shape[1:]), None

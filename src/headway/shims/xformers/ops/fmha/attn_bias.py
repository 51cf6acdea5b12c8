"""xFormers' biases: values that say which key each query may attend to.

`materialize` writes one out as numbers to add to scores, by its definition and for whoever wants to look; attention
itself never does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from headway.errors import RequestError
from headway.masks.documents import documents_of
from headway.shims.xformers.ops.fmha.seqinfo import _GappySeqInfo, _PaddedSeqLenInfo, _SeqLenInfo, default_device

Device = str | torch.device
Sides = tuple[int | None, int | None, bool]
"""How far left and right of the diagonal a query sees, None for any distance, and whether the last query's diagonal
ends at the last key (else the first query's starts at the first)."""


class AttentionBias:
    """What all biases are."""

    def materialize(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, device: Device = "cpu") -> Tensor:
        """Numbers of `shape`, (..., queries, keys): 0 where attention may go, -inf elsewhere."""
        raise NotImplementedError


def _written(keep: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.where(keep, torch.zeros(*shape[:-2], *keep.shape, dtype=dtype, device=keep.device), float("-inf"))


def _near(step: Tensor, sides: Sides) -> Tensor:
    """Where a key that lies `step` to the right of its query's diagonal may be seen."""
    left, right, _ = sides
    keep = torch.ones_like(step, dtype=torch.bool)
    if left is not None:
        keep &= step >= -left
    return keep if right is None else keep & (step <= right)


# -- one band over all queries and keys -------------------------------------------------------------------------------


class _Band(AttentionBias):
    """A band around one diagonal."""

    def _sides(self) -> Sides:
        raise NotImplementedError

    def to(self: Any, device: Device) -> Any:
        del device  # there is nothing to move
        return self

    def materialize(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, device: Device = "cpu") -> Tensor:
        queries, keys = shape[-2:]
        step = torch.arange(keys, device=device) - torch.arange(queries, device=device)[:, None]
        sides = self._sides()
        return _written(_near(step - (keys - queries if sides[2] else 0), sides), shape, dtype)


class LowerTriangularMask(_Band):
    """Causal: query i sees keys 0 to i."""

    def __init__(self, device: torch.device | None = None) -> None:
        del device  # as there: for callers of long ago

    def _sides(self) -> Sides:
        return None, 0, False

    def add_bias(self, bias: Tensor) -> LowerTriangularMaskWithTensorBias:
        return LowerTriangularMaskWithTensorBias(bias)


class LowerTriangularMaskWithTensorBias(LowerTriangularMask):
    """Causal, and numbers to add."""

    def __init__(self, bias: Tensor) -> None:
        self._bias = bias

    def to(self, device: Device) -> LowerTriangularMaskWithTensorBias:
        return type(self)(self._bias.to(device))

    def materialize(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, device: Device = "cpu") -> Tensor:
        return super().materialize(shape, dtype, device) + self._bias


class LowerTriangularFromBottomRightMask(_Band):
    """Causal, where the last query sees the last key."""

    def _sides(self) -> Sides:
        return None, 0, True

    def make_local_attention(self, window_size: int) -> LowerTriangularFromBottomRightLocalAttentionMask:
        return LowerTriangularFromBottomRightLocalAttentionMask(window_size)


@dataclass
class LowerTriangularFromBottomRightLocalAttentionMask(LowerTriangularFromBottomRightMask):
    """The last `window_size` keys that LowerTriangularFromBottomRightMask shows."""

    _window_size: int

    def __post_init__(self) -> None:
        _check_window(self._window_size)

    def _sides(self) -> Sides:
        return self._window_size - 1, 0, True


@dataclass
class LocalAttentionFromBottomRightMask(_Band):
    """Keys from `window_left` before to `window_right` after, where the last query meets the last key."""

    window_left: int
    window_right: int

    def __post_init__(self) -> None:
        for name in ("window_left", "window_right"):
            if getattr(self, name) < 0:
                raise RequestError(f"got {name}={getattr(self, name)}, takes 0 or more")

    def _sides(self) -> Sides:
        return self.window_left, self.window_right, True


def _check_window(size: int) -> None:
    if size <= 0:
        raise RequestError(f"got window_size={size}, takes 1 or more: 1 shows a query the key on its diagonal")


# -- blocks: each block of queries sees its own block of keys ---------------------------------------------------------

Blocks = TypeVar("Blocks", bound="_Blocks")


def block_of(edges: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The block that each of `count` positions is in, by where blocks start and end; and the positions."""
    positions = torch.arange(count, device=edges.device, dtype=torch.int32)
    return documents_of(positions, edges), positions


@dataclass
class _Blocks(AttentionBias):
    """Queries end to end, and for each block of them a block of keys."""

    q_seqinfo: _SeqLenInfo
    k_seqinfo: Any

    def _sides(self) -> Sides:
        return None, None, False

    def to(self: Blocks, device: Device) -> Blocks:
        moved = {name: value.to(device) if hasattr(value, "to") else value for name, value in vars(self).items()}
        changed = any(value is not vars(self)[name] for name, value in moved.items())
        return type(self)(**moved) if changed else self

    def _key_spans(self) -> tuple[Tensor, Tensor]:
        """Where each block's keys start, and how many there are."""
        starts = self.k_seqinfo.seqstart
        return starts[:-1], starts.diff()

    def _keep(self, queries: int, columns: Tensor) -> Tensor:
        """What each query sees, of keys that have the number `columns` says, (blocks, keys), in each block."""
        device = columns.device
        edges, counts = self.q_seqinfo.seqstart.to(device), self._key_spans()[1].to(device)
        block, rows = block_of(edges, queries)
        sides, diagonal = self._sides(), rows - edges[block]
        if sides[2]:
            diagonal = diagonal + (counts - edges.diff())[block]
        column = columns[block]
        return (column >= 0) & (column < counts[block, None]) & _near(column - diagonal[:, None], sides)

    def _check_shape(self, queries: int, keys: int) -> None:
        fits = self.q_seqinfo.seqstart_py[-1], self.k_seqinfo.seqstart_py[-1]
        if (queries, keys) != fits:
            raise RequestError(f"got {queries} queries and {keys} keys, takes the {fits[0]} and {fits[1]} of this bias")

    def materialize(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, device: Device = "cpu") -> Tensor:
        self._check_shape(*shape[-2:])
        columns = torch.arange(shape[-1], device=device) - self._key_spans()[0].to(device)[:, None]
        return _written(self._keep(shape[-2], columns), shape, dtype)


@dataclass
class BlockDiagonalMask(_Blocks):
    """Sequences end to end, queries and keys alike, none of which sees another.

    >>> mask, x = BlockDiagonalMask.from_tensor_list([torch.zeros(1, 3, 8), torch.zeros(2, 2, 8)])
    >>> x.shape, [part.shape for part in mask.split(x)]
    (torch.Size([1, 7, 8]), [torch.Size([1, 3, 8]), torch.Size([2, 2, 8])])
    """

    k_seqinfo: _SeqLenInfo
    _batch_sizes: Sequence[int] | None = None

    @classmethod
    def from_seqlens(
        cls, q_seqlen: Sequence[int], kv_seqlen: Sequence[int] | None = None, *, device: torch.device | None = None
    ) -> BlockDiagonalMask:
        queries = _SeqLenInfo.from_seqlens(q_seqlen, device=device)
        if kv_seqlen is None or list(kv_seqlen) == list(q_seqlen):
            return cls(queries, queries)
        _check_blocks(q_seqlen, kv_seqlen)
        return cls(queries, _SeqLenInfo.from_seqlens(kv_seqlen, device=device))

    @classmethod
    def from_tensor_list(cls, tensors: Sequence[Tensor]) -> tuple[BlockDiagonalMask, Tensor]:
        """The mask of tensors (batch, length, ...) laid end to end, and they themselves so."""
        mask = cls.from_seqlens([x.shape[1] for x in tensors for _ in range(x.shape[0])])
        mask._batch_sizes = [x.shape[0] for x in tensors]
        return mask, _end_to_end(tensors)

    @classmethod
    def from_tensor_lists_qkv(
        cls, tensors_q: Sequence[Tensor], tensors_k: Sequence[Tensor], tensors_v: Sequence[Tensor] | None = None
    ) -> tuple[BlockDiagonalMask, Tensor, Tensor, Tensor | None]:
        for given in (tensors_k, tensors_k if tensors_v is None else tensors_v):
            if [x.shape[0] for x in given] != [x.shape[0] for x in tensors_q]:
                raise RequestError("got lists of other batches for q, k and v, takes one list entry for one of each")
        if tensors_v is not None and [v.shape[1] for v in tensors_v] != [k.shape[1] for k in tensors_k]:
            raise RequestError("got values of other lengths than keys, takes one value for each key")
        q_lens, k_lens = ([x.shape[1] for x in given for _ in range(x.shape[0])] for given in (tensors_q, tensors_k))
        mask = cls.from_seqlens(q_lens, k_lens)
        mask._batch_sizes = [x.shape[0] for x in tensors_q]
        values = None if tensors_v is None else _end_to_end(tensors_v)
        return mask, _end_to_end(tensors_q), _end_to_end(tensors_k), values

    def split_queries(self, tensor: Tensor) -> Sequence[Tensor]:
        return self.q_seqinfo.split(tensor, self._batch_sizes)

    def split_kv(self, tensor: Tensor) -> Sequence[Tensor]:
        return self.k_seqinfo.split(tensor, self._batch_sizes)

    def split(self, tensor: Tensor) -> Sequence[Tensor]:
        """What `from_tensor_list` laid end to end, apart again."""
        if self.q_seqinfo is not self.k_seqinfo:
            raise RequestError("got queries and keys of other lengths, takes one: use split_queries or split_kv")
        return self.split_queries(tensor)

    def make_causal(self) -> BlockDiagonalCausalMask:
        return BlockDiagonalCausalMask(self.q_seqinfo, self.k_seqinfo, self._batch_sizes)

    def make_causal_from_bottomright(self) -> BlockDiagonalCausalFromBottomRightMask:
        return BlockDiagonalCausalFromBottomRightMask(self.q_seqinfo, self.k_seqinfo, self._batch_sizes)

    def make_local_attention(self, window_size: int) -> BlockDiagonalCausalLocalAttentionMask:
        return BlockDiagonalCausalLocalAttentionMask(
            self.q_seqinfo, self.k_seqinfo, self._batch_sizes, _window_size=window_size
        )

    def make_local_attention_from_bottomright(
        self, window_size: int
    ) -> BlockDiagonalCausalLocalAttentionFromBottomRightMask:
        return BlockDiagonalCausalLocalAttentionFromBottomRightMask(
            self.q_seqinfo, self.k_seqinfo, self._batch_sizes, _window_size=window_size
        )


def _check_blocks(queries: Sequence[int], keys: Sequence[int]) -> None:
    if len(queries) != len(keys):
        raise RequestError(f"got {len(queries)} blocks of queries and {len(keys)} of keys, takes as many of one")


def _end_to_end(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([x.flatten(0, 1)[None] for x in tensors], dim=1)


@dataclass
class BlockDiagonalCausalMask(BlockDiagonalMask):
    """Each block causal: its query i sees its keys 0 to i."""

    def _sides(self) -> Sides:
        return None, 0, False


@dataclass
class BlockDiagonalCausalFromBottomRightMask(BlockDiagonalMask):
    """Each block causal, where its last query sees its last key; no block has more queries than keys."""

    def __post_init__(self) -> None:
        for i, (queries, keys) in enumerate(_block_lengths(self)):
            if keys < queries:
                raise RequestError(
                    f"got {queries} queries and {keys} keys in block {i}, takes num_keys >= num_queries: the first"
                    " queries would see nothing"
                )

    def _sides(self) -> Sides:
        return None, 0, True


def _block_lengths(bias: BlockDiagonalMask) -> list[tuple[int, int]]:
    pairs = zip(bias.q_seqinfo.intervals(), bias.k_seqinfo.intervals(), strict=False)
    return [(q_end - q_start, k_end - k_start) for (q_start, q_end), (k_start, k_end) in pairs]


@dataclass
class BlockDiagonalCausalLocalAttentionMask(BlockDiagonalCausalMask):
    """The last `window_size` keys that BlockDiagonalCausalMask shows."""

    _window_size: int = 0

    def __post_init__(self) -> None:
        _check_window(self._window_size)
        for queries, keys in _block_lengths(self):
            if queries - self._window_size >= keys:
                raise RuntimeError(
                    f"got {queries} queries, {keys} keys and window_size={self._window_size} in a block, takes a window"
                    " that reaches a key from every query: No keys are attended"
                )

    def _sides(self) -> Sides:
        return self._window_size - 1, 0, False


@dataclass
class BlockDiagonalCausalLocalAttentionFromBottomRightMask(BlockDiagonalCausalFromBottomRightMask):
    """The last `window_size` keys that BlockDiagonalCausalFromBottomRightMask shows."""

    _window_size: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_window(self._window_size)

    def _sides(self) -> Sides:
        return self._window_size - 1, 0, True


# -- blocks of keys with gaps between them ----------------------------------------------------------------------------


@dataclass
class _KeysWithGaps(_Blocks):
    """Keys of a block start somewhere and are not all in use."""

    def _key_spans(self) -> tuple[Tensor, Tensor]:
        return self.k_seqinfo.seqstart[:-1], self.k_seqinfo.seqlen

    def _width(self) -> int:
        """The most keys that a block can have."""
        return int(self.k_seqinfo.max_seqlen)

    def _places(self, device: torch.device) -> Tensor | None:
        """Where the keys of each block lie, (blocks, width); None if the axis only has to be cut into blocks.

        What is no key of the block lies anywhere.
        """
        starts = self._key_spans()[0].to(device)
        return starts[:, None] + torch.arange(self._width(), device=device)

    def _keys_needed(self) -> int | None:
        """How many keys there have to be, if this bias knows."""
        return int(self.k_seqinfo.seqstart_py[-1])


@dataclass
class BlockDiagonalPaddedKeysMask(_KeysWithGaps):
    """Each block of keys is padded to one length, and the filler is seen by nobody."""

    k_seqinfo: _PaddedSeqLenInfo

    def _width(self) -> int:
        return self.k_seqinfo.padding

    def _places(self, device: torch.device) -> Tensor | None:
        return None

    @classmethod
    def from_seqlens(
        cls,
        q_seqlen: Sequence[int],
        kv_padding: int,
        kv_seqlen: Sequence[int],
        causal_diagonal: Any = None,
        *,
        device: torch.device | None = None,
    ) -> BlockDiagonalPaddedKeysMask:
        del causal_diagonal  # as there: for callers of long ago
        return cls(*_padded(q_seqlen, kv_padding, kv_seqlen, device))

    def make_paged(
        self, block_tables: Tensor, page_size: int, paged_type: type[PagedBlockDiagonalPaddedKeysMask]
    ) -> PagedBlockDiagonalPaddedKeysMask:
        keys = self.k_seqinfo
        room = block_tables.shape[1] * page_size
        keys = _PaddedSeqLenInfo(
            keys.seqstart, keys.max_seqlen, keys.min_seqlen, keys.seqstart_py, keys.seqlen, keys.seqlen_py, room
        )
        return paged_type(self.q_seqinfo, keys, block_tables, page_size)

    def make_local_attention(self, window_left: int, window_right: int) -> BlockDiagonalLocalAttentionPaddedKeysMask:
        return BlockDiagonalLocalAttentionPaddedKeysMask(self.q_seqinfo, self.k_seqinfo, window_left, window_right)


def _padded(
    queries: Sequence[int], padding: int, keys: Sequence[int], device: torch.device | None = None
) -> tuple[_SeqLenInfo, _PaddedSeqLenInfo]:
    _check_blocks(queries, keys)
    return (
        _SeqLenInfo.from_seqlens(queries, device=device),
        _PaddedSeqLenInfo.from_seqlens_padded(keys, padding, device=device),
    )


@dataclass
class BlockDiagonalCausalWithOffsetPaddedKeysMask(BlockDiagonalPaddedKeysMask):
    """Padded keys, each block causal: its last query sees its last real key."""

    causal_diagonal: Any = None  # as there: for callers of long ago

    def _sides(self) -> Sides:
        return None, 0, True


@dataclass
class BlockDiagonalLocalAttentionPaddedKeysMask(BlockDiagonalPaddedKeysMask):
    """Padded keys, and in each block a window around where its last query meets its last real key."""

    window_left: int
    window_right: int

    def _sides(self) -> Sides:
        return self.window_left, self.window_right, True

    @classmethod
    def from_seqlens_local(
        cls,
        q_seqlen: Sequence[int],
        kv_padding: int,
        kv_seqlen: Sequence[int],
        window_left: int,
        window_right: int,
    ) -> BlockDiagonalLocalAttentionPaddedKeysMask:
        return cls(*_padded(q_seqlen, kv_padding, kv_seqlen), window_left, window_right)


@dataclass
class BlockDiagonalCausalLocalAttentionPaddedKeysMask(BlockDiagonalPaddedKeysMask):
    """The last `window_size` keys that BlockDiagonalCausalWithOffsetPaddedKeysMask shows."""

    _window_size: int

    def _sides(self) -> Sides:
        return self._window_size - 1, 0, True

    @classmethod
    def from_seqlens_local(
        cls, q_seqlen: Sequence[int], kv_padding: int, kv_seqlen: Sequence[int], window_size: int
    ) -> BlockDiagonalCausalLocalAttentionPaddedKeysMask:
        return cls(*_padded(q_seqlen, kv_padding, kv_seqlen), window_size)


@dataclass
class BlockDiagonalGappyKeysMask(_KeysWithGaps):
    """Each block of keys lies anywhere."""

    k_seqinfo: _GappySeqInfo

    @classmethod
    def from_seqlens(
        cls,
        q_seqlen: Sequence[int],
        kv_seqstarts: Sequence[int],
        kv_seqlen: Sequence[int],
        *,
        device: torch.device | None = None,
    ) -> BlockDiagonalGappyKeysMask:
        _check_blocks(q_seqlen, kv_seqlen)
        device = default_device(device)
        keys = _GappySeqInfo.from_seqlens_gappy(kv_seqstarts, kv_seqlen, False, device=device)
        return cls(_SeqLenInfo.from_seqlens(q_seqlen, device=device), keys)

    def make_paged(
        self,
        block_tables: Tensor,
        page_size: int,
        notional_padding: int,
        paged_type: type[PagedBlockDiagonalGappyKeysMask],
    ) -> AttentionBias:
        """The same keys in pages, if block i lies from i * `notional_padding` on; no device is waited for."""
        if notional_padding % page_size:
            raise RequestError(f"got notional_padding={notional_padding}, takes multiples of page_size={page_size}")
        keys, room = self.k_seqinfo, block_tables.shape[1] * page_size
        starts = [start - i * notional_padding for i, start in enumerate(keys.seqstart_py[:-1])]
        if not all(0 <= start < room for start in starts) or keys.max_seqlen > room:
            raise RequestError(f"got blocks from {starts} in their pages, takes starts and lengths within {room} keys")
        count = len(starts)
        shift = torch.arange(count, device=keys.seqstart.device, dtype=torch.int32) * notional_padding
        seqstart = torch.nn.functional.pad(keys.seqstart[:-1] - shift, (0, 1), value=-1)
        ends = [start + length for start, length in zip(starts, keys.seqlen_py, strict=True)]
        info = _GappySeqInfo(
            seqstart, keys.max_seqlen, keys.min_seqlen, [*starts, -1], keys.seqlen + seqstart[:-1], ends
        )
        return paged_type(self.q_seqinfo, info, block_tables, page_size)


@dataclass
class BlockDiagonalCausalWithOffsetGappyKeysMask(BlockDiagonalGappyKeysMask):
    """Keys anywhere, each block causal: its last query sees its last key."""

    def _sides(self) -> Sides:
        return None, 0, True


# -- keys in pages ----------------------------------------------------------------------------------------------------


@dataclass
class _PagedKeys(_KeysWithGaps):
    """Keys in pages of one pool: row i of `block_tables` names the pages of block i, in order."""

    block_tables: Tensor
    page_size: int

    _UNPAGED_TYPE: ClassVar[type[_KeysWithGaps]]

    def _sides(self) -> Sides:
        return self._UNPAGED_TYPE._sides(self)

    def _width(self) -> int:
        return int(self.block_tables.shape[1]) * self.page_size

    def _keys_needed(self) -> int | None:
        return None  # only the device knows which page is the last

    def _at(self, keys: Tensor) -> Tensor:
        """Where keys, counted from the first of each block's pages, lie in the pool: (blocks, keys)."""
        tables = self.block_tables.to(keys.device).long()
        pages = tables.gather(1, (keys // self.page_size).clamp(0, tables.shape[1] - 1))
        return pages * self.page_size + keys % self.page_size

    def _places(self, device: torch.device) -> Tensor | None:
        starts = self._key_spans()[0].to(device)
        return self._at(starts[:, None] + torch.arange(self._width(), device=device))

    def materialize(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, device: Device = "cpu") -> Tensor:
        """`shape` counts keys as if each block's pages had a place of their own; the answer has those of the pool."""
        fits = self.q_seqinfo.seqstart_py[-1], len(self.block_tables) * self._width()
        if tuple(shape[-2:]) != fits:
            raise RequestError(f"got {list(shape)}, takes (..., {fits[0]}, {fits[1]}): queries, and pages x page_size")
        starts = self._key_spans()[0].to(device)[:, None]
        columns = torch.arange(self._width(), device=device) - starts
        keep, places = self._keep(shape[-2], columns), self._at(columns + starts)
        block, _ = block_of(self.q_seqinfo.seqstart.to(device), shape[-2])
        pool = torch.zeros(shape[-2], (int(self.block_tables.max()) + 1) * self.page_size, device=device)
        return _written(pool.scatter_add_(1, places[block], keep.float()) > 0, shape, dtype)


@dataclass
class PagedBlockDiagonalPaddedKeysMask(_PagedKeys):
    """BlockDiagonalPaddedKeysMask with keys in pages."""

    k_seqinfo: _PaddedSeqLenInfo

    _UNPAGED_TYPE = BlockDiagonalPaddedKeysMask

    def _key_spans(self) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(self.k_seqinfo.seqlen), self.k_seqinfo.seqlen

    @classmethod
    def from_seqlens(
        cls,
        q_seqlen: Sequence[int],
        kv_seqlen: Sequence[int],
        block_tables: Tensor,
        page_size: int,
        *,
        device: torch.device | None = None,
    ) -> PagedBlockDiagonalPaddedKeysMask:
        infos = _padded(q_seqlen, block_tables.shape[1] * page_size, kv_seqlen, device)
        return cls(*infos, block_tables, page_size)


@dataclass
class PagedBlockDiagonalCausalWithOffsetPaddedKeysMask(PagedBlockDiagonalPaddedKeysMask):
    """BlockDiagonalCausalWithOffsetPaddedKeysMask with keys in pages."""

    _UNPAGED_TYPE = BlockDiagonalCausalWithOffsetPaddedKeysMask


@dataclass
class PagedBlockDiagonalGappyKeysMask(_PagedKeys):
    """BlockDiagonalGappyKeysMask with keys in pages; each block's keys start so many after its first page does."""

    k_seqinfo: _GappySeqInfo

    _UNPAGED_TYPE = BlockDiagonalGappyKeysMask

    def _key_spans(self) -> tuple[Tensor, Tensor]:
        starts = self.k_seqinfo.seqstart[:-1]
        return starts, self.k_seqinfo.seqlen - starts

    @classmethod
    def from_seqlens(
        cls,
        q_seqlen: Sequence[int],
        kv_seqstarts: Sequence[int],
        kv_seqlen: Sequence[int],
        block_tables: Tensor,
        page_size: int,
        *,
        device: torch.device | None = None,
    ) -> PagedBlockDiagonalGappyKeysMask:
        _check_blocks(q_seqlen, kv_seqlen)
        device = block_tables.device if device is None else device
        keys = _GappySeqInfo.from_seqlens_gappy(kv_seqstarts, kv_seqlen, True, device=device)
        return cls(_SeqLenInfo.from_seqlens(q_seqlen, device=device), keys, block_tables, page_size)


@dataclass
class PagedBlockDiagonalCausalWithOffsetGappyKeysMask(PagedBlockDiagonalGappyKeysMask):
    """BlockDiagonalCausalWithOffsetGappyKeysMask with keys in pages."""

    _UNPAGED_TYPE = BlockDiagonalCausalWithOffsetGappyKeysMask


VARLEN_BIASES = (
    BlockDiagonalMask,
    BlockDiagonalGappyKeysMask,
    BlockDiagonalPaddedKeysMask,
    PagedBlockDiagonalPaddedKeysMask,
    PagedBlockDiagonalGappyKeysMask,
)

BIASES = tuple(
    kind
    for name, kind in list(vars().items())
    if isinstance(kind, type)
    and issubclass(kind, AttentionBias)
    and not name.startswith("_")
    and name != "AttentionBias"
)
"""All that attention takes."""

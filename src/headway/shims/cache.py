"""Caches of keys and values as flash_attn has them: in rows or in pages, written in place.

What lies in a cache beyond its ends is anything, NaN among it, which not even a weight of 0 would silence: so it is
read as 0. No value is read from a device; what would have to be is asserted there.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.compiler import is_compiling

from headway.errors import RequestError
from headway.masks.base import shape_of
from headway.shims.insist import insist
from headway.sites.packed import Ends


@dataclasses.dataclass(frozen=True)
class Cache:
    """k and v are (rows, length, heads, head_dim), or (pages, page length, heads, head_dim) with a table of pages."""

    k: Tensor
    v: Tensor
    rows: Tensor | None = None
    """The row of each batch entry; None is its own number."""
    pages: Tensor | None = None
    """The pages of each batch entry, in order."""

    def __post_init__(self) -> None:
        what = "(pages, page length, heads, head_dim)" if self.pages is not None else "(rows, length, heads, head_dim)"
        if self.k.dim() != 4 or self.k.shape[:3] != self.v.shape[:3] or self.v.dim() != 4:
            raise RequestError(
                f"got k {list(self.k.shape)} and v {list(self.v.shape)} of a cache, takes {what} for both"
            )
        if self.pages is not None and (self.pages.dim() != 2 or self.pages.dtype != torch.int32):
            raise RequestError(f"got block_table {shape_of(self.pages)}, takes int32 (batch, pages): .to(torch.int32)")

    @property
    def length(self) -> int:
        """How many tokens a batch entry has room for."""
        return self.k.shape[1] if self.pages is None else self.pages.shape[1] * self.k.shape[1]

    def append(self, k: Tensor, v: Tensor, ends: int | Tensor) -> int | Tensor:
        """Write new keys and values, (batch, length, heads, head_dim), after those there are; where it ends now."""
        batch, count = k.shape[:2]
        starts = torch.full((batch,), ends, device=k.device) if isinstance(ends, int) else ends
        places = starts[:, None].long() + torch.arange(count, device=k.device)
        insist(
            ((places >= 0) & (places < self.length)).all(),
            f"got {count} new keys for a cache of {self.length}, takes cache_seqlens that leave room for them",
        )
        if self.pages is None:
            rows = torch.arange(batch, device=k.device) if self.rows is None else self.rows.long()
            at = rows[:, None], places
        else:
            pages = self.pages.long().gather(1, places // self.k.shape[1])
            self._insist_pages((pages >= 0) & (pages < len(self.k)))
            at = pages, places % self.k.shape[1]
        self.k[at], self.v[at] = k, v
        return ends + count

    def read(
        self, batch: int, ends: int | Tensor | None, firsts: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Ends | None]:
        """Keys and values of each batch entry, and where they are real, if they are not throughout."""
        length = self.length
        if isinstance(ends, Tensor):
            insist(((ends >= 0) & (ends <= length)).all(), f"takes lengths of a cache from 0 to its room of {length}")
            if ends.device.type == "cpu" and not is_compiling():
                length = max(ends.tolist())  # nothing waits to read it, and what nobody sees need not be computed
        elif ends is not None:
            if not 0 <= ends <= length:
                raise RequestError(f"got a cache that ends at {ends}, takes 0 to its room of {length}")
            length = ends
        k, v = (self._laid_out(x, batch, ends)[:, :length] for x in (self.k, self.v))
        if not isinstance(ends, Tensor) and firsts is None:
            return k, v, None
        found = Ends(None, ends if isinstance(ends, Tensor) else None, firsts)
        at = torch.arange(length, device=k.device)
        real = at >= (0 if firsts is None else firsts[:, None])
        real = (real if found.keys is None else real & (at < found.keys[:, None])).expand(batch, -1)[..., None, None]
        return torch.where(real, k, 0), torch.where(real, v, 0), found

    def _laid_out(self, x: Tensor, batch: int, ends: int | Tensor | None) -> Tensor:
        if self.pages is not None:
            return x[self._used(ends)].flatten(1, 2)
        return x[:batch] if self.rows is None else x.index_select(0, self.rows)

    def _used(self, ends: int | Tensor | None) -> Tensor:
        """The table, where pages that nobody uses may be any number: they are read as the first."""
        assert self.pages is not None
        starts = torch.arange(self.pages.shape[1], device=self.pages.device) * self.k.shape[1]
        used = starts < (self.length if ends is None else ends if isinstance(ends, int) else ends[:, None])
        inside = (self.pages >= 0) & (self.pages < len(self.k))
        self._insist_pages(inside | ~used)
        return torch.where(inside & used, self.pages, 0).long()

    def _insist_pages(self, right: Tensor) -> None:
        insist(right.all(), f"takes pages from 0 to {len(self.k) - 1} in block_table where they are used")

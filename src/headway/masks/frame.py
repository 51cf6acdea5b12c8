"""The grid a mask is laid over: how many batches, heads, queries and keys, and on which device."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from headway.errors import MaskError
from headway.masks.memo import Bounded, kept

CPU = torch.device("cpu")
_SCALARS = Bounded(256)


@dataclasses.dataclass(frozen=True)
class Frame:
    """One attention call's index space.

    >>> Frame(q_len=4, kv_len=6).offset("lower-right")
    2
    """

    q_len: int
    kv_len: int
    batch: int = 1
    heads: int = 1
    device: torch.device = CPU

    def offset(self, align: str | None) -> int:
        """Key index that lines up with query 0 under `align`."""
        if align == "lower-right":
            return self.kv_len - self.q_len
        if align is None and self.q_len != self.kv_len:
            raise MaskError(
                f"got {self.q_len} queries and {self.kv_len} keys with no alignment named; a diagonal on unequal"
                " lengths has two readings: pass align='upper-left' (query 0 meets key 0)"
                " or align='lower-right' (the last query meets the last key)"
            )
        return 0

    def scalar(self, value: int) -> Tensor:
        """`value` as a tensor on this device, without a host-device sync.

        Compiled kernels capture it as data, so that another value is no other program.
        """
        (scalar,) = kept(
            _SCALARS, value, self.device, lambda: (torch.full((), value, dtype=torch.int32, device=self.device),)
        )
        return scalar

    def indices(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Batch, head, query and key indices, shaped to broadcast against each other."""
        counts = (self.batch, self.heads, self.q_len, self.kv_len)
        shapes = ((-1, 1, 1, 1), (-1, 1, 1), (-1, 1), (-1,))
        b, h, q, k = (
            torch.arange(n, device=self.device, dtype=torch.int32).view(shape)
            for n, shape in zip(counts, shapes, strict=True)
        )
        return b, h, q, k

"""Request: all that one call asks for and that the choice of a backend depends on."""

from __future__ import annotations

import dataclasses
from operator import index

CONTRACTS = ("deterministic", "double-backward", "float32", "fullgraph", "maps", "no-sync")
"""Words for `require=`: what a backend must promise, or refuse the call."""


def representative(length: int) -> int:
    """A length that stands for all that are decided alike: the next power of two, unless 64 modulo 128.

    Written in comparisons alone, so that torch.compile can guard on a symbolic length's class without fixing it.

    >>> [representative(n) for n in (0, 1, 77, 128, 320, 1000)]
    [0, 1, 128, 128, 448, 1024]
    """
    if length == 0:
        return 0
    if length == 1:
        return 1
    for step in range(7, 24):
        if length <= 1 << step:
            return (1 << step) - 64 if length % 128 == 64 else 1 << step
    return 1 << 24


def length_class(length: int, device: str, half_tile: bool | None) -> int:
    """A coarser class for compiled calls, where each class of a symbolic length is a program of its own.

    Torch gives up after 8 programs. On CPU nothing depends on a length; on a GPU the measured times do, and for some
    calls whether it is 64 modulo 128: `half_tile` is None for all others.
    """
    if device == "cpu":
        return 1024
    if device == "mps":
        return index(length)  # a defect there strikes by the number of scores
    steps = (8, 10, 12, 14) if half_tile is None else (10, 13)
    size = next((1 << step for step in steps if length <= 1 << step), 1 << 15)
    return size - 64 if half_tile else size


def _batch_class(batch: int) -> int:
    """The next power of two, but 65,535 for what fits a GPU's grid, which ends there."""
    rounded = 1 << max(batch - 1, 0).bit_length()
    return 65535 if rounded == 65536 and batch < 65536 else rounded


@dataclasses.dataclass(frozen=True)
class Request:
    """One call, without its tensors.

    >>> print(Request(heads=8, kv_heads=2, q_len=512, kv_len=512, mask=frozenset({"causal"})))
    batch 1, heads 8:2, length 512, head_dim 64, float32 on cpu, mask causal
    """

    batch: int = 1
    heads: int = 1
    kv_heads: int = 1
    q_len: int = 128
    kv_len: int = 128
    head_dim: int = 64
    value_dim: int = 64
    dtype: str = "float32"
    device: str = "cpu"
    mask: frozenset[str] = frozenset()
    """Kinds of the mask's terms; see headway.masks.terms."""
    rows_may_be_empty: bool = False
    mask_needs_grad: bool = False
    dropout: bool = False
    softcap: bool = False
    sinks: bool = False
    returns_lse: bool = False
    plain_scale: bool = True
    """The scale is a positive, finite number."""
    needs_grad: bool = False
    aligned: bool = True
    """Last axes are contiguous and rows start on 16 bytes, as kernels' vector loads need."""
    transformed: bool = False
    """Inside torch.func.vmap, grad, jvp and the like."""
    compiled: bool = False
    """Inside torch.compile or torch.export."""
    require: frozenset[str] = frozenset()

    def rounded(self) -> Request:
        """This request with lengths and batch of its class, so that few decisions serve many shapes.

        Rounded up, so that a limit on size which passes the class passes every request in it.
        """
        q_len = representative(self.q_len)
        kv_len = q_len if self.q_len == self.kv_len else representative(self.kv_len)
        return dataclasses.replace(self, batch=_batch_class(self.batch), q_len=q_len, kv_len=kv_len)

    def __str__(self) -> str:
        heads = f"{self.heads}" if self.heads == self.kv_heads else f"{self.heads}:{self.kv_heads}"
        length = f"{self.q_len}" if self.q_len == self.kv_len else f"{self.q_len}x{self.kv_len}"
        head_dim = f"{self.head_dim}" if self.head_dim == self.value_dim else f"{self.head_dim}/{self.value_dim}"
        words = [
            f"batch {self.batch}",
            f"heads {heads}",
            f"length {length}",
            f"head_dim {head_dim}",
            f"{self.dtype} on {self.device}",
            f"mask {mask_words(self.mask)}",
        ]
        said = {
            "a mask with gradient": self.mask_needs_grad,
            "dropout": self.dropout,
            "softcap": self.softcap,
            "sinks": self.sinks,
            "returns lse": self.returns_lse,
            "an odd scale": not self.plain_scale,
            "gradients on": self.needs_grad,
            "unaligned views": not self.aligned,
            "inside torch.func": self.transformed,
            "inside torch.compile": self.compiled,
        }
        words += [word for word, yes in said.items() if yes]
        words += [f"require {word}" for word in sorted(self.require)]
        return ", ".join(words)


def mask_words(kinds: frozenset[str]) -> str:
    """
    >>> mask_words(frozenset({"or", "causal"}))
    'causal & or(...)'
    """
    return " & ".join(sorted(f"{kind}(...)" if kind in ("and", "or", "not") else kind for kind in kinds)) or "none"

"""A mask as text or as a picture."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from headway.errors import MaskError
from headway.masks.alibi import Alibi
from headway.masks.base import And, Mask, Not, Or
from headway.masks.bias import Bias
from headway.masks.dense import Dense
from headway.masks.frame import Frame
from headway.masks.padding import Padding
from headway.masks.prefix import Prefix


def matrix(mask: Mask, q_len: int, kv_len: int, *, batch: int, head: int, at_most: int) -> str:
    keep = sample(mask, q_len, kv_len, batch=batch, head=head, at_most=at_most)
    rows = (" ".join("■" if cell else "·" for cell in row) for row in keep.tolist())
    return "\n".join(rows)


def draw(mask: Mask, path: str | Path, q_len: int, kv_len: int, *, batch: int, head: int) -> Path:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MaskError("drawing a mask needs matplotlib: pip install matplotlib") from error
    keep = sample(mask, q_len, kv_len, batch=batch, head=head, at_most=1024)
    # A figure of its own: pyplot would choose a backend for the whole process.
    figure = Figure(figsize=(5, 5 * max(0.3, min(3.0, q_len / max(kv_len, 1)))), layout="constrained")
    axes = figure.subplots()
    axes.imshow(keep.numpy(), cmap="Greys", vmin=0, vmax=1.4, interpolation="nearest", extent=(0, kv_len, q_len, 0))
    axes.set(xlabel="key", ylabel="query", aspect="auto")
    axes.set_title(repr(mask), wrap=True)
    figure.savefig(path, dpi=150, format="png")
    return Path(path)


def sample(mask: Mask, q_len: int, kv_len: int, *, batch: int, head: int, at_most: int) -> Tensor:
    """Yes or no for one batch entry and head, at evenly spaced queries and keys where there are too many."""
    device = mask.tensors[0].device if mask.tensors else torch.device("cpu")
    batches, heads = _room(mask)
    frame = Frame(q_len, kv_len, max(batches, batch + 1), max(heads, head + 1), device)
    mask.check(frame)
    q, k = (_evenly(n, at_most).to(device) for n in (q_len, kv_len))
    b, h = (torch.tensor(n, device=device, dtype=torch.int32) for n in (batch, head))
    at = (b, h, q[:, None], k)
    keep, score = mask.rule(frame)(*at), mask.score(frame)
    if score is not None:
        keep = keep & ~score(torch.zeros(1, 1, device=device), *at).isneginf()
    return keep.expand(len(q), len(k)).cpu()


def _evenly(count: int, at_most: int) -> Tensor:
    # In float64, as float32 has no odd numbers from 2**24 on.
    return torch.linspace(0, count - 1, min(count, at_most), dtype=torch.float64).round().to(torch.int32)


def _room(mask: Mask) -> tuple[int, int]:
    """Batch entries and heads that the mask's own tensors have room for."""
    if isinstance(mask, And | Or):
        batches, heads = zip(*(_room(part) for part in mask.parts), strict=True)
        return max(batches), max(heads)
    if isinstance(mask, Not):
        return _room(mask.part)
    if isinstance(mask, Alibi):
        return 1, mask.slopes.shape[0]
    if isinstance(mask, Padding | Prefix) and mask.tensors:
        return mask.tensors[0].shape[0], 1
    if isinstance(mask, Dense | Bias):
        shape = (1,) * (4 - mask.tensors[0].ndim) + tuple(mask.tensors[0].shape)
        return shape[0], shape[1]
    return 1, 1

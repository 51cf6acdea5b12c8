"""A mask as text or as a picture."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from headway.errors import MaskError
from headway.masks.base import Mask
from headway.masks.frame import Frame


def matrix(mask: Mask, q_len: int, kv_len: int, *, batch: int, head: int, at_most: int) -> str:
    keep = sample(mask, q_len, kv_len, batch=batch, head=head, at_most=at_most)
    rows = (" ".join("■" if cell else "·" for cell in row) for row in keep.tolist())
    return "\n".join(rows)


def draw(mask: Mask, path: str | Path, q_len: int, kv_len: int, *, batch: int, head: int) -> Path:
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise MaskError("drawing a mask needs matplotlib; install headway[figures]") from error
    keep = sample(mask, q_len, kv_len, batch=batch, head=head, at_most=1024)
    figure, axes = pyplot.subplots(figsize=(5, 5 * max(0.3, min(3.0, q_len / max(kv_len, 1)))), layout="constrained")
    axes.imshow(keep.numpy(), cmap="Greys", vmin=0, vmax=1.4, interpolation="nearest", extent=(0, kv_len, q_len, 0))
    axes.set(xlabel="key", ylabel="query", title=repr(mask))
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return Path(path)


def sample(mask: Mask, q_len: int, kv_len: int, *, batch: int, head: int, at_most: int) -> Tensor:
    """Yes or no for one batch entry and head, at evenly spaced queries and keys where there are too many."""
    device = mask.tensors[0].device if mask.tensors else torch.device("cpu")
    frame = Frame(q_len, kv_len, *_room(mask, batch, head), device)
    mask.check(frame)
    q, k = (_evenly(n, at_most).to(device) for n in (q_len, kv_len))
    b, h = (torch.tensor(n, device=device, dtype=torch.int32) for n in (batch, head))
    keep = mask.rule(frame)(b, h, q[:, None], k)
    return keep.expand(len(q), len(k)).cpu()


def _evenly(count: int, at_most: int) -> Tensor:
    return torch.linspace(0, count - 1, min(count, at_most)).round().to(torch.int32)


def _room(mask: Mask, batch: int, head: int) -> tuple[int, int]:
    """Batch entries and heads the mask's own tensors ask for, read off whichever of its shapes fit."""
    from headway.masks.alibi import Alibi
    from headway.masks.base import And, Not, Or
    from headway.masks.padding import Padding

    if isinstance(mask, And | Or):
        rooms = [_room(part, batch, head) for part in mask.parts]
        return max(b for b, _ in rooms), max(h for _, h in rooms)
    if isinstance(mask, Not):
        return _room(mask.part, batch, head)
    if isinstance(mask, Alibi):
        return batch + 1, mask.slopes.shape[0]
    if isinstance(mask, Padding) or mask.kind == "prefix":
        return max(batch + 1, *(t.shape[0] for t in mask.tensors), 1), head + 1
    if mask.kind in ("dense", "bias"):
        shape = (1,) * (4 - mask.tensors[0].ndim) + tuple(mask.tensors[0].shape)
        return max(batch + 1, shape[0]), max(head + 1, shape[1])
    return batch + 1, head + 1

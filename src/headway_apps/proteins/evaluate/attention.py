"""Which backend computes attention of a packed batch of proteins on a device, and why."""

from __future__ import annotations

import dataclasses

import torch

import headway
from headway_apps.proteins.model.config import DiTConfig
from headway_apps.proteins.model.packed import Packed


@dataclasses.dataclass(frozen=True)
class Attention:
    """The choice for one kind of call."""

    device: str
    dtype: str
    gradients: bool
    layout: str
    """How the packed proteins lie as attention is computed."""
    backend: str
    why: str
    whole: str
    """The whole decision, with what speaks against every other backend."""


def attention_of(
    config: DiTConfig,
    lengths: list[int],
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    gradients: bool = False,
) -> Attention:
    """As the network does it for proteins of these many tokens; nothing is computed."""
    device = torch.device(device)
    heads, size = config.heads, config.head_dim
    like = torch.empty(1, heads, sum(lengths), size, dtype=dtype, device=device).requires_grad_(gradients)
    packed = Packed.of(torch.tensor(lengths), like)
    if packed.places is None and not packed.is_rows:
        like = like.new_empty(1, heads, sum(lengths) + packed.filler, size).requires_grad_(gradients)
        decision, layout = headway.explain(like, like, like, packed.mask), "packed end to end"
    else:
        rows = torch.empty(packed.documents, heads, packed.longest, size, dtype=dtype, device=device)
        rows.requires_grad_(gradients)
        decision = headway.explain(rows, rows, rows, None if packed.is_rows else packed.mask)
        layout = "in rows of a batch" + ("" if packed.is_rows else ", filled up: no kernel here knows packed proteins")
    return Attention(
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        gradients=gradients,
        layout=layout,
        backend=decision.backend().name,
        why=decision.why,
        whole=str(decision),
    )

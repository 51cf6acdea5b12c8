"""Recognises attention among the operators of a run: fused kernels, PyTorch's transformer fast path, softmax by hand,
and calls of `headway.attention`, whichever backend they chose."""

from __future__ import annotations

import importlib
import sys
from types import CodeType, FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from headway.backends import reference
from headway.masks import Frame
from headway.watch.apart import readable
from headway.watch.entropy import Added, Seen, causal, dense, scores_of, typed, unblurred
from headway.watch.statistics import wide

_DOORS: tuple[CodeType, ...] = (
    importlib.import_module("headway.attention").attention.__code__,
    reference.in_full.__code__,
)

FUSED = frozenset(
    f"aten::_scaled_dot_product_{name}"
    for name in ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention",
                 "fused_attention_overrideable")
)  # fmt: skip
FAST_PATHS = frozenset(("aten::_native_multi_head_attention", "aten::_transformer_encoder_layer_fwd"))
SOFTMAX = frozenset(("aten::_softmax", "aten::_safe_softmax"))
PRODUCTS = frozenset(("aten::bmm", "aten::baddbmm"))


def arguments(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """An operator's arguments by name, with its defaults."""
    named = {one.name: one.default_value for one in func._schema.arguments if one.has_default_value()}
    named.update(zip((one.name for one in func._schema.arguments), args, strict=False))
    named.update(kwargs)
    return named


def fused(named: dict[str, Any]) -> Seen | None:
    """A call of a fused kernel, from its arguments by name."""
    q, k = named["query"], named["key"]
    if not (readable(q) and readable(k)) or q.dim() != 4:
        return None
    frame = Frame(q.shape[2], k.shape[2], q.shape[0], q.shape[1], q.device)
    mask = named.get("attn_mask", named.get("attn_bias"))
    added = ([dense(mask, frame)] if mask is not None else []) + ([causal] if named.get("is_causal") else [])
    return Seen(frame, scores_of(q, k, named.get("scale"), added))


def fast_path(name: str, named: dict[str, Any]) -> Seen | None:
    """PyTorch's one-operator transformer layer: queries and keys are projected anew, an example at a time."""
    layer = name == "aten::_transformer_encoder_layer_fwd"
    x = named["src"] if layer else named["query"]
    source = x if layer else named["key"]
    weight, bias = named["qkv_weight"], named["qkv_bias"]
    heads = named["num_heads"] if layer else named["num_head"]
    if not all(map(readable, (x, source, weight))) or x.dim() != 3 or (not layer and source is not x):
        return None
    frame = Frame(x.shape[1], x.shape[1], x.shape[0], heads, x.device)
    size = weight.shape[1]

    def project(batch: int, part: int, rows: Tensor | slice) -> Tensor:
        row: Tensor = x[batch, rows]
        if layer and named["norm_first"]:
            row = F.layer_norm(row, (size,), named["norm_weight_1"], named["norm_bias_1"], named["eps"])
        at = slice(part * size, (part + 1) * size)
        projected: Tensor = wide(F.linear(row, weight[at], bias[at]))
        return projected.view(-1, heads, size // heads).transpose(0, 1)

    added = _fast_mask(named.get("mask"), named.get("mask_type"), frame)

    def scores(batch: int, rows: Tensor, first: int, end: int) -> Tensor:
        queries, keys = project(batch, 0, rows), project(batch, 1, slice(first, end))
        product: Tensor = (queries / (size // heads) ** 0.5) @ keys.transpose(-1, -2)
        return product if added is None else product + added(batch, rows, first, end)

    return Seen(frame, scores)


def _fast_mask(mask: Tensor | None, kind: int | None, frame: Frame) -> Added | None:
    """There True blocks; of (L, L) for kind 0, (B, L) for kind 1, and all four axes for kind 2."""
    if mask is None:
        return None
    shaped = mask[:, None, None, :] if kind == 1 else mask
    return dense(~shaped if shaped.dtype == torch.bool else shaped, frame)


def by_hand(scores: Tensor, heads: int | None) -> Seen | None:
    """What went into a softmax that turns out to weigh values: (..., heads, L, S), or (B · heads, L, S)."""
    if not readable(scores) or scores.dim() < 3:
        return None
    if scores.dim() == 3:
        many = heads if heads and scores.shape[0] % heads == 0 else 1
        whole = scores.unflatten(0, (-1, many))
    else:
        whole = scores.flatten(0, -4) if scores.dim() > 4 else scores
    frame = Frame(whole.shape[2], whole.shape[3], whole.shape[0], whole.shape[1], whole.device)
    return Seen(frame, lambda batch, rows, first, end: unblurred(whole[batch, :, :, first:end][:, rows]))


def at_the_door(stop: CodeType) -> FrameType | None:
    """The running call of `headway.attention`, or for weights, if the operator is one of its; looked for up to `stop`.

    The frame is read and not kept. It tells the call as it was meant: typed mask, cap, sinks, key heads unrepeated.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not stop:
        if frame.f_code in _DOORS:
            return frame
        frame = frame.f_back
    return None


def door(values: dict[str, Any]) -> Seen | None:
    """A call of `headway.attention`, from its arguments by name."""
    q, k, mask = values["q"], values["k"], values["mask"]
    if not (readable(q) and readable(k)):
        return None
    frame = Frame(q.shape[2], k.shape[2], q.shape[0], q.shape[1], q.device)
    added = [] if mask is None else [typed(mask, frame)]
    return Seen(frame, scores_of(q, k, values["scale"], added, values["softcap"]), values["sinks"])

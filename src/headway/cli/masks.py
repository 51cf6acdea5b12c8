"""Masks in words, as `headway explain --mask` takes them: kinds joined by &, | and ~, a sample of each at any lengths.

>>> read("causal & (padding | ~prefix)", Frame(4, 4)).kind
'and'
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable

import torch

from headway.errors import MaskError, UnknownNameError
from headway.masks import (
    Alibi,
    Bias,
    Causal,
    Dense,
    Documents,
    Frame,
    Full,
    Mask,
    Padding,
    Predicate,
    Prefix,
    Tree,
    Window,
)
from headway.masks.causal import Align

ALIGNED: dict[str, Callable[[Frame, Align | None], Mask]] = {
    "causal": lambda frame, align: Causal(align),
    "window": lambda frame, align: Window(0, 0, align),
    "alibi": lambda frame, align: Alibi(torch.ones(1).expand(frame.heads), align),
    "tree": lambda frame, align: Tree([-1, 0], _halves(frame.kv_len), align),
}
"""Kinds with a diagonal, which on unequal lengths has two readings."""

PLAIN: dict[str, Callable[[Frame], Mask]] = {
    "full": lambda frame: Full(),
    "prefix": lambda frame: Prefix(min(1, frame.kv_len)),
    "documents": lambda frame: Documents(_halves(frame.q_len), _halves(frame.kv_len)),
    "documents-cross": lambda frame: Documents(
        _halves(frame.q_len), [frame.kv_len - frame.kv_len // 3, frame.kv_len // 3]
    ),
    "padding": lambda frame: Padding(torch.full((frame.batch,), frame.kv_len - frame.kv_len // 2)),
    "dense": lambda frame: Dense(torch.ones(1, 1, dtype=torch.bool)),
    "bias": lambda frame: Bias(torch.zeros(1, 1)),
    "predicate": lambda frame: Predicate(lambda b, h, q, k: q >= k),
}


def _aligned(suffix: str, align: Align | None) -> dict[str, Callable[[Frame], Mask]]:
    def one(make: Callable[[Frame, Align | None], Mask]) -> Callable[[Frame], Mask]:
        return lambda frame: make(frame, align)

    return {name + suffix: one(make) for name, make in ALIGNED.items()}


SAMPLES: dict[str, Callable[[Frame], Mask]] = {
    **PLAIN,
    **_aligned("", None),
    **_aligned("-upper-left", "upper-left"),
    **_aligned("-lower-right", "lower-right"),
}
"""One mask of each kind, with numbers that make it no other: no choice depends on which."""


def read(text: str, frame: Frame) -> Mask | None:
    """The mask that words mean at these lengths, or MaskError; None where nothing is said."""
    if not text.strip():
        return None
    tree = None
    try:
        if re.fullmatch(r"[a-z\s&|~()_-]+", text):
            tree = ast.parse(text.replace("-", "_").strip(), mode="eval").body
        mask = _built(tree, text, frame)
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise _unread(text) from error
    mask.check(frame)
    return mask


def _built(tree: ast.expr | None, text: str, frame: Frame) -> Mask:
    if isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.BitAnd | ast.BitOr):
        left, right = _built(tree.left, text, frame), _built(tree.right, text, frame)
        return left & right if isinstance(tree.op, ast.BitAnd) else left | right
    if isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.Invert):
        return ~_built(tree.operand, text, frame)
    if isinstance(tree, ast.Name):
        return _sample(tree.id.replace("_", "-"), frame)
    raise _unread(text)


def _unread(text: str) -> MaskError:
    meant = text.replace(" and ", " & ").replace(" or ", " | ").replace("not ", "~")
    example = meant if meant != text else "causal & (documents | prefix)"
    return MaskError(f"got the mask {text[:200]!r}, takes kinds joined by &, | and ~, such as {example[:200]!r}")


def _sample(name: str, frame: Frame) -> Mask:
    if name not in SAMPLES:
        raise UnknownNameError("kind of mask", name, tuple(SAMPLES))
    if name in ALIGNED and frame.q_len != frame.kv_len:
        raise MaskError(
            f"got {name} on {frame.q_len} queries and {frame.kv_len} keys, which has two readings;"
            f" takes {name}-lower-right or {name}-upper-left"
        )
    return SAMPLES[name](frame)


def _halves(length: int) -> list[int]:
    return [length - length // 2, length // 2]

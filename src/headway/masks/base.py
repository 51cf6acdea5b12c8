"""What every mask can do, and the algebra `&`, `|`, `~` that joins masks."""

from __future__ import annotations

import dataclasses
import enum
import functools
import operator
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from headway.errors import MaskError
from headway.masks.frame import Frame
from headway.masks.memo import Remembers
from headway.masks.tiles import Blocks, Tiles

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

Rule: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Score: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
CuSeqlens: TypeAlias = tuple[Tensor, Tensor, int, int]
"""Cumulative lengths of queries and of keys, int32 from 0, and the longest of each."""


class Witness(enum.Enum):
    """A key that every query may be known to see, whatever the data: proof that no row is empty."""

    FIRST_KEY = "first key"
    UPPER_DIAGONAL = "key of the query's own index"
    LOWER_DIAGONAL = "key as far from the end as the query"


class Mask(Remembers):
    """Says which key each query may attend to, and possibly what is added to the score.

    >>> from headway.masks import Causal, Window
    >>> print((Causal() & Window(left=1)).matrix(4, 4))
    ■ · · ·
    ■ ■ · ·
    · ■ ■ ·
    · · ■ ■
    """

    kind: ClassVar[str]
    """The word for this mask in requests, refusals and support tables."""
    adds_score: ClassVar[bool] = False
    """True if the mask adds a number to scores rather than (only) blocking."""

    # -- what each mask defines -----------------------------------------------------------------------------------

    def rule(self, frame: Frame) -> Rule:
        """The yes/no rule `(b, h, q, k) -> bool tensor`, elementwise on index tensors."""
        raise NotImplementedError

    def score(self, frame: Frame) -> Score | None:
        """The score rule `(score, b, h, q, k) -> score`, or None if scores stay as they are."""
        del frame
        return None

    def blocks(self, frame: Frame, tiles: Tiles) -> Blocks | None:
        """Tiles judged from the mask's structure alone; None if that needs every element."""
        del frame, tiles
        return None

    def shows(self, frame: Frame, witness: Witness) -> bool:
        """True only if every query surely sees the key that `witness` names."""
        del frame, witness
        return False

    def check(self, frame: Frame) -> None:
        """Raise MaskError if this mask does not fit `frame`."""
        del frame

    def keep(self, frame: Frame) -> Tensor:
        """True where attention may go; (B, H, q_len, kv_len), and 1 for any axis over which it does not vary."""
        return self.rule(frame)(*frame.indices())

    def added(self, frame: Frame, dtype: torch.dtype) -> Tensor | None:
        """What is added to scores, for sums in `dtype`; any axis may be 1, and None stands for nothing."""
        score = self.score(frame)
        # Four axes, as a tensor of none would not lift what is added to it to its own precision.
        return None if score is None else score(_zero(frame, dtype), *frame.indices())

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors this mask holds; a mask with none is a plain value."""
        return ()

    @property
    def is_value(self) -> bool:
        """True if the mask is a plain value: equal masks are the same mask, now and later."""
        return not self.tensors

    def state(self) -> tuple[Any, ...]:
        """What tells whether the mask is still what it was: its tensors, and how often each was written to."""
        return tuple((id(tensor), tensor._version) for tensor in self.tensors)

    # -- algebra ------------------------------------------------------------------------------------------------

    def __and__(self, other: Mask) -> Mask:
        return And(_flatten(And, self, other))

    def __or__(self, other: Mask) -> Mask:
        return Or(_flatten(Or, self, other))

    def __invert__(self) -> Mask:
        return Not(self)

    def __bool__(self) -> bool:
        raise MaskError("got a mask where yes or no is asked for, as by and, or, not and if; takes & | ~, or `is None`")

    # -- what each mask becomes ------------------------------------------------------------------------------------

    def to_bool(self, frame: Frame) -> Tensor:
        """A bool tensor, True where attention may go, broadcastable to (B, H, q_len, kv_len)."""
        self.check(frame)
        return _spread(self.keep(frame), frame)

    def to_additive(self, frame: Frame, dtype: torch.dtype) -> Tensor:
        """A float tensor to add to scores: -inf where attention may not go, the mask's own bias elsewhere."""
        self.check(frame)
        added = self.added(frame, dtype)
        bias = torch.zeros((), dtype=dtype, device=frame.device) if added is None else narrowed(added, dtype)
        return _spread(torch.where(self.keep(frame), bias, float("-inf")), frame)

    def to_block_mask(self, frame: Frame) -> BlockMask:
        """A flex attention BlockMask, built from structure where the mask has any."""
        from headway.masks.block_mask import block_mask

        return block_mask(self, frame)

    def to_cu_seqlens(self, frame: Frame) -> CuSeqlens:
        """Cumulative lengths of what sees each other, as variable-length kernels take them, or MaskError."""
        raise MaskError(
            f"got {self.kind}, takes Documents or Padding(lengths) for cumulative lengths;"
            " of masks joined with & ask the part that is one, or use to_bool or to_block_mask"
        )

    def to_xformers(self, frame: Frame, dtype: torch.dtype) -> Any:
        """An `xformers.ops.fmha.attn_bias` object, a tensor to add to scores, or None where nothing is masked."""
        from headway.masks.xformers_bias import to_xformers

        return to_xformers(self, frame, dtype)

    def matrix(self, q_len: int, kv_len: int, batch: int = 0, head: int = 0, at_most: int = 32) -> str:
        """The mask as text, ■ may and · may not; larger ones are sampled evenly to `at_most` rows and columns."""
        from headway.masks.draw import matrix

        return matrix(self, q_len, kv_len, batch=batch, head=head, at_most=at_most)

    def draw(self, path: str | Path, q_len: int, kv_len: int, batch: int = 0, head: int = 0) -> Path:
        """Write a picture of the mask as PNG and return its path."""
        from headway.masks.draw import draw

        return draw(self, path, q_len, kv_len, batch=batch, head=head)


def _flatten(kind: type[And] | type[Or], *masks: Mask) -> tuple[Mask, ...]:
    for mask in masks:
        if not isinstance(mask, Mask):
            raise MaskError(f"masks join with masks, got {type(mask).__name__}; wrap a bool tensor in Dense(...)")
    return tuple(part for mask in masks for part in (mask.parts if isinstance(mask, kind) else (mask,)))


@dataclasses.dataclass(frozen=True, repr=False)
class And(Mask):
    """All of `parts` must allow; what they add to scores is added up."""

    parts: tuple[Mask, ...]
    kind: ClassVar[str] = "and"

    def __repr__(self) -> str:
        return " & ".join(f"({part!r})" if isinstance(part, Or) else repr(part) for part in self.parts)

    @property
    def adds_score(self) -> bool:  # type: ignore[override]  # a class constant everywhere else
        return any(part.adds_score for part in self.parts)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(t for part in self.parts for t in part.tensors)

    @property
    def is_value(self) -> bool:
        return all(part.is_value for part in self.parts)

    def state(self) -> tuple[Any, ...]:
        return tuple(part.state() for part in self.parts)

    def check(self, frame: Frame) -> None:
        for part in self.parts:
            part.check(frame)

    def rule(self, frame: Frame) -> Rule:
        rules = [part.rule(frame) for part in self.parts]

        def keep(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            allowed = rules[0](b, h, q, k)
            for rule in rules[1:]:
                allowed = allowed & rule(b, h, q, k)
            return allowed

        return keep

    def score(self, frame: Frame) -> Score | None:
        scores = [score for part in self.parts if (score := part.score(frame)) is not None]
        if not scores:
            return None

        def add(value: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            for score in scores:
                value = score(value, b, h, q, k)
            return value

        return add

    def keep(self, frame: Frame) -> Tensor:
        return functools.reduce(operator.and_, (part.keep(frame) for part in self.parts))

    def added(self, frame: Frame, dtype: torch.dtype) -> Tensor | None:
        added = [one for part in self.parts if (one := part.added(frame, dtype)) is not None]
        if len(added) > 1:
            added[0] = added[0] + _zero(frame, dtype)
        return functools.reduce(operator.add, added) if added else None

    def blocks(self, frame: Frame, tiles: Tiles) -> Blocks | None:
        return _judged(operator.and_, self.parts, frame, tiles)

    def shows(self, frame: Frame, witness: Witness) -> bool:
        return all(part.shows(frame, witness) for part in self.parts)


@dataclasses.dataclass(frozen=True, repr=False)
class Or(Mask):
    """Any of `parts` may allow."""

    parts: tuple[Mask, ...]
    kind: ClassVar[str] = "or"

    def __repr__(self) -> str:
        return " | ".join(f"({part!r})" if isinstance(part, And) else repr(part) for part in self.parts)

    def __post_init__(self) -> None:
        _refuse_scores("|", self.parts)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(t for part in self.parts for t in part.tensors)

    @property
    def is_value(self) -> bool:
        return all(part.is_value for part in self.parts)

    def state(self) -> tuple[Any, ...]:
        return tuple(part.state() for part in self.parts)

    def check(self, frame: Frame) -> None:
        for part in self.parts:
            part.check(frame)

    def rule(self, frame: Frame) -> Rule:
        rules = [part.rule(frame) for part in self.parts]

        def keep(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            allowed = rules[0](b, h, q, k)
            for rule in rules[1:]:
                allowed = allowed | rule(b, h, q, k)
            return allowed

        return keep

    def keep(self, frame: Frame) -> Tensor:
        return functools.reduce(operator.or_, (part.keep(frame) for part in self.parts))

    def blocks(self, frame: Frame, tiles: Tiles) -> Blocks | None:
        return _judged(operator.or_, self.parts, frame, tiles)

    def shows(self, frame: Frame, witness: Witness) -> bool:
        return any(part.shows(frame, witness) for part in self.parts)


@dataclasses.dataclass(frozen=True, repr=False)
class Not(Mask):
    """Allows what `part` does not."""

    part: Mask
    kind: ClassVar[str] = "not"

    def __repr__(self) -> str:
        return f"~({self.part!r})" if isinstance(self.part, And | Or) else f"~{self.part!r}"

    def __post_init__(self) -> None:
        _refuse_scores("~", (self.part,))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.part.tensors

    @property
    def is_value(self) -> bool:
        return self.part.is_value

    def state(self) -> tuple[Any, ...]:
        return self.part.state()

    def check(self, frame: Frame) -> None:
        self.part.check(frame)

    def rule(self, frame: Frame) -> Rule:
        blocked = self.part.rule(frame)
        return lambda b, h, q, k: ~blocked(b, h, q, k)

    def keep(self, frame: Frame) -> Tensor:
        return ~self.part.keep(frame)

    def blocks(self, frame: Frame, tiles: Tiles) -> Blocks | None:
        blocks = self.part.blocks(frame, tiles)
        return None if blocks is None else Blocks(~blocks.judged.flip(0))  # something, where not all is hidden


def _judged(
    join: Callable[[Tensor, Tensor], Tensor], parts: tuple[Mask, ...], frame: Frame, tiles: Tiles
) -> Blocks | None:
    blocks = [part.blocks(frame, tiles) for part in parts]
    known = [one.judged for one in blocks if one is not None]
    return Blocks(functools.reduce(join, known)) if len(known) == len(blocks) else None


def _refuse_scores(operator: str, parts: tuple[Mask, ...]) -> None:
    for part in parts:
        if part.adds_score:
            raise MaskError(
                f"{part.kind} adds to scores and has no yes or no, so {operator} has no meaning for it;"
                " join it with & outside the bracket"
            )


def _spread(tensor: Tensor, frame: Frame) -> Tensor:
    """All queries and keys, as a view; batch entries and heads may stay one for all."""
    return tensor.expand(torch.broadcast_shapes(tensor.shape, (1, 1, frame.q_len, frame.kv_len)))


def _zero(frame: Frame, dtype: torch.dtype) -> Tensor:
    """A start for sums of scores, which are made in float32 at least."""
    return torch.zeros((1, 1, 1, 1), dtype=torch.promote_types(dtype, torch.float32), device=frame.device)


def narrowed(added: Tensor, dtype: torch.dtype) -> Tensor:
    """`added` in `dtype`; a finite number stays finite, as -inf would block what the number only disfavours."""
    most = torch.finfo(dtype).max
    if dtype in (torch.float32, torch.bfloat16):
        most /= 4  # kernels count in powers of two: they multiply by log2(e), in float32
    if torch.finfo(added.dtype).max > most:
        added = torch.where(added.isinf(), added, added.clamp(-most, most))
    return added.to(dtype)


def shape_of(tensor: Tensor) -> str:
    """A tensor as masks print it: dtype and shape, not values."""
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def must_be_tensor(value: object, what: str) -> None:
    if not isinstance(value, Tensor):
        raise MaskError(f"got {what} of type {type(value).__name__}, takes a tensor: torch.as_tensor(x)")


def holds_integers(tensor: Tensor) -> bool:
    """True for numbers that count; bools do not."""
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)

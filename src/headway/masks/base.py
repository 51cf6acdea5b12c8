"""What every mask can do, and the algebra `&`, `|`, `~` that joins masks."""

from __future__ import annotations

import dataclasses
import enum
import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from headway.errors import MaskError
from headway.masks.frame import Frame

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

Rule: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Score: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


class Witness(enum.Enum):
    """A key that every query may be known to see, whatever the data: proof that no row is empty."""

    FIRST_KEY = "first key"
    UPPER_DIAGONAL = "key of the query's own index"
    LOWER_DIAGONAL = "key as far from the end as the query"


@dataclasses.dataclass(frozen=True)
class Blocks:
    """For each tile of the grid: may something in it be seen, and is all of it surely seen.

    `some` may say yes too often and `every` no too often: a tile that is neither is checked element by element.
    """

    some: Tensor
    every: Tensor


@dataclasses.dataclass(frozen=True)
class Tiles:
    """First and last index of each tile of queries (a column) and of keys (a row)."""

    q_first: Tensor
    q_last: Tensor
    k_first: Tensor
    k_last: Tensor


class Mask:
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

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors this mask holds; a mask with none is a plain value."""
        return ()

    @functools.cached_property
    def memo(self) -> dict[Any, Any]:
        """What has been worked out from this mask: it lives and dies with it, and is not copied or saved."""
        return {}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "memo"}

    # -- algebra ------------------------------------------------------------------------------------------------

    def __and__(self, other: Mask) -> Mask:
        return And(_flatten(And, self, other))

    def __or__(self, other: Mask) -> Mask:
        return Or(_flatten(Or, self, other))

    def __invert__(self) -> Mask:
        return Not(self)

    # -- what each mask becomes ------------------------------------------------------------------------------------

    def to_bool(self, frame: Frame) -> Tensor:
        """A bool tensor, True where attention may go, broadcastable to (B, H, q_len, kv_len)."""
        self.check(frame)
        keep = self.rule(frame)(*frame.indices())
        return keep.expand(torch.broadcast_shapes(keep.shape, (1, 1, frame.q_len, frame.kv_len)))

    def to_additive(self, frame: Frame, dtype: torch.dtype) -> Tensor:
        """A float tensor to add to scores: -inf where attention may not go, the mask's own bias elsewhere."""
        keep = self.to_bool(frame)
        score = self.score(frame)
        # Four axes, as a tensor of none would not lift the biases added to it to its own precision.
        zero = torch.zeros((1, 1, 1, 1), dtype=dtype, device=frame.device)
        bias = zero if score is None else score(zero, *frame.indices()).to(dtype)
        return torch.where(keep, bias, float("-inf"))

    def to_block_mask(self, frame: Frame) -> BlockMask:
        """A flex attention BlockMask, built from structure where the mask has any."""
        from headway.masks.block_mask import block_mask

        return block_mask(self, frame)

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

    def blocks(self, frame: Frame, tiles: Tiles) -> Blocks | None:
        judged = [part.blocks(frame, tiles) for part in self.parts]
        if any(one is None for one in judged):
            return None
        known = [one for one in judged if one is not None]
        some, every = known[0].some, known[0].every
        for one in known[1:]:
            some, every = some & one.some, every & one.every
        return Blocks(some, every)

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

    def blocks(self, frame: Frame, tiles: Tiles) -> Blocks | None:
        judged = [part.blocks(frame, tiles) for part in self.parts]
        if any(one is None for one in judged):
            return None
        known = [one for one in judged if one is not None]
        some, every = known[0].some, known[0].every
        for one in known[1:]:
            some, every = some | one.some, every | one.every
        return Blocks(some, every)

    def shows(self, frame: Frame, witness: Witness) -> bool:
        return any(part.shows(frame, witness) for part in self.parts)


@dataclasses.dataclass(frozen=True, repr=False)
class Not(Mask):
    """Allows what `part` does not."""

    part: Mask
    kind: ClassVar[str] = "not"

    def __repr__(self) -> str:
        return f"~({self.part!r})"

    def __post_init__(self) -> None:
        _refuse_scores("~", (self.part,))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.part.tensors

    def check(self, frame: Frame) -> None:
        self.part.check(frame)

    def rule(self, frame: Frame) -> Rule:
        blocked = self.part.rule(frame)
        return lambda b, h, q, k: ~blocked(b, h, q, k)

    def blocks(self, frame: Frame, tiles: Tiles) -> Blocks | None:
        judged = self.part.blocks(frame, tiles)
        return None if judged is None else Blocks(some=~judged.every, every=~judged.some)


def _refuse_scores(operator: str, parts: tuple[Mask, ...]) -> None:
    for part in parts:
        if part.adds_score:
            raise MaskError(
                f"{part.kind} adds to scores and has no yes or no, so {operator} has no meaning for it;"
                " join it with & outside the bracket"
            )


def shape_of(tensor: Tensor) -> str:
    """A tensor as masks print it: dtype and shape, not values."""
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"

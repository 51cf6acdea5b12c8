"""Predicate: a function of batch, head, query and key, checked before any kernel meets it."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from headway.errors import MaskError
from headway.masks.base import Mask, Rule
from headway.masks.frame import Frame


@dataclasses.dataclass(frozen=True)
class Predicate(Mask):
    """`fn(b, h, q, k)` returns a bool tensor, elementwise on index tensors.

    >>> print(Predicate(lambda b, h, q, k: (q - k) % 2 == 0).matrix(3, 3))
    ■ · ■
    · ■ ·
    ■ · ■
    """

    fn: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    kind: ClassVar[str] = "predicate"

    def __post_init__(self) -> None:
        for name, value in _captured(self.fn).items():
            # bool is an int too, but it selects one of two programs, not one of very many.
            if isinstance(value, int | float) and not isinstance(value, bool):
                raise MaskError(
                    f"the predicate captures {name}={value!r}, a Python number: each new value would compile a new"
                    f" kernel. Capture a tensor instead: {name} = torch.tensor({value!r}, device=...)"
                )
        index = torch.zeros((), dtype=torch.int32, device=_home(self.fn))
        answer = self.fn(index, index, index, index)
        if not isinstance(answer, Tensor):
            raise MaskError(
                f"the predicate returned a Python {type(answer).__name__}, takes a bool tensor made from its indices;"
                " for 'always' return q >= 0"
            )
        if answer.dtype != torch.bool:
            raise MaskError(f"the predicate returned {answer.dtype}, takes torch.bool; compare, or add .bool()")

    def __repr__(self) -> str:
        return f"Predicate({getattr(self.fn, '__qualname__', repr(self.fn))})"

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(value for value in _captured(self.fn).values() if isinstance(value, Tensor))

    def check(self, frame: Frame) -> None:
        for name, value in _captured(self.fn).items():
            if isinstance(value, Tensor) and value.device != frame.device:
                raise MaskError(
                    f"the predicate captures {name} on {value.device}, but the call is on {frame.device};"
                    f" capture {name}.to({str(frame.device)!r})"
                )

    def rule(self, frame: Frame) -> Rule:
        return self.fn


def _captured(fn: Callable[..., Any]) -> dict[str, Any]:
    """Names and values a plain function closes over or takes as defaults."""
    if not inspect.isfunction(fn):
        return {}
    cells = zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True)
    defaults = {name: p.default for name, p in inspect.signature(fn).parameters.items() if p.default is not p.empty}
    return {name: cell.cell_contents for name, cell in cells} | defaults


def _home(fn: Callable[..., Any]) -> torch.device:
    """The device of the tensors `fn` captures, where a probe of it must run."""
    held = [value.device for value in _captured(fn).values() if isinstance(value, Tensor)]
    return held[0] if held else torch.device("cpu")

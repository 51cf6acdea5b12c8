"""Predicate: a function of batch, head, query and key, checked before any kernel meets it."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import numbers
from collections.abc import Callable, Hashable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from headway.errors import MaskError
from headway.masks.base import Mask, Rule
from headway.masks.frame import Frame


@dataclasses.dataclass(frozen=True, repr=False)
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
        if not callable(self.fn) or isinstance(self.fn, Tensor):
            raise MaskError(
                f"got {type(self.fn).__name__}, takes a function fn(b, h, q, k); wrap a bool tensor in Dense(tensor)"
            )
        if torch.compiler.is_compiling():
            return  # the tracer looks into the function itself, and a probe would become a part of its graph
        captured = _captured(self.fn)
        for name, value in captured.items():
            if (found := _numbers(value)) is not None:
                raise MaskError(
                    f"the predicate captures {name}={value!r}, {found}: each new value would compile a new"
                    f" kernel. Capture a tensor instead: {name} = torch.tensor({value!r}, device=...)"
                )
        homes = {name: value.device for name, value in captured.items() if isinstance(value, Tensor)}
        if len(set(homes.values())) > 1:
            listed = ", ".join(f"{name} on {device}" for name, device in homes.items())
            raise MaskError(f"the predicate captures tensors on several devices ({listed}); move them to the call's")
        _probe(self.fn, next(iter(homes.values()), torch.device("cpu")))

    def __repr__(self) -> str:
        fn = self.fn.func if isinstance(self.fn, functools.partial) else self.fn
        return f"Predicate({getattr(fn, '__qualname__', type(fn).__qualname__)})"

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(value for value in _captured(self.fn).values() if isinstance(value, Tensor))

    @property
    def is_value(self) -> bool:
        """A function that holds nothing says the same for ever; one that holds anything has to be asked."""
        return not _captured(self.fn) and isinstance(self.fn, Hashable)

    def state(self) -> tuple[Any, ...]:
        """Also what else the function holds: a flag may be flipped."""
        others = (value for value in _captured(self.fn).values() if not isinstance(value, Tensor))
        return (*super().state(), *(value if isinstance(value, _FLAGS) else id(value) for value in others))

    def check(self, frame: Frame) -> None:
        for name, value in _captured(self.fn).items():
            if isinstance(value, Tensor) and not _same(value.device, frame.device):
                raise MaskError(
                    f"the predicate captures {name} on {value.device}, but the call is on {frame.device};"
                    f" capture {name}.to({str(frame.device)!r})"
                )

    def rule(self, frame: Frame) -> Rule:
        return self.fn


_FLAGS = (bool, str, type(None))


def _numbers(value: object) -> str | None:
    """What kind of Python number would be compiled in, if any. A bool only chooses one of two programs."""
    if isinstance(value, list | tuple) and any(_numbers(one) for one in value):
        return f"a {type(value).__name__} of Python numbers"
    return "a Python number" if isinstance(value, numbers.Number) and not isinstance(value, bool) else None


def _same(one: torch.device, other: torch.device) -> bool:
    """'cuda' without a number stands for any."""
    return one.type == other.type and (None in (one.index, other.index) or one.index == other.index)


def _probe(fn: Callable[..., Any], device: torch.device) -> None:
    """Call the predicate on one index as flex attention will: under vmap, where nothing may be read."""
    answers = []

    def call(index: Tensor) -> Tensor:
        answers.append(fn(index, index, index, index))
        return index

    try:
        torch.vmap(call)(torch.zeros(1, dtype=torch.int32, device=device))
    except MaskError:
        raise
    except Exception as error:
        if "data-dependent control flow" in str(error):
            raise MaskError(
                "the predicate asks a tensor for a Python bool, with if, and, or, not or bool();"
                " use & | ~ and torch.where on its indices"
            ) from error
        raise MaskError(
            f"the predicate failed on its first index ({type(error).__name__}: {error});"
            " takes fn(b, h, q, k), elementwise on index tensors"
        ) from error
    (answer,) = answers
    if not isinstance(answer, Tensor):
        raise MaskError(
            f"the predicate returned a Python {type(answer).__name__}, takes a bool tensor made from its indices;"
            " for 'always' return q >= 0"
        )
    if answer.dtype != torch.bool:
        raise MaskError(f"the predicate returned {answer.dtype}, takes torch.bool; compare, or add .bool()")


def _captured(fn: Callable[..., Any]) -> dict[str, Any]:
    """Names and values a predicate holds: closed over, bound, global, taken as defaults, or kept as attributes."""
    # A tracer sees all of this by itself, and cannot follow the looking.
    return {} if torch.compiler.is_compiling() else dict(_held(fn, set()))


def _held(fn: object, seen: set[int]) -> Iterator[tuple[str, Any]]:
    if id(fn) in seen:
        return
    seen.add(id(fn))
    for name, value in _own(fn):
        if callable(value) and not isinstance(value, type | Tensor):
            yield from _held(value, seen)
        elif isinstance(value, list | tuple | dict) and any(isinstance(each, Tensor) for each in _values(value)):
            yield from ((f"{name}[{i}]", each) for i, each in enumerate(_values(value)))
        else:
            yield name, value


def _values(held: list[Any] | tuple[Any, ...] | dict[Any, Any]) -> list[Any]:
    return list(held.values() if isinstance(held, dict) else held)


def _is_users(value: object) -> bool:
    """A plain function that is not torch's: it may hold tensors too."""
    return inspect.isfunction(value) and not (value.__module__ or "").startswith("torch")


def _own(fn: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(fn, functools.partial):
        yield "function", fn.func
        yield from inspect.signature(fn.func).bind_partial(*fn.args, **fn.keywords).arguments.items()
    elif inspect.ismethod(fn):
        yield "function", fn.__func__
        yield from vars(fn.__self__).items()
    elif inspect.isfunction(fn):
        yield from zip(fn.__code__.co_freevars, (cell.cell_contents for cell in fn.__closure__ or ()), strict=True)
        defaults = fn.__defaults__ or ()
        yield from zip(fn.__code__.co_varnames[fn.__code__.co_argcount - len(defaults) :], defaults, strict=False)
        yield from (fn.__kwdefaults__ or {}).items()
        called = ((name, fn.__globals__.get(name)) for name in fn.__code__.co_names)
        yield from ((name, value) for name, value in called if isinstance(value, Tensor) or _is_users(value))
    elif isinstance(fn, torch.nn.Module):
        yield from (*fn.named_parameters(), *fn.named_buffers())
    elif not type(fn).__module__.startswith("torch."):  # torch's own operators hold what is theirs
        yield from getattr(fn, "__dict__", {}).items()

"""Running a module for what it answers: its outputs, and the gradients of a fixed mix of them."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import math
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from headway.sites.seen import Inputs

SEED = 7

NO_ARRAY = "Can't call numpy() on Tensor that requires grad"
NO_COPY = "Only Tensors created explicitly by the user (graph leaves) support the deepcopy protocol"
"""What PyTorch says to a forward that is at fault only in that its tensors have gradients."""


@dataclasses.dataclass
class Answer:
    """What is no number, or nobody's to judge, is NaN."""

    outputs: list[Tensor]
    gradients: dict[str, Tensor | None]
    drew: bool = False
    """Whether it took random numbers, which in another dtype would be others."""


def answer(
    module: nn.Module,
    inputs: Inputs,
    *,
    at_most: int | None = None,
    dtype: torch.dtype | None = None,
    among: Answer | None = None,
    seeing: Tensor | None = None,
    without: Collection[str] | None = (),
) -> Answer:
    """The first `at_most` floating-point outputs, and the gradients of a fixed mix of what is finite in `among`.

    What comes out for queries that are not `seeing` anything is nobody's to judge: 0, a mean or NaN, by the kernel.
    The inputs named in `without` have no gradients; None means that nothing has.
    """
    given: list[Tensor] = []
    args, kwargs = _mapped((inputs.args, inputs.kwargs), dtype, given, names_of(inputs) if without is None else without)
    torch.manual_seed(SEED)
    fresh = _random_state(module)
    with torch.set_grad_enabled(without is not None), contextlib.ExitStack() as stack:
        for kind, cast in inputs.casts if dtype is None else ():
            stack.enter_context(torch.autocast(kind, cast))
        if dtype == torch.float64:
            stack.enter_context(_Float64Softmax())
        outputs = list(tensors_of(module(*args, **kwargs)))[:at_most]
        drew = any(not torch.equal(*pair) for pair in zip(fresh, _random_state(module), strict=True))
        wanted = {f"input {i}": x for i, x in enumerate(given) if x.requires_grad}
        wanted |= {name: p for name, p in module.named_parameters() if p.requires_grad}
        judged = [_over_rows(out, seeing) for out in outputs]
        if among is not None:
            # Gradients of a mix that another answer could not take part in would not be comparable with its own.
            finite = (was.isfinite() for was in among.outputs)
            judged = [
                rows & was if was.shape == out.shape else rows
                for out, rows, was in zip(outputs, judged, finite, strict=False)
            ] + judged[len(among.outputs) :]
        ends = [(out, rows) for out, rows in zip(outputs, judged, strict=True) if out.requires_grad]
        shown = [out.detach().masked_fill(~rows, math.nan) for out, rows in zip(outputs, judged, strict=True)]
        if not ends or not wanted:
            return Answer(shown, {}, drew)
        mixed = torch.stack([(out * _mix(out).masked_fill(~rows, 0.0)).sum() for out, rows in ends]).sum()
        for leaf in wanted.values():
            leaf.grad = None
        mixed.backward()  # a reentrant checkpoint refuses torch.autograd.grad
    return Answer(shown, {name: leaf.grad for name, leaf in wanted.items()}, drew)


class _Float64Softmax(TorchFunctionMode):
    """A softmax of numbers in float64 stays there, also where a model asks for float32.

    There the least number of float64, with which it masks, is -inf: rows of filler are NaN, and in the next layer all.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _SOFTMAXES and kwargs.get("dtype") == torch.float32 and args and args[0].dtype == torch.float64:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


_SOFTMAXES = (torch.softmax, torch.nn.functional.softmax, Tensor.softmax)


def wants_no_gradients(error: RuntimeError) -> bool:
    """Whether a forward would run if its tensors had no gradients."""
    return str(error).startswith((NO_ARRAY, NO_COPY))


def names_of(inputs: Inputs) -> list[str]:
    """The inputs that have gradients, as answers name them."""
    given: list[Tensor] = []
    _mapped((inputs.args, inputs.kwargs), None, given, ())
    return [f"input {i}" for i in range(len(given))]


def _random_state(module: nn.Module) -> list[Tensor]:
    cards = {p.device for p in module.parameters() if p.device.type == "cuda"}
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(card) for card in cards)]


def named(module: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """What the module was called with, by the names of its parameters, also what was given by its place."""
    given = inspect.signature(module.forward).bind_partial(*inputs.args, **inputs.kwargs).arguments
    return {**given, **inputs.kwargs}


def rows_that_see(mask: Any) -> Tensor | None:
    """The queries (batch, length) that see anything, by an attention_mask of transformers; None if it does not say."""
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        return None
    if mask.dim() == 2:
        return mask != 0
    may = mask > torch.finfo(mask.dtype).min / 2 if mask.is_floating_point() else mask != 0
    return may.any(-1).all(1)


def _over_rows(out: Tensor, seeing: Tensor | None) -> Tensor:
    """Which numbers of an answer are judged, broadcast over it; all, where it has no such rows."""
    if seeing is None or out.shape[:2] != seeing.shape:
        return torch.ones((), dtype=torch.bool, device=out.device)
    return seeing.view(*seeing.shape, *(1,) * (out.dim() - 2))


def _mix(out: Tensor) -> Tensor:
    """The same numbers whatever dtype the answer has; 0 where it is no number."""
    # Drawn where it is used: on the host the logits of a large vocabulary took most of a proof's time.
    kind = "cpu" if out.device.type == "mps" else out.device
    made = torch.randn(out.shape, generator=torch.Generator(kind).manual_seed(SEED), device=kind)
    return made.to(out.device, out.dtype) * out.detach().isfinite()


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Every floating-point tensor in an answer, in order."""
    if isinstance(value, Tensor):
        if value.is_floating_point() and not value.is_nested:
            yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from tensors_of(each)
    elif isinstance(value, tuple | list):
        for each in value:
            yield from tensors_of(each)


def _mapped(value: Any, dtype: torch.dtype | None, inputs: list[Tensor], without: Collection[str]) -> Any:
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            return value
        made = value.detach().to(dtype or value.dtype, copy=True).requires_grad_(f"input {len(inputs)}" not in without)
        inputs.append(made)
        return made.clone()  # which a module may write to
    if isinstance(value, dict):
        return {key: _mapped(each, dtype, inputs, without) for key, each in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_mapped(each, dtype, inputs, without) for each in value)
    return value if isinstance(value, nn.Module) else copy.deepcopy(value)

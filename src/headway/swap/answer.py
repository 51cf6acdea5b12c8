"""Running a module for what it answers: its outputs, and the gradients of a fixed mix of them."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

SEED = 7
Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@dataclasses.dataclass
class Answer:
    """What is no number, or nobody's to judge, is NaN."""

    outputs: list[Tensor]
    gradients: dict[str, Tensor | None]


def answer(
    module: nn.Module,
    inputs: Inputs,
    *,
    at_most: int | None = None,
    dtype: torch.dtype | None = None,
    among: Answer | None = None,
) -> Answer:
    """The first `at_most` floating-point outputs, and the gradients of a fixed mix of what is finite in `among`."""
    given: list[Tensor] = []
    args, kwargs = _mapped(inputs, dtype, given)
    with torch.enable_grad():
        outputs = list(tensors_of(module(*args, **kwargs)))[:at_most]
        wanted = {f"input {i}": x for i, x in enumerate(given)}
        wanted |= {name: p for name, p in module.named_parameters() if p.requires_grad}
        seeing = _rows_that_see(inputs[1].get("attention_mask"))
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
            return Answer(shown, {})
        mixed = torch.stack([(out * _mix(out).masked_fill(~rows, 0.0)).sum() for out, rows in ends]).sum()
        gradients = torch.autograd.grad(mixed, list(wanted.values()), allow_unused=True)
    return Answer(shown, dict(zip(wanted, gradients, strict=True)))


def _rows_that_see(mask: Any) -> Tensor | None:
    """The queries (batch, length) that see anything, by a model's attention_mask; None if it does not say.

    What comes out for the others is nobody's to say: 0, the mean of all values or NaN, by the kernel that ran.
    """
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
    """The same numbers whatever dtype and device the answer has; 0 where it is no number."""
    made = torch.randn(out.shape, generator=torch.Generator().manual_seed(SEED), dtype=torch.float64)
    return made.to(torch.float32).to(out.device, out.dtype) * out.detach().isfinite()


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


def _mapped(value: Any, dtype: torch.dtype | None, inputs: list[Tensor]) -> Any:
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            return value
        made = value.detach().to(dtype or value.dtype, copy=True).requires_grad_()
        inputs.append(made)
        return made
    if isinstance(value, dict):
        return {key: _mapped(each, dtype, inputs) for key, each in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_mapped(each, dtype, inputs) for each in value)
    return value if isinstance(value, nn.Module) else copy.deepcopy(value)

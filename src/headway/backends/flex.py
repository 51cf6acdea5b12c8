"""flex: flex attention, compiled; any mask that is a rule, on CUDA with gradients and on CPU without."""

from __future__ import annotations

import dataclasses
import functools
import operator
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from headway.backends.kernel import Attended, Extras, gate_sinks
from headway.errors import RecompileBudgetError
from headway.masks.base import Mask, Score, narrowed
from headway.masks.frame import Frame

BUDGET = 16
"""Compilations allowed per kind of mask and score. Beyond that torch would run the eager path, which is unfused."""


@dataclasses.dataclass(frozen=True)
class Lowered:
    signature: str
    """What decides the program: masks of one signature share one compiled kernel."""
    block_mask: BlockMask | None = None
    score: Score | None = None
    options: dict[str, int] | None = None
    shift: Tensor | None = None
    """(B, H, L): taken off each row's scores, which softmax does not see, and given back to its lse."""


def lower(mask: Mask | None, frame: Frame, dtype: torch.dtype) -> Lowered:
    if mask is None:
        return Lowered("none")
    blocks = None if mask.kind in ("bias", "alibi") else mask.to_block_mask(frame)
    held = signature(mask)
    # A tensor loaded tile by tile takes shared memory in every stage of the pipeline; with one stage it always fits.
    options = {"num_stages": 1} if frame.device.type == "cuda" and ("bias" in held or "dense" in held) else None
    score, shift = mask.score(frame), _largest(mask, frame) if "bias" in held else None
    return Lowered(held, blocks, score if score is None or shift is None else _less(score, shift), options, shift)


def _largest(mask: Mask, frame: Frame) -> Tensor:
    """What a row adds at most to a score it sees, as far as that takes no more room than what is added itself.

    The kernel takes the largest score off the others by a fused multiplication, exact to one rounding of that score. In
    a row of -1e30 that is 1e22, and its exponential NaN: such a row was seen to give NaN on an H200.
    """
    with torch.no_grad():
        parts: tuple[Mask, ...] = getattr(mask, "parts", (mask,))
        pieces = [narrowed(one, one.dtype) for part in parts if (one := part.added(frame, torch.float32)) is not None]
        wide = [torch.zeros(1, device=frame.device)] if len(pieces) > 1 else []
        added = functools.reduce(operator.add, wide + pieces)
        for part in parts:
            keep = part.keep(frame)
            if torch.broadcast_shapes(added.shape, keep.shape) == added.shape:
                added = torch.where(keep, added, float("-inf"))
        largest = added.amax(-1).to(torch.float32)
        largest = torch.where(largest.isneginf(), 0.0, largest)
    return largest.expand(frame.batch, frame.heads, frame.q_len)


def _less(score: Score, shift: Tensor) -> Score:
    def less(value: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return score(value, b, h, q, k) - shift[b, h, q]

    return less


def signature(mask: Mask) -> str:
    """The mask's structure without its numbers."""
    parts = getattr(mask, "parts", None) or ((mask.part,) if hasattr(mask, "part") else ())
    if parts:
        return f"{mask.kind}({','.join(signature(part) for part in parts)})"
    # A predicate's code, not the function: one made anew at each step is the same program.
    return f"{mask.kind}:{id(getattr(mask.fn, '__code__', mask.fn))}" if hasattr(mask, "fn") else mask.kind


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Lowered, extras: Extras) -> Attended:
    score, capped = mask.score, extras.softcap is not None
    if extras.softcap is not None:
        score = _softcapped(torch.full((), extras.softcap, device=q.device), score)
    wants_lse = extras.lse or extras.sinks is not None
    arguments = (q, k, v, score, mask.block_mask, extras.scale, q.shape[1] != k.shape[1], wants_lse, mask.options)
    if torch.compiler.is_compiling():
        answer = _flex(*arguments)
    else:
        kernel = compiled(mask.signature + (" softcap" if capped else ""), wants_lse, extras.needs_grad)
        answer = kernel(*arguments)
    if not wants_lse:
        return answer, None
    out, lse = answer
    lse = lse if mask.shift is None else lse + mask.shift
    return gate_sinks(out, lse, extras.sinks)


def _softcapped(cap: Tensor, then: Score | None) -> Score:
    def score(value: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        value = cap * torch.tanh(value / cap)
        return value if then is None else then(value, b, h, q, k)

    return score


def _flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    score: Score | None,
    blocks: BlockMask | None,
    scale: float | None,
    gqa: bool,
    lse: bool,
    options: dict[str, int] | None,
) -> Any:
    flex: Any = flex_attention  # its overloads know no plain bool for return_lse
    return flex(q, k, v, score, blocks, scale, gqa, lse, options)


class Counted:
    """A function compiled per shape, that counts how often it is compiled, and stops at its budget."""

    def __init__(self, name: str, budget: int) -> None:
        self.name, self.budget, self.compilations = name, budget, 0
        self._by_shape: dict[Any, Callable[..., Any]] = {}

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
        scale = rest[2]
        shapes = (q.shape, k.shape, v.shape, q.dtype, scale)  # the scale is compiled in
        run = self._by_shape.get(shapes)
        if run is None:
            self._spend(0)
            run = self._by_shape[shapes] = self._own()
        try:
            return run(q, k, v, *rest)
        except BackendCompilerFailed as error:
            if isinstance(error.inner_exception, RecompileBudgetError):
                raise error.inner_exception from None
            raise

    def _own(self) -> Callable[..., Any]:
        """A code object of its own: torch counts recompilations per code object, and gives up at 8."""
        code = _flex.__code__.replace(co_name=f"flex_{abs(hash(self.name))}_{len(self._by_shape)}")
        own = types.FunctionType(code, _flex.__globals__, _flex.__name__)
        return torch.compile(own, fullgraph=True, dynamic=False, backend=self._compile)

    def _compile(self, graph: Any, inputs: Any) -> Any:
        from torch._inductor.compile_fx import compile_fx

        self._spend(1)
        return compile_fx(graph, inputs)

    def _spend(self, count: int) -> None:
        if self.compilations >= self.budget:
            raise RecompileBudgetError(
                f"flex attention with {self.name} would be compiled for the {self.compilations + 1}th time,"
                f" budget {self.budget}: its shapes or options change too often; pad lengths to a few sizes,"
                f" or choose another backend"
            )
        self.compilations += count


@functools.cache
def compiled(signature: str, lse: bool, grad: bool) -> Counted:
    """The compiled kernel for one kind of mask and score."""
    return Counted(f"mask {signature}", BUDGET)

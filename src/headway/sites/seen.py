"""What a model does while its example runs: which module computes attention where, and with what inputs.

The model is run once with hooks of its own on every module, which are gone when it returns, and inside a mode that sees
calls of F.scaled_dot_product_attention and attention written by hand: a softmax of a matrix product that goes into
another matrix product.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from headway.sites.unseen import SDPA, heard

PRODUCTS = frozenset(
    {
        *(torch.matmul, torch.mm, torch.bmm, torch.baddbmm, torch.einsum, torch.addmm),
        *(Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, Tensor.mm, Tensor.bmm, Tensor.baddbmm, Tensor.addmm),
    }
)
SOFTMAXES = frozenset({torch.softmax, F.softmax, Tensor.softmax, torch.exp, Tensor.exp})
KEEPS = frozenset(
    {
        *(torch.add, torch.mul, torch.div, torch.sub, torch.where, torch.masked_fill, torch.tanh, torch.clamp),
        *(Tensor.add, Tensor.mul, Tensor.div, Tensor.sub, Tensor.masked_fill, Tensor.masked_fill_, Tensor.tanh),
        *(Tensor.__add__, Tensor.__mul__, Tensor.__truediv__, Tensor.__sub__, Tensor.__iadd__, Tensor.__radd__),
        *(Tensor.add_, Tensor.mul_, Tensor.div_, Tensor.where, Tensor.float, Tensor.to, Tensor.half, Tensor.type_as),
        *(Tensor.view, Tensor.reshape, Tensor.transpose, Tensor.permute, Tensor.contiguous, Tensor.flatten),
        *(Tensor.unsqueeze, Tensor.squeeze, Tensor.__imul__, Tensor.__itruediv__, Tensor.__rmul__, torch.transpose),
        *(F.dropout, Tensor.unflatten, Tensor.expand, Tensor.bfloat16, torch.dropout, torch.reshape, torch.permute),
        *(F.log_softmax, torch.log_softmax, Tensor.log_softmax, torch.nan_to_num, Tensor.nan_to_num, Tensor.clamp),
        *(torch.cat, torch.concat, F.pad, Tensor.__getitem__, Tensor.narrow, Tensor.type, Tensor.double, Tensor.clone),
        *(torch.squeeze, torch.unsqueeze, torch.flatten, torch.unflatten, Tensor.clip, Tensor.tanh_),
        *(Tensor.masked_scatter, Tensor.view_as, Tensor.expand_as, Tensor.swapaxes, Tensor.addcmul, Tensor.detach),
    }
)
"""What scores, or weights, are after which still are scores, or weights."""


class Inputs(NamedTuple):
    """What a module was called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    casts: tuple[tuple[str, torch.dtype], ...] = ()
    """Where autocast was on, and to what."""


def _casts() -> tuple[tuple[str, torch.dtype], ...]:
    return tuple((kind, torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind))


@dataclasses.dataclass
class Seen:
    """What one run showed."""

    sdpa: dict[str, int] = dataclasses.field(default_factory=dict)
    """Modules that call F.scaled_dot_product_attention themselves, and how often; by the name of the innermost."""
    by_hand: dict[tuple[str, str], int] = dataclasses.field(default_factory=dict)
    """(module, file:line) of attention written by hand, with the bytes of the largest scores seen there."""
    kernels: dict[str, int] = dataclasses.field(default_factory=dict)
    """Modules that call flash_attn's or xFormers' functions themselves, and how often, where they were watched."""
    unseen: dict[str, str] = dataclasses.field(default_factory=dict)
    """Modules that call what no mode sees and no site redirects, and what that is."""
    calls: dict[str, Inputs] = dataclasses.field(default_factory=dict)
    """The inputs of the first call of each module that was asked for."""
    ran: set[str] = dataclasses.field(default_factory=set)
    """Modules whose forward ran."""


def see(model: nn.Module, run: Callable[[nn.Module], Any], keep: Collection[str] = ()) -> Seen:
    """Run the model once and tell what it did; the inputs of the modules in `keep` are kept."""
    seen = Seen()
    stack: list[str] = []
    # Without gradients, as a cache in a graph has no copies.
    with torch.no_grad(), _named(model, stack, seen, keep), heard(stack, seen.unseen), _Eye(stack, seen):
        run(model)
    return seen


@contextlib.contextmanager
def _named(model: nn.Module, stack: list[str], seen: Seen, keep: Collection[str]) -> Iterator[None]:
    """Keeps `stack` at the names of the modules that are running."""
    handles = []

    def enter(name: str) -> Callable[..., None]:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            stack.append(name)
            seen.ran.add(name)
            if name in keep and name not in seen.calls:
                seen.calls[name] = Inputs(pinned(args), pinned(kwargs), _casts())

        return before

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        stack.pop()

    try:
        for name, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            handles.append(module.register_forward_pre_hook(enter(name), with_kwargs=True))
            handles.append(module.register_forward_hook(leave, always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def pinned(value: Any) -> Any:
    """Inputs as they are now: a cache that a module is given grows while it runs."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: pinned(each) for key, each in value.items()}
    if type(value) in (tuple, list):
        return type(value)(pinned(each) for each in value)
    return value if isinstance(value, nn.Module) else copy.deepcopy(value)


class _Eye(TorchFunctionMode):
    """Sees PyTorch's functions as the model calls them."""

    def __init__(self, stack: list[str], seen: Seen) -> None:
        super().__init__()
        self.stack, self.seen = stack, seen
        self.scores, self.weights = WeakIdKeyDictionary(), WeakIdKeyDictionary()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = self.stack[-1] if self.stack else ""
        if func is SDPA:
            self.seen.sdpa[name] = self.seen.sdpa.get(name, 0) + 1
            return func(*args, **kwargs)
        held = [*_tensors(args), *_tensors(kwargs.values())]
        if func in PRODUCTS:
            weights = next((self.weights[x] for x in held if x in self.weights), None)
            if weights is not None:
                at, size = weights
                self.seen.by_hand[name, at] = max(size, self.seen.by_hand.get((name, at), 0))
        out = func(*args, **kwargs)
        if isinstance(out, Tensor):
            self._mark(func, held, out)
        return out

    def _mark(self, func: Any, held: list[Tensor], out: Tensor) -> None:
        if func in PRODUCTS:
            # By a parameter it is a projection, or a classifier's logits.
            if not any(isinstance(x, nn.Parameter) or isinstance(x._base, nn.Parameter) for x in held):
                self.scores[out] = True
        elif func in SOFTMAXES and any(x in self.scores for x in held):
            self.weights[out] = _where(), out.numel() * out.element_size()
        elif func in KEEPS:
            for marks in (self.scores, self.weights):
                mark = next((marks[x] for x in held if x in marks), None)
                if mark is not None:
                    marks[out] = mark


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Also those in lists, as einsum takes them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _where() -> str:
    """file:line of the first frame outside of torch and this file."""
    torch_home, frame = str(Path(torch.__file__).parent), sys._getframe(1)
    while frame.f_back is not None and (
        frame.f_code.co_filename.startswith(torch_home) or frame.f_code.co_filename == __file__
    ):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"

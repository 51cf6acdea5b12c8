"""Sees every operator that runs in the block, on this thread and in backward passes that it starts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

Sees = Callable[[Any, tuple[Any, ...], dict[str, Any], Callable[[], Any]], Any]


class Operators(TorchDispatchMode):
    """Below autograd and autocast, where all is plain arithmetic.

    A TorchFunctionMode would not do: with one on, PyTorch's transformer layers leave their fast path.
    """

    supports_higher_order_operators = True  # flex attention is one

    def __init__(self, sees: Sees) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sees = sees

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or each call would go by a wrapper that imports the compiler

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # what is compiled stays compiled while it is watched

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return self.sees(func, args, kwargs, lambda: func(*args, **kwargs))


@functools.lru_cache(maxsize=4096)
def only_views(func: Any) -> bool:
    """True for an operator that computes nothing: it returns its input, or a view of it."""
    schema = getattr(func, "_schema", None)
    if schema is None:
        return False
    if schema.name in ("aten::_unsafe_view", "aten::_reshape_alias"):
        return True
    returned = [one.alias_info for one in schema.returns]
    return bool(returned) and all(info is not None and not info.is_write for info in returned)


@functools.lru_cache(maxsize=4096)
def writes(func: Any) -> bool:
    """True for an operator that changes its input."""
    schema = getattr(func, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


UNFILLED = frozenset(
    f"aten::{name}"
    for name in ("empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided", "resize_",
                 "resize_as_", "set_", "empty_quantized")
)  # fmt: skip
"""These return memory as it lies: what it holds is nobody's result."""

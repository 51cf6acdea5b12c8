"""Calls that compute attention and take part in no mode: heard of by name while the example runs, and left alone.

flex_attention compiles itself, kernels of packages are plain functions, and another tool may have put a function of its
own in the place of F.scaled_dot_product_attention. The interpreter tells its profile hook of each call, on this thread.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import threading
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import Any

import torch
import torch.nn.functional as F

SDPA = torch._C._nn.scaled_dot_product_attention
"""PyTorch's own, whatever stands at F.scaled_dot_product_attention now."""

_KNOWN = (
    ("torch.nn.attention.flex_attention", "flex_attention"),
    ("torch.nn.attention.varlen", "varlen_attn"),
    ("sageattention", "sageattn"),
)
"""Where functions that compute attention are, which no kind of site redirects."""


def in_its_place() -> str:
    """What another tool put in the place of F.scaled_dot_product_attention, or ''."""
    now: Any = F.scaled_dot_product_attention
    if now is SDPA:
        return ""
    return f"{getattr(now, '__module__', '?')}.{getattr(now, '__qualname__', type(now).__name__)}"


def notes() -> Iterator[str]:
    """What stands between models and a census of all their attention."""
    place = in_its_place()
    if place:
        yield (
            f"another tool put {place} in the place of F.scaled_dot_product_attention, for every model of this process:"
            " what it drops of a call was lost before the swap too"
        )
    if sys.getprofile() is not None:
        yield f"a profiler is at work, so calls of {', '.join(name for _, name in _KNOWN)} are not looked for"


@contextlib.contextmanager
def heard(stack: list[str], calls: dict[str, str]) -> Iterator[None]:
    """Notes in `calls` which module, the last of `stack`, called which of these functions."""
    listened = _listened()
    if sys.getprofile() is not None or not listened:  # a profiler must not lose what it measures
        yield
        return

    hook: _Hook

    def hear(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            code = frame.f_code
            said = listened.get((code.co_filename, code.co_name))  # compiled, it is another code of that name
            if said is not None:
                calls.setdefault(stack[-1] if stack else "", said)
                hook.meet_the_compiler(said)

    with _Hook(hear) as hook:
        yield


class _Hook:
    """The profile hook of this thread, but not while torch.compile is at work on it: the compiler calls so much that to
    hear of it takes ten times as long."""

    def __init__(self, hear: Callable[[FrameType, str, Any], None]) -> None:
        self._hear, self._thread, self._off, self._compiler = hear, threading.get_ident(), False, None

    def __enter__(self) -> _Hook:
        self._listen()
        sys.setprofile(self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        if self._compiler is not None:
            # torch._dynamo.reset, which the model may call, forgets them itself.
            for known, own in (
                (self._compiler.start_callbacks, self._begins),
                (self._compiler.end_callbacks, self._ends),
            ):
                if own in known:
                    known.remove(own)

    def meet_the_compiler(self, called: str) -> None:
        """Import it before flex_attention does, which compiles itself."""
        if self._compiler is None and called == "flex_attention":
            sys.setprofile(None)
            importlib.import_module("torch._dynamo.callback")
            self._listen()
            sys.setprofile(self._hear)

    def _listen(self) -> None:
        self._compiler = getattr(sys.modules.get("torch._dynamo.callback"), "callback_handler", None)
        if self._compiler is not None:
            self._compiler.register_start_callback(self._begins)
            self._compiler.register_end_callback(self._ends)

    def _begins(self, *_: Any) -> None:
        if sys.getprofile() is self._hear:
            self._off = True
            sys.setprofile(None)

    def _ends(self, *_: Any) -> None:
        if self._off and threading.get_ident() == self._thread and sys.getprofile() is None:
            self._off = False
            sys.setprofile(self._hear)


def _listened() -> dict[tuple[str, str], str]:
    """What each of them is called, by the file and name of its code."""
    found = {name: getattr(sys.modules.get(home), name, None) for home, name in _KNOWN}
    place = in_its_place()
    if place:
        found[f"{place}, which another tool put in the place of F.scaled_dot_product_attention"] = (
            F.scaled_dot_product_attention
        )
    codes = {said: _code(value) for said, value in found.items()}
    return {(code.co_filename, code.co_name): said for said, code in codes.items() if code is not None}


def _code(value: Any) -> CodeType | None:
    """What runs when a value is called; None if that is not Python."""
    for function in (value, type(value).__call__):
        code = getattr(function, "__code__", None)
        if isinstance(code, CodeType):
            return code
    return None

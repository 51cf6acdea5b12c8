"""Follows which module is running, without a hook: a watched module's forward is looked up on the instance first.

Hooks would not do. One on a module sends nn.TransformerEncoder off its fast path, so that the watched model is another
than the unwatched one; one on all modules is everybody's in the process.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

from torch import nn
from torch.compiler import is_compiling

FORWARD = "forward"


class Follower(Protocol):
    """What is told of each call."""

    def follows(self) -> bool: ...
    def enter(self, path: str, module: nn.Module, args: Any, kwargs: Any) -> None: ...
    def leave(self, path: str, module: nn.Module, output: Any) -> None: ...
    def fall(self) -> None: ...


class Followed:
    """A module's forward, told of. A copy or a pickle of the module made meanwhile gets the module's own forward."""

    def __init__(self, module: nn.Module, path: str, follower: Follower) -> None:
        self.module, self.path, self.follower = module, path, follower
        self.had = FORWARD in module.__dict__
        self.forward: Callable[..., Any] = module.forward
        functools.update_wrapper(self, self.forward, updated=())  # signatures are read by many: through __wrapped__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if is_compiling() or not self.follower.follows():
            return self.forward(*args, **kwargs)
        self.follower.enter(self.path, self.module, args, kwargs)
        try:
            output = self.forward(*args, **kwargs)
        except BaseException:
            self.follower.fall()
            raise
        self.follower.leave(self.path, self.module, output)
        return output

    def __getattr__(self, name: str) -> Any:
        if name == FORWARD:
            raise AttributeError(name)  # not there yet: or this would ask itself for ever
        return getattr(self.forward, name)

    def __reduce__(self) -> Any:
        return _itself, (self.forward,)  # a bound method, which follows its module into a copy


def _itself(forward: Any) -> Any:
    return forward


def follow(modules: dict[str, nn.Module], follower: Follower) -> Callable[[], None]:
    """Follow these modules. The returned call ends it and leaves each instance as it was."""
    followed: list[Followed] = []

    def end() -> None:
        for one in reversed(followed):
            if one.module.__dict__.get(FORWARD) is one:
                if one.had:
                    one.module.__dict__[FORWARD] = one.forward
                else:
                    del one.module.__dict__[FORWARD]
        followed.clear()

    try:
        for path, module in modules.items():
            one = Followed(module, path, follower)
            module.__dict__[FORWARD] = one
            followed.append(one)
    except BaseException:
        end()
        raise
    return end


def compiled(module: nn.Module) -> bool:
    """True where torch.compile has the module: new forwards inside would only make it compile again."""
    return getattr(module, "_compiled_call_impl", None) is not None or "_orig_mod" in module._modules

"""Modules that call flash_attn's or xFormers' functions: the calls are redirected, for that module alone.

These functions take part in no mode of PyTorch, and to patch them would change every model of the process. But a method
finds them in its globals: so a swapped module's class runs the very code of each such method over globals in which the
name leads to its site. They look everything else up in the module's own globals, at every use. What a method does not
reach by its globals (it imports the function itself, calls a helper that calls it, holds it as an attribute) is out of
reach; such modules are left alone, and the census says why.
"""

from __future__ import annotations

import contextlib
import dataclasses
import dis
import functools
import inspect
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from types import CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn

from headway.errors import SwapError
from headway.sites import kernel_arguments
from headway.sites.roles import rejoin, set_role, take_role
from headway.sites.seen import Seen
from headway.sites.site import HELD, Found, Site

KIND = "flash_attn and xFormers"

_FLASH = (
    "flash_attn_func", "flash_attn_qkvpacked_func", "flash_attn_kvpacked_func",
    "flash_attn_varlen_func", "flash_attn_varlen_qkvpacked_func", "flash_attn_varlen_kvpacked_func",
)  # fmt: skip
_FLASH4 = ("flash_attn_func", "flash_attn_varlen_func")
_XFORMERS = ("memory_efficient_attention",)

_HOMES: tuple[tuple[tuple[str, ...], tuple[str, ...], kernel_arguments.Translate], ...] = (
    (("flash_attn.cute", "flash_attn.cute.interface"), _FLASH4, kernel_arguments.flash4),
    (
        ("flash_attn", "flash_attn.flash_attn_interface", "headway.shims.flash_attn.flash_attn_interface"),
        _FLASH, kernel_arguments.flash,
    ),
    (
        ("xformers.ops", "xformers.ops.fmha", "mslk.attention.fmha", "headway.shims.xformers.ops.fmha"),
        _XFORMERS, kernel_arguments.xformers,
    ),
)  # fmt: skip
"""Which modules have which functions, and how their arguments are understood."""

_PACKAGES = frozenset({"flash_attn", "flash_attn_interface", "xformers", "mslk"})
_SHIMS = "headway.shims"
"""Where the functions are that stand in for theirs."""
_OTHERS = frozenset(
    {
        *_FLASH, *_XFORMERS, "flash_attn_with_kvcache", "flash_attn_combine",
        "memory_efficient_attention_forward", "memory_efficient_attention_forward_requires_grad",
        "memory_efficient_attention_partial",
    }
)  # fmt: skip
"""Functions of those packages that compute attention too; no calls of those that are not in _HOMES are redirected."""

_DEPTH = 3
"""How many helpers deep a call is looked for: further down is what other modules and other settings would do."""

_NOT_OURS = frozenset({"torch", "transformers"})
"""Packages whose classes are not looked at: PyTorch's call no such function, and transformers' are another kind."""

_NOT_FOLLOWED = frozenset({"torch", *sys.stdlib_module_names})
"""Packages whose functions are not looked at."""


class Kernel(NamedTuple):
    """A function that computes attention, and how a site understands its arguments; None if it does not."""

    name: str
    translate: kernel_arguments.Translate | None


def _kernel(value: Any) -> Kernel | None:
    """What `value` is known as: by where it says it comes from, or by being what a loaded package has there."""
    if not isinstance(value, FunctionType):
        return None
    at, name = value.__module__ or "", value.__name__
    for homes, names, translate in _HOMES:
        if (at in homes and name in names) or any(_has(home, names, value) for home in homes):
            return Kernel(name, translate)
    is_theirs = _package(value) in _PACKAGES or at.startswith(f"{_SHIMS}.")
    return Kernel(name, None) if name in _OTHERS and is_theirs else None


def _has(home: str, names: Collection[str], value: Any) -> bool:
    module = sys.modules.get(home)
    return module is not None and any(vars(module).get(name) is value for name in names)


# -- the redirection --------------------------------------------------------------------------------------------------


class Rerouted:
    """What the class of a swapped module starts with: its own methods, over globals that lead to its site."""

    __dict__: dict[str, Any]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "_original" in cls.__dict__:  # else another tool's subclass of such a class
            for name, look in _look_at_class(cls.__dict__["_original"]).methods.items():
                setattr(cls, name, _rerouted(look.function, frozenset(look.names)))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return rejoin(self, protocol)  # type: ignore[arg-type]  # it is a module


def _rerouted(function: FunctionType, names: frozenset[str]) -> Callable[..., Any]:
    @functools.wraps(function)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _interpreted()(function, names, self, args, kwargs)

    return method


def _run(function: FunctionType, names: frozenset[str], module: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
    again = FunctionType(
        function.__code__,
        Globals(function.__globals__, module.__dict__[HELD], names),
        function.__name__,
        function.__defaults__,
        function.__closure__,  # the very cells: super() and what the method shares with others stay as they are
    )
    again.__kwdefaults__ = function.__kwdefaults__
    again.__qualname__ = function.__qualname__
    return again(module, *args, **kwargs)


def _interpreted() -> Callable[..., Any]:
    """`_run`, out of torch.compile's sight, which looks into globals past `__missing__`: it breaks its graph there."""
    if not _DISABLED and "torch._dynamo" in sys.modules:  # to import it takes a second
        _DISABLED.append(torch.compiler.disable(_run))
    return _DISABLED[0] if _DISABLED else _run


_DISABLED: list[Callable[..., Any]] = []

_ASKED_OF_GLOBALS = ("__builtins__", "__name__", "__package__", "__spec__", "__path__", "__file__", "__loader__")
"""What the interpreter itself looks up in a function's globals, past `__missing__`."""


class Globals(dict[str, Any]):
    """A method's globals as they are at each use, but for `names`, which lead to a site. Of one call alone.

    The interpreter asks `__missing__` of globals that are not exactly a dict.
    """

    def __init__(self, real: dict[str, Any], held: Any, names: frozenset[str]) -> None:
        super().__init__({name: real[name] for name in _ASKED_OF_GLOBALS if name in real})
        self.real, self.held, self.names = real, held, names

    def __missing__(self, name: str) -> Any:
        value = self.real[name]
        return _redirected(value, self.held) if name in self.names else value


class _Through:
    """A module as a swapped module sees it: its kernels, and those of its submodules, lead to the site."""

    def __init__(self, module: ModuleType, held: Any) -> None:
        self.__dict__["_headway_through"] = module, held

    def __getattr__(self, name: str) -> Any:
        module, held = self.__dict__["_headway_through"]
        return _redirected(getattr(module, name), held)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["_headway_through"][0], name, value)


def _redirected(value: Any, held: Any) -> Any:
    if isinstance(value, ModuleType):
        return _Through(value, held)
    if isinstance(value, functools.partial):
        inner = _redirected(value.func, held)
        return value if inner is value.func else functools.partial(inner, *value.args, **value.keywords)
    kernel = _kernel(value)
    if kernel is None or kernel.translate is None:
        return value
    return functools.partial(_call, held, value, kernel)


def _call(held: Any, real: Callable[..., Any], kernel: Kernel, /, *args: Any, **kwargs: Any) -> Any:
    if isinstance(held, _Watcher):
        return held.run(real, args, kwargs)
    assert kernel.translate is not None
    return kernel.translate(held, real, args, kwargs)


# -- what a class's code says -----------------------------------------------------------------------------------------


@dataclasses.dataclass
class Look:
    """What the code of one method says of kernels, without running it."""

    function: FunctionType
    names: set[str] = dataclasses.field(default_factory=set)
    """Globals by which it reaches kernels that a site understands."""
    kernels: list[str] = dataclasses.field(default_factory=list)
    """Those kernels."""
    others: list[str] = dataclasses.field(default_factory=list)
    """Kernels that no site understands; calls of them stay as they are."""
    because: str = ""
    """How it reaches a kernel other than by its globals, or what else keeps it from being rebuilt."""


@dataclasses.dataclass
class ClassLook:
    methods: dict[str, Look] = dataclasses.field(default_factory=dict)
    """Those to be rebuilt."""
    others: tuple[str, ...] = ()
    because: str = ""
    """Why there is no way to redirect all that its instances call."""

    @property
    def kernels(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(kernel for look in self.methods.values() for kernel in look.kernels))


def _look_at_class(kind: type) -> ClassLook:
    """All that a class has of its own and of its bases."""
    found, looks, becauses = ClassLook(), [], []
    owners = [owner for owner in kind.__mro__ if owner is not object and _package(owner) not in _NOT_OURS]
    for owner in owners:
        for name, value in vars(owner).items():
            if (held := _kernel(_bare(value))) is not None:
                becauses.append(f"its class holds {held.name} itself, as {name}")
            elif name == "__init__":
                continue  # it calls nothing yet; what it keeps is looked for in the instance
            elif isinstance(value, FunctionType):
                looks.append((owner, name, _look(value)))
            else:
                becauses += [_wrapped(name, function) for function in _functions(value)]
    for _, name, look in looks:
        becauses.append(look.because)
        if look.kernels and _is_first(kind, name, look.function):
            found.methods[name] = look
    becauses += [_by_super(owners, owner, look, looks) for owner, _, look in looks]
    found.others = tuple(dict.fromkeys(other for _, _, look in looks for other in look.others))
    found.because = next(filter(None, becauses), "")
    return found


def _package(value: Any) -> str:
    return (value.__module__ or "").partition(".")[0]


def _is_first(kind: type, name: str, function: FunctionType) -> bool:
    """Whether it is what instances find by that name."""
    return next(vars(owner)[name] for owner in kind.__mro__ if name in vars(owner)) is function


def _by_super(owners: list[type], owner: type, look: Look, looks: list[tuple[type, str, Look]]) -> str:
    """Why what a method calls by super() is out of reach: super() finds the base's own method, and never ours."""
    bases = owners[owners.index(owner) + 1 :]
    names = {name for code in _codes(look.function.__code__) for name in (*code.co_names, *code.co_freevars)}
    if not names & {"super", "__class__", *(base.__name__ for base in bases)}:
        return ""
    for base, name, theirs in looks:
        if base in bases and name in names and theirs.kernels:
            return f"{_at(look.function)} calls {_at(theirs.function)} by super(), which calls {theirs.kernels[0]}"
    return ""


def _bare(value: Any) -> Any:
    value = value.__func__ if isinstance(value, staticmethod | classmethod) else value
    return value.func if isinstance(value, functools.partial) else value


def _functions(value: Any) -> Iterator[FunctionType]:
    """The functions behind what is no plain method: a property, a static method, what some decorator made."""
    if isinstance(value, type | nn.Module | ModuleType):
        return
    for name in ("__func__", "fget", "fset", "func", "__wrapped__", "_torchdynamo_orig_callable"):
        inner = inspect.getattr_static(value, name, None)
        inner = getattr(value, name, None) if inspect.isdatadescriptor(inner) else inner
        if isinstance(inner, FunctionType):
            yield inner


def _wrapped(name: str, function: FunctionType) -> str:
    look = _look(function)
    if look.because or not look.kernels:
        return look.because
    return f"{_at(function)} calls {look.kernels[0]}, and {name} is no plain method of it"


def _look(function: FunctionType) -> Look:
    look, becauses, touches = Look(function), [], ""
    for how, name, value in _reached(function):
        kernel = _kernel(_bare(value))
        if how == "whole":
            touches = touches or f"{_at(function)} reads or writes its globals as a whole, or binds {name} there"
        elif how == "imports":
            becauses.append(f"{_at(function)} imports {name} itself, where no globals lead")
        elif kernel is not None and how != "global":
            becauses.append(f"{_at(function)} has {kernel.name} from {name}, not from its globals")
        elif kernel is not None and kernel.translate is None:
            look.others.append(kernel.name)
        elif kernel is not None:
            look.kernels.append(kernel.name)
            look.names.add(name)
        else:
            becauses.append(_hidden(value))
    look.because = next(filter(None, becauses), touches if look.kernels else "")
    return look


def _hidden(value: Any) -> str:
    """Where a function that a method calls, or one that it calls in turn, calls a kernel; '' if none does."""
    known: set[FunctionType] = set()
    level = {*_behind(value)}
    for _ in range(_DEPTH):
        below: set[FunctionType] = set()
        for function in level:
            for how, name, inner in _reached(function):
                kernel = _kernel(_bare(inner))
                if how == "imports" or (kernel is not None and kernel.translate is not None):
                    called = name if kernel is None else kernel.name
                    return f"{_at(function)}, which it calls, calls {called} with globals of its own"
                below.update(_behind(inner))
        known |= level
        level = below - known
    return ""


def _behind(value: Any) -> Iterator[FunctionType]:
    """The functions that a call of `value` may run, if any are to be looked at."""
    if isinstance(value, type) and issubclass(value, torch.autograd.Function):
        value = value.forward
    value = _bare(value)
    if isinstance(value, FunctionType) and _package(value) not in _NOT_FOLLOWED:
        yield value


def _at(function: FunctionType) -> str:
    return f"{function.__qualname__} ({function.__code__.co_filename}:{function.__code__.co_firstlineno})"


def _reached(function: FunctionType) -> Iterator[tuple[str, str, Any]]:
    """(how, by which name, what): all that a function, and code inside it, reaches by names."""
    cells: dict[str, Any] = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # a cell that is empty yet
            cells[name] = cell.cell_contents
    for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
        yield "default", "a default", value
    if (wrapped := function.__dict__.get("__wrapped__")) is not None:
        yield "wrapped", "__wrapped__", wrapped
    for how, name, attributes in _read(function.__code__):
        names = cells if how == "closure" else function.__globals__
        if how in ("whole", "imports"):
            yield how, name, None
        elif name in names:
            yield from _followed(how, name, names[name], attributes)


def _followed(how: str, name: str, value: Any, attributes: tuple[str, ...]) -> Iterator[tuple[str, str, Any]]:
    """What a name is bound to, and what is read of that."""
    yield how, name, value
    for attribute in attributes:
        # Of modules and classes alone, and as they have it: to ask anything else could run code.
        if not isinstance(value, ModuleType | type):
            return
        how = "class" if isinstance(value, type) else how
        value = inspect.getattr_static(value, attribute, None)
        yield how, name, value


def _codes(code: CodeType) -> Iterator[CodeType]:
    """It, and all that is defined inside it: lambdas and functions share its globals."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


@functools.lru_cache(maxsize=4096)
def _read(code: CodeType) -> tuple[tuple[str, str, tuple[str, ...]], ...]:
    """(how, name, the attributes read of it at once) for each name that code uses."""
    found: list[tuple[str, str, tuple[str, ...]]] = []
    for step in (step for one in _codes(code) for step in (None, *dis.get_instructions(one))):
        if step is None:
            found.append(("", "", ()))
            continue
        name = str(step.argval)
        if step.opname in ("LOAD_ATTR", "LOAD_METHOD") and found and found[-1][0] in ("global", "closure"):
            how, first, attributes = found.pop()
            found.append((how, first, (*attributes, name)))
            continue
        found.append(("", "", ()))  # which ends a chain of attributes
        if step.opname in ("STORE_GLOBAL", "DELETE_GLOBAL") or (step.opname == "LOAD_GLOBAL" and name == "globals"):
            found.append(("whole", name, ()))
        elif step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            found.append(("global", name, ()))
        elif step.opname in ("LOAD_DEREF", "LOAD_CLASSDEREF"):
            found.append(("closure", name, ()))
        elif step.opname == "IMPORT_NAME" and name.partition(".")[0] in _PACKAGES:
            found.append(("imports", name, ()))
    return tuple(dict.fromkeys(each for each in found if each[0]))


# -- a kind of site ---------------------------------------------------------------------------------------------------


_NN_MODULES = frozenset(nn.Module().__dict__)
_PLAIN = (int, float, str, bytes, tuple, list, dict, set, type(None), torch.Tensor, torch.dtype, torch.device)
"""Values of an instance that nobody calls."""


def _looks(model: nn.Module) -> Iterator[tuple[str, nn.Module, ClassLook]]:
    """Every module, by every name, whose class says anything of kernels."""
    if sys.modules.keys().isdisjoint((*_PACKAGES, _SHIMS)):
        return  # nobody has loaded what could be called
    known: dict[type, ClassLook] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        kind = type(module)
        if kind not in known:
            known[kind] = _look_at_class(kind)
        look = known[kind]
        if held := _held(module):
            look = dataclasses.replace(look, because=look.because or held)
        if look.methods or look.because or look.others:
            yield name, module, look


def _held(module: nn.Module) -> str:
    """How it keeps a kernel as an attribute, or what calls one."""
    for name, value in module.__dict__.items():
        if name in _NN_MODULES or isinstance(value, _PLAIN):
            continue
        if (kernel := _kernel(_bare(value))) is not None:
            return f"it holds {kernel.name} itself, as self.{name}"
        called = inspect.getattr_static(type(value), "__call__", None)  # a processor's, say
        if hidden := _hidden(value) or _hidden(called):
            return hidden
    return ""


def find(model: nn.Module, seen: Seen | None) -> Iterator[Found]:
    """The modules whose methods call kernels, once each, with all their paths."""
    paths: dict[nn.Module, list[str]] = {}
    looks: dict[nn.Module, ClassLook] = {}
    for name, module, look in _looks(model):
        paths.setdefault(module, []).append(name)
        looks[module] = look
    for module, (name, *aliases) in paths.items():
        because = _why_not(module, looks[module])
        if seen is not None:
            names = {name, *aliases}
            otherwise = names & {*seen.sdpa, *(at for at, _ in seen.by_hand)}
            called = names & seen.kernels.keys()
            if otherwise and not called:
                continue  # the example took another branch, and what it computed there is another kind's
            because = because or _not_seen(looks[module], seen, names, bool(otherwise), bool(called))
        yield Found(name, module, KIND, because, tuple(aliases))


def _not_seen(look: ClassLook, seen: Seen, names: set[str], otherwise: bool, called: bool) -> str:
    if otherwise:
        return f"it computes attention in another way too, beside {look.kernels[0]}, and a site is of one kind"
    if seen.ran & names and not called:
        return f"it did not call {look.kernels[0]} with the example, so nothing about it could be proven"
    return ""


def _why_not(module: nn.Module, look: ClassLook) -> str:
    if look.because:
        return look.because
    if not look.methods:
        return f"it calls {look.others[0]}, of which no site understands the arguments"
    replaced = next((name for name in ("forward", *look.methods) if name in module.__dict__), "")
    if replaced:
        return f"its {replaced} was replaced on the instance, which no class can override"
    return ""


def notes(model: nn.Module) -> Iterator[str]:
    """Calls of modules that can be swapped which stay as they are."""
    told: dict[nn.Module, str] = {}
    for name, module, look in _looks(model):
        if look.methods and look.others and not look.because and module not in told:
            told[module] = f"{name or 'the model'}: calls of {', '.join(look.others)} stay with their package"
    yield from told.values()


class _Watcher:
    """Held by a module of a copy that is only looked at: kernels run as they are, and it is noted who called them."""

    def __init__(self, name: str, calls: dict[str, int]) -> None:
        self.name, self.calls = name, calls

    def run(self, real: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.calls[self.name] = self.calls.get(self.name, 0) + 1
        try:
            with torch._C.DisableTorchFunction():  # what it does inside is not the module's own doing
                return real(*args, **kwargs)
        except Exception as error:
            raise SwapError(
                f"got a model that does not run here as it is: {real.__name__}, called by {self.name or 'the model'},"
                f" says {type(error).__name__}: {error}; takes one that runs with its example, to compare with;"
                " swap it where it does, or without an example, and so without a proof"
            ) from error


def watch(model: nn.Module) -> dict[str, int]:
    """Make a copy tell, while it runs, which of its modules call kernels, and how often."""
    calls: dict[str, int] = {}
    first: dict[nn.Module, str] = {}
    for name, module, look in _looks(model):
        if look.methods and not _why_not(module, look):
            first.setdefault(module, name)
    held: Any = {name: _Watcher(name, calls) for name in first.values()}
    set_role(model, held, Rerouted)
    return calls


def apply(model: nn.Module, sites: Mapping[str, Site]) -> None:
    """Give each named module its site and its new class, or none of them."""
    set_role(model, sites, Rerouted)


def restore(model: nn.Module, names: Collection[str] | None = None) -> None:
    """Give back the classes, of all sites or of the named; the very objects are as before."""
    take_role(model, Rerouted, names)

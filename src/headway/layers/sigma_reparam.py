"""σReparam (Zhai et al. 2023, arXiv:2303.06296): a weight of learnt spectral norm, W_hat = (γ / σ(W)) W.

σ(W) is the largest singular value, followed by power iteration on two kept vectors, one step at each forward pass in
training. γ starts as σ(W), so wrapping leaves the function as it is. A module keeps its object, hooks and bias; its
`weight` becomes what is computed, and the state_dict holds, where `weight` stood,

    parametrizations.weight.original   the very Parameter that `weight` was; optimizers that hold it go on
    parametrizations.weight.0.gamma    γ, learnt if the weight is; give it to the optimizer
    parametrizations.weight.0.u, .v    the singular vectors

so a checkpoint of a wrapped model loads into a wrapped model. One of a plain model is loaded before wrapping, or after
`remove_sigma_reparam`, which gives the plain names back. A matrix held as one, such as `in_proj_weight` with its
queries, keys and values, has one γ.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.amp import is_autocast_available
from torch.compiler import is_compiling
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import (
    ParametrizationList,
    is_parametrized,
    register_parametrization,
    remove_parametrizations,
)

from headway.errors import RequestError

One: TypeAlias = str | type[nn.Module]

LAYERS: tuple[tuple[type[nn.Module], tuple[str, ...]], ...] = (
    (nn.Linear, ("weight",)),
    (_ConvNd, ("weight",)),
    (nn.MultiheadAttention, ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")),
)
"""What is wrapped unless names say otherwise. The output projection of nn.MultiheadAttention is a Linear."""
ORDER = "_order_of_parameters"
"""Where the class of a wrapped module keeps the names of its parameters, in the order that they had before."""
MOST_STEPS = 512
"""Of the search for the first singular value; tens are enough for the weights of real models."""


def sigma_reparam(module: nn.Module, names: One | Iterable[One] | None = None) -> nn.Module:
    """Wrap weights of `module` and all modules in it, in place, and return it; the function stays as it is.

    - `names` None: every weight of a Linear, a convolution or an nn.MultiheadAttention.
    - A glob, such as 'encoder.*' or '*.out_proj.weight': those of them whose path, or whose module's path, it matches.
    - A path in full, such as 'token_embedding.weight': that parameter, whatever module has it.
    - A module class: the weights of its instances.

    Each must match something. What is wrapped already stays so. A parameter that several modules share stays shared:
    all that hold it get the same weight and the one γ. All is wrapped, or nothing.

    >>> layer = sigma_reparam(nn.Linear(4, 3))
    >>> sorted(name for name, _ in layer.named_parameters())
    ['bias', 'parametrizations.weight.0.gamma', 'parametrizations.weight.original']
    """
    every = _weights(module)
    named = {id(weight.tensor) for weight in _chosen(every, names)}
    chosen = [weight for weight in every if id(weight.tensor) in named and weight.wrapper is None]
    for weight in chosen:
        _check(weight)
    try:
        for weight in chosen:
            sharing = (other.held for other in every if other.tensor is weight.tensor and other.wrapper is not None)
            _wrap(weight, next(sharing, None))
    except BaseException:
        for weight in chosen:
            if weight.wrapper is not None:
                _unwrap(weight)
        raise
    return module


def remove_sigma_reparam(module: nn.Module) -> nn.Module:
    """Give every σReparam weight of `module` back as a plain Parameter that holds what is effective now.

    Classes, names and the order of parameters are those before wrapping, and the Parameter is the same object.
    """
    wrapped = [weight for weight in _weights(module) if weight.wrapper is not None]
    if not wrapped:
        raise RequestError(
            f"got a {type(module).__name__} without σReparam; takes one that sigma_reparam wrapped:"
            " nothing needs to be removed"
        )
    for weight in wrapped:
        _check_on_top(weight)
    plain: dict[nn.Parameter, Tensor] = {}
    for weight in wrapped:  # all of them first: nothing is changed should one of them fail
        assert weight.wrapper is not None
        if weight.tensor not in plain:
            plain[weight.tensor] = weight.wrapper.effective(weight.tensor)
    for weight in wrapped:
        _unwrap(weight)
    with torch.no_grad():
        for parameter, effective in plain.items():
            parameter.copy_(effective)
    return module


class SigmaReparam(nn.Module):
    """The parametrization of one weight: its γ and its first singular vectors, float32 at least.

    They stay so under `.half()` or `.bfloat16()`: in eight bits a small step of γ would round back to where it was.
    """

    gamma: nn.Parameter
    u: Tensor
    v: Tensor

    def __init__(self, weight: Tensor, axis: int) -> None:
        super().__init__()
        self.axis = axis
        rows, columns = self._matrix(weight).shape
        like = weight.detach().to(_wide(weight.dtype))
        # One number with one axis, as FSDP2 shards no parameter without.
        self.gamma = nn.Parameter(like.new_ones(1), requires_grad=weight.requires_grad)
        self.register_buffer("u", like.new_zeros(rows))
        self.register_buffer("v", like.new_zeros(columns))

    def forward(self, weight: Tensor) -> Tensor:
        return self._weight(weight, steps=self.training and weight.requires_grad)

    @torch.no_grad()
    def effective(self, weight: Tensor) -> Tensor:
        """The weight as it acts now; no buffer changes."""
        return self._weight(weight, steps=False)

    @torch.no_grad()
    def right_inverse(self, weight: Tensor) -> Tensor:
        """Called when a weight is wrapped and when one is assigned: γ becomes σ of it, so that it acts unchanged."""
        if weight.device.type != "meta":  # there everything is filled in when a state_dict is loaded
            u, v = first_singular_vectors(self._matrix(weight))
            self.u.copy_(u)
            self.v.copy_(v)
            self.gamma.copy_(self._sigma(weight.to(_wide(weight.dtype)), self.u, self.v))
        return weight

    def extra_repr(self) -> str:
        return f"rows={len(self.u)}, columns={len(self.v)}"

    def _weight(self, weight: Tensor, steps: bool) -> Tensor:
        kind = weight.device.type
        if is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):
                return self._weight(weight, steps)
        wide = weight.to(_wide(weight.dtype))
        if steps:
            with torch.no_grad():
                step = _opaque_step if is_compiling() else _step
                step(self._matrix(wide), self.u, self.v)
        # Copies, as the buffers may change before the backward pass.
        sigma = self._sigma(wide, self.u.to(wide.dtype, copy=True), self.v.to(wide.dtype, copy=True))
        # A zero matrix has no direction to scale. It acts as it is, and learns as it would without γ.
        zero = sigma == 0
        ratio = torch.where(zero, 1.0, self.gamma.to(wide.dtype) / torch.where(zero, 1.0, sigma))
        return (wide * ratio).to(weight.dtype)

    def _sigma(self, weight: Tensor, u: Tensor, v: Tensor) -> Tensor:
        return torch.dot(u, torch.mv(self._matrix(weight), v))

    def _matrix(self, weight: Tensor) -> Tensor:
        return weight.movedim(self.axis, 0).flatten(1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SigmaReparam:
        def apply(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if not tensor.is_floating_point() or _wide(moved.dtype) == moved.dtype:
                return moved
            return tensor.to(moved.device)

        super()._apply(apply, recurse)  # type: ignore[no-untyped-call]  # torch has no types here
        return self


# -- power iteration --------------------------------------------------------------------------------------------------


def _step(matrix: Tensor, u: Tensor, v: Tensor) -> None:
    """One step, in place, so that replicas of DataParallel share it.

    None in a backward pass: what is recomputed there, by activation checkpointing, is the weight of the forward pass.
    """
    if torch._C._current_graph_task_id() == -1:
        u.copy_(_unit(torch.mv(matrix, v.to(matrix.dtype)), otherwise=u))
        v.copy_(_unit(torch.mv(matrix.mT, u.to(matrix.dtype)), otherwise=v))


# A compiled program cannot ask whether it runs in a backward pass; an operator that it does not look into can.
_opaque_step = torch.library.custom_op("headway::power_iteration_step", mutates_args=("u", "v"))(_step)


@_opaque_step.register_fake
def _(matrix: Tensor, u: Tensor, v: Tensor) -> None: ...


# -- singular vectors -------------------------------------------------------------------------------------------------


@torch.no_grad()
def first_singular_vectors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors u, v with uᵀ M v = σ(M), in float64 where the device has it.

    By Golub-Kahan-Lanczos with full reorthogonalisation: singular values that nearly coincide slow power iteration
    down, but not this. The start is a fixed one, drawn without touching the global random state.
    """
    wide = torch.float32 if matrix.device.type == "mps" else torch.float64
    if matrix.shape[0] < matrix.shape[1]:  # the side that is complete first
        v, u = first_singular_vectors(matrix.mT)
        return u, v
    rows, columns = matrix.shape
    draw = torch.Generator().manual_seed(0)
    start = [torch.randn(n, generator=draw, dtype=torch.float64).to(matrix.device, wide) for n in (rows, columns)]
    largest = matrix.abs().amax().to(wide)
    if not 0 < largest.item() < math.inf:
        return _unit(start[0], start[0]), _unit(start[1], start[1])
    a = matrix.to(wide) / largest  # so that no square overflows or vanishes
    steps = min(columns, MOST_STEPS)
    us, vs = a.new_zeros(steps, rows), a.new_zeros(steps, columns)
    bidiagonal = torch.zeros(steps, steps, dtype=torch.float64)
    nothing = torch.finfo(wide).eps * math.sqrt(rows)
    enough = 1e-12 if wide == torch.float64 else 1e-6
    v, found, before, done = start[1], 0.0, 0.0, 0
    for j in range(steps):
        vs[j] = v / torch.linalg.vector_norm(v)
        u = _without(_without(a @ vs[j], us[:j]), us[:j])
        alpha = torch.linalg.vector_norm(u).item()
        done = j + 1
        if alpha <= nothing:  # no direction is left; that row of zeros joins nothing
            break
        bidiagonal[j, j], us[j] = alpha, u / alpha
        v = _without(_without(a.mT @ us[j], vs[:done]), vs[:done])
        beta = torch.linalg.vector_norm(v).item()
        if done == steps or beta <= nothing:
            break
        if done % 8 == 0:
            now = torch.linalg.matrix_norm(bidiagonal[:done, :done], ord=2).item()
            if now - before <= enough * now:  # over sixteen steps
                break
            before, found = found, now
        bidiagonal[j, j + 1] = beta
    left, _, right = torch.linalg.svd(bidiagonal[:done, :done])
    u, v = left[:, 0].to(us) @ us[:done], right[0].to(vs) @ vs[:done]
    return _unit(u, u), _unit(v, v)


def _without(x: Tensor, basis: Tensor) -> Tensor:
    return x - (basis @ x) @ basis


def _unit(x: Tensor, otherwise: Tensor) -> Tensor:
    """x at length 1, however large or small; `otherwise` where that cannot be."""
    largest = x.abs().amax()
    fits = (largest > 0) & (largest < math.inf)
    scaled = torch.where(fits, x / torch.where(fits, largest, 1.0), otherwise.to(x.dtype))
    length: Tensor = torch.linalg.vector_norm(scaled)
    return scaled / length


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


# -- weights of a model -----------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Weight:
    """One parameter of one module, plain or wrapped."""

    module: nn.Module
    name: str
    paths: list[str]
    """Of the module; several where a model holds it several times."""

    @property
    def held(self) -> ParametrizationList | None:
        """What torch puts in the place of a parametrized parameter."""
        return _lists(self.module).get(self.name)

    @property
    def wrapper(self) -> SigmaReparam | None:
        first = None if self.held is None else self.held[0]
        return first if isinstance(first, SigmaReparam) else None

    @property
    def tensor(self) -> nn.Parameter:
        """What is learnt, the same object before wrapping and after."""
        made = self.module._parameters[self.name] if self.held is None else next(self.held.parameters())
        assert made is not None
        return made

    @property
    def is_usual(self) -> bool:
        return any(isinstance(self.module, kind) and self.name in names for kind, names in LAYERS)

    @property
    def path(self) -> str:
        return _join(self.paths[0], self.name)

    def matches(self, one: One) -> bool:
        if isinstance(one, type):
            if not isinstance(self.module, one):
                return False
            return self.is_usual or not any(isinstance(self.module, kind) for kind, _ in LAYERS)
        names = [name for path in self.paths for name in (path, _join(path, self.name))]
        return one in names or (self.is_usual and any(fnmatch.fnmatchcase(name, one) for name in names))


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _lists(module: nn.Module) -> dict[str, ParametrizationList]:
    return dict(module.parametrizations.items()) if is_parametrized(module) else {}  # type: ignore[union-attr, operator]


def _weights(model: nn.Module) -> list[Weight]:
    """Every parameter with two axes or more, of every module, once."""
    found: dict[tuple[int, str], Weight] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if ".parametrizations." in f".{path}.":
            continue
        plain = [name for name, parameter in module._parameters.items() if _is_matrix(parameter)]
        held = [name for name, lists in _lists(module).items() if any(map(_is_matrix, lists.parameters(recurse=False)))]
        for name in (*plain, *held):
            found.setdefault((id(module), name), Weight(module, name, [])).paths.append(path)
    return list(found.values())


def _is_matrix(parameter: nn.Parameter | None) -> bool:
    if parameter is None:
        return False
    return is_lazy(parameter) or (parameter.ndim >= 2 and parameter.is_floating_point() and parameter.numel() > 0)


def _chosen(every: list[Weight], names: One | Iterable[One] | None) -> list[Weight]:
    asked: list[One] = [names] if isinstance(names, str | type) else list(names or ())
    if names is None:
        matched = [weight for weight in every if weight.is_usual]
        if not matched:
            raise RequestError(
                "got a model without weights of Linear, Conv or nn.MultiheadAttention; takes one with some:"
                f" name others in full, {_some(every)}"
            )
        return matched
    for one in asked:
        if not isinstance(one, str | type):
            raise RequestError(f"got names with {one!r}; takes globs, paths in full and module classes")
        if not any(weight.matches(one) for weight in every):
            what = repr(one) if isinstance(one, str) else one.__name__
            raise RequestError(
                f"got names={what}, which matches no weight; takes a glob, a path in full or a module class:"
                f" the weights are {_some(every)}"
            )
    if not asked:
        raise RequestError("got names with nothing in it; takes one or more, or None for all layers")
    return [weight for weight in every if any(weight.matches(one) for one in asked)]


def _some(every: list[Weight], at_most: int = 8) -> str:
    paths = [repr(weight.path) for weight in every]
    more = [f"and {len(paths) - at_most} more"] if len(paths) > at_most else []
    return ", ".join(paths[:at_most] + more) or "none"


def _check(weight: Weight) -> None:
    if weight.held is not None:
        raise RequestError(
            f"got {weight.path!r} with a parametrization already, {type(weight.held[0]).__name__};"
            " takes a plain parameter: remove that (torch.nn.utils.parametrize.remove_parametrizations),"
            " or leave the weight out by names"
        )
    if is_lazy(weight.tensor):
        raise RequestError(f"got {weight.path!r} without a shape yet; takes one that is there: run the model once")
    if hasattr(type(weight.tensor), "__tensor_flatten__"):
        raise RequestError(
            f"got {weight.path!r} as a {type(weight.tensor).__name__}; takes a plain parameter:"
            " wrap before the model is sharded or quantised"
        )
    held = _lists(weight.module)
    if held and not held.keys() & type(weight.module).__dict__.keys():
        raise RequestError(
            f"got {weight.path!r}, whose module's class was changed after another of its parameters was parametrized;"
            " takes it as it was before: undo what came later first (swap.undo())"
        )


def _check_on_top(weight: Weight) -> None:
    """Nothing may lie above: torch removes the property from the class, and all parametrizations at once."""
    if weight.name not in type(weight.module).__dict__:
        raise RequestError(
            f"got {weight.path!r}, whose module's class was changed after wrapping;"
            " takes it as sigma_reparam left it: undo what came later first (swap.undo())"
        )
    if hasattr(type(weight.tensor), "__tensor_flatten__"):
        raise RequestError(
            f"got {weight.path!r} as a {type(weight.tensor).__name__}; takes a plain parameter:"
            " load the full state_dict into a model that is wrapped and not sharded, and remove it there"
        )
    if weight.held is not None and len(weight.held) > 1:
        raise RequestError(
            f"got {weight.path!r} with {type(weight.held[1]).__name__} on top of σReparam; takes σReparam alone:"
            " torch.nn.utils.parametrize.remove_parametrizations removes both"
        )


# -- wrapping ---------------------------------------------------------------------------------------------------------


def _wrap(weight: Weight, shared: ParametrizationList | None) -> None:
    """By a parametrization of its own, or by the one of another module that holds the same parameter."""
    module, name = weight.module, weight.name
    order = tuple(module._parameters)
    if is_parametrized(module):
        _own_class(module)
        order = type(module).__dict__.get(ORDER, order)
    axis = 1 if isinstance(module, _ConvTransposeNd) else 0
    wrapper = SigmaReparam(weight.tensor, axis) if shared is None else nn.Identity()
    register_parametrization(module, name, wrapper, unsafe=True)
    if shared is not None:
        module.parametrizations[name] = shared  # type: ignore[index, operator, assignment]
    _make_copyable(module, order)


def _unwrap(weight: Weight) -> None:
    """The parameter goes back to its place as it is."""
    module = weight.module
    _own_class(module)
    places = {name: i for i, name in enumerate(type(module).__dict__[ORDER])}
    remove_parametrizations(module, weight.name, leave_parametrized=False)
    ordered = sorted(module._parameters.items(), key=lambda item: places.get(item[0], len(places)))
    module._parameters.clear()
    module._parameters.update(ordered)


def _own_class(module: nn.Module) -> None:
    """Give the module a class that no copy of it shares, as torch adds and removes properties there."""
    cls = type(module)
    module.__class__ = type(cls.__name__, cls.__bases__, dict(cls.__dict__))


def _make_copyable(module: nn.Module, order: tuple[str, ...]) -> None:
    """Let the module be pickled, which torch refuses, and let a deep copy have a class of its own."""
    cls: Any = type(module)
    base = cls.__bases__[0]
    if "__deepcopy__" in cls.__dict__ and not hasattr(base, "__deepcopy__"):
        del cls.__deepcopy__
    setattr(cls, ORDER, order)
    cls.__reduce_ex__ = _reduce


def _reduce(self: nn.Module, protocol: Any) -> Any:
    cls: Any = next(kind for kind in type(self).__mro__ if kind.__dict__.get("__reduce_ex__") is _reduce)
    if type(self) is not cls:  # another tool's class on top, which is that tool's to copy
        return super(cls, self).__reduce_ex__(protocol)
    return _again, (cls.__bases__[0], tuple(_lists(self)), cls.__dict__[ORDER]), self.__dict__.copy()


def _again(cls: type[nn.Module], names: tuple[str, ...], order: tuple[str, ...]) -> nn.Module:
    """A module of a parametrized class, with nothing in it yet; unpickling fills it."""
    module = cls.__new__(cls)
    nn.Module.__init__(module)
    for name in names:
        module.register_parameter(name, nn.Parameter(torch.empty(0)))
        register_parametrization(module, name, nn.Identity(), unsafe=True)
    _make_copyable(module, order)
    return module

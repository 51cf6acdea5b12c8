"""The context that fills a recording while a model runs."""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import functools
import threading
import weakref
from collections import deque
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _functorch
from torch.utils.hooks import RemovableHandle

from headway.errors import RequestError
from headway.watch import calls
from headway.watch.apart import apart, readable
from headway.watch.diversity import PICKED, Spread
from headway.watch.entropy import Heads, Seen, look
from headway.watch.forwards import Followed, compiled, follow
from headway.watch.leaves import leaves
from headway.watch.operators import UNFILLED, Operators, only_views, writes
from headway.watch.recording import Recording
from headway.watch.rows import (
    MODULE,
    MODULE_GRADIENT,
    OP,
    OP_BACKWARD,
    PARAMETER_GRADIENT,
    Calls,
    Origin,
    Parameter,
    Row,
)
from headway.watch.statistics import Statistics, is_finite, measure

_MOST_REPEATS = 32
"""Calls of one operator in one call of a module that have a row each; a loop's further ones share the last."""
OUTSIDE = "(outside the model)"
"""The path of operators that no module of the model runs: of the loss, of the optimizer."""
_MOST_ORIGINS = 32
_MARKS = 1 << 14
"""Module calls whose backward operators still find their module."""


def watch(model: nn.Module, *, bound: int = 64 << 20, rows: int = 256, operators: bool = True) -> Watch:
    """Record what a model does inside a `with` block, and leave no trace in the model.

    - `bound`: the most bytes that the recording holds. Tensors are read as they pass and none is kept; rows past the
      bound are left out, operators' first, and the report says so.
    - `rows`: how many query rows of each attention call are looked at for entropy and largest logit, evenly picked.
    - `operators`: also keep statistics of every operator inside the modules, not of modules' outputs alone.

    The user runs forward, and backward if they wish; mode, gradients, buffers, hooks, random state and results stay
    those of an unwatched run. Reading each tensor takes time, and on a GPU waits for it.

    >>> layer = nn.Linear(4, 2)
    >>> with watch(layer) as recording:
    ...     layer(torch.ones(3, 4)).sum().backward()
    >>> recording.row("output", "", "Linear").shape
    (3, 2)
    """
    return Watch(model, bound, rows, operators)


@dataclasses.dataclass(slots=True)
class _Call:
    """A module's call that is running."""

    path: str
    heads: int | None
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    softmax: list[tuple[tuple[int, int], int, Heads]] = dataclasses.field(default_factory=list)
    attentions: int = 0
    door: tuple[int, ...] = ()


class Watch:
    """What `watch` returns: a context manager, used once."""

    def __init__(self, model: nn.Module, bound: int, rows: int, operators: bool) -> None:
        if not isinstance(model, nn.Module):
            raise RequestError(f"got a model of type {type(model).__name__}; takes a torch.nn.Module")
        for name, value in (("bound", bound), ("rows", rows)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise RequestError(f"got {name}={value!r}; takes a whole number of 1 or more")
        self.model, self.rows, self.keeps_operators = model, rows, operators
        self.recording = Recording(bound)
        self.thread = 0
        self._undo: contextlib.ExitStack | None = None
        self._calls: list[_Call] = []
        self._order = 0
        self._storages: dict[int, str] = {}
        self._accumulators: dict[str, Any] = {}
        self._handles: list[RemovableHandle] = []
        self._marks: deque[tuple[int, str]] = deque(maxlen=_MARKS)
        self._last: tuple[weakref.ref[Tensor], int, Statistics] | None = None
        self._backward = -1
        self._backward_counts: dict[tuple[str, str], int] = {}

    # -- begin and end ------------------------------------------------------------------------------------------------

    def __enter__(self) -> Recording:
        if self._undo is not None or self.thread:
            raise RequestError("got one watch for a second block; takes one: call headway.watch again")
        self.thread = threading.get_ident()
        self._describe()
        with contextlib.ExitStack() as undo:
            undo.callback(self._forget)
            undo.callback(follow(self._followed(), self))
            undo.enter_context(Operators(self._sees))
            self._undo = undo.pop_all()
        return self.recording

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._undo is not None
        if kind is not None:
            self.recording.facts.error = f"{kind.__name__}: {error}"[:500]
        self._undo.close()

    def _forget(self) -> None:
        """Drop all that hangs on the model or on a graph."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._accumulators.clear()
        self._storages.clear()
        self._calls.clear()
        self._marks.clear()
        self._last = None

    def _describe(self) -> None:
        model, recording = self.model, self.recording
        facts = recording.facts
        facts.model, facts.torch = type(model).__name__, str(torch.__version__)
        facts.training = model.training
        names: dict[nn.Parameter, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            names.setdefault(parameter, []).append(name)
        whole = recording.ledger
        with apart():
            for parameter, aliases in names.items():
                zeros = readable(parameter) and parameter.numel() > 0 and not bool(parameter.any())
                held = Parameter(tuple(parameter.shape), tuple(aliases), parameter.requires_grad, zeros)
                if not whole.admit((aliases[0], held)):
                    self._too_small()
                recording.parameters[aliases[0]] = held
        for path, module in model.named_modules():
            held_module = Calls(type(module).__name__)
            if not whole.admit((path, held_module)):
                self._too_small()
            recording.modules[path] = held_module

    def _too_small(self) -> None:
        count = sum(1 for _ in self.model.parameters()) + sum(1 for _ in self.model.modules())
        raise RequestError(
            f"got bound={self.recording.ledger.bound}; takes room for the names of {count} modules and parameters"
            f" at least: pass bound={4096 * (count + 16)}"
        )

    def _followed(self) -> dict[str, nn.Module]:
        """All modules but those inside compiled ones."""
        followed: dict[str, nn.Module] = {}
        closed: list[str] = []
        for path, module in self.model.named_modules():
            inside = any(path == one or path.startswith(f"{one}." if one else "") for one in closed)
            if compiled(module):
                closed.append(path)
            if inside or getattr(module, "_compiled_call_impl", None) is not None:
                self.recording.modules[path].unseen = "compiled by torch.compile"
            else:
                followed[path] = module
        return followed

    # -- modules ------------------------------------------------------------------------------------------------------

    def follows(self) -> bool:
        """True on the thread of the block: another's calls of the same modules are not of this run."""
        return threading.get_ident() == self.thread

    def enter(self, path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not self._calls and not _in_backward():
            self._begin_forward()
        heads = getattr(module, "num_heads", None)
        self._calls.append(_Call(path, heads if isinstance(heads, int) and heads > 0 else None))
        self._mark(path)
        if path == "" and not _in_backward():
            self._spread(self.recording.inputs, (args, kwargs), "")

    def fall(self) -> None:
        """The call ended in an exception."""
        self._calls.pop()
        self._mark(self._calls[-1].path if self._calls else OUTSIDE)

    def leave(self, path: str, module: nn.Module, output: Any) -> None:
        self.fall()
        again = _in_backward()  # activation checkpointing runs a forward a second time
        if not again:
            self.recording.modules[path].calls += 1
        for leaf, tensor in leaves(output):
            name = _named(type(module).__name__, leaf)
            if not again:
                self._read(MODULE, path, name, tensor)
            if tensor.requires_grad and tensor.grad_fn is not None and readable(tensor):
                notice = functools.partial(self._gradient, path, name, tensor.output_nr)
                self._handles.append(tensor.grad_fn.register_prehook(notice))
        if path == "" and not again:
            self._spread(self.recording.outputs, output, "output")

    def _begin_forward(self) -> None:
        facts = self.recording.facts
        facts.forwards += 1
        facts.grad_enabled |= torch.is_grad_enabled()
        self._handles = [one for one in self._handles if one.hooks_dict_ref() is not None]
        with apart():
            self._storages = {}
            for name, parameter in self.model.named_parameters():
                if name in self.recording.parameters and readable(parameter) and parameter.numel():
                    self._storages[parameter.untyped_storage().data_ptr()] = name
        if torch.is_inference_mode_enabled() or _functorch.maybe_current_level() is not None:
            return  # there are no graphs, or those of torch.func, which end in no parameter
        for name, parameter in self.model.named_parameters():
            known = name in self.recording.parameters
            if known and parameter.requires_grad and parameter.is_leaf and readable(parameter):
                self._meet_gradient(name, parameter)

    def _spread(self, spreads: dict[str, Spread], value: Any, name: str) -> None:
        """How examples differ, along the first axis of what comes in and goes out."""
        for leaf, tensor in leaves(value):
            if tensor.dim() == 0 or not readable(tensor) or tensor.numel() == 0 or tensor.is_complex():
                continue
            shape = tuple(tensor.shape[1:])
            at = f"{_named(name, leaf)} {list(shape)}".strip()
            if at not in spreads:
                fresh = Spread(shape)
                if not self.recording.ledger.admit((at, fresh, b"\0" * (2 * 8 * PICKED + 512))):
                    continue
                spreads[at] = fresh
            with apart():
                spreads[at].add(tensor)

    # -- statistics ---------------------------------------------------------------------------------------------------

    def _read(
        self, kind: str, path: str, name: str, tensor: Tensor, parameters: tuple[str, ...] = ()
    ) -> Statistics | None:
        """Measure a tensor into its row; None if it cannot be read."""
        if not (readable(tensor) or (tensor.layout is torch.sparse_coo and tensor.device.type != "meta")):
            self.recording.facts.unread += 1
            return None
        with apart():
            found = self._measured(tensor)
        row = self._row(kind, path, name, tensor, parameters)
        if row is not None:
            row.add(found, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        return found

    def _measured(self, tensor: Tensor) -> Statistics:
        """Statistics; a module most often returns what its last operator made, which was measured just now."""
        if tensor.is_inference():
            return measure(tensor)  # it does not count its changes
        if self._last is None or self._last[0]() is not tensor or self._last[1] != tensor._version:
            self._last = weakref.ref(tensor), tensor._version, measure(tensor)
        return self._last[2]

    def _row(self, kind: str, path: str, name: str, tensor: Tensor, parameters: tuple[str, ...]) -> Row | None:
        rows = self.recording.rows
        row = rows.get((kind, path, name))
        if row is None:
            self._order += 1
            row = Row(kind, path, name, self._order, tuple(tensor.shape), str(tensor.dtype), parameters=parameters)
            # Operators leave room for what cannot be done without: outputs, and gradients of parameters.
            if not self.recording.ledger.admit(((kind, path, name), row), 0.6 if kind in (OP, OP_BACKWARD) else 1.0):
                return None
            rows[kind, path, name] = row
        return row

    # -- operators ----------------------------------------------------------------------------------------------------

    def _sees(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], run: Any) -> Any:
        """Run one operator and look at what it took and gave."""
        if only_views(func):
            return run()
        inputs = [tensor for _, tensor in leaves((args, kwargs))]
        before = None
        if writes(func):  # afterwards nobody could tell what was in it
            with apart():
                before = self._soundness(inputs)
        out = run()
        backward = _in_backward()
        path = self._calls[-1].path if self._calls else self._of_node() if backward else OUTSIDE
        inside = path != OUTSIDE
        name = _name(func)
        used = self._parameters(inputs) if self._calls else ()
        if used and not writes(func) and not (backward and not self._calls):
            for one in used:
                self.recording.parameters[one].used = True
        if name not in UNFILLED:
            label = self._label(name, path, backward)
            for which, tensor in enumerate(_results(name, out)):
                self._result(which, tensor, label, name, path, inside, backward, used, inputs, before, args)
        if self._calls and not backward:
            self._attention(func, name, args, kwargs)
        return out

    def _result(
        self, which: int, tensor: Tensor, label: str, name: str, path: str, inside: bool, backward: bool,
        used: tuple[str, ...], inputs: list[Tensor], before: tuple[bool, bool, str] | None, args: tuple[Any, ...],
    ) -> None:  # fmt: skip
        """One tensor that an operator gave."""
        if not readable(tensor) or not (tensor.is_floating_point() or tensor.is_complex()) or tensor.numel() == 0:
            return
        recomputed = backward and bool(self._calls)
        if inside and self.keeps_operators and not recomputed:
            kind = OP_BACKWARD if backward else OP
            found = self._read(kind, path, f"{label}.{which}" if which else label, tensor, used)
            sound = found is None or not (found.nans or found.infs)
        else:
            with apart():
                sound = is_finite(tensor)
        if sound or len(self.recording.origins) >= _MOST_ORIGINS:
            return
        with apart():
            found = measure(tensor)
            nan, inf, holder = self._soundness(inputs) if before is None else before
        phase = "backward" if backward else "forward" if self._calls else "outside"
        known = any(origin.what == "NaN" for origin in self.recording.origins)
        scalars = [one for one in _numbers(args) if one != one or one in (float("inf"), float("-inf"))]
        if found.nans and not nan and not any(one != one for one in scalars):
            self._origin("NaN", label, path, phase, "Inf" if inf or scalars else "finite")
        elif found.nans and nan and not known:
            self._origin("NaN", label, path, phase, holder or "a tensor made before the block or outside torch")
        elif found.infs and not (nan or inf or scalars):
            self._origin("Inf", label, path, phase, "finite")

    def _origin(self, what: str, op: str, path: str, phase: str, inputs: str) -> None:
        if any((one.what, one.op, one.path, one.phase) == (what, op, path, phase) for one in self.recording.origins):
            return
        self._order += 1
        origin = Origin(what, op, path, phase, self._order, inputs)
        if self.recording.ledger.admit(origin):
            self.recording.origins.append(origin)

    def _soundness(self, inputs: list[Tensor]) -> tuple[bool, bool, str]:
        """Whether some input holds NaN, whether one holds Inf, and the name of what holds NaN."""
        nan = inf = False
        holder = ""
        for tensor in inputs:
            if not readable(tensor) or is_finite(tensor):
                continue
            found = measure(tensor)
            nan, inf = nan or found.nans > 0, inf or found.infs > 0
            if found.nans and not holder:
                parameter = self._storages.get(tensor.untyped_storage().data_ptr())
                holder = f"parameter {parameter}" if parameter else ""
        if nan and not holder and any(spread.nonfinite for spread in self.recording.inputs.values()):
            holder = "the model's input"
        return nan, inf, holder

    def _parameters(self, inputs: list[Tensor]) -> tuple[str, ...]:
        found = []
        for tensor in inputs:
            if readable(tensor) and tensor.numel():
                name = self._storages.get(tensor.untyped_storage().data_ptr())
                if name is not None:
                    found.append(name)
        return tuple(dict.fromkeys(found))

    def _label(self, name: str, path: str, backward: bool) -> str:
        """The operator's name, and for its further calls in the same call of a module which one it is."""
        short = name.removeprefix("aten::")
        if backward:
            count = self._backward_counts.get((path, short), 0)
            if count < _MOST_REPEATS:
                self._backward_counts[path, short] = count + 1
        elif self._calls:
            count = self._calls[-1].counts.get(short, 0)
            self._calls[-1].counts[short] = count + 1
        else:
            return short
        count = min(count, _MOST_REPEATS - 1)
        return f"{short}#{count + 1}" if count else short

    # -- backward -----------------------------------------------------------------------------------------------------

    def _mark(self, path: str) -> None:
        """From this autograd node on, nodes are those of `path`."""
        self._marks.append((torch._C._autograd._get_sequence_nr(), path))

    def _of_node(self) -> str:
        """The module whose forward made the autograd node that is running, or OUTSIDE if that is not known."""
        self._new_backward()
        node = torch._C._current_autograd_node()
        if node is None or not self._marks:
            return OUTSIDE
        number = node._sequence_nr()
        at = bisect.bisect_right(self._marks, number, key=lambda mark: mark[0])
        return self._marks[at - 1][1] if at and number < 1 << 62 else OUTSIDE

    def _new_backward(self) -> None:
        task = torch._C._current_graph_task_id()
        if task != self._backward:
            self._backward = task
            self._backward_counts = {}
            self.recording.facts.backwards += 1

    def _meet_gradient(self, name: str, parameter: Tensor) -> None:
        """Be told of each gradient on its way into a parameter: by the graph's node, not by a hook of its own."""
        with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch(), torch.enable_grad():
            node = parameter.view_as(parameter).grad_fn.next_functions[0][0]  # type: ignore[union-attr]
        if node is None or self._accumulators.get(name) is node:
            return
        self._accumulators[name] = node
        self._handles.append(node.register_prehook(functools.partial(self._arrived, name)))

    def _arrived(self, name: str, grads: tuple[Tensor | None, ...]) -> None:
        self._new_backward()
        if grads[0] is None:
            return
        parameter = self.recording.parameters[name]
        parameter.reached += 1
        found = self._read(PARAMETER_GRADIENT, name, "", grads[0])
        if found is None or found.zeros < found.count:
            parameter.nonzero = True

    def _gradient(self, path: str, name: str, at: int, grads: tuple[Tensor | None, ...]) -> None:
        self._new_backward()
        grad = grads[at]
        if grad is not None:
            self._read(MODULE_GRADIENT, path, name, grad)

    # -- attention ----------------------------------------------------------------------------------------------------

    def _attention(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Look at the call if it is attention, or completes one."""
        call = self._calls[-1]
        known = name in calls.FUSED or name in calls.SOFTMAX or name in calls.PRODUCTS or name in calls.FAST_PATHS
        if not known and name.startswith("aten::"):
            return
        frame = calls.at_the_door(Followed.__call__.__code__)
        if frame is not None:
            values = frame.f_locals
            this = id(frame), id(values["q"]), id(values["k"]), id(values["v"])
            if this != call.door:
                call.door = this
                with apart():
                    seen = calls.door(values)
                self._look(call, seen)
            return
        call.door = ()
        with apart():
            if name in calls.FUSED:
                self._look(call, calls.fused(calls.arguments(func, args, kwargs)))
            elif name in calls.FAST_PATHS:
                self._look(call, calls.fast_path(name, calls.arguments(func, args, kwargs)))
            elif name in calls.SOFTMAX:
                self._softmax(call, args[0], args[1])
            elif name in calls.PRODUCTS:
                self._weighed(call, args[0 if name == "aten::bmm" else 1])

    def _softmax(self, call: _Call, scores: Tensor, axis: int) -> None:
        """Attention by hand, perhaps: what it weighs will tell."""
        if axis not in (-1, scores.dim() - 1):
            return
        seen = calls.by_hand(scores, call.heads)
        if seen is not None:
            heads = Heads.blank(seen.frame.heads)
            look(seen, heads, self.rows)
            call.softmax = [*call.softmax[-3:], (tuple(scores.shape[-2:]), scores.numel(), heads)]  # type: ignore[list-item]

    def _weighed(self, call: _Call, weights: Tensor) -> None:
        """A product in the same module whose left side has a softmax's shape: those were attention's weights.

        Or all columns but one, which is how sinks are written: a logit beside the keys', whose weight is thrown away.
        """
        shape, rows = weights.shape, weights.numel() // max(weights.shape[-1], 1)
        for held in call.softmax:
            (queries, keys), count = held[0], held[1] // max(held[0][1], 1)
            if queries == shape[-2] and keys in (shape[-1], shape[-1] + 1) and rows == count:
                call.softmax.remove(held)
                self._keep(call, held[2])
                return

    def _look(self, call: _Call, seen: Seen | None) -> None:
        if seen is None:
            self.recording.facts.unread += 1
            return
        heads = Heads.blank(seen.frame.heads)
        with apart():
            look(seen, heads, self.rows)
        self._keep(call, heads)

    def _keep(self, call: _Call, fresh: Heads) -> None:
        at = min(call.attentions, _MOST_REPEATS - 1)
        call.attentions += 1
        site = f"{call.path}#{at + 1}" if at else call.path
        held = self.recording.heads.get(site)
        if held is not None and held.count == fresh.count:
            held.join(fresh)
        elif held is None and self.recording.ledger.admit((site, fresh)):
            self.recording.heads[site] = fresh


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _name(func: Any) -> str:
    schema = getattr(func, "_schema", None)
    return str(schema.name) if schema is not None else str(getattr(func, "_name", func))


def _named(name: str, leaf: str) -> str:
    if not name or not leaf:
        return name or leaf
    return f"{name}{leaf}" if leaf.startswith("[") else f"{name}.{leaf}"


def _results(name: str, out: Any) -> list[Tensor]:
    """What an operator computed; kernels of attention also hand back seeds, and sums that are rightly infinite."""
    found = [tensor for _, tensor in leaves(out)]
    if "attention" in name:
        return found[:3] if "backward" in name else found[:1]
    return found


def _numbers(args: Any) -> list[float]:
    """The plain numbers among an operator's arguments."""
    found: list[float] = []
    for one in args:
        if isinstance(one, float):
            found.append(one)
        elif isinstance(one, list | tuple):
            found += _numbers(one)
    return found

"""The door: one call in, one choice, one kernel, one result."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import warnings
from collections.abc import Callable, Iterable
from operator import index
from typing import Any, Literal, TypeVar, cast, overload

import torch
from torch import Tensor
from torch._C._functorch import maybe_current_level
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from headway.backends.kernel import Extras, Kernel
from headway.backends.registry import NAMES, Backend
from headway.choice.choose import Decision, choose
from headway.choice.here import here
from headway.errors import MaskError, NoBackendError, RecompileBudgetError, RequestError, UnknownNameError
from headway.limits.machine import Machine
from headway.limits.request import CONTRACTS, Request, length_class
from headway.masks.base import Mask
from headway.masks.frame import Frame
from headway.masks.memo import is_recorded
from headway.masks.terms import rows_may_be_empty, terms

ENVIRONMENT = "HEADWAY_BACKEND"
Function = TypeVar("Function", bound=Callable[..., Any])
_ENVIRON: dict[Any, Any] = os.environ._data  # type: ignore[attr-defined]  # os.environ itself takes a microsecond
_IN_ENVIRON = os.environ.encodekey(ENVIRONMENT)
_TENSOR_GUARDS = getattr(torch._C._dynamo.guards, "TensorGuards", None)
"""torch.compile's own check that tensors are as before: type, dtype, device, shape, strides, requires_grad."""
_PLAIN = frozenset({Tensor, torch.nn.Parameter})
"""Tensors with nothing of their own to do at a call."""


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask | None = None, *, scale: float | None = None, dropout: float = 0.0,
    softcap: float | None = None, sinks: Tensor | None = None, backend: str = "auto",
    require: Iterable[str] = (), return_lse: Literal[False] = False,
) -> Tensor: ...  # fmt: skip
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask | None = None, *, scale: float | None = None, dropout: float = 0.0,
    softcap: float | None = None, sinks: Tensor | None = None, backend: str = "auto",
    require: Iterable[str] = (), return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | None = None,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    backend: str = "auto",
    require: Iterable[str] = (),
    return_lse: bool = False,
) -> Any:
    """Softmax(q kᵀ · scale) v on the fastest backend that computes exactly what was asked.

    q is (batch, heads, queries, head_dim); k and v are (batch, key heads, keys, head_dim), where several query heads
    may share one key head, and v may have a head size of its own.

    - `mask`: a typed mask; see `headway.masks`. A query that may see nothing gives 0, and gradients of 0. What is
      hidden must be finite too: to most kernels 0 times NaN is NaN, as it is to PyTorch.
    - `scale`: what scores are multiplied by; by default 1 / sqrt(head_dim).
    - `dropout`: share of attention weights dropped, now: pass 0 in evaluation.
    - `softcap`: bounds scores to ±softcap by tanh. `sinks`: one logit per head that takes weight and gives no value.
    - `backend`: 'auto', or a name that runs or raises. `require`: contracts such as 'deterministic'.
    - `return_lse`: also return the log of each row's softmax denominator, (batch, heads, queries).

    >>> from headway import Causal
    >>> q = k = v = torch.randn(1, 2, 5, 16)
    >>> attention(q, k, v, mask=Causal()).shape
    torch.Size([1, 2, 5, 16])
    """
    if type(require) is not tuple and type(require) is not str:
        require = tuple(require)  # read once: it may be a generator
    if torch._C._is_any_autocast_enabled() and casts(q):
        return _autocast(q, k, v, mask, scale, dropout, softcap, sinks, backend, require, return_lse)
    if (
        is_compiling()
        or not (type(q) is type(k) is type(v) is Tensor or _plain(q, k, v))
        or maybe_current_level() is not None  # _transformed(), without a microsecond's tenth for the call
        or forward_ad._current_level >= 0
    ):
        return _traced(q, k, v, mask, scale, dropout, softcap, sinks, backend, require, return_lse)
    plain_options = scale is None and dropout == 0 and softcap is None and sinks is None
    # Everything a plan depends on. What tensors hold is never a part of it, so nothing waits for a device.
    ask = (
        (q.data_ptr() | k.data_ptr() | v.data_ptr()) & 15,
        torch.is_grad_enabled(),
        None if mask is None else _mask_key(mask, q, k),
        plain_options or _options_key(scale, dropout, softcap, sinks),
        _ENVIRON.get(_IN_ENVIRON) if backend == "auto" else backend, require, return_lse,
        torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    for alike, known in _PLANS.recent.get(ask, ()):
        if alike(q, k, v):
            plan = known
            break
    else:
        key = (
            q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(), q.dtype, k.dtype, v.dtype,
            q.device, k.device, v.device, q.requires_grad or k.requires_grad or v.requires_grad, ask,
        )  # fmt: skip
        found = _PLANS.get(key)  # held: another thread may empty them all
        plan = found or _plan(q, k, v, mask, scale, dropout, softcap, sinks, backend, require, return_lse)
        if not is_recorded(q.device):  # a mask lowered now would hold nothing yet
            if found is None:
                _PLANS[key] = plan
            _PLANS.recall(ask, q, k, v, plan)
    try:
        if plain_options and plan.is_bare:  # as `run` does it, without what a call more would cost
            out, lse = plan.kernel.attend(q, k, v, plan.lowered, plan.extras)
            return (out, lse) if return_lse else out
        return plan.run(q, k, v, mask, scale, dropout, softcap, sinks)
    except RecompileBudgetError as error:
        if asked_backend(backend) != "auto":
            raise
        other = _without_flex(error, q, k, v, mask, scale, dropout, softcap, sinks, require, return_lse)
        _PLANS.replace(plan, other)
        return other.run(q, k, v, mask, scale, dropout, softcap, sinks)


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | None = None,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    backend: str = "auto",
    require: Iterable[str] = (),
    return_lse: bool = False,
) -> Decision:
    """What `attention` would decide for this call, and why; nothing is computed.

    >>> q = torch.randn(1, 2, 5, 16)
    >>> print(str(explain(q, q, q, backend="sage")).splitlines()[0])
    no backend: sage was asked for by name and does not take it
    """
    if casts(q):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    request = _request(q, k, v, mask, scale, dropout, softcap, sinks, require, return_lse)
    return _decide(request, here(q.device), asked_backend(backend))


def constant_to_tracers(fn: Function) -> Function:
    """torch.compiler.assume_constant_result, without the second that importing dynamo for it takes."""
    fn._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return fn


# -- plans: a decision and all that need not be done twice ---------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Facts:
    """What a plan depends on of a mask that holds tensors."""

    kinds: frozenset[str]
    rows_may_be_empty: bool
    needs_grad: bool


class Plan:
    """How one kind of call is run: the kernel, and the mask as it takes it if the mask is a plain value."""

    __slots__ = ("backend", "copies", "empty", "extras", "frame", "is_bare", "kernel", "lowered", "plain", "return_lse")

    def __init__(
        self,
        backend: Backend,
        frame: Frame,
        extras: Extras,
        mask: Mask | None,
        dtype: torch.dtype,
        *,
        empty: bool,
        copies: bool,
    ) -> None:
        self.backend, self.frame, self.extras = backend, frame, extras
        self.kernel: Kernel = backend.load()
        self.empty, self.copies = empty, copies
        self.return_lse = extras.lse
        self.plain = mask is None or mask.is_value
        self.lowered = None
        if self.plain and not empty:
            with torch.inference_mode(False):  # a plan made for inference serves training too
                self.lowered = self.kernel.lower(mask, frame, dtype)
        self.is_bare = self.plain and not empty and not copies

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Mask | None,
        scale: float | None,
        dropout: float,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Any:
        if self.empty:
            return _nothing(q, k, v, mask, sinks, self.return_lse)
        if self.copies:
            q, k, v = (x if _is_aligned(x) else x.clone(memory_format=torch.contiguous_format) for x in (q, k, v))
        extras = self.extras
        if scale is not None or dropout or softcap is not None or sinks is not None:
            extras = dataclasses.replace(extras, scale=scale, dropout=dropout, softcap=softcap, sinks=sinks)
        lowered = self.lowered if self.plain else self._lower(mask, q.dtype)
        out, lse = self.kernel.attend(q, k, v, lowered, extras)
        return (out, lse) if self.return_lse else out

    def _lower(self, mask: Mask | None, dtype: torch.dtype) -> Any:
        """The mask for this kernel: kept with the mask, for the layers that share it, until its tensors change."""
        assert mask is not None
        tensors = mask.tensors
        if any(t.requires_grad or t.is_inference() for t in tensors):
            return self.kernel.lower(mask, self.frame, dtype)
        # One for each backend: the lowerings of every length that a cache grows through would fill the memory.
        at, state = ("lowered", self.backend.name), (self.frame, dtype, mask.state())
        found = mask.memo.get(at)
        if found is None or found[0] != state:
            with torch.inference_mode(False):
                # Holding the tensors keeps their ids theirs.
                found = (state, tensors, self.kernel.lower(mask, self.frame, dtype))
            if not is_recorded(self.frame.device):
                mask.memo[at] = found
        return found[2]


class _Plans(dict[Any, Plan]):
    """Plans by key, emptied when there are too many, or when the masks they hold as tensors take too much.

    `recent` has, for each ask, the plans last used with it, and what says that tensors are like theirs: a look in C++
    where a key of all that tensors are costs microseconds. Two of them, for self- and cross-attention in turns.
    """

    most, most_bytes = 4096, 1 << 28

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.recent: dict[Any, tuple[tuple[Callable[..., bool], Plan], ...]] = {}

    def __setitem__(self, key: Any, plan: Plan) -> None:
        size = _bytes_of(plan.lowered)
        if len(self) >= self.most or self.bytes + size > self.most_bytes:
            self.clear()
        self.bytes += size
        super().__setitem__(key, plan)

    def recall(self, ask: Any, q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> None:
        one_twice = q is k or k is v or q is v  # which the guards never take
        if _TENSOR_GUARDS is not None and not one_twice:
            guards = _TENSOR_GUARDS(q, k, v, dynamic_dims_sizes=None, dynamic_dims_strides=None)
            self.recent[ask] = ((guards.check, plan), *self.recent.get(ask, ())[:1])

    def replace(self, plan: Plan, other: Plan) -> None:
        for key in [key for key, held in list(self.items()) if held is plan]:  # another thread may add
            self[key] = other
        self.recent.clear()

    def clear(self) -> None:
        super().clear()
        self.recent.clear()
        self.bytes = 0


def _bytes_of(lowered: Any) -> int:
    """The memory of the tensors in a lowered mask."""
    if isinstance(lowered, Tensor):
        return lowered.untyped_storage().nbytes()
    if isinstance(lowered, tuple | list):
        return sum(map(_bytes_of, lowered))
    return sum(map(_bytes_of, vars(lowered).values())) if hasattr(lowered, "__dict__") and not callable(lowered) else 0


_PLANS = _Plans()


def _plan(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, scale: float | None, dropout: float, softcap: float | None,
    sinks: Tensor | None, backend: str, require: Iterable[str], return_lse: bool,
) -> Plan:  # fmt: skip
    request = _request(q, k, v, mask, scale, dropout, softcap, sinks, require, return_lse)
    machine = here(q.device)
    chosen = _decide(request, machine, asked_backend(backend)).backend()
    extras = Extras(
        lse=return_lse,
        needs_grad=request.needs_grad,
        deterministic="deterministic" in request.require or machine.deterministic,
    )
    empty = 0 in (*q.shape, *k.shape, *v.shape)
    return Plan(chosen, _frame(q, k), extras, mask, q.dtype, empty=empty, copies=not request.aligned)


_choose = functools.lru_cache(maxsize=4096)(choose)


def _decide(request: Request, machine: Machine, asked: str) -> Decision:
    """What is decided for the request's class, which few are, in the words of the request itself."""
    decision = _choose(request.rounded(), machine, asked)
    return (
        choose(request, machine, asked) if decision.chosen is None else dataclasses.replace(decision, request=request)
    )


def _without_flex(error: RecompileBudgetError, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Plan:
    """Auto's next best, and not in silence: whose shapes change at every call should know."""
    mask, scale, dropout, softcap, sinks, require, return_lse = rest
    decision = explain(
        q,
        k,
        v,
        mask,
        scale=scale,
        dropout=dropout,
        softcap=softcap,
        sinks=sinks,
        require=require,
        return_lse=return_lse,
    )
    others = [name for name in decision.accepted if name != "flex"]
    if not others:
        raise error
    warnings.warn(f"{error}. Until then auto takes {others[0]} for such calls.", RuntimeWarning, stacklevel=3)
    return _plan(q, k, v, mask, scale, dropout, softcap, sinks, others[0], require, return_lse)


def asked_backend(backend: str) -> str:
    """The backend asked for: by the call, else by the environment, else auto."""
    if backend != "auto":
        return backend
    name = os.environ.get(ENVIRONMENT) or "auto"
    if name != "auto" and name not in NAMES:
        raise UnknownNameError("backend", name, ("auto", *NAMES), where=f"the environment variable {ENVIRONMENT}")
    return name


# -- from tensors to a request ------------------------------------------------------------------------------------


def _request(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, scale: float | None, dropout: float, softcap: float | None,
    sinks: Tensor | None, require: Iterable[str], return_lse: bool,
) -> Request:  # fmt: skip
    _check(q, k, v, mask, scale, dropout, softcap, sinks)
    if return_lse and v.shape[3] == 0:
        raise RequestError(
            "got values of size 0 with return_lse; takes values of 1 or more: give k as values for its lse"
        )
    facts = None if mask is None else _facts(mask, q, k)
    tensors = (q, k, v) if sinks is None else (q, k, v, sinks)
    mask_needs_grad = facts is not None and facts.needs_grad
    return Request(
        batch=q.shape[0],
        heads=q.shape[1],
        kv_heads=k.shape[1],
        q_len=q.shape[2],
        kv_len=k.shape[2],
        head_dim=q.shape[3],
        value_dim=v.shape[3],
        dtype=str(q.dtype).removeprefix("torch."),
        device=q.device.type,
        mask=frozenset() if facts is None else facts.kinds,
        rows_may_be_empty=facts is not None and facts.rows_may_be_empty,
        mask_needs_grad=mask_needs_grad,
        dropout=dropout > 0,
        softcap=softcap is not None,
        sinks=sinks is not None,
        returns_lse=return_lse,
        plain_scale=scale is None or 0 < scale < math.inf,
        needs_grad=torch.is_grad_enabled() and (mask_needs_grad or any(t.requires_grad for t in tensors)),
        aligned=all(_is_aligned(x) for x in (q, k, v)),
        transformed=_transformed(),
        compiled=is_compiling(),
        require=_contracts(require),
    )


def _check(
    q: Tensor, k: Tensor, v: Tensor, mask: object, scale: float | None, dropout: float, softcap: float | None,
    sinks: Tensor | None,
) -> None:  # fmt: skip
    if not (isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)):
        got = ", ".join(f"{name} {type(x).__name__}" for name, x in (("q", q), ("k", k), ("v", v)))
        raise RequestError(f"got {got}; takes tensors: torch.as_tensor(x)")
    if not is_compiling() and torch._C._get_tracing_state() is not None:
        raise RequestError(
            "got a call inside torch.jit.trace, where sizes are no numbers to choose by; takes torch.compile or"
            " torch.export; to trace a swapped model undo the swap first"
        )
    if q.is_nested or k.is_nested or v.is_nested:
        raise RequestError("got nested tensors; takes dense ones: pack them and say Documents(lengths), or pad them")
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if not q.ndim == k.ndim == v.ndim == 4:
        raise RequestError(
            f"got {shapes}; takes (batch, heads, length, head_dim) for each: x.unsqueeze(0) adds a batch"
        )
    if not (q.dtype == k.dtype == v.dtype and q.is_floating_point()):
        raise RequestError(
            f"got q {q.dtype}, k {k.dtype}, v {v.dtype}; takes one floating-point dtype for all: x.to(dtype)"
        )
    if not q.device == k.device == v.device:
        raise RequestError(f"got q on {q.device}, k on {k.device}, v on {v.device}; takes one device: move two of them")
    if not (q.shape[0] == k.shape[0] == v.shape[0] and q.shape[3] == k.shape[3] and k.shape[1:3] == v.shape[1:3]):
        raise RequestError(
            f"got {shapes}; takes one batch for all, one head_dim for q and k, the same heads and keys in k and v"
        )
    if q.shape[1] != k.shape[1] and (k.shape[1] == 0 or q.shape[1] % k.shape[1]):
        raise RequestError(
            f"got {q.shape[1]} query heads and {k.shape[1]} key heads; takes a whole number of the first to each"
        )
    if mask is not None and not isinstance(mask, Mask):
        raise RequestError(f"got a mask of type {type(mask).__name__}; takes a typed mask: {_typed_instead(mask)}")
    if q.shape[3] == 0:
        raise RequestError(f"got {shapes}; takes a head_dim of 1 or more: there is nothing to compare")
    if isinstance(scale, Tensor):
        raise RequestError(
            "got a tensor for scale; takes a number: multiply q by it, attention(q * scale, k, v, scale=1.0)"
        )
    if scale is not None and not -math.inf < scale < math.inf:
        raise RequestError(f"got scale={scale}; takes a finite number, or None for 1 / sqrt(head_dim)")
    if not 0 <= dropout < 1:
        raise RequestError(f"got dropout={dropout}; takes a share from 0 to below 1")
    if softcap is not None and not 0 < softcap < math.inf:
        raise RequestError(f"got softcap={softcap}; takes a positive, finite number, or None for no cap")
    if sinks is not None and (tuple(sinks.shape) != (q.shape[1],) or sinks.device != q.device):
        raise RequestError(
            f"got sinks {list(sinks.shape)} on {sinks.device}; takes one logit per query head, on {q.device}"
        )


def _typed_instead(mask: object) -> str:
    """The typed mask that whoever gave this may have meant."""
    if isinstance(mask, type):
        return f"{mask.__name__}(), with parentheses"
    if callable(mask) and not isinstance(mask, Tensor):
        return "headway.Predicate(fn) for a function of (b, h, q, k)"
    if isinstance(mask, str | bool):
        return "headway.Causal() for the causal one"
    tensor = "tensor" if isinstance(mask, Tensor) else "torch.as_tensor(mask)"
    return (
        f"headway.masks.from_sdpa({tensor}) for PyTorch's (True = may),"
        f" from_key_padding_mask({tensor}) for nn.MultiheadAttention's (True = blocked)"
    )


def _contracts(require: Iterable[str]) -> frozenset[str]:
    words = frozenset((require,) if isinstance(require, str) else require)
    for word in words:
        if word not in CONTRACTS:
            raise UnknownNameError("contract", word, CONTRACTS)
    return words


def _frame(q: Tensor, k: Tensor) -> Frame:
    return Frame(q.shape[2], k.shape[2], q.shape[0], q.shape[1], q.device)


def _options_key(scale: float | None, dropout: float, softcap: float | None, sinks: Tensor | None) -> Any:
    """What a plan depends on of the options: which there are, and whether they can be; not their numbers."""
    return (
        scale is None or (0 < scale < math.inf, -math.inf < scale < math.inf), dropout == 0, 0 <= dropout < 1,
        softcap is None or 0 < softcap < math.inf, softcap is None,
        None if sinks is None else (sinks.shape, sinks.device, torch.is_grad_enabled() and sinks.requires_grad),
    )  # fmt: skip


def _mask_key(mask: Mask, q: Tensor, k: Tensor) -> Mask | Facts:
    """A mask that is a plain value stands for itself; of one that holds tensors a plan depends on its facts."""
    if not isinstance(mask, Mask):
        _check(q, k, k, mask, None, 0.0, None, None)
    return mask if mask.is_value else _facts(mask, q, k)


def _facts(mask: Mask, q: Tensor, k: Tensor) -> Facts:
    """What the choice depends on of this mask; checked against the shapes, and worked out, once per mask and shape."""
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in mask.tensors)
    at = ("facts", q.shape, k.shape, q.device, needs_grad)
    facts = mask.memo.get(at)
    if facts is None:
        facts = mask.memo[at] = _new_facts(mask, _frame(q, k), needs_grad)
    return cast(Facts, facts)


def _new_facts(mask: Mask, frame: Frame, needs_grad: bool) -> Facts:
    mask.check(frame)
    for tensor in mask.tensors:
        if tensor.device.type != "cpu" and tensor.device != frame.device:
            raise MaskError(
                f"got a mask on {tensor.device} for a call on {frame.device}; make the mask on {frame.device}"
            )
    return Facts(terms(mask, frame).kinds(frame), _settled(rows_may_be_empty(mask, frame)), needs_grad)


def _settled(flag: bool) -> bool:
    """A plain bool: a tracer may hold a comparison as a symbol, and only a branch makes it decide."""
    return True if flag else False  # noqa: SIM210


def _is_aligned(x: Tensor) -> bool:
    """Rows contiguous, and on CUDA starting on 16 bytes: kernels there load vectors, and crash on others."""
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        return False
    if x.device.type != "cuda" or is_compiling() or type(x) not in _PLAIN or _transformed():
        return True
    size = x.element_size()
    return x.data_ptr() % 16 == 0 and all(step * size % 16 == 0 for step in x.stride()[:-1])


def _plain(*tensors: Tensor) -> bool:
    return all(type(x) in _PLAIN for x in tensors)


def _transformed() -> bool:
    """True inside a torch.func transform, or where dual numbers carry derivatives forward."""
    return _transforming() if is_compiling() else maybe_current_level() is not None or forward_ad._current_level >= 0


@constant_to_tracers
def _transforming() -> bool:
    """The same for a tracer, which is inside the transform while it traces it."""
    return maybe_current_level() is not None or forward_ad._current_level >= 0


def casts(q: Tensor) -> bool:
    """Whether autocast would compute in a dtype of its own."""
    kind = q.device.type
    return q.dtype != torch.float64 and torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


# -- calls that are not planned -----------------------------------------------------------------------------------


def _autocast(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
    """As PyTorch's own attention does: in autocast's dtype."""
    kind = q.device.type
    dtype = torch.get_autocast_dtype(kind)
    mask, scale, dropout, softcap, sinks, backend, require, return_lse = rest
    with torch.autocast(kind, enabled=False):
        return attention(
            q.to(dtype), k.to(dtype), v.to(dtype), mask, scale=scale, dropout=dropout, softcap=softcap, sinks=sinks,
            backend=backend, require=require, return_lse=return_lse,
        )  # fmt: skip


def _traced(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, scale: float | None, dropout: float, softcap: float | None,
    sinks: Tensor | None, backend: str, require: Iterable[str], return_lse: bool,
) -> Any:  # fmt: skip
    """The call inside torch.compile, torch.export or torch.func, and for tensor subclasses: nothing is remembered."""
    _check(q, k, v, mask, scale, dropout, softcap, sinks)
    if not (q.shape[2] and k.shape[2] and q.shape[0] and q.shape[1] and q.shape[3] and v.shape[3]):
        return _nothing(q, k, v, mask, sinks, return_lse)
    frame = _frame(q, k)
    facts = None
    if mask is not None:
        facts = _new_facts(mask, frame, torch.is_grad_enabled() and any(t.requires_grad for t in mask.tensors))
    tensors = (q, k, v) if sinks is None else (q, k, v, sinks)
    needs_grad = torch.is_grad_enabled() and (
        (facts is not None and facts.needs_grad) or any(t.requires_grad for t in tensors)
    )
    # Heads and head sizes are a model's own: index() fixes a symbolic one. A length only chooses its class.
    heads, kv_heads, head_dim, value_dim = (index(n) for n in (q.shape[1], k.shape[1], q.shape[3], v.shape[3]))
    batch, q_len, kv_len = q.shape[0], q.shape[2], k.shape[2]
    if is_compiling():
        square, batch = q_len == kv_len, 1 if batch <= 65535 else 65536
        half_tile = (not square or kv_len % 128 == 64) if facts is not None and needs_grad else None
        kv_len = length_class(kv_len, q.device.type, half_tile)
        q_len = kv_len if square else 1 if q_len == 1 else kv_len + 128
    entry = _entry_for(
        batch, heads, kv_heads, q_len, kv_len, head_dim, value_dim, str(q.dtype), q.device.type, q.device.index,
        None if facts is None else tuple(sorted(facts.kinds)), facts is not None and facts.rows_may_be_empty,
        facts is not None and facts.needs_grad, _settled(dropout > 0), softcap is not None, sinks is not None,
        return_lse, _settled(scale is None or 0 < scale < math.inf), needs_grad, _transformed(), is_compiling(),
        tuple((require,) if isinstance(require, str) else require), backend,
    )  # fmt: skip
    if entry not in _KERNELS:
        raise NoBackendError(entry)  # raised here, where a tracer sees an error of the call and not one of its own
    kernel = _KERNELS[entry]
    extras = Extras(
        scale, dropout, softcap, sinks, return_lse, needs_grad,
        "deterministic" in require or torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    out, lse = kernel.attend(q, k, v, kernel.lower(mask, frame, q.dtype), extras)
    return (out, lse) if return_lse else out


_KERNELS: dict[str, Kernel] = {}
"""Loaded kernels, where a tracer can find them by name: it takes constants from functions, but no modules."""


@constant_to_tracers
def _entry_for(
    batch: int, heads: int, kv_heads: int, q_len: int, kv_len: int, head_dim: int, value_dim: int, dtype: str,
    device: str, device_index: int | None, kinds: tuple[str, ...] | None, rows_may_be_empty: bool,
    mask_needs_grad: bool, dropout: bool, softcap: bool, sinks: bool, returns_lse: bool, plain_scale: bool,
    needs_grad: bool, transformed: bool, compiled: bool, require: tuple[str, ...], backend: str,
) -> str:  # fmt: skip
    """The chosen kernel's entry, or the words of the refusal, from plain values alone: a constant to a tracer."""
    request = Request(
        batch, heads, kv_heads, q_len, kv_len, head_dim, value_dim, dtype.removeprefix("torch."), device,
        frozenset(kinds or ()), rows_may_be_empty, mask_needs_grad, dropout, softcap, sinks, returns_lse, plain_scale,
        needs_grad, transformed=transformed, compiled=compiled, require=_contracts(require),
    )  # fmt: skip
    machine = here(torch.device(device) if device_index is None else torch.device(device, device_index))
    try:
        chosen = _decide(request, machine, asked_backend(backend)).backend()
    except NoBackendError as error:
        return str(error)
    kernel = _KERNELS[chosen.entry] = chosen.load()
    for operator in getattr(kernel, "OPERATORS", ()):
        torch.compiler.allow_in_graph(operator)
    return chosen.entry


def _nothing(q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, sinks: Tensor | None, return_lse: bool) -> Any:
    """The result where there is nothing to attend to: zeros, and zero gradients, that stay in the graph."""
    inputs = (q, k, v, *(() if sinks is None else (sinks,)), *(() if mask is None else mask.tensors))
    never = torch.zeros((), dtype=torch.bool, device=q.device)
    held = sum(torch.where(never, x.sum().to(q), 0.0) for x in inputs if x.requires_grad)
    out = q.new_zeros(*q.shape[:3], v.shape[3]) + held
    if not return_lse:
        return out
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    # The sink is all that is left of a row's denominator.
    lse = q.new_full((), float("-inf"), dtype=wide) if sinks is None else sinks.to(wide)[:, None]
    return out, lse.expand(q.shape[:3]).contiguous()

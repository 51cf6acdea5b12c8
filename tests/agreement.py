"""The judge: an answer may err a small multiple of what plain PyTorch errs in its dtype, both against float64.

The formula here is the tests' own: nothing of it comes from the backends. Masks become bool by `Mask.to_bool`, which
tests/masks judge; what masks add to scores is worked out here again.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor

import headway
from headway import Alibi, Bias, Mask
from headway.masks import And, Frame

TIMES = 2.0
"""How many times plain PyTorch's error a backend may err."""
FORWARD_ULPS, BACKWARD_ULPS = (2.0, 0.5), (4.0, 1.0)
"""And how many roundings on top: of the worst element, and in the mean of many (of one, the mean is the worst)."""


@dataclasses.dataclass(frozen=True)
class Call:
    """One attention call with all its tensors. Those that require gradients are judged by them too."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Mask | None = None
    scale: float | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    return_lse: bool = False
    require: tuple[str, ...] = ()

    def options(self) -> dict[str, Any]:
        names = ("mask", "scale", "softcap", "sinks", "return_lse", "require")
        return {name: getattr(self, name) for name in names}

    def frame(self) -> Frame:
        return Frame(self.q.shape[2], self.k.shape[2], self.q.shape[0], self.q.shape[1], self.q.device)

    def tensors(self) -> dict[str, Tensor]:
        """All that a gradient may flow to, by name."""
        found = {"q": self.q, "k": self.k, "v": self.v}
        if self.sinks is not None:
            found["sinks"] = self.sinks
        return found | {f"bias {i}": bias.bias for i, bias in enumerate(biases(self.mask))}

    def learnt(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self.tensors().items() if tensor.requires_grad}


@dataclasses.dataclass(frozen=True)
class Answer:
    """What came out of a call; the formula also says which rows see a key."""

    out: Tensor
    lse: Tensor | None
    grads: dict[str, Tensor | None]
    sees: Tensor | None = None
    cancelled: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    """How large the terms are that the gradients of queries, keys and biases are the difference of."""


Attend: TypeAlias = Callable[[], "tuple[Tensor, Tensor | None]"]


def run(call: Call, backend: str = "auto", *, learns: bool = True) -> Answer:
    """Headway's answer."""

    def attend() -> tuple[Tensor, Tensor | None]:
        answer = headway.attention(call.q, call.k, call.v, backend=backend, **call.options())
        return answer if call.return_lse else (answer, None)

    return answered(attend, call.learnt() if learns else {}, call.q.dtype)


def answered(attend: Attend, wanted: dict[str, Tensor], dtype: torch.dtype) -> Answer:
    """`attend`'s answer and its gradients of the wanted tensors, for a fixed random cotangent."""
    with torch.set_grad_enabled(bool(wanted)):
        out, lse = attend()
    if not wanted:
        return Answer(out, lse, {})
    ends, pushes = [out], [_cotangent(out, dtype)]
    if lse is not None and lse.requires_grad:
        ends.append(torch.where(lse.isfinite(), lse, 0.0))
        pushes.append(_cotangent(lse, dtype))
    grads = torch.autograd.grad(ends, list(wanted.values()), pushes, allow_unused=True)
    return Answer(out.detach(), None if lse is None else lse.detach(), dict(zip(wanted, grads, strict=True)))


def _cotangent(end: Tensor, dtype: torch.dtype) -> Tensor:
    """The same numbers whatever dtype the answer comes in: they are rounded to the request's first."""
    return _pushes(end.shape).to(dtype).to(end.device, end.dtype)


@functools.lru_cache
def _pushes(shape: torch.Size) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


# -- the formula ------------------------------------------------------------------------------------------------------


def by_formula(call: Call, dtype: torch.dtype, *, learns: bool, other_order: bool = False) -> Answer:
    """The answer by the textbook: all inputs, the weights and the answer in `dtype`, sums in float32 at least.

    `other_order` adds keys and features up from the other end: float64 has no better judge than itself, and the
    difference between two orders is what rounding does to it.
    """
    wide = {name: t.detach().to(dtype).requires_grad_(t.requires_grad) for name, t in call.tensors().items()}
    frame = call.frame()
    room = (frame.batch, frame.heads, frame.q_len, frame.kv_len)
    keep = torch.ones(room, dtype=torch.bool, device=frame.device)
    if call.mask is not None:
        keep = keep & call.mask.to_bool(frame)
    for i, _ in enumerate(biases(call.mask)):
        keep = keep & (wide[f"bias {i}"] > float("-inf"))

    def attend(values: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        added = torch.zeros(room, dtype=dtype, device=frame.device)
        for part in _added(call.mask, wide, frame, dtype):
            added = added + part
        q, k, v, may, bias = wide["q"], wide["k"], wide["v"] if values is None else values, keep, added
        if other_order:
            q, k, v, may, bias = q.flip(-1), k.flip(-1, -2), v.flip(-2), may.flip(-1), bias.flip(-1)
        scale = q.shape[-1] ** -0.5 if call.scale is None else call.scale
        out, lse = textbook(q, k, v, may, bias, scale=scale, softcap=call.softcap, sinks=wide.get("sinks"))
        return out, lse if call.return_lse else None

    wanted = {name: tensor for name, tensor in wide.items() if learns and tensor.requires_grad}
    answer = dataclasses.replace(answered(attend, wanted, call.q.dtype), sees=keep.any(-1))
    if not wanted or other_order:
        return answer
    with torch.no_grad():
        unity = torch.eye(frame.kv_len, dtype=dtype, device=frame.device)
        weights, _ = attend(unity.expand(*wide["k"].shape[:2], -1, -1))
    return dataclasses.replace(answer, cancelled=_cancelled(call, weights, answer.out))


def _cancelled(call: Call, weights: Tensor, out: Tensor) -> dict[str, Tensor]:
    """A weight's gradient is what its value gives, less what the result gives: both as large as cotangent x result.

    Rounded as those are, at large logits little is left of it, but times large queries and keys; and of a bias that is
    the same for all keys nothing is, however many are summed.
    """
    scale = abs(call.q.shape[-1] ** -0.5 if call.scale is None else call.scale)
    given = (_cotangent(out, call.q.dtype).double() * out).abs().sum(-1, keepdim=True) * weights
    shared = call.q.shape[1] // max(call.k.shape[1], 1)
    keys = call.k.detach().double().abs().repeat_interleave(shared, 1)
    to_keys = (given.mT @ call.q.detach().double().abs()).unflatten(1, (call.k.shape[1], shared)).sum(2)
    to_biases = {f"bias {i}": given.sum_to_size(bias.bias.shape) for i, bias in enumerate(biases(call.mask))}
    return {"q": given @ keys * scale, "k": to_keys * scale, **to_biases}


def textbook(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor,
    added: Tensor | float = 0.0,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(cap(q kᵀ · scale) + added) v over the keys that are kept, and the logs of its denominators."""
    narrow, wide = q.dtype, torch.promote_types(q.dtype, torch.float32)
    shared = q.shape[1] // k.shape[1]
    owner = [head // shared for head in range(q.shape[1])]
    logits = torch.einsum("bhld,bhsd->bhls", q.to(wide), k[:, owner].to(wide)) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = (logits + added).masked_fill(~keep, float("-inf"))
    if sinks is not None:
        sink = sinks.to(wide).view(1, -1, 1, 1).expand(*logits.shape[:-1], 1)
        logits, keep = torch.cat((logits, sink), -1), torch.nn.functional.pad(keep, (0, 1), value=True)
    some = keep.any(-1, keepdim=True)
    logits = torch.where(some, logits, 0.0)
    weights = (logits.softmax(-1) * some)[..., : k.shape[2]].to(narrow).to(wide)
    out = torch.einsum("bhls,bhse->bhle", weights, v[:, owner].to(wide))
    lse = torch.where(some, logits.logsumexp(-1, keepdim=True), float("-inf"))
    return out.to(narrow), lse.squeeze(-1)


def biases(mask: Mask | None) -> Iterator[Bias]:
    return (part for part in conjuncts(mask) if isinstance(part, Bias))


def conjuncts(mask: Mask | None) -> Iterator[Mask]:
    if isinstance(mask, And):
        for part in mask.parts:
            yield from conjuncts(part)
    elif mask is not None:
        yield mask


def _added(mask: Mask | None, wide: dict[str, Tensor], frame: Frame, dtype: torch.dtype) -> Iterator[Tensor]:
    """What the mask's parts add to scores, each broadcast over (batch, heads, queries, keys)."""
    for i, _ in enumerate(biases(mask)):
        yield wide[f"bias {i}"]
    for part in conjuncts(mask):
        if isinstance(part, Alibi):
            shift = frame.kv_len - frame.q_len if part.align == "lower-right" else 0
            rows = [[abs(q + shift - k) for k in range(frame.kv_len)] for q in range(frame.q_len)]
            distance = torch.tensor(rows, dtype=dtype, device=frame.device)
            yield -part.slopes.to(frame.device, dtype).view(-1, 1, 1) * distance


# -- the verdict ------------------------------------------------------------------------------------------------------


def check(call: Call, backend: str = "auto", *, learns: bool = True) -> None:
    """Run a call and judge all that comes out of it."""
    judge(call, run(call, backend, learns=learns), learns=learns)


def judge(call: Call, got: Answer, *, learns: bool = True) -> None:
    Judge(call, learns=learns).verdict(got)


class Judge:
    """Knows the truth of a call, and how far plain PyTorch is from it in the call's own dtype."""

    def __init__(self, call: Call, *, learns: bool = True) -> None:
        self.dtype = call.q.dtype
        self.truth = by_formula(call, torch.float64, learns=learns)
        self.plain = by_formula(call, self.dtype, learns=learns, other_order=True)
        self.steepest = steepest(call)
        self.values = call.v.detach().double()
        self.slopes = tuple(grad for grad in self.truth.grads.values() if grad is not None)

    def verdict(self, got: Answer) -> None:
        """Raise AssertionError unless `got` is as good as plain PyTorch, and exact where exactness is promised."""
        truth, plain = self.truth, self.plain
        assert got.out.dtype == self.dtype, f"out is {got.out.dtype} for a request in {self.dtype}"
        self.compare("out", got.out, plain.out, truth.out, beside=(self.values,))
        assert_nothing_from_nothing(got, truth)
        assert (got.lse is None) == (truth.lse is None), "lse is there if, and only if, it was asked for"
        if got.lse is not None:
            self.compare("lse", got.lse, plain.lse, truth.lse)
        assert got.grads.keys() == truth.grads.keys()
        for name, grad in got.grads.items():
            assert grad is not None, f"no gradient reaches {name}"
            what = f"gradient of {name}"
            beside = (*self.slopes, *(terms for key, terms in truth.cancelled.items() if key == name))
            self.compare(what, grad, plain.grads[name], truth.grads[name], beside=beside)

    def compare(
        self, what: str, got: Tensor, plain: Tensor | None, truth: Tensor | None, beside: tuple[Tensor, ...] = ()
    ) -> None:
        """The worst element finds one bad value; the root mean square finds a scale that is a little wrong everywhere.

        On top of what plain PyTorch errs there is room for a few roundings: of the result, in the request's dtype; and
        of the scores, in the dtype that kernels add up in, where one rounded at 100 is a weight 100 roundings off.
        What is a small difference of large things is rounded as those are: they are `beside` it.
        """
        assert plain is not None
        assert truth is not None
        assert got.shape == truth.shape, f"{what} is {list(got.shape)}, should be {list(truth.shape)}"
        never = truth.isneginf()
        assert torch.equal(got.isneginf(), never), f"{what} is -inf elsewhere than it should be"
        unit = max(torch.finfo(self.dtype).eps, torch.finfo(got.dtype).eps)
        fine = min(unit, torch.finfo(torch.float32).eps)
        got, plain, truth = (torch.where(never, 0.0, x.double()) for x in (got, plain, truth))
        assert bool(got.isfinite().all()), f"{what} is not finite"
        worst, mean = BACKWARD_ULPS if what.startswith("gradient") else FORWARD_ULPS
        cancels = 1 / 8 if what.startswith("gradient") else 0.0
        mean += (worst - mean) / max(_as_many(truth), 1.0) ** 0.5
        for norm, measure, ulps in (("worst element", _worst, worst), ("root mean square", _rms, mean)):
            size, large = measure(truth), max((measure(thing) for thing in beside), default=1.0)
            roundings = ulps * (unit * max(size, cancels * large) + fine * self.steepest * max(size, large))
            error, allowed = measure(got - truth), TIMES * measure(plain - truth) + roundings
            assert error <= allowed, f"{what}: {norm} errs {error:.3g}, plain PyTorch allows {allowed:.3g}"


def steepest(call: Call) -> float:
    """How many roundings of a weight one rounding of its score's terms may be, at most."""
    q, k = (x.detach().double().abs() for x in (call.q, call.k))
    terms = (q.amax(1) @ k.amax(1).transpose(-1, -2)).amax().item() if q.numel() and k.numel() else 0.0
    size = terms * abs(q.shape[-1] ** -0.5 if call.scale is None else call.scale)
    added = (bias.bias.detach().masked_fill(bias.bias.isneginf(), 0.0) for bias in biases(call.mask))
    return max(1.0, size / min(1.0, call.softcap or 1.0)) + sum(_worst(bias.double()) for bias in added)


def _as_many(x: Tensor) -> float:
    """How many elements of one size would vary as much in their mean square as these, of which few may be large."""
    squares = x.square()
    return (squares.sum().square() / squares.square().sum()).nan_to_num(float(x.numel())).item()


def assert_nothing_from_nothing(got: Answer, truth: Answer) -> None:
    """A row that sees nothing gives exactly 0, and takes exactly 0."""
    assert truth.sees is not None
    empty = ~truth.sees
    assert bool((got.out[empty] == 0).all()), "a row that sees nothing is not exactly 0"
    grad = got.grads.get("q")
    if grad is not None:
        assert bool((grad[empty] == 0).all()), "the gradient of a query that sees nothing is not exactly 0"


def _worst(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item() if x.numel() else 0.0

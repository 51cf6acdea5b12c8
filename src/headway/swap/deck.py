"""The edge deck: calls that break kernels, with the heads, sizes and dtype that a site really uses."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from headway.attention import attention, explain
from headway.errors import NoBackendError
from headway.limits.request import Request
from headway.masks import Causal, Frame, Mask, Padding, Window
from headway.swap.judge import Errors, errors_of

LOG = logging.getLogger(__name__)
SEED = 7


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a deck is dealt for."""

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    dtype: str
    device: str
    asked: str
    """The backend asked for."""

    @classmethod
    def of(cls, request: Request, asked: str) -> Shape:
        return cls(
            request.heads, request.kv_heads, request.head_dim, request.value_dim, request.dtype, request.device, asked
        )


@dataclasses.dataclass(frozen=True)
class Card:
    """How one call of the deck went."""

    case: str
    shape: Shape
    backend: str
    """The backend that ran, or '' if none takes the call."""
    errors: tuple[Errors, ...]
    wrong: str = ""

    @property
    def failure(self) -> str:
        failed = [errors for errors in self.errors if not errors.passed]
        return self.wrong or (str(failed[0]) if failed else "")


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    q_len: int = 96
    kv_len: int = 96
    mask: Callable[[], Mask | None] = lambda: None
    logits: float = 1.0
    strided: bool = False
    empty: tuple[int, ...] = ()
    """Batch entries in which no query sees anything."""
    filler_from: int | None = None
    """Keys and values of the last batch entry from here on are large. Not NaN: 0 times NaN is NaN to PyTorch."""


CASES = (
    Case("plain"),
    Case("one query", q_len=1),
    Case("one key", kv_len=1),
    Case("causal", mask=lambda: Causal()),
    Case("causal, fewer queries than keys", 40, 96, lambda: Causal("lower-right")),
    Case("causal, more queries than keys", 96, 40, lambda: Causal("upper-left")),
    Case("window", mask=lambda: Window(17, 0)),
    Case("padding", mask=lambda: Padding([96, 31])),
    Case("large numbers in padding", mask=lambda: Padding([96, 31]), filler_from=31),
    Case("rows that see nothing", mask=lambda: Padding([0, 96]), empty=(0,)),
    Case("length 64 modulo 128, with padding", 192, 192, lambda: Padding([192, 65])),
    Case("logits far from 0", mask=lambda: Causal(), logits=30.0),
    Case("strided views", mask=lambda: Causal(), strided=True),
)


def deal(shapes: Iterable[Shape]) -> Iterator[Card]:
    """Every case for every shape."""
    for shape in dict.fromkeys(shapes):
        for case in CASES:
            LOG.info("edge deck, %d heads of %d: %s", shape.heads, shape.head_dim, case.name)
            yield _play(case, shape)


def _play(case: Case, shape: Shape) -> Card:
    q, k, v = _draw(case, shape)
    mask = case.mask()
    try:
        backend = explain(q, k, v, mask, backend=shape.asked).backend().name
    except NoBackendError:
        return Card(case.name, shape, "", ())
    now = _answer((q, k, v), partial(attention, mask=mask, backend=shape.asked))
    before = _answer((q, k, v), partial(_plain, mask=mask))
    wide = tuple(x.detach().double().requires_grad_() for x in (q, k, v))
    truth = _answer(wide, partial(attention, mask=mask, backend="reference"))
    answers = zip(("forward", "gradient of q", "gradient of k", "gradient of v"), truth, before, now, strict=True)
    errors = tuple(errors_of(*answer, torch.finfo(q.dtype).eps) for answer in answers)
    empty = [answer[entry] for answer in now[:2] for entry in case.empty]
    return Card(
        case.name, shape, backend, errors, "rows that see nothing are not 0" if any(map(torch.any, empty)) else ""
    )


def _draw(case: Case, shape: Shape) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(SEED)

    def tensor(heads: int, length: int, size: int, factor: float = 1.0, of_keys: bool = True) -> Tensor:
        wide = size + 8 if case.strided else size
        made = torch.randn(2, length, heads, wide, generator=generator, dtype=torch.float64) * factor
        if of_keys and case.filler_from is not None:
            made[-1, case.filler_from :] = 1e4
        made = made.to(shape.device, getattr(torch, shape.dtype))[..., :size].transpose(1, 2)
        return (made if case.strided else made.contiguous()).requires_grad_()

    return (
        tensor(shape.heads, case.q_len, shape.head_dim, case.logits, of_keys=False),
        tensor(shape.kv_heads, case.kv_len, shape.head_dim),
        tensor(shape.kv_heads, case.kv_len, shape.value_dim),
    )


def _plain(q: Tensor, k: Tensor, v: Tensor, mask: Mask | None) -> Tensor:
    """The same call through PyTorch's own door, with all heads and a dense mask."""
    shared = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(shared, 1) for x in (k, v))
    frame = Frame(q.shape[2], k.shape[2], q.shape[0], q.shape[1], q.device)
    return F.scaled_dot_product_attention(q, k, v, None if mask is None else mask.to_bool(frame))


def _answer(inputs: tuple[Tensor, ...], call: Callable[..., Tensor]) -> tuple[Tensor, ...]:
    """The result, and the gradients of a fixed mix of it."""
    out = call(*inputs)
    generator = torch.Generator().manual_seed(SEED + 1)
    mix = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(torch.float32).to(out.device, out.dtype)
    return out.detach(), *torch.autograd.grad(out, inputs, mix)

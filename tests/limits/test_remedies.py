"""Advice is taken: after each remedy the same backend takes the call, and the answer is what it was.

A case makes a call, has it refused on a described machine, and does what the refusal says. The choice is asked again
with the changed call; the changed call is computed on this machine's CPU and compared with the reference's answer to
the call as it was.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from choice.machines import A10, A100, B200, CPU, H100, MPS, T4, with_packages
from torch import Tensor

import headway
from headway import Bias, Causal, Dense, Mask
from headway.choice.choose import choose
from headway.limits.machine import Machine
from headway.limits.request import Request

door = importlib.import_module("headway.attention")  # `headway.attention` itself is the function of that name


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of headway.attention."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Mask | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    compiled: bool = False
    batch: int | None = None
    """Said to be so large where one that is would take too long to make."""

    def request(self) -> Request:
        asked = {"scale": None, "dropout": 0.0, "softcap": None, "sinks": None, "require": (), "return_lse": False}
        asked |= self.options
        request: Request = door._request(self.q, self.k, self.v, self.mask, *asked.values())
        return dataclasses.replace(request, compiled=self.compiled, batch=self.batch or request.batch)

    def run(self, backend: str) -> Tensor:
        out: Tensor = headway.attention(self.q, self.k, self.v, self.mask, backend=backend, **self.options)
        return out

    def but(self, **changes: Any) -> Call:
        return dataclasses.replace(self, **changes)

    def tensors(self, change: Callable[[Tensor], Tensor]) -> Call:
        return self.but(q=change(self.q), k=change(self.k), v=change(self.v))


@dataclasses.dataclass(frozen=True)
class Case:
    """A refused call, the remedy as it is worded, and what following it looks like."""

    call: Call
    machine: Machine
    backend: str
    remedy: str
    changed: Call
    """The call after the remedy, as the choice sees it."""
    follow: Callable[[Call, Callable[[Call], Tensor]], Tensor] = lambda changed, run: run(changed)
    """Runs the changed call, with what the remedy does to the result."""
    on_cpu: str = "sdpa-math"
    """A backend of this machine that the changed call is computed with."""


def draw(
    heads: int = 2, kv_heads: int | None = None, size: int = 64, values: int | None = None, length: int = 12
) -> Call:
    random = torch.Generator().manual_seed(0)
    kv_heads, values = kv_heads or heads, values or size
    q = torch.randn(2, heads, length, size, generator=random)
    k = torch.randn(2, kv_heads, length, size, generator=random)
    v = torch.randn(2, kv_heads, length, values, generator=random)
    return Call(q, k, v)


def half(call: Call) -> Call:
    return call.tensors(lambda x: x.half())


def learnt(call: Call) -> Call:
    return call.tensors(lambda x: x.clone().requires_grad_())


def to(size: int) -> Callable[[Tensor], Tensor]:
    return lambda x: F.pad(x, (0, size - x.shape[-1]))


def cut(size: int) -> Callable[[Call, Callable[[Call], Tensor]], Tensor]:
    return lambda changed, run: run(changed)[..., :size]


def without_gradients(changed: Call, run: Callable[[Call], Tensor]) -> Tensor:
    with torch.no_grad():
        return run(changed)


def in_parts(count: int) -> Callable[[Call, Callable[[Call], Tensor]], Tensor]:
    """The batch of the tensors here split in so many, and joined again."""

    def follow(changed: Call, run: Callable[[Call], Tensor]) -> Tensor:
        parts = zip(*(x.chunk(count) for x in (changed.q, changed.k, changed.v)), strict=True)
        return torch.cat([run(changed.but(q=q, k=k, v=v)) for q, k, v in parts])

    return follow


def rows_in_parts(count: int) -> Callable[[Call, Callable[[Call], Tensor]], Tensor]:
    """The queries split in so many, each with its rows of a dense mask."""

    def follow(changed: Call, run: Callable[[Call], Tensor]) -> Tensor:
        keep = changed.mask.to_bool(door._frame(changed.q, changed.k)) if changed.mask is not None else None
        rows = torch.arange(changed.q.shape[2]).chunk(count)
        return torch.cat(
            [
                run(changed.but(q=changed.q[:, :, r], mask=keep if keep is None else Dense(keep[..., r, :])))
                for r in rows
            ],
            dim=2,
        )

    return follow


FULL_H100 = with_packages(H100)
FULL_A100 = with_packages(A100)
PLAIN = draw()
BIAS = Bias(torch.randn(1, 2, 12, 12, generator=torch.Generator().manual_seed(1)).requires_grad_())
TRIL = Dense(torch.ones(12, 12, dtype=torch.bool).tril())


def scaled(call: Call, scale: float) -> Call:
    return call.but(options={**call.options, "scale": scale})


ODD = half(draw(size=76))
WIDE_VALUES = half(draw(size=20, values=36))
NARROW_VALUES = half(draw(size=64, values=32))
NARROW_HEADS = half(draw(size=32, values=64))
TINY = draw(size=8)
LARGE = half(learnt(draw(size=200)))
SHARED = half(draw(heads=28, kv_heads=4, size=16))
ODD_FA4 = half(learnt(draw(size=72)))

CASES: dict[str, Case] = {
    "cast to half": Case(
        PLAIN,
        FULL_A100,
        "flash2",
        "cast q, k and v to bfloat16, and the result back",
        PLAIN.tensors(lambda x: x.bfloat16()),
        lambda changed, run: run(changed).float(),
        on_cpu="sdpa-flash",
    ),
    "cast to what an older GPU computes in": Case(
        PLAIN.tensors(lambda x: x.bfloat16()),
        T4,
        "sdpa-efficient",
        "cast q, k and v to float32, and the result back",
        PLAIN.tensors(lambda x: x.bfloat16().float()),
        lambda changed, run: run(changed).bfloat16(),
        on_cpu="sdpa-flash",
    ),
    "cast for a contract": Case(
        half(PLAIN).but(options={"require": ("float32",)}),
        CPU,
        "sdpa-flash",
        "cast q, k and v to float32, and the result back",
        half(PLAIN).tensors(lambda x: x.float()).but(options={"require": ("float32",)}),
        lambda changed, run: run(changed).half(),
        on_cpu="sdpa-flash",
    ),
    "pad heads": Case(
        ODD,
        A100,
        "sdpa-flash",
        "pad q, k and v to 80, keep the scale (76**-0.5 by default), cut the result to 76",
        scaled(ODD.tensors(to(80)), 76**-0.5),
        cut(76),
        on_cpu="sdpa-flash",
    ),
    "pad heads and keep a scale of one's own": Case(
        scaled(ODD, 0.3),
        A100,
        "sdpa-flash",
        "pad q, k and v to 80, keep the scale (76**-0.5 by default), cut the result to 76",
        scaled(ODD.tensors(to(80)), 0.3),
        cut(76),
    ),
    "pad heads and values": Case(
        WIDE_VALUES,
        A100,
        "sdpa-cudnn",
        "pad q and k to 24, pad v to 40, keep the scale (20**-0.5 by default), cut the result to 36",
        scaled(WIDE_VALUES.but(q=to(24)(WIDE_VALUES.q), k=to(24)(WIDE_VALUES.k), v=to(40)(WIDE_VALUES.v)), 20**-0.5),
        cut(36),
    ),
    "pad both to one size": Case(
        WIDE_VALUES,
        A100,
        "sdpa-flash",
        "pad q, k and v to 40, keep the scale (20**-0.5 by default), cut the result to 36",
        scaled(WIDE_VALUES.tensors(to(40)), 20**-0.5),
        cut(36),
        on_cpu="sdpa-flash",
    ),
    "pad values alone": Case(
        NARROW_VALUES,
        A100,
        "sdpa-flash",
        "pad v to 64, cut the result to 32",
        NARROW_VALUES.but(v=to(64)(NARROW_VALUES.v)),
        cut(32),
        on_cpu="sdpa-flash",
    ),
    "pad queries and keys alone": Case(
        NARROW_HEADS,
        A100,
        "sdpa-flash",
        "pad q and k to 64, keep the scale (32**-0.5 by default)",
        scaled(NARROW_HEADS.but(q=to(64)(NARROW_HEADS.q), k=to(64)(NARROW_HEADS.k)), 32**-0.5),
        on_cpu="sdpa-flash",
    ),
    "pad to the smallest head": Case(
        TINY,
        A100,
        "flex",
        "pad q, k and v to 16, keep the scale (8**-0.5 by default), cut the result to 8",
        scaled(TINY.tensors(to(16)), 8**-0.5),
        cut(8),
    ),
    "pad past a gap": Case(
        LARGE,
        A10,
        "sdpa-flash",
        "pad q, k and v to 232, keep the scale (200**-0.5 by default), cut the result to 200",
        scaled(LARGE.tensors(to(232)), 200**-0.5),
        cut(200),
    ),
    "negative scale": Case(
        scaled(PLAIN, -0.5),
        CPU,
        "sdpa-flash",
        "multiply q by the scale and pass scale=1.0",
        scaled(PLAIN.but(q=PLAIN.q * -0.5), 1.0),
        on_cpu="sdpa-flash",
    ),
    "scale of 0": Case(
        scaled(PLAIN.but(mask=Causal()), 0.0),
        CPU,
        "sdpa-flash",
        "multiply q by the scale and pass scale=1.0",
        scaled(PLAIN.but(q=PLAIN.q * 0.0, mask=Causal()), 1.0),
        on_cpu="sdpa-flash",
    ),
    "split the batch": Case(
        half(PLAIN).but(batch=100_000),
        A100,
        "sdpa-flash",
        "split the batch in 2 and join the results",
        half(PLAIN).but(batch=50_000),
        in_parts(2),
        on_cpu="sdpa-flash",
    ),
    "no gradient": Case(
        learnt(PLAIN),
        CPU,
        "flex",
        "wrap the call in torch.no_grad() if no gradient is wanted",
        PLAIN,
        without_gradients,
    ),
    "no gradient of sinks": Case(
        learnt(PLAIN).but(options={"sinks": torch.randn(2, generator=torch.Generator().manual_seed(2))}),
        CPU,
        "sdpa-flash",
        "wrap the call in torch.no_grad() if no gradient is wanted",
        PLAIN.but(options={"sinks": torch.randn(2, generator=torch.Generator().manual_seed(2))}),
        without_gradients,
        on_cpu="sdpa-flash",
    ),
    "detach a bias": Case(
        learnt(PLAIN).but(mask=BIAS),
        CPU,
        "sdpa-flash",
        "detach the mask's tensor if its gradient is not wanted, or choose another backend",
        learnt(PLAIN).but(mask=Bias(BIAS.tensors[0].detach())),
        on_cpu="sdpa-flash",
    ),
    "recognise a tensor": Case(
        half(PLAIN).but(mask=TRIL),
        A100,
        "sdpa-flash",
        "give its tensor to headway.recognise, which may find a typed mask in it, or choose another backend",
        half(PLAIN).but(mask=headway.recognise(TRIL.tensors[0])),
        on_cpu="sdpa-flash",
    ),
    "no dropout": Case(
        PLAIN.but(options={"dropout": 0.5}),
        CPU,
        "sdpa-flash",
        "pass dropout=0.0 if none is wanted, as in evaluation, or choose another backend",
        PLAIN,
        on_cpu="sdpa-flash",
    ),
    "drop a contract": Case(
        half(PLAIN).but(options={"require": ("maps",)}),
        A100,
        "sdpa-flash",
        "drop 'maps' from require if it may be broken, or choose another backend",
        half(PLAIN),
        on_cpu="sdpa-flash",
    ),
    "out of the graph": Case(
        half(PLAIN).but(compiled=True),
        FULL_H100,
        "flash4",
        "keep the call out of the graph by torch.compiler.disable",
        half(PLAIN),
        lambda changed, run: torch.compiler.disable(run)(changed),
    ),
    "by name what approximates": Case(
        half(PLAIN), FULL_A100, "sage", "pass backend='sage' if an approximation is good enough", half(PLAIN)
    ),
    "repeat k and v": Case(
        SHARED,
        B200,
        "sdpa-cudnn",
        "repeat k and v: k.repeat_interleave(7, dim=1), or run `headway doctor --acquit` to look for the defect here",
        SHARED.but(k=SHARED.k.repeat_interleave(7, dim=1), v=SHARED.v.repeat_interleave(7, dim=1)),
        on_cpu="sdpa-flash",
    ),
    "pad heads past a defect": Case(
        ODD_FA4,
        FULL_H100,
        "flash4",
        "pad q, k and v to 96, keep the scale (72**-0.5 by default), cut the result to 72,"
        " or run `headway doctor --acquit` to look for the defect here",
        scaled(ODD_FA4.tensors(to(96)), 72**-0.5),
        cut(72),
        on_cpu="sdpa-flash",
    ),
}
"""By what is done. Of the remedies that change the machine, and those that name another backend, nothing is run."""


def refusals_of(case: Case) -> list[str]:
    found = dict(choose(case.call.request(), case.machine).refusals).get(case.backend, ())
    return [refusal.remedy for refusal in found]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_remedy_is_the_only_thing_said(case: Case) -> None:
    assert refusals_of(case) == [case.remedy]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_remedy_makes_the_backend_take_the_call(case: Case) -> None:
    assert choose(case.changed.request(), case.machine, case.backend).chosen is not None


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_remedy_leaves_the_answer(case: Case) -> None:
    asked = {name: value for name, value in case.call.options.items() if name not in ("dropout", "require")}
    call = case.call.but(options=asked)  # what is random has no one answer, and a contract changes none
    wanted = call.run("reference")
    got = case.follow(case.changed, lambda changed: changed.run(case.on_cpu))
    loose = 4e-2 if torch.bfloat16 in (case.changed.q.dtype, call.q.dtype) else 4e-3
    tight = loose if torch.float16 in (case.changed.q.dtype, call.q.dtype) or loose > 1e-2 else 1e-5
    torch.testing.assert_close(got, wanted.to(got.dtype), atol=tight, rtol=tight)


def test_padding_without_keeping_the_scale_would_change_the_answer() -> None:
    case = CASES["pad heads"]
    without = case.changed.but(options={}).run("sdpa-flash")[..., :76]
    assert not torch.allclose(without, case.call.run("reference"), atol=4e-3)


def test_fold_a_mapped_axis() -> None:
    """vmap over an axis is the same call with that axis in the batch."""
    q, k, v = (torch.randn(3, 2, 2, 12, 16, generator=torch.Generator().manual_seed(n)) for n in range(3))
    mapped = dataclasses.replace(Call(q[0], k[0], v[0]).request(), transformed=True)
    (refusal,) = dict(choose(mapped, CPU).refusals)["sdpa-flash"]
    assert refusal.remedy == "fold vmap's axis into the batch, and take gradients by torch.autograd"
    folded = [x.flatten(0, 1) for x in (q, k, v)]
    assert choose(Call(*folded).request(), CPU, "sdpa-flash").chosen is not None
    wanted = torch.vmap(lambda *x: headway.attention(*x, backend="reference"))(q, k, v)
    got = headway.attention(*folded, backend="sdpa-flash").unflatten(0, (3, 2))
    torch.testing.assert_close(got, wanted)


LONG = {
    "efficient-long-mask": (
        A100,
        "sdpa-efficient",
        Request(q_len=70_000, kv_len=70_000, dtype="float16", mask=frozenset({"dense"})),
        "split the queries in 2, each with its rows of the mask",
    ),
    "mps-large-scores": (
        MPS,
        "sdpa-math",
        Request(batch=3, heads=40, q_len=8192, kv_len=8192),
        "split the queries in 2, each with its rows of the mask",
    ),
}


@pytest.mark.parametrize("machine, backend, request_, said", LONG.values(), ids=LONG)
def test_split_the_queries(machine: Machine, backend: str, request_: Request, said: str) -> None:
    """Too long to be computed here: the choice is asked with the parts, and short ones are computed."""
    (refusal,) = dict(choose(request_, machine).refusals)[backend]
    assert refusal.remedy.startswith(said)
    part = dataclasses.replace(request_, q_len=-(-request_.q_len // 2))
    assert choose(part, machine, backend).chosen is not None
    short = PLAIN.but(mask=TRIL)
    got = rows_in_parts(2)(short, lambda changed: changed.run("sdpa-math"))
    torch.testing.assert_close(got, short.run("reference"))

"""Random calls: for each, every backend agrees with float64 or refuses with a remedy.

HEADWAY_FUZZ_DRAWS says how many calls (3,000 unless told), HEADWAY_FUZZ_SEED which: the same ones at every run unless
told. A failure prints a `@reproduce_failure` line.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from agreement import Call, Judge, run
from deck import LAYOUTS, Source
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from test_agreement import SAMPLES

import headway
from headway import (
    Alibi,
    Bias,
    Causal,
    Dense,
    Documents,
    Full,
    Mask,
    MaskError,
    NoBackendError,
    Padding,
    Predicate,
    Prefix,
    Tree,
    Window,
)
from headway.backends.registry import NAMES
from headway.masks import Frame

DRAWS = int(os.environ.get("HEADWAY_FUZZ_DRAWS", "3000"))
SEED = int(os.environ.get("HEADWAY_FUZZ_SEED", "0"))
SHARDS = 8
"""Tests the draws are spread over, for the workers of pytest-xdist."""

POLICY = settings(
    max_examples=max(DRAWS // SHARDS, 1),
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)

# -- what may be drawn ------------------------------------------------------------------------------------------------

ALIGNS = ("upper-left", "lower-right")


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A call in words, as a failure prints it."""

    dtype: str
    frame: Frame
    kv_heads: int
    sizes: tuple[int, int]
    layout: str
    mask: Mask | None
    logits: float
    sinks: bool
    learns: bool
    source: int
    options: dict[str, Any]

    def call(self) -> Call:
        dtype, source, f = getattr(torch, self.dtype), Source(str(self.source)), self.frame
        shapes = ((f.heads, f.q_len, self.sizes[0]), *((self.kv_heads, f.kv_len, size) for size in self.sizes))
        q, k, v = (LAYOUTS[self.layout](source, (f.batch, *shape), dtype, f.device) for shape in shapes)
        q = q * self.logits if self.logits != 1 else q
        sinks = source.normal(f.heads).to(f.device, torch.float32) if self.sinks else None
        if self.learns:
            q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
            sinks = None if sinks is None else sinks.requires_grad_()
        return Call(q, k, v, mask=self.mask, sinks=sinks, **self.options)


def frames(device: str) -> st.SearchStrategy[Frame]:
    lengths = st.one_of(st.integers(1, 40), st.sampled_from([1, 2, 16, 32]))
    both = st.one_of(lengths.map(lambda n: (n, n)), st.tuples(lengths, lengths))
    rest = st.tuples(st.integers(1, 3), st.sampled_from([1, 2, 4]))
    return st.builds(lambda both, rest: Frame(*both, *rest, torch.device(device)), both, rest)


@st.composite
def calls(draw: st.DrawFn, device: str) -> Drawn:
    frame = draw(frames(device))
    size = draw(st.sampled_from([1, 4, 8, 16, 17, 24, 32]))
    options = {
        "scale": draw(st.sampled_from([None, None, None, 0.3, 0.0, -0.2, 1.5])),
        "softcap": draw(st.sampled_from([None, None, None, 0.5, 20.0])),
        "return_lse": draw(st.booleans()),
        "require": draw(st.sampled_from([(), (), (), ("deterministic",), ("double-backward",), ("maps", "no-sync")])),
    }
    return Drawn(
        dtype=draw(st.sampled_from(["float64", "float32", "float32", "bfloat16", "float16"])),
        frame=frame,
        kv_heads=draw(st.sampled_from([n for n in (1, 2, 4) if frame.heads % n == 0])),
        sizes=(size, draw(st.sampled_from([size, size, 8, 20]))),
        layout=draw(st.sampled_from(list(LAYOUTS))),
        mask=draw(st.one_of(st.none(), masks(frame))),
        logits=draw(st.sampled_from([1.0, 1.0, 1.0, 30.0])),
        sinks=draw(st.sampled_from([False, False, True])),
        learns=draw(st.booleans()),
        source=draw(st.integers(0, 2**16)),
        options=options,
    )


@st.composite
def masks(draw: st.DrawFn, frame: Frame) -> Mask:
    """Any mask of the algebra: yes and no in any nesting, and what adds to scores joined by & outside."""
    mask = yes_and_no(draw, frame, 4) if draw(st.booleans()) else Full()
    for _ in range(draw(st.integers(0, 2))):
        extra = adding(draw, frame)
        mask = mask & extra if draw(st.booleans()) else extra & mask
    return mask


# Functions that draw, and no strategies: one that is made for a frame is looked through before it is used, which takes
# longer than all that it draws.


def yes_and_no(draw: st.DrawFn, frame: Frame, most: int) -> Mask:
    """Of `most` leaves or fewer, each and what is joined of them turned round or not."""
    joined = draw(st.sampled_from(["", "&", "|"])) if most > 1 else ""
    if joined:
        left = draw(st.integers(1, most - 1))
        one, other = yes_and_no(draw, frame, left), yes_and_no(draw, frame, most - left)
        mask = one & other if joined == "&" else one | other
    else:
        mask = LEAVES[draw(st.sampled_from(list(LEAVES)))](draw, frame)
    return ~mask if draw(st.integers(0, 3)) == 3 else mask


def near(draw: st.DrawFn) -> int | None:
    return draw(st.integers(0, 12)) if draw(st.booleans()) else None


def align(draw: st.DrawFn, frame: Frame) -> Any:
    return draw(st.sampled_from((None, *ALIGNS) if frame.q_len == frame.kv_len else ALIGNS))


def counts(draw: st.DrawFn, frame: Frame) -> list[int]:
    """Of keys, one for each of a batch."""
    return [draw(st.integers(0, frame.kv_len)) for _ in range(frame.batch)]


def source(draw: st.DrawFn) -> Source:
    return Source(str(draw(st.integers(0, 99))))


def every(draw: st.DrawFn, frame: Frame) -> Mask:
    step = torch.tensor(draw(st.integers(1, 5)), device=frame.device)
    return Predicate(lambda b, h, q, k: (q + k + h) % step == 0)


def room(draw: st.DrawFn, frame: Frame) -> tuple[int, ...]:
    """A shape that broadcasts over the frame."""
    full = (frame.batch, frame.heads, frame.q_len, frame.kv_len)
    axes = draw(st.sampled_from([0, 1, 2, 3, None]))
    return tuple(draw(st.sampled_from([1, n])) for n in full) if axes is None else full[axes:]


def documents(draw: st.DrawFn, frame: Frame) -> Mask:
    count = draw(st.integers(1, 4))
    if frame.q_len == frame.kv_len and draw(st.booleans()):
        return Documents(packing(draw, frame.q_len, count))
    return Documents(packing(draw, frame.q_len, count), packing(draw, frame.kv_len, count))


def packing(draw: st.DrawFn, total: int, count: int) -> list[int]:
    cuts = sorted(draw(st.integers(0, total)) for _ in range(count - 1))
    return [end - start for start, end in zip([0, *cuts], [*cuts, total], strict=True)]


def tree(draw: st.DrawFn, frame: Frame) -> Mask:
    if frame.q_len > frame.kv_len:
        return Full()
    lengths = packing(draw, frame.kv_len, draw(st.integers(1, 5)))
    parents = [draw(st.integers(-1, i - 1)) for i in range(len(lengths))]
    return Tree(parents, lengths, align=align(draw, frame))


LEAVES: dict[str, Callable[[st.DrawFn, Frame], Mask]] = {
    "full": lambda draw, frame: Full(),
    "causal": lambda draw, frame: Causal(align(draw, frame)),
    "window": lambda draw, frame: Window(near(draw), near(draw), align(draw, frame)),
    "prefix": lambda draw, frame: Prefix(draw(st.integers(0, frame.kv_len))),
    "prefixes": lambda draw, frame: Prefix(torch.tensor(counts(draw, frame), device=frame.device)),
    "documents": documents,
    "padding": lambda draw, frame: Padding(counts(draw, frame), draw(st.sampled_from(["left", "right"]))),
    "any padding": lambda draw, frame: Padding(source(draw).yes(frame.batch, frame.kv_len).to(frame.device)),
    "dense": lambda draw, frame: Dense(source(draw).yes(*room(draw, frame)).to(frame.device)),
    "predicate": every,
    "tree": tree,
}


def adding(draw: st.DrawFn, frame: Frame) -> Mask:
    numbers = source(draw)
    if draw(st.booleans()):
        return Alibi(numbers.normal(frame.heads).abs().to(frame.device, torch.float32), align=align(draw, frame))
    bias = numbers.normal(*room(draw, frame))
    if draw(st.booleans()):
        bias = bias.masked_fill(numbers.yes(*bias.shape, share=0.3), float("-inf"))
    return Bias(bias.to(frame.device, torch.float32).requires_grad_(draw(st.booleans())))


# -- what must hold ---------------------------------------------------------------------------------------------------


def backends(device: str, call: Call) -> list[str]:
    """All of them, but on CUDA those that take seconds to compile each new shape: tests/test_agreement.py has these."""
    slow = set(SAMPLES) if device == "cuda" else set()
    chosen = headway.explain(call.q, call.k, call.v, **call.options()).chosen
    auto = ["auto"] if chosen is None or chosen.name not in slow else []
    return [*auto, *(name for name in NAMES if name not in slow and name != "sage")]


@pytest.mark.usefixtures("flex_uncompiled")
@pytest.mark.parametrize("shard", range(SHARDS))
def test_every_backend_agrees_or_refuses(shard: int, device: str) -> None:
    @seed(SEED * SHARDS + shard)
    @POLICY
    @given(calls(device))
    def holds(drawn: Drawn) -> None:
        call = drawn.call()
        judge = Judge(call, learns=drawn.learns)
        with torch.set_grad_enabled(drawn.learns):
            asked = backends(device, call)
        refused = {name for name in asked if not agrees(call, judge, name, learns=drawn.learns)}
        assert not refused & {"auto", "reference"}, "the reference takes every call"

    holds()


def agrees(call: Call, judge: Judge, backend: str, *, learns: bool) -> bool:
    try:
        got = run(call, backend, learns=learns)
    except NoBackendError as refusal:
        lines = str(refusal).splitlines()
        assert any("got " in line and ", takes " in line and "; " in line for line in lines), "a refusal has a remedy"
        return False
    try:
        judge.verdict(got)
    except AssertionError as error:
        raise AssertionError(f"{backend}: {error}") from error
    return True


@pytest.mark.parametrize("shard", range(2))
def test_a_mask_for_other_lengths_is_refused_by_all_alike(shard: int, device: str) -> None:
    @seed(SEED * SHARDS + shard)
    @POLICY
    @given(calls(device), frames(device).flatmap(masks))
    def holds(drawn: Drawn, mask: Mask) -> None:
        call = dataclasses.replace(drawn, mask=mask).call()
        try:
            mask.to_bool(drawn.frame)
            mask.check(drawn.frame)
        except MaskError:
            for name in ("auto", *NAMES):
                with pytest.raises(MaskError, match=r"."):
                    run(call, name, learns=drawn.learns)

    holds()

"""Random calls: for each, every backend agrees with float64 or refuses with a remedy.

HEADWAY_FUZZ_DRAWS says how many calls (3,000 unless told), HEADWAY_FUZZ_SEED which: the same ones at every run unless
told. A failure prints a `@reproduce_failure` line.
"""

from __future__ import annotations

import dataclasses
import os
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
    mask = draw(st.one_of(st.just(Full()), yes_and_no(frame)))
    for extra in draw(st.lists(adding(frame), max_size=2)):
        mask = draw(st.sampled_from([mask & extra, extra & mask]))
    return mask


def yes_and_no(frame: Frame) -> st.SearchStrategy[Mask]:
    def joined(inner: st.SearchStrategy[Mask]) -> st.SearchStrategy[Mask]:
        pairs = st.tuples(inner, inner)
        return st.one_of(pairs.map(lambda p: p[0] & p[1]), pairs.map(lambda p: p[0] | p[1]), inner.map(lambda m: ~m))

    return st.recursive(leaves(frame), joined, max_leaves=4)


def leaves(frame: Frame) -> st.SearchStrategy[Mask]:
    near = st.one_of(st.none(), st.integers(0, 12))
    kinds = [
        st.just(Full()),
        aligns(frame).map(Causal),
        st.builds(Window, near, near, aligns(frame)),
        st.integers(0, frame.kv_len).map(Prefix),
        st.lists(st.integers(0, frame.kv_len), min_size=frame.batch, max_size=frame.batch).map(
            lambda n: Prefix(torch.tensor(n, device=frame.device))
        ),
        documents(frame),
        st.builds(
            Padding,
            st.lists(st.integers(0, frame.kv_len), min_size=frame.batch, max_size=frame.batch),
            st.sampled_from(["left", "right"]),
        ),
        tensors(frame, lambda source: Padding(source.yes(frame.batch, frame.kv_len).to(frame.device))),
        st.tuples(rooms(frame), st.integers(0, 99)).map(
            lambda drawn: Dense(Source(str(drawn[1])).yes(*drawn[0]).to(frame.device))
        ),
        st.integers(1, 5).map(lambda n: every(torch.tensor(n, device=frame.device))),
    ]
    if frame.q_len <= frame.kv_len:
        kinds.append(trees(frame))
    return st.one_of(kinds)


def aligns(frame: Frame) -> st.SearchStrategy[Any]:
    return st.sampled_from([None, *ALIGNS] if frame.q_len == frame.kv_len else ALIGNS)


def every(step: torch.Tensor) -> Predicate:
    return Predicate(lambda b, h, q, k: (q + k + h) % step == 0)


def tensors(frame: Frame, make: Any) -> st.SearchStrategy[Mask]:
    return st.integers(0, 99).map(lambda n: make(Source(str(n))))


def rooms(frame: Frame) -> st.SearchStrategy[tuple[int, ...]]:
    """Shapes that broadcast over the frame."""
    full = (frame.batch, frame.heads, frame.q_len, frame.kv_len)
    chosen = st.tuples(*(st.sampled_from([1, n]) for n in full))
    return st.one_of(chosen, st.sampled_from([full[2:], full[1:], full[3:]]))


@st.composite
def documents(draw: st.DrawFn, frame: Frame) -> Mask:
    count = draw(st.integers(1, 4))
    if frame.q_len == frame.kv_len and draw(st.booleans()):
        return Documents(draw(packings(frame.q_len, count)))
    return Documents(draw(packings(frame.q_len, count)), draw(packings(frame.kv_len, count)))


@st.composite
def packings(draw: st.DrawFn, total: int, count: int) -> list[int]:
    cuts = sorted(draw(st.lists(st.integers(0, total), min_size=count - 1, max_size=count - 1)))
    return [end - start for start, end in zip([0, *cuts], [*cuts, total], strict=True)]


@st.composite
def trees(draw: st.DrawFn, frame: Frame) -> Mask:
    lengths = draw(packings(frame.kv_len, draw(st.integers(1, 5))))
    parents = [draw(st.integers(-1, i - 1)) for i in range(len(lengths))]
    return Tree(parents, lengths, align=draw(aligns(frame)))


@st.composite
def adding(draw: st.DrawFn, frame: Frame) -> Mask:
    source = Source(str(draw(st.integers(0, 99))))
    if draw(st.booleans()):
        return Alibi(source.normal(frame.heads).abs().to(frame.device, torch.float32), align=draw(aligns(frame)))
    bias = source.normal(*draw(rooms(frame)))
    if draw(st.booleans()):
        bias = bias.masked_fill(source.yes(*bias.shape, share=0.3), float("-inf"))
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

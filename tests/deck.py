"""The deck: named calls that between them meet every shape, layout, mask and option worth a case of its own."""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from agreement import Call
from torch import Tensor

from headway import Alibi, Bias, Causal, Dense, Documents, Full, Mask, Padding, Predicate, Prefix, Tree, Window
from headway.masks import Frame

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
DTYPES = ("float64", "float32", "bfloat16", "float16")


Shape: TypeAlias = tuple[int, int, int, int]


@dataclasses.dataclass(frozen=True)
class Case:
    """How to draw one call. Lengths are (queries, keys), heads (query heads, key heads), sizes (q and k, v)."""

    name: str
    lengths: tuple[int, int] = (48, 48)
    heads: tuple[int, int] = (2, 2)
    sizes: tuple[int, int] = (64, 64)
    batch: int = 2
    layout: str = "contiguous"
    mask: Callable[[Frame], Mask] | None = None
    logits: float = 1.0
    """What q is multiplied by, for scores far from 0."""
    sinks: bool = False
    dropout: float = 0.0
    dtypes: tuple[str, ...] = DTYPES
    """Those for which the case means something."""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def draw(self, dtype: str, device: str, *, learns: bool = True) -> Call:
        """The same numbers on every device, and in every dtype but for rounding."""
        (q_len, kv_len), (heads, kv_heads), (size, value_size) = self.lengths, self.heads, self.sizes
        shapes = tuple(
            (self.batch, *shape)
            for shape in ((heads, q_len, size), (kv_heads, kv_len, size), (kv_heads, kv_len, value_size))
        )
        drawn = _drawn(self.name, self.layout, shapes, dtype, device)
        q, k, v, sinks = (x.detach().requires_grad_(learns) for x in drawn)
        q = (q.detach() * self.logits).requires_grad_(learns) if self.logits != 1 else q
        mask = None if self.mask is None else self.mask(Frame(q_len, kv_len, self.batch, heads, q.device))
        return Call(q, k, v, mask=mask, sinks=sinks if self.sinks else None, **self.options)


class Source:
    """Random numbers that depend on a name alone."""

    def __init__(self, name: str) -> None:
        self.generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def yes(self, *shape: int, share: float = 0.6) -> Tensor:
        return torch.rand(shape, generator=self.generator) < share


@functools.cache
def _drawn(
    name: str, layout: str, shapes: tuple[Shape, ...], dtype: str, device: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys, values and sinks. Drawn once for all backends: it takes as long as many of them do."""
    source, to, where = Source(name), getattr(torch, dtype), torch.device(device)
    q, k, v = (LAYOUTS[layout](source, shape, to, where) for shape in shapes)
    return q, k, v, source.normal(shapes[0][1]).to(where, torch.float32)


# -- layouts ----------------------------------------------------------------------------------------------------------

Layout = Callable[[Source, Shape, torch.dtype, torch.device], Tensor]


def contiguous(source: Source, shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensor:
    return source.normal(*shape).to(device, dtype)


def tokens_first(source: Source, shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(B, L, H, D) in memory, as a projection's output is."""
    batch, heads, length, size = shape
    return contiguous(source, (batch, length, heads, size), dtype, device).transpose(1, 2)


def every_other(source: Source, shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Strided on the last axis."""
    return contiguous(source, (*shape[:3], 2 * shape[3]), dtype, device)[..., ::2]


def features_first(source: Source, shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensor:
    batch, heads, length, size = shape
    return contiguous(source, (batch, heads, size, length), dtype, device).transpose(2, 3)


def one_for_all(source: Source, shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Expanded over batch and heads, with strides of 0."""
    return contiguous(source, (1, 1, *shape[2:]), dtype, device).expand(shape)


def misaligned(source: Source, shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Rows that start one element off any boundary."""
    return contiguous(source, (*shape[:3], shape[3] + 3), dtype, device)[..., 1 : 1 + shape[3]]


LAYOUTS: dict[str, Layout] = {
    "contiguous": contiguous,
    "tokens-first": tokens_first,
    "every-other": every_other,
    "features-first": features_first,
    "one-for-all": one_for_all,
    "misaligned": misaligned,
}

# -- masks ------------------------------------------------------------------------------------------------------------


def random_bias(name: str, *shape: int, learns: bool = False, blocked: float = 0.0) -> Callable[[Frame], Mask]:
    def make(frame: Frame) -> Mask:
        source = Source(name)
        bias = source.normal(*shape)
        bias = bias.masked_fill(source.yes(*shape, share=blocked), float("-inf")) if blocked else bias
        return Bias(bias.to(frame.device, torch.float32).requires_grad_(learns))

    return make


def dense(name: str, *shape: int, empty_rows: bool = False) -> Callable[[Frame], Mask]:
    def make(frame: Frame) -> Mask:
        may = Source(name).yes(*shape)
        if shape[-1] > 1:
            may[..., 0] = True
        if empty_rows:
            may[..., 3:7, :] = False
        return Dense(may.to(frame.device))

    return make


def real_keys(frame: Frame) -> Mask:
    real = Source("real keys").yes(frame.batch, frame.kv_len)
    real[:, 5] = True
    return Padding(real.to(frame.device))


def steps(frame: Frame) -> Mask:
    step = torch.tensor(3, device=frame.device)
    return Predicate(lambda b, h, q, k: (q - k) % step == 0)


def slopes(frame: Frame) -> Tensor:
    return 2.0 ** -torch.arange(1, frame.heads + 1, device=frame.device, dtype=torch.float32)


def _lowest(length: int) -> Callable[[Frame], Mask]:
    """Some rows are numbers as low as there are, all over."""
    lowest = torch.finfo(torch.float32).min
    return lambda f: Bias(torch.zeros(length, length, device=f.device).index_fill(0, _some(f), lowest))


SQUARE: dict[str, Callable[[Frame], Mask]] = {
    "full": lambda f: Full(),
    "nothing": lambda f: ~Full(),
    "causal": lambda f: Causal(),
    "window": lambda f: Window(3, 5),
    "window-back": lambda f: Window(left=4, right=0),
    "window-ahead": lambda f: Window(right=4),
    "window-open": lambda f: Window(),
    "causal & window": lambda f: Causal() & Window(left=5),
    "prefix": lambda f: Prefix(7),
    "prefix-per-entry": lambda f: Prefix(torch.tensor([0, 9], device=f.device)),
    "causal | prefix": lambda f: Causal() | Prefix(7),
    "documents": lambda f: Documents([20, 1, 27]),
    "documents-some-empty": lambda f: Documents([0, 20, 0, 28, 0]),
    "documents & causal": lambda f: Documents([20, 1, 27]) & Causal(),
    "documents & window": lambda f: Documents([20, 1, 27]) & Window(2, 3),
    "documents-cross": lambda f: Documents([10, 20, 18], [5, 30, 13]),
    "documents-cross-no-keys": lambda f: Documents([10, 20, 18], [35, 0, 13]),
    "documents-cross & causal": lambda f: Documents([10, 20, 18], [5, 30, 13]) & Causal(),
    "documents & documents": lambda f: Documents([20, 28]) & Documents([30, 18]),
    "padding": lambda f: Padding([48, 9]),
    "padding-left": lambda f: Padding([48, 9], side="left"),
    "padding-holes": real_keys,
    "padding-all": lambda f: Padding([0, 30]),
    "padding & padding": lambda f: Padding([40, 40]) & Padding([48, 9], side="left"),
    "tree": lambda f: Tree([-1, 0, 0, 1], lengths=[20, 10, 8, 10]),
    "dense": dense("dense", 48, 48),
    "dense-per-head": dense("dense per head", 2, 2, 48, 48),
    "dense-over-keys": dense("dense over keys", 2, 1, 1, 48),
    "dense-over-queries": dense("dense over queries", 1, 2, 48, 1),
    "dense-empty-rows": dense("dense empty rows", 48, 48, empty_rows=True),
    "bias": random_bias("bias", 48, 48),
    "bias-per-head": random_bias("bias per head", 1, 2, 48, 48),
    "bias-over-keys": random_bias("bias over keys", 2, 1, 1, 48),
    "bias-blocks": random_bias("bias blocks", 48, 48, blocked=0.4),
    "bias-empty-rows": lambda f: Bias(torch.zeros(48, 48, device=f.device).index_fill(0, _some(f), float("-inf"))),
    "bias-lowest-row": _lowest(48),
    "bias & bias": lambda f: random_bias("one", 48, 48)(f) & random_bias("two", 2, 1, 1, 48)(f),
    "bias-learnt": random_bias("bias learnt", 2, 2, 48, 48, learns=True),
    "bias-learnt-per-head": random_bias("bias learnt per head", 1, 2, 48, 48, learns=True),
    "bias-learnt-over-keys": random_bias("bias learnt over keys", 2, 1, 48, learns=True),
    "bias-learnt-blocks": random_bias("bias learnt blocks", 48, 48, learns=True, blocked=0.4),
    "bias-learnt & causal": lambda f: random_bias("bias learnt causal", 2, 48, 48, learns=True)(f) & Causal(),
    "causal & bias": lambda f: Causal() & random_bias("causal bias", 2, 48, 48)(f),
    "alibi": lambda f: Alibi(slopes(f)),
    "alibi & causal": lambda f: Alibi(slopes(f)) & Causal(),
    "alibi & documents": lambda f: Alibi(slopes(f)) & Documents([20, 1, 27]),
    "alibi & documents-cross": lambda f: Alibi(slopes(f)) & Documents([10, 20, 18], [5, 30, 13]),
    "causal & alibi & padding": lambda f: Causal() & Alibi(slopes(f)) & Padding([48, 9]),
    "predicate": lambda f: Predicate(lambda b, h, q, k: (q - k) % 2 == 0),
    "predicate-captures": steps,
    "not-causal": lambda f: ~Causal(),
    "not-documents": lambda f: ~Documents([20, 1, 27]),
    "causal & padding": lambda f: Causal() & Padding([48, 9]),
    "causal & padding-left": lambda f: Causal() & Padding([48, 9], side="left"),
    "documents & causal & padding": lambda f: Documents([20, 1, 27]) & Causal() & Padding([48, 9]),
    "(window | prefix) & padding": lambda f: (Window(3, 3) | Prefix(2)) & Padding([48, 9]),
    "~(window & documents)": lambda f: ~(Window(3, 3) & Documents([20, 28])),
}
"""On 48 queries and 48 keys, two heads, two batch entries."""


LOWEST = ("float64", "float32", "bfloat16")
MASK_DTYPES = {"bias-lowest-row": LOWEST}
"""float16 has no number so low that it would swallow a score."""


def _some(frame: Frame) -> Tensor:
    return torch.tensor([0, 5, 47], device=frame.device)


SKEWED: dict[str, tuple[tuple[int, int], Callable[[Frame], Mask]]] = {
    "causal-upper-left-wide": ((40, 64), lambda f: Causal("upper-left")),
    "causal-upper-left-tall": ((64, 40), lambda f: Causal("upper-left")),
    "causal-lower-right-wide": ((40, 64), lambda f: Causal("lower-right")),
    "causal-lower-right-tall": ((64, 40), lambda f: Causal("lower-right")),
    "window-upper-left-wide": ((40, 64), lambda f: Window(3, 5, align="upper-left")),
    "window-upper-left-tall": ((64, 40), lambda f: Window(3, 5, align="upper-left")),
    "window-lower-right-wide": ((40, 64), lambda f: Window(3, 5, align="lower-right")),
    "window-lower-right-tall": ((64, 40), lambda f: Window(3, 5, align="lower-right")),
    "both-aligns": ((64, 40), lambda f: Causal("upper-left") & Causal("lower-right")),
    "both-aligns-wide": ((40, 64), lambda f: Causal("lower-right") & Causal("upper-left")),
    "tree-tail": ((10, 48), lambda f: Tree([-1, 0, 0, 1], lengths=[20, 10, 8, 10], align="lower-right")),
    "alibi-upper-left": ((40, 64), lambda f: Alibi(slopes(f), align="upper-left")),
    "alibi-lower-right": ((40, 64), lambda f: Alibi(slopes(f), align="lower-right")),
    "alibi-upper-left & causal-lower-right": (
        (40, 64),
        lambda f: Alibi(slopes(f), align="upper-left") & Causal("lower-right"),
    ),
    "causal-lower-right & padding": ((40, 64), lambda f: Causal("lower-right") & Padding([64, 30])),
    "causal-upper-left & padding": ((40, 64), lambda f: Causal("upper-left") & Padding([64, 30])),
}

# -- cases ------------------------------------------------------------------------------------------------------------


def _shapes() -> list[Case]:
    lengths = [(1, 1), (1, 77), (77, 1), (5, 5), (64, 64), (192, 192), (320, 320), (130, 130), (24, 300)]
    heads = [(1, 1), (8, 2), (6, 1), (6, 2)]
    return [
        *(Case(f"length {q}x{k}", lengths=(q, k), batch=1) for q, k in lengths),
        *(Case(f"heads {h}:{g}", heads=(h, g)) for h, g in heads),
        *(Case(f"size {d}", sizes=(d, d)) for d in (8, 16, 40, 76, 128, 256, 264)),
        *(Case(f"size {d}, values {e}", sizes=(d, e)) for d, e in ((64, 32), (64, 128), (40, 24))),
        Case("size 32, values 24, layout one-for-all", sizes=(32, 24), batch=3, layout="one-for-all"),
        *(Case(f"batch {n}", batch=n) for n in (1, 3)),
        *(Case(f"layout {name}", layout=name) for name in LAYOUTS),
        Case("layout tokens-first, heads 8:2", layout="tokens-first", heads=(8, 2)),
        Case("layout every-other, causal", layout="every-other", mask=SQUARE["causal"]),
        Case(
            "length 1x48, padding, layout one-for-all",
            lengths=(1, 48),
            heads=(4, 4),
            batch=3,
            layout="one-for-all",
            mask=lambda f: Padding([48, 9, 30]),
        ),
        Case(
            "length 65x100, causal-upper-left, layout one-for-all",
            lengths=(65, 100),
            layout="one-for-all",
            mask=lambda f: Causal("upper-left"),
        ),
        Case("layout misaligned, padding", layout="misaligned", mask=SQUARE["padding"]),
        Case("heads 8:2, causal", heads=(8, 2), mask=SQUARE["causal"]),
        Case("heads 8:2, padding", heads=(8, 2), mask=SQUARE["padding"]),
        Case("heads 8:2, documents", heads=(8, 2), mask=SQUARE["documents & causal"]),
        Case("length 320x320, causal", lengths=(320, 320), batch=1, mask=SQUARE["causal"]),
        Case("length 320x320, bias-lowest-row", lengths=(320, 320), batch=1, mask=_lowest(320), dtypes=LOWEST),
        Case("length 320x320, padding", lengths=(320, 320), batch=1, mask=lambda f: Padding([100])),
        Case("length 64x64, padding, large logits", lengths=(64, 64), mask=lambda f: Padding([64, 9]), logits=30.0),
        Case("length 320x320, window, large logits", lengths=(320, 320), batch=1, mask=SQUARE["window"], logits=30.0),
        Case(
            "length 192x192, padding, large logits",
            lengths=(192, 192),
            batch=1,
            mask=lambda f: Padding([9]),
            logits=30.0,
        ),
    ]


def _masks() -> list[Case]:
    return [
        *(Case(f"mask {name}", mask=mask, dtypes=MASK_DTYPES.get(name, DTYPES)) for name, mask in SQUARE.items()),
        *(Case(f"mask {name}", lengths=lengths, mask=mask) for name, (lengths, mask) in SKEWED.items()),
        Case("mask causal, large logits", mask=SQUARE["causal"], logits=30.0),
        Case("mask padding-all, large logits", mask=SQUARE["padding-all"], logits=30.0),
    ]


def _options() -> list[Case]:
    cases = {
        "softcap": {"softcap": 2.0},
        "scale": {"scale": 0.3},
        "scale negative": {"scale": -0.2},
        "scale 0": {"scale": 0.0},
        "lse": {"return_lse": True},
    }
    masks = {"": None, ", causal": SQUARE["causal"], ", padding-all": SQUARE["padding-all"]}
    made = [Case(word + on, mask=mask, options=o) for word, o in cases.items() for on, mask in masks.items()]
    made += [Case("sinks" + on, mask=mask, sinks=True) for on, mask in masks.items()]
    made += [Case("dropout" + on, mask=mask, dropout=0.2) for on, mask in masks.items()]
    made += [
        Case("lse, documents-cross", mask=SQUARE["documents-cross"], options={"return_lse": True}),
        Case("lse, heads 8:2", heads=(8, 2), options={"return_lse": True}),
        Case("lse, length 320x320", lengths=(320, 320), batch=1, options={"return_lse": True}),
        Case("lse, documents", mask=SQUARE["documents"], options={"return_lse": True}),
        Case("softcap, heads 8:2, alibi", heads=(8, 2), mask=SQUARE["alibi"], options={"softcap": 2.0}),
        Case("sinks, heads 8:2", heads=(8, 2), sinks=True),
        Case("sinks, documents", mask=SQUARE["documents"], sinks=True),
        Case("sinks, lse", sinks=True, options={"return_lse": True}),
        Case("sinks, lse, padding-all", mask=SQUARE["padding-all"], sinks=True, options={"return_lse": True}),
        Case("sinks, bias-learnt", mask=SQUARE["bias-learnt"], sinks=True),
        Case("softcap, sinks, causal", mask=SQUARE["causal"], sinks=True, options={"softcap": 2.0}),
        Case("scale, bias", mask=SQUARE["bias"], options={"scale": 0.3}),
    ]
    words = ("deterministic", "double-backward", "fullgraph", "maps", "no-sync")
    made += [Case(f"require {word}", options={"require": (word,)}) for word in words]
    wide = ("float64", "float32")
    return [*made, Case("require float32", dtypes=wide, options={"require": ("float32",)})]


DECK: dict[str, Case] = {case.name: case for case in (*_shapes(), *_masks(), *_options())}

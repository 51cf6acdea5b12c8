"""torch.compile and torch.export: one graph whatever the mask, the same answers, and few programs for many lengths."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from agreement import Call, answered, judge
from deck import Source
from test_attention import draw
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from headway import (
    Alibi,
    Bias,
    Causal,
    Dense,
    Documents,
    Mask,
    NoBackendError,
    Padding,
    Predicate,
    Prefix,
    RequestError,
    Tree,
    Window,
    attention,
)
from headway.masks import Not, from_key_padding_mask, from_sdpa

LENGTH, HEADS = 12, 2
SHORT = torch.tensor([12, 5])
NUMBERS = Source("numbers").normal(HEADS, LENGTH, LENGTH).float()
MAY = Source("may").yes(LENGTH, LENGTH)
STEP = torch.tensor(2)

MASKS: dict[str, Callable[[], Mask | None]] = {
    "none": lambda: None,
    "causal": lambda: Causal(),
    "window": lambda: Window(2, 1),
    "causal & window": lambda: Causal() & Window(left=3),
    "prefix": lambda: Causal() | Prefix(4),
    "prefixes": lambda: Prefix(SHORT),
    "documents": lambda: Documents([4, 8]) & Causal(),
    "documents, cross": lambda: Documents([4, 8], [6, 6]),
    "padding, list": lambda: Padding([12, 5]),
    "padding": lambda: Padding(SHORT),
    "padding, left": lambda: Padding(SHORT, side="left") & Causal(),
    "padding, bool": lambda: Padding(MAY[:2]),
    "key padding": lambda: from_key_padding_mask(MAY[:2]),
    "tree": lambda: Tree([-1, 0, 0], lengths=[4, 4, 4]),
    "dense": lambda: Dense(MAY) & Causal(),
    "from sdpa": lambda: from_sdpa(NUMBERS),
    "bias & causal": lambda: Bias(NUMBERS) & Causal(),
    "alibi": lambda: Alibi(torch.tensor([0.5, 0.25])) & Causal(),
    "predicate": lambda: Predicate(lambda b, h, q, k: (q - k) % STEP == 0),
    "not": lambda: Not(Window(2, 1)),
}


@pytest.fixture(autouse=True)
def _no_programs_left() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def agrees(compiled: Callable[..., Tensor], call: Call) -> None:
    wanted = call.learnt()
    judge(call, answered(lambda: (compiled(call.q, call.k, call.v), None), wanted, call.q.dtype), learns=bool(wanted))


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_made_inside(name: str) -> None:
    @torch.compile(backend="eager", fullgraph=True)
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, mask=MASKS[name]())

    agrees(run, Call(*draw(2, HEADS, LENGTH, 16, learns=True), mask=MASKS[name]()))


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_made_outside(name: str) -> None:
    mask = MASKS[name]()
    run = torch.compile(lambda q, k, v, mask: attention(q, k, v, mask=mask), backend="aot_eager", fullgraph=True)
    call = Call(*draw(2, HEADS, LENGTH, 16, learns=True), mask=mask)
    agrees(lambda q, k, v: run(q, k, v, mask), call)


@pytest.mark.parametrize("name", ["causal", "padding", "bias & causal"])
def test_a_mask_used_in_eager_mode_first(name: str) -> None:
    """What eager calls remember with the mask must not enter the graph."""
    mask = MASKS[name]()
    attention(*draw(2, HEADS, LENGTH, 16), mask=mask)
    run = torch.compile(lambda q, k, v: attention(q, k, v, mask=mask), backend="eager", fullgraph=True)
    agrees(run, Call(*draw(2, HEADS, LENGTH, 16, learns=True), mask=mask))
    attention(*draw(2, HEADS, LENGTH, 16), mask=mask)


OPTIONS: dict[str, dict[str, Any]] = {
    "scale": {"scale": 0.3},
    "scale 0": {"scale": 0.0},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": torch.tensor([0.5, 2.0])},
    "deterministic": {"require": ("deterministic",)},
    "a word": {"require": "fullgraph"},
    "words": {"require": ["fullgraph", "no-sync"]},
    "reference": {"backend": "reference"},
    "sdpa-math": {"backend": "sdpa-math"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name: str) -> None:
    options = OPTIONS[name]
    run = torch.compile(lambda q, k, v: attention(q, k, v, Causal(), **options), backend="aot_eager", fullgraph=True)
    asked = {key: value for key, value in options.items() if key not in ("backend", "require")}
    agrees(run, Call(*draw(2, HEADS, LENGTH, 16, learns=True), mask=Causal(), **asked))


def test_lse() -> None:
    run = torch.compile(lambda q, k, v: attention(q, k, v, Causal(), return_lse=True), backend="eager", fullgraph=True)
    call = Call(*draw(2, HEADS, LENGTH, 16, learns=True), mask=Causal(), return_lse=True)
    judge(call, answered(lambda: run(call.q, call.k, call.v), call.learnt(), call.q.dtype))


def test_dropout() -> None:
    run = torch.compile(lambda q, k, v: attention(q, k, v, dropout=0.5), backend="aot_eager", fullgraph=True)
    q, k, _ = draw(2, HEADS, 16, 16)
    left = run(q, k, torch.eye(16).expand(2, HEADS, 16, 16))
    assert 0.3 < (left == 0).double().mean().item() < 0.7


def test_heads_that_share_keys_and_views() -> None:
    run = torch.compile(lambda q, k, v: attention(q, k, v, Causal()), backend="aot_eager", fullgraph=True)
    q, k, v = draw(2, 4, LENGTH, 16)
    q = q.transpose(2, 3).contiguous().transpose(2, 3).requires_grad_()
    agrees(run, Call(q, k[:, ::2].requires_grad_(), v[:, ::2].requires_grad_(), mask=Causal()))


def test_a_learnt_bias_and_learnt_sinks() -> None:
    bias, sinks = NUMBERS.clone().requires_grad_(), torch.tensor([0.5, 2.0], requires_grad=True)
    run = torch.compile(
        lambda q, k, v, bias, sinks: attention(q, k, v, Bias(bias) & Causal(), sinks=sinks),
        backend="aot_eager",
        fullgraph=True,
    )
    call = Call(*draw(2, HEADS, LENGTH, 16, learns=True), mask=Bias(bias) & Causal(), sinks=sinks)
    agrees(lambda q, k, v: run(q, k, v, bias, sinks), call)


def test_nothing_to_attend_to() -> None:
    run = torch.compile(lambda q, k, v: attention(q, k, v), backend="aot_eager", fullgraph=True)
    q, k, v = draw(2, HEADS, 4, 16, kv_len=0)
    assert not run(q, k, v).any()


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"backend": "sdpa-flash", "softcap": 2.0}, NoBackendError),
        ({"backend": "sdpa-math", "require": ("maps",)}, NoBackendError),
        ({"dropout": 1.5}, RequestError),
    ],
    ids=str,
)
def test_a_refusal_reaches_the_caller(options: dict[str, Any], error: type[Exception]) -> None:
    """In Headway's words, whatever the tracer wraps around them."""
    run = torch.compile(lambda q, k, v: attention(q, k, v, **options), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"(?s)got .*takes") as raised:
        run(*draw(2, HEADS, LENGTH, 16))
    chain = [raised.value, raised.value.__cause__, raised.value.__context__]
    assert any(isinstance(one, error) for one in chain) or error.__name__ in str(raised.value)


# -- lengths that change ----------------------------------------------------------------------------------------------

CHANGING: dict[str, Callable[[Tensor], Mask | None]] = {
    "none": lambda q: None,
    "causal": lambda q: Causal(),
    "window": lambda q: Window(2, 1),
    "padding": lambda q: Padding(torch.full((q.shape[0],), 4)),
    "prefix": lambda q: Causal() | Prefix(3),
    "prefixes": lambda q: Prefix(torch.full((q.shape[0],), 3)),
    "dense": lambda q: Dense(torch.ones(q.shape[0], 1, 1, q.shape[2], dtype=torch.bool)),
    "bias": lambda q: Bias(torch.zeros(q.shape[2], q.shape[2])),
}


@pytest.mark.parametrize("how", ["dynamic=True", "dynamic=None", "mark_dynamic"])
@pytest.mark.parametrize("name", CHANGING)
def test_few_programs_for_many_lengths(name: str, how: str) -> None:
    """Lengths of one class share a program; the first may be a program for itself."""
    counter = CompileCounter()
    run = torch.compile(
        lambda q, k, v: attention(q, k, v, CHANGING[name](q)),
        backend=counter,
        fullgraph=True,
        dynamic=True if how == "dynamic=True" else None,
    )
    for length in (9, 33, 77, 100, 127):
        q, k, v = draw(2, HEADS, length, 16, learns=True)
        if how == "mark_dynamic":
            for x in (q, k, v):
                torch._dynamo.mark_dynamic(x, 2)
        agrees(run, Call(q, k, v, mask=CHANGING[name](q)))
    assert counter.frame_count <= 2


def test_lengths_of_other_classes_are_other_programs_but_few() -> None:
    counter = CompileCounter()
    run = torch.compile(lambda q, k, v: attention(q, k, v, Causal()), backend=counter, fullgraph=True, dynamic=True)
    for length in (1, 64, 65, 100, 192, 200, 250, 320, 300, 400, 500):
        agrees(run, Call(*draw(1, HEADS, length, 16), mask=Causal()))
    assert counter.frame_count <= 8


def test_queries_and_keys_change_apart() -> None:
    """A decoder's step: one query, more and more keys."""
    counter = CompileCounter()
    run = torch.compile(
        lambda q, k, v: attention(q, k, v, Causal("lower-right")), backend=counter, fullgraph=True, dynamic=True
    )
    for kv_len in range(9, 40, 3):
        call = Call(*draw(1, HEADS, 1, 16, kv_len=kv_len), mask=Causal("lower-right"))
        agrees(run, call)
    assert counter.frame_count <= 2


def test_the_batch_may_change() -> None:
    counter = CompileCounter()
    run = torch.compile(lambda q, k, v: attention(q, k, v, Causal()), backend=counter, fullgraph=True, dynamic=True)
    for batch in (2, 3, 5, 8):
        agrees(run, Call(*draw(batch, HEADS, 9, 16, learns=True), mask=Causal()))
    assert counter.frame_count <= 2


def test_another_mask_of_the_same_kind_needs_no_other_program() -> None:
    counter = CompileCounter()
    run = torch.compile(lambda q, k, v, n: attention(q, k, v, Padding(n)), backend=counter, fullgraph=True)
    for lengths in ([3, 4], [9, 1], [0, 9]):
        n = torch.tensor(lengths)
        agrees(lambda q, k, v, n=n: run(q, k, v, n), Call(*draw(2, HEADS, 9, 16), mask=Padding(n)))
    assert counter.frame_count == 1


# -- autocast ---------------------------------------------------------------------------------------------------------


def test_autocast_inside_and_outside() -> None:
    q, k, v = draw(2, HEADS, LENGTH, 16, learns=True)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def inside(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return attention(q, k, v, Causal())

    outside = torch.compile(lambda q, k, v: attention(q, k, v, Causal()), backend="aot_eager", fullgraph=True)
    known = attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), Causal())
    with torch.autocast("cpu", torch.bfloat16):
        answers = (outside(q, k, v), inside(q, k, v))
    for out in (*answers, inside(q, k, v)):
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out, known)
        assert all(g.dtype == torch.float32 for g in torch.autograd.grad(out.sum(), (q, k, v), retain_graph=True))


# -- modules, export, inductor ----------------------------------------------------------------------------------------


class SelfAttention(nn.Module):
    """What a model would write."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, 16)).permute(2, 0, 3, 1, 4).unbind()
        out = attention(q, k, v, mask=Causal() & Padding(lengths))
        return self.out(out.transpose(1, 2).flatten(2))


def batch(length: int = 10) -> tuple[Tensor, Tensor]:
    return Source("x").normal(3, length, 32).float(), torch.tensor([length, 4, 0])


def test_a_module_compiles_as_one_graph() -> None:
    module = SelfAttention()
    explained = torch._dynamo.explain(module)(*batch())
    assert explained.graph_break_count == 0
    torch.testing.assert_close(torch.compile(module, backend="aot_eager", fullgraph=True)(*batch()), module(*batch()))


def test_export() -> None:
    module = SelfAttention().eval()
    exported = torch.export.export(module, batch())
    torch.testing.assert_close(exported.module()(*batch()), module(*batch()))


def test_export_with_a_length_that_changes() -> None:
    module = SelfAttention().eval()
    shapes = {"x": {1: torch.export.Dim("length", min=2, max=63)}, "lengths": None}
    exported = torch.export.export(module, batch(), dynamic_shapes=shapes)
    for length in (7, 10, 60):
        torch.testing.assert_close(exported.module()(*batch(length)), module(*batch(length)))


def on(device: str, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.to(device) for x in tensors)


def test_inductor_with_gradients(device: str) -> None:
    module = SelfAttention().to(device)
    given = on(device, *batch())
    known = torch.autograd.grad(module(*given).square().sum(), list(module.parameters()))
    compiled = torch.compile(module, fullgraph=True)
    got = torch.autograd.grad(compiled(*given).square().sum(), list(module.parameters()))
    for one, other in zip(got, known, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_flex_on_cpu_is_left_out_of_other_programs() -> None:
    """Inductor's CPU template for flex knows no tensor made inside the region; it would fail in torch's words."""
    run = torch.compile(lambda q, k, v: attention(q, k, v, Window(2, 2), softcap=2.0), backend="eager", fullgraph=True)
    agrees(run, Call(*draw(2, HEADS, 32, 16), mask=Window(2, 2), softcap=2.0))
    run = torch.compile(lambda q, k, v: attention(q, k, v, backend="flex"), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"got a call inside torch\.compile"):
        run(*draw(2, HEADS, 32, 16))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("backend", ["flex", "sdpa-flash", "sdpa-efficient", "sdpa-cudnn", "sdpa-math"])
def test_inductor_takes_kernels_into_its_own_program(backend: str) -> None:
    """Forward and backward, with a mask made inside."""
    made = {"flex": lambda: Window(3, 2), "sdpa-flash": Causal}.get(backend, lambda: Padding([32, 5]))
    options = {"softcap": 2.0} if backend == "flex" else {}
    run = torch.compile(lambda q, k, v: attention(q, k, v, made(), backend=backend, **options), fullgraph=True)
    q, k, v = draw(2, HEADS, 32, 64, device="cuda", dtype=torch.bfloat16, learns=True)
    agrees(run, Call(q, k, v, mask=made(), **options))


def test_lengths_are_one_program_and_export_takes_their_range() -> None:
    """Each class of a length was a program of its own, and torch gives up after eight."""
    counter = CompileCounter()
    run = torch.compile(
        lambda q, k: attention(q, k, k, mask=Causal("lower-right")), dynamic=True, fullgraph=True, backend=counter
    )
    for length in (5, 100, 192, 300, 600, 1000, 1100, 2000, 3000):
        run(torch.randn(1, 1, length, 16), torch.randn(1, 1, length, 16))
    assert counter.frame_count == 1
    for q_len, kv_len in ((5, 100), (300, 20), (700, 100), (64, 192), (3000, 10), (3, 2000), (40, 41)):
        run(torch.randn(1, 1, q_len, 16), torch.randn(1, 1, kv_len, 16))
    assert counter.frame_count <= 3

    class Module(torch.nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            return attention(q, q, q, mask=Causal())

    exported = torch.export.export(
        Module(), (torch.randn(1, 2, 16, 16),), dynamic_shapes={"q": {2: torch.export.Dim("length", min=2, max=100)}}
    )
    q = torch.randn(1, 2, 77, 16)
    torch.testing.assert_close(exported.module()(q), attention(q, q, q, mask=Causal()))


def test_transforms_inside_a_compiled_function() -> None:
    q = torch.randn(3, 1, 2, 8, 16)
    torch.testing.assert_close(
        torch.compile(torch.func.vmap(lambda x: attention(x, x, x)), fullgraph=True, backend="eager")(q),
        torch.stack([attention(x, x, x) for x in q]),
    )
    grad = torch.func.grad(lambda x: attention(x, x, x).sum())
    torch.testing.assert_close(torch.compile(grad, fullgraph=True, backend="eager")(q[0]), grad(q[0]))

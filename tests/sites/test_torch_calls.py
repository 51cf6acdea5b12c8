"""Modules that call F.scaled_dot_product_attention: redirected one by one, with every argument kept."""

from __future__ import annotations

import copy
import inspect
import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sites.made import gpt
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.nn.functional import scaled_dot_product_attention as bound_early

from headway.sites import torch_calls
from headway.sites.site import site_of
from headway.swap import swap


@pytest.fixture(autouse=True)
def _priority_as_it_was() -> Iterator[None]:
    """PyTorch's selector leaves the order it was given behind."""
    order = torch._C._get_sdp_priority_order()
    yield
    torch._C._set_sdp_priority_order(order)


class Calls(nn.Module):
    """One call with the arguments it is given, and a parameter to move."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return F.scaled_dot_product_attention(q * self.gain, k, v, *args, **kwargs)


def swapped(model: nn.Module, *example: Any) -> nn.Module:
    """A copy that is swapped and proven."""
    ours = copy.deepcopy(model)
    done = swap(ours, example or (rand(1, 2, 3, 4),) * 3)
    assert done.certificate is not None
    assert done.certificate.passed, str(done)
    return ours


def runs(model: nn.Module) -> dict[str, int]:
    sites = {name: site_of(module) for name, module in model.named_modules()}
    return {name: sum(site.ticket.runs.values()) for name, site in sites.items() if site and site.ticket.swapped}


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def compare(args: tuple[Tensor, ...], ours: nn.Module | None = None, **kwargs: Any) -> None:
    """Outputs and gradients of everything that wants one, against PyTorch's function, in float64."""
    ours = swapped(Calls()) if ours is None else ours
    before = sum(runs(ours).values())
    leaves = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point()]
    wanted = [x for x in leaves if x.requires_grad]
    mine, theirs = ours(*args, **kwargs), F.scaled_dot_product_attention(*args, **kwargs)
    assert sum(runs(ours).values()) == before + 1, "our attention did not run"
    assert mine.shape == theirs.shape
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10)
    if wanted:
        mix = rand(*theirs.shape)
        grads = (torch.autograd.grad((out * mix).sum(), wanted) for out in (mine, theirs))
        for one, other in zip(*grads, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


def qkv(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...] | None = None) -> tuple[Tensor, Tensor, Tensor]:
    made = (rand(*shape).requires_grad_() for shape in (q, k, v or k))
    return next(made), next(made), next(made)


SHAPES = {
    "4-D": ((2, 3, 5, 4), (2, 3, 7, 4)),
    "2-D": ((5, 4), (7, 4)),
    "3-D": ((3, 5, 4), (3, 7, 4)),
    "5-D": ((2, 2, 3, 5, 4), (2, 2, 3, 7, 4)),
    "6-D": ((1, 2, 2, 3, 5, 4), (1, 2, 2, 3, 7, 4)),
    "value size of its own": ((2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 6)),
    "one batch entry of keys": ((2, 3, 5, 4), (1, 3, 7, 4)),
    "one head of keys": ((2, 3, 5, 4), (2, 1, 7, 4)),
    "one query batch entry": ((1, 3, 5, 4), (2, 3, 7, 4)),
    "keys without batch": ((2, 3, 5, 4), (3, 7, 4)),
    "5-D broadcast": ((2, 1, 3, 5, 4), (1, 2, 1, 7, 4)),
    "value broadcast apart": ((2, 3, 5, 4), (2, 1, 7, 4), (1, 3, 7, 4)),
}


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_every_argument_on_every_shape(shapes: Any) -> None:
    """Masks bool and float, full and broadcast; causal from the upper left; scale; positional and by keyword."""
    args = qkv(*shapes)
    ours = swapped(Calls())
    q_len, kv_len = args[0].shape[-2], args[1].shape[-2]
    front = torch.broadcast_shapes(*(x.shape[:-2] for x in args))
    keep = torch.rand(q_len, kv_len) > 0.4
    keep[:, 0] = True
    compare(args, ours)
    compare(args, ours, scale=0.3)
    compare(args, ours, is_causal=True)
    compare(args, ours, attn_mask=keep)
    compare(args, ours, attn_mask=rand(q_len, kv_len).requires_grad_(), scale=2.0)
    compare(args, ours, attn_mask=keep.expand(*front, -1, -1))
    compare(args, ours, attn_mask=keep[:1])
    if front:
        compare(args, ours, attn_mask=rand(*front, q_len, kv_len).requires_grad_())
        compare(args, ours, attn_mask=rand(front[-1], 1, kv_len).requires_grad_())
        compare(args, ours, attn_mask=rand(*front, 1, kv_len).masked_fill(~keep[:1], float("-inf")))
    mine, theirs = (f(*args, keep, 0.0, False) for f in (ours, F.scaled_dot_product_attention))
    torch.testing.assert_close(mine, theirs)
    mine = ours(v=args[2], k=args[1], q=args[0], attn_mask=None, is_causal=True, dropout_p=0.0, enable_gqa=False)
    torch.testing.assert_close(mine, F.scaled_dot_product_attention(*args, is_causal=True))


@pytest.mark.parametrize(
    "shapes",
    (
        ((2, 6, 5, 4), (2, 2, 7, 4)),
        ((2, 6, 5, 4), (2, 1, 7, 4)),
        ((6, 5, 4), (2, 7, 4)),
        ((2, 6, 5, 4), (2, 3, 7, 4), (2, 2, 7, 6)),
        ((2, 6, 5, 4), (2, 6, 7, 4)),
        ((2, 2, 6, 5, 4), (2, 2, 2, 7, 4)),
        ((2, 6, 5, 4), (1, 2, 7, 4)),
    ),
    ids=str,
)
def test_enable_gqa(shapes: Any) -> None:
    args = qkv(*shapes)
    ours = swapped(Calls())
    compare(args, ours, enable_gqa=True)
    compare(args, ours, enable_gqa=True, is_causal=True)
    heads = args[0].shape[-3]
    compare(args, ours, enable_gqa=True, attn_mask=rand(heads, 5, 7).requires_grad_())


@pytest.mark.parametrize("q_len, kv_len", ((4, 4), (3, 6), (6, 3), (1, 5), (5, 1)))
def test_causal_on_unequal_lengths_is_upper_left(q_len: int, kv_len: int) -> None:
    args = qkv((1, 2, q_len, 4), (1, 2, kv_len, 4))
    compare(args, is_causal=True)


@pytest.mark.parametrize("make", (causal_upper_left, causal_lower_right))
def test_causal_biases_of_torch(make: Callable[..., Any]) -> None:
    """Tensor subclasses that hold no numbers: what they are is in their class."""
    args = tuple(x.detach() for x in qkv((1, 2, 3, 4), (1, 2, 5, 4)))
    ours = swapped(Calls())
    bias = make(3, 5)
    torch.testing.assert_close(ours(*args, bias), F.scaled_dot_product_attention(*args, bias))
    assert runs(ours) == {"": 1}


def test_rows_that_see_nothing_are_zero() -> None:
    q, k, v = qkv((1, 2, 3, 4), (1, 2, 5, 4))
    keep = torch.ones(3, 5, dtype=torch.bool)
    keep[1] = False
    out = swapped(Calls())(q, k, v, keep)
    assert not out[:, :, 1].any()
    for grad in torch.autograd.grad(out.sum(), (q, k, v)):
        assert grad.isfinite().all()


def test_dropout_is_the_callers_also_in_eval() -> None:
    """As in PyTorch: a call that says dropout_p drops, whatever the mode; seeds repeat, draws differ from stock's."""
    ours = swapped(Calls()).eval()
    args = tuple(x.detach() for x in qkv((1, 2, 6, 4), (1, 2, 6, 4)))
    torch.manual_seed(5)
    one = ours(*args, dropout_p=0.5)
    torch.manual_seed(5)
    assert torch.equal(one, ours(*args, dropout_p=0.5))
    assert not torch.allclose(one, ours(*args, dropout_p=0.5))
    many = torch.stack([ours(*args, dropout_p=0.5) for _ in range(400)])
    truth = F.scaled_dot_product_attention(*args)
    assert ((many.mean(0) - truth).abs() / (many.std(0) / 20)).max() < 6


def _wrong() -> Iterator[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    q, k = rand(1, 2, 3, 4), rand(1, 2, 5, 4)
    mask = torch.ones(3, 5, dtype=torch.bool)
    yield "mask and causal", (q, k, k, mask, 0.0, True), {}
    yield "mask of another size", (q, k, k, mask[:2]), {}
    yield "mask of integers", (q, k, k, mask.long()), {}
    yield "mask of more axes", (q, k, k, mask[(None,) * 4].expand(2, 1, 1, 1, 3, 5)), {}
    yield "another head size", (q, rand(1, 2, 5, 6), k), {}
    yield "keys and values of unequal lengths", (q, k, q), {}
    yield "heads that do not broadcast", (q, rand(1, 3, 5, 4), rand(1, 3, 5, 4)), {}
    yield "heads that do not divide", (rand(1, 4, 3, 4), rand(1, 3, 5, 4), rand(1, 3, 5, 4)), {"enable_gqa": True}
    yield "batches that do not broadcast", (rand(3, 2, 3, 4), rand(2, 2, 5, 4), rand(2, 2, 5, 4)), {}
    yield "unequal dtypes", (q, k.float(), k.float()), {}
    yield "scale by position", (q, k, k, None, 0.0, False, 0.5), {}
    yield "an unknown argument", (q, k, k), {"window": 3}
    yield "1-D", (q[0, 0, 0],) * 3, {}


@pytest.mark.parametrize("case", [case for case, *_ in _wrong()])
def test_what_pytorch_refuses_is_refused(case: str) -> None:
    """Also where its kernel for this machine does not look: values of another length, a mask beside is_causal."""
    _, args, kwargs = next(each for each in _wrong() if each[0] == case)
    with pytest.raises((RuntimeError, ValueError, TypeError)):
        swapped(Calls())(*args, **kwargs)


def test_the_signature_is_pytorchs() -> None:
    """What PyTorch adds to the function is seen here, not passed over."""
    text = " ".join(str(F.scaled_dot_product_attention.__doc__).split())
    head = text[: text.index("->")]
    names = [part.split("=")[0].strip(" )") for part in head[head.index("(") + 1 :].split(",")]
    ours = list(inspect.signature(torch_calls.attend).parameters)
    assert ours == ["site", *names]


# -- models -----------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """nanoGPT's."""

    def __init__(self, size: int = 16, heads: int = 2, causal: bool = True) -> None:
        super().__init__()
        self.qkv, self.out, self.heads, self.causal = nn.Linear(size, 3 * size), nn.Linear(size, size), heads, causal

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=0.0, is_causal=self.causal)
        return self.out(out.transpose(1, 2).flatten(2))


def test_a_nanogpt_like_model() -> None:
    stock = gpt(Attention)
    ours = copy.deepcopy(stock)
    tokens = torch.randint(0, 11, (2, 6))
    done = swap(ours, tokens)
    assert [t.name for t in done.census.swapped] == ["1.attention", "2.attention"]
    assert done.certificate is not None
    assert done.certificate.passed
    assert all(proof.judge == "float64" for proof in done.certificate.proofs)
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (stock, ours)]
    for _ in range(3):
        for model, optimizer in zip((stock, ours), optimizers, strict=True):
            loss = F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for (name, one), other in zip(stock.state_dict().items(), ours.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, msg=lambda text, name=name: f"{name}: {text}")
    assert runs(ours)["1.attention"] >= 3


class Root(nn.Module):
    """Calls it itself, and has a child that does, and one nn.MultiheadAttention."""

    def __init__(self) -> None:
        super().__init__()
        self.child, self.multihead = Attention(), nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = F.scaled_dot_product_attention(x, x, x)
        x = self.child(x)
        x = self.multihead(x, x, x, need_weights=False)[0]
        return bound_early(x, x, x, is_causal=True)


def test_a_call_from_the_root_itself() -> None:
    stock = Root().double()
    ours = copy.deepcopy(stock)
    done = swap(ours, rand(1, 4, 16))
    assert {t.name for t in done.census.swapped} == {"", "child", "multihead"}
    x = rand(2, 5, 16)
    torch.testing.assert_close(ours(x), stock(x))
    assert runs(ours) == {"": 2, "child": 1, "multihead": 1}
    done.undo()
    assert type(ours) is Root
    assert torch.equal(ours(x), stock(x))


@pytest.mark.parametrize("kwargs", ({"skip": ["child", "multihead"]}, {"only": ""}))
def test_what_is_left_out_inside_a_swapped_module_stays_out(kwargs: dict[str, Any]) -> None:
    """The redirection of a module does not reach into children that are to be left alone."""
    ours = Root().double()
    done = swap(ours, rand(1, 4, 16), **kwargs)
    calls: list[int] = []
    site = site_of(ours)
    assert site is not None
    real = site.attend
    site.attend = lambda *a, **k: calls.append(len(calls)) or real(*a, **k)  # type: ignore[method-assign]
    x = rand(2, 5, 16)
    out = ours(x)
    assert len(calls) == 2
    assert runs(ours) == {"": 2}
    done.undo()
    torch.testing.assert_close(out, ours(x))
    assert [type(m) for m in ours.modules()] == [type(m) for m in Root().modules()]


def test_a_child_that_is_swapped_alone() -> None:
    ours = Root().double()
    swap(ours, rand(1, 4, 16), only="child", backend={"child": "reference"})
    ours(rand(2, 5, 16))
    assert runs(ours) == {"child": 1}
    assert type(ours) is Root
    (site,) = (s for s in map(site_of, ours.modules()) if s)
    assert set(site.ticket.runs) == {"reference"}


def test_modules_that_hold_each_other_with_backends_of_their_own() -> None:
    ours = Root().double()
    swap(ours, rand(1, 4, 16), backend={"*": "sdpa-math", "child": "reference"})
    ours(rand(2, 5, 16))
    sites = {name: site_of(module) for name, module in ours.named_modules()}
    ran = {name: set(site.ticket.runs) for name, site in sites.items() if site}
    assert ran == {"": {"sdpa-math"}, "child": {"reference"}, "multihead": {"sdpa-math"}}


def test_nothing_outside_the_module_is_redirected() -> None:
    """Neither another model, nor the caller, nor a hook of the module that runs after it; nor after an exception."""
    ours, other = swapped(Calls()), Calls()
    args = (rand(1, 2, 3, 4),) * 3
    other(*args), F.scaled_dot_product_attention(*args)
    ours.register_forward_hook(lambda *_: F.scaled_dot_product_attention(*args) and None)
    before = runs(ours)
    with pytest.raises(Exception, match="."):
        ours(rand(1), rand(1), rand(1))
    F.scaled_dot_product_attention(*args)
    assert runs(ours) == before
    assert not torch.overrides._get_current_function_mode_stack()


def test_threads_and_differently_swapped_models_do_not_mix() -> None:
    """Two models, two backends, many threads: each call goes where its own model says."""
    models = [gpt(Attention) for _ in range(2)]
    tokens = torch.randint(0, 11, (2, 6))
    for model, backend in zip(models, ("reference", "sdpa-math"), strict=True):
        swap(model, tokens, backend=backend)
    barrier = threading.Barrier(4)
    failures: list[BaseException] = []

    def work(i: int) -> None:
        try:
            barrier.wait()
            for _ in range(10):
                models[i % 2](tokens)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    for model, backend in zip(models, ("reference", "sdpa-math"), strict=True):
        for site in filter(None, map(site_of, model.modules())):
            assert set(site.ticket.runs) == {backend}


def test_a_replica_as_dataparallel_makes_them() -> None:
    """A replica shares the parameters and runs our attention too."""
    ours = swapped(Calls())
    replica = ours._replicate_for_data_parallel()
    replica.gain = ours.gain
    args = qkv((1, 2, 3, 4), (1, 2, 5, 4))
    torch.testing.assert_close(replica(*args), F.scaled_dot_product_attention(*args))
    assert runs(ours) == {"": 1}


@pytest.mark.parametrize("order", ("swap, compile", "compile a copy's forward"))
def test_under_torch_compile_in_one_graph(order: str) -> None:
    """fullgraph=True, so nothing breaks; what is skipped inside stays skipped."""
    torch._dynamo.reset()
    stock = gpt(Attention)
    ours = copy.deepcopy(stock)
    tokens = torch.randint(0, 11, (2, 6))
    done = swap(ours, tokens)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    if order != "swap, compile":
        ours.compile(fullgraph=True, backend="aot_eager")
        compiled = ours
    out = compiled(tokens)
    torch.testing.assert_close(out, stock(tokens), atol=1e-5, rtol=1e-5)
    mine, theirs = (
        torch.autograd.grad(y.square().sum(), list(m.parameters())) for y, m in ((out, ours), (stock(tokens), stock))
    )
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    done.undo()
    torch._dynamo.reset()
    torch.testing.assert_close(compiled(tokens), stock(tokens), atol=1e-5, rtol=1e-5)


class Selects(nn.Module):
    """Says itself which kernels it wants, in what order."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Attention()

    def forward(self, x: Tensor) -> Tensor:
        with sdpa_kernel([SDPBackend.MATH, SDPBackend.FLASH_ATTENTION], set_priority=True):
            return self.inner(x)


@pytest.mark.parametrize("compiled", (False, True), ids=("", "compiled"))
@pytest.mark.parametrize("make", (Attention, Selects))
def test_selectors_of_kernels_neither_break_a_graph_nor_reach_a_site(make: Any, compiled: bool) -> None:
    """Under torch.compile they broke graphs and were remembered wrongly (pytorch#134608, pytorch#149725)."""
    torch._dynamo.reset()
    stock, x = make(), torch.randn(2, 5, 16)
    ours = copy.deepcopy(stock)
    swap(ours, x, backend="reference")
    run = torch.compile(ours, fullgraph=True, backend="aot_eager") if compiled else ours
    for kernels in ([SDPBackend.FLASH_ATTENTION], [SDPBackend.MATH], [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        with sdpa_kernel(kernels, set_priority=len(kernels) > 1):
            torch.testing.assert_close(run(x), stock(x), atol=1e-5, rtol=1e-5)
    (site,) = filter(None, map(site_of, ours.modules()))
    assert site.ticket.runs == ({} if compiled else {"reference": 3})


def test_left_alone_inside_and_compiled() -> None:
    torch._dynamo.reset()
    ours = Root()
    stock = copy.deepcopy(ours)
    x = torch.randn(2, 5, 16)
    swap(ours, x, skip=["child", "multihead"])
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), stock(x), atol=1e-5, rtol=1e-5)


class Saves(nn.Module):
    """Recomputes in the backward pass: a whole child, or a function of its own."""

    def __init__(self, inner: bool) -> None:
        super().__init__()
        self.child, self.inner = Attention(), inner

    def forward(self, x: Tensor) -> Tensor:
        from torch.utils.checkpoint import checkpoint

        def own(y: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(y, y, y)

        return checkpoint(own if self.inner else self.child, x, use_reentrant=False)


@pytest.mark.parametrize("inner", (False, True), ids=("a child", "a function of its own"))
def test_activation_checkpointing(inner: bool) -> None:
    """A child is redirected again when it is recomputed; a function is not, so its module is left alone."""
    stock = Saves(inner).double()
    ours = copy.deepcopy(stock)
    x = rand(2, 5, 16).requires_grad_()
    done = swap(ours, x)
    (ticket,) = done.census.tickets
    assert ticket.swapped != inner
    assert not inner or "checkpoints inside its forward" in ticket.because
    mine, theirs = (torch.autograd.grad(m(x).square().sum(), x)[0] for m in (ours, stock))
    torch.testing.assert_close(mine, theirs)


class Nested(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype stage:UserWarning")
def test_nested_tensors_are_left_alone_and_said_so() -> None:
    x = torch.nested.nested_tensor([torch.randn(5, 2, 4), torch.randn(3, 2, 4)], layout=torch.jagged).transpose(1, 2)
    model = Nested()
    truth = model(x)
    done = swap(model, lambda m: m(x))
    (ticket,) = done.census.tickets
    assert not ticket.swapped
    assert "nested" in ticket.because
    assert torch.equal(model(x).values(), truth.values())


def test_a_forward_patched_on_the_instance_is_left_alone() -> None:
    model = nn.Sequential(Calls())
    was = model[0].forward
    model[0].forward = lambda *args: was(*args) * 2  # type: ignore[method-assign]
    args = (rand(1, 2, 3, 4),) * 3
    (ticket,) = swap(model, lambda m: m[0](*args)).census.tickets
    assert "replaced on the instance" in ticket.because


def test_a_shared_module_is_one_site() -> None:
    """Under two names it is swapped once, and the census tells both."""
    block = Attention()
    model = nn.Sequential(block, nn.Linear(16, 16), block)
    done = swap(model, torch.randn(1, 4, 16))
    (ticket,) = done.census.tickets
    assert (ticket.name, ticket.aliases) == ("0", ("2",))
    model(torch.randn(1, 4, 16))
    assert sum(ticket.runs.values()) == 2
    assert "0 = 2" in str(done.census)
    done.undo()
    assert type(block) is Attention
    assert "_headway" not in block.__dict__


def test_whisper() -> None:
    whisper = pytest.importorskip("whisper.model")
    dims = whisper.ModelDimensions(
        n_mels=8, n_audio_ctx=6, n_audio_state=16, n_audio_head=2, n_audio_layer=1,
        n_vocab=20, n_text_ctx=8, n_text_state=16, n_text_head=2, n_text_layer=1,
    )  # fmt: skip
    torch.manual_seed(0)
    stock = whisper.Whisper(dims)
    torch.nn.init.normal_(stock.decoder.positional_embedding)
    ours = copy.deepcopy(stock)
    mel, tokens = torch.randn(1, 8, 12), torch.randint(0, 20, (1, 5))
    done = swap(ours, (mel, tokens))
    assert done.certificate is not None
    assert done.certificate.passed, str(done)
    assert len(done.census.swapped) == 3
    with torch.no_grad():
        torch.testing.assert_close(ours(mel, tokens), stock(mel, tokens), atol=1e-5, rtol=1e-5)
    assert all(count for count in runs(ours).values())


def test_x_transformers_with_flash() -> None:
    x_transformers = pytest.importorskip("x_transformers")
    torch.manual_seed(0)
    stock = x_transformers.TransformerWrapper(
        num_tokens=20, max_seq_len=8, attn_layers=x_transformers.Decoder(dim=16, depth=2, heads=2, attn_flash=True)
    )
    ours = copy.deepcopy(stock)
    tokens = torch.randint(0, 20, (1, 6))
    done = swap(ours, tokens)
    assert done.certificate is not None
    assert done.certificate.passed, str(done)
    assert len(done.census.swapped) == 2
    torch.testing.assert_close(ours(tokens), stock(tokens), atol=1e-5, rtol=1e-5)
    assert all(runs(ours).values())


def test_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    stock = diffusers.UNet2DConditionModel(
        sample_size=4, in_channels=2, out_channels=2, layers_per_block=1, block_out_channels=(8, 8),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8, attention_head_dim=4, norm_num_groups=4,
    )  # fmt: skip
    ours = copy.deepcopy(stock)
    example = {
        "sample": torch.randn(1, 2, 4, 4), "timestep": torch.tensor(3), "encoder_hidden_states": torch.randn(1, 3, 8),
    }  # fmt: skip
    done = swap(ours, example)
    assert done.certificate is not None
    assert done.certificate.passed, str(done)
    assert len(done.census.swapped) == 8, str(done.census)
    with torch.no_grad():
        torch.testing.assert_close(ours(**example).sample, stock(**example).sample, atol=1e-4, rtol=1e-4)
    assert all(runs(ours).values())
    done.undo()
    assert [type(m) for m in ours.modules()] == [type(m) for m in stock.modules()]


def test_products_of_all_arguments_through_attend() -> None:
    """The redirection itself, without a model: masks × causal × GQA × scale."""
    site = site_of(swapped(Calls()))
    assert site is not None
    for mask, causal, gqa, scale in itertools.product((None, "bool", "float"), (False, True), (False, True), (None, 3)):
        if mask and causal:
            continue
        q, k, v = qkv((2, 4, 3, 4), (2, 2 if gqa else 4, 5, 4))
        keep = torch.rand(2, 4, 3, 5) > 0.5
        keep[..., 0] = True
        attn_mask = None if mask is None else keep if mask == "bool" else rand(2, 4, 3, 5)
        kwargs = {"attn_mask": attn_mask, "is_causal": causal, "enable_gqa": gqa, "scale": scale}
        mine, theirs = torch_calls.attend(site, q, k, v, **kwargs), F.scaled_dot_product_attention(q, k, v, **kwargs)
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("first", ("parametrize", "swap"))
@pytest.mark.parametrize("removed", (True, False))
def test_a_module_that_is_parametrised_itself(first: str, removed: bool) -> None:
    """Before the swap or after it; what is removed meanwhile is gone, what is not stays when the swap is undone."""

    class Weighs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, q: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, q, q @ self.weight)

    torch.manual_seed(0)
    model, x = Weighs(), torch.randn(2, 3, 4)
    if first == "parametrize":
        torch.nn.utils.parametrizations.weight_norm(model)
    want, kind = model(x), type(model)
    done = swap(model, x)
    assert done.census.swapped
    if first == "swap":
        torch.nn.utils.parametrizations.weight_norm(model)
    torch.testing.assert_close(model(x), want)
    if removed:
        torch.nn.utils.parametrize.remove_parametrizations(model, "weight")
    torch.testing.assert_close(model(x), want)
    assert all(runs(model).values())
    done.undo()
    torch.testing.assert_close(model(x), want)
    if (first == "swap") == removed:
        assert type(model) is kind
    assert torch.nn.utils.parametrize.type_before_parametrizations(model) is Weighs
    assert torch.nn.utils.parametrize.is_parametrized(model) is not removed

"""Gradients beyond the first: double backward, torch.func, forward mode, checkpointing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from deck import Source
from test_attention import draw
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

import headway
from headway import Alibi, Bias, Causal, Documents, Mask, NoBackendError, Padding, Tree, Window, attention

TWICE = ("reference", "sdpa-math")
"""Those that promise double backward and torch.func."""

MASKS: dict[str, Callable[[], Mask | None]] = {
    "none": lambda: None,
    "causal": Causal,
    "window": lambda: Window(2, 1),
    "padding-all": lambda: Padding([5, 0]),
    "documents": lambda: Documents([2, 3]) & Causal(),
    "tree": lambda: Tree([-1, 0, 0], lengths=[2, 2, 1]),
    "bias": lambda: Bias(Source("bias").normal(5, 5)),
    "alibi": lambda: Alibi(torch.tensor([0.5, 0.25], dtype=torch.float64)),
}


def wide(device: str) -> tuple[Tensor, Tensor, Tensor]:
    return draw(2, 2, 5, 4, device=device, dtype=torch.float64, learns=True)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("backend", TWICE)
def test_first_and_second_derivatives(backend: str, name: str) -> None:
    mask = MASKS[name]()
    call = lambda q, k, v: attention(q, k, v, mask=mask, backend=backend, require=("double-backward",))  # noqa: E731
    assert gradcheck(call, wide("cpu"))
    assert gradgradcheck(call, wide("cpu"), fast_mode=True)  # one by one is a second each


@pytest.mark.parametrize("backend", TWICE)
def test_derivatives_of_bias_and_sinks(backend: str) -> None:
    bias = Source("bias").normal(2, 5, 5).requires_grad_()
    sinks = Source("sinks").normal(2).requires_grad_()
    q, k, v = wide("cpu")

    def call(q: Tensor, bias: Tensor, sinks: Tensor) -> Tensor:
        return attention(q, k.detach(), v.detach(), mask=Bias(bias) & Causal(), sinks=sinks, backend=backend)

    assert gradcheck(call, (q, bias, sinks))
    assert gradgradcheck(call, (q, bias, sinks))


def test_derivatives_of_softcap_and_lse() -> None:
    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return attention(q, k, v, mask=Causal(), softcap=1.5, return_lse=True, backend="reference")

    assert gradcheck(call, wide("cpu"))
    assert gradgradcheck(call, wide("cpu"))


def test_the_lse_of_rows_that_see_nothing_spoils_no_gradient() -> None:
    """-inf has no slope; those who mask it out must not find NaN behind it."""
    q, k, v = wide("cpu")
    bias = torch.zeros(5, 5, dtype=torch.float64).index_fill(0, torch.tensor([1]), float("-inf")).requires_grad_()
    for mask in (Padding([5, 0]), Bias(bias)):
        _, lse = attention(q, k, v, mask=mask, return_lse=True)
        total = torch.where(lse.isfinite(), lse, 0.0).sum()
        assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(total, (q, k)))


def test_a_gradient_penalty_trains(device: str) -> None:
    """The seed of many a report: the norm of a gradient, differentiated."""
    q, k, v = draw(2, 2, 6, 8, device=device, learns=True)
    out = attention(q, k, v, mask=Causal(), require=("double-backward",))
    (inner,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    torch.autograd.backward(inner.square().sum())
    assert k.grad is not None
    assert bool(k.grad.any())
    assert bool(k.grad.isfinite().all())


def test_double_backward_is_refused_by_those_who_lack_it() -> None:
    with pytest.raises(NoBackendError, match="require double-backward"):
        attention(*wide("cpu"), backend="sdpa-flash", require=("double-backward",))


# -- torch.func -------------------------------------------------------------------------------------------------------


def loss(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return attention(q, k, v, **options).square().sum()


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("backend", ["auto", *TWICE])
def test_grad(backend: str, name: str, device: str) -> None:
    q, k, v = (x.detach() for x in wide(device))
    mask = MASKS[name]()
    mask = Bias(mask.bias.to(device)) if isinstance(mask, Bias) else mask
    got = grad(loss, argnums=(0, 1, 2))(q, k, v, mask=mask, backend=backend)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    known = torch.autograd.grad(loss(*leaves, mask=mask, backend="reference"), leaves)
    for one, other in zip(got, known, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("backend", ["auto", *TWICE])
def test_vmap_over_each_argument(backend: str, device: str) -> None:
    q, k, v = (x.detach() for x in draw(6, 2, 5, 4, device=device, dtype=torch.float64))
    q3, k3, v3 = (x.unflatten(0, (3, 2)) for x in (q, k, v))
    whole = attention(q, k, v, mask=Causal(), backend="reference").unflatten(0, (3, 2))
    one = lambda q, k, v: attention(q, k, v, mask=Causal(), backend=backend)  # noqa: E731
    torch.testing.assert_close(vmap(one)(q3, k3, v3), whole)
    alone = vmap(one, in_dims=(0, None, None))(q3, k3[0], v3[0])
    torch.testing.assert_close(alone[2], attention(q3[2], k3[0], v3[0], mask=Causal(), backend="reference"))


@pytest.mark.parametrize("backend", ["auto", *TWICE])
def test_gradients_per_sample(backend: str, device: str) -> None:
    """vmap over grad, the way of differential privacy."""
    q, k, v = draw(3, 2, 5, 4, device=device, dtype=torch.float64)
    each = vmap(grad(lambda q, k, v: loss(q[None], k[None], v[None], mask=Causal(), backend=backend)))(q, k, v)
    leaf = q.clone().requires_grad_()
    (known,) = torch.autograd.grad(loss(leaf, k, v, mask=Causal(), backend="reference"), leaf)
    torch.testing.assert_close(each, known)


@pytest.mark.parametrize("backend", ["auto", *TWICE])
def test_jacobians_and_products(backend: str, device: str) -> None:
    q, k, v = draw(1, 1, 3, 4, device=device, dtype=torch.float64)
    one = lambda q: attention(q, k, v, mask=Causal(), backend=backend)  # noqa: E731
    full = jacrev(one)(q)
    assert full.shape == (*q.shape, *q.shape)
    push = torch.ones_like(q)
    _, along = jvp(one, (q,), (push,))
    torch.testing.assert_close(along, torch.einsum("abcdefgh,efgh->abcd", full, push))
    _, pull = vjp(one, q)
    torch.testing.assert_close(pull(push)[0], torch.einsum("abcd,abcdefgh->efgh", push, full))


def test_those_without_torch_func_refuse_with_the_remedy() -> None:
    q, k, v = draw(2, 2, 5, 16)
    for backend in ("sdpa-flash", "flex"):
        with pytest.raises(NoBackendError, match=r"(?s)got a torch\.func transform.*into the batch"):
            vmap(lambda q, k, v, name=backend: attention(q[None], k[None], v[None], backend=name))(q, k, v)


def test_the_remedy_works() -> None:
    q, k, v = draw(6, 2, 5, 16)
    folded = attention(q, k, v, backend="sdpa-flash")
    mapped = vmap(lambda q, k, v: attention(q[None], k[None], v[None])[0])(q, k, v)
    torch.testing.assert_close(folded, mapped, rtol=1e-4, atol=1e-5)


def test_forward_mode_outside_torch_func(device: str) -> None:
    """Dual numbers made by hand: computed, or refused in Headway's words, never an error from inside a kernel."""
    q, k, v = draw(1, 1, 3, 4, device=device)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, torch.ones_like(q))
        out = attention(dual, k, v, mask=Causal())
        along = torch.autograd.forward_ad.unpack_dual(out).tangent
    _, known = jvp(lambda q: attention(q, k, v, mask=Causal(), backend="reference"), (q,), (torch.ones_like(q),))
    torch.testing.assert_close(along, known)


# -- checkpointing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_gradients(reentrant: bool, device: str) -> None:
    mask = Causal() & Documents([3, 6])
    q, k, v = draw(2, 2, 9, 16, device=device, learns=True)
    run = lambda q, k, v: attention(q, k, v, mask=mask, dropout=0.0)  # noqa: E731
    known = torch.autograd.grad(run(q, k, v).square().sum(), (q, k, v))
    torch.autograd.backward(checkpoint(run, q, k, v, use_reentrant=reentrant).square().sum())
    for x, other in zip((q, k, v), known, strict=True):
        torch.testing.assert_close(x.grad, other)


def test_checkpointing_replays_dropout() -> None:
    q, k, v = draw(2, 2, 9, 16, learns=True)
    run = lambda q, k, v: attention(q, k, v, dropout=0.4)  # noqa: E731
    torch.manual_seed(3)
    known = torch.autograd.grad(run(q, k, v).square().sum(), (q, k, v))
    torch.manual_seed(3)
    again = torch.autograd.grad(checkpoint(run, q, k, v, use_reentrant=False).square().sum(), (q, k, v))
    for one, other in zip(again, known, strict=True):
        torch.testing.assert_close(one, other)


def test_a_bias_shared_by_layers_gathers_their_gradients(device: str) -> None:
    bias = torch.zeros(9, 9, device=device, requires_grad=True)
    mask = Bias(bias) & Causal()
    q, k, v = draw(1, 1, 9, 16, device=device)
    twice = attention(attention(q, k, v, mask=mask), k, v, mask=mask).sum()
    (both,) = torch.autograd.grad(twice, bias)
    first = attention(q, k, v, mask=Bias(bias.detach()) & Causal())
    (last,) = torch.autograd.grad(attention(first, k, v, mask=mask).sum(), bias)
    assert not torch.allclose(both, last)
    assert headway.explain(q, k, v, mask=mask).request.mask_needs_grad

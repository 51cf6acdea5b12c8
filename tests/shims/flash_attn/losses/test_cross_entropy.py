"""flash_attn.losses.cross_entropy: against its definition in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from deck import Source
from torch import Tensor

from headway.errors import RequestError
from headway.shims.flash_attn.losses.cross_entropy import CrossEntropyLoss
from headway.shims.flash_attn.ops.triton.cross_entropy import cross_entropy_loss

ROWS, CLASSES = 7, 11
LABELS = torch.tensor([0, 3, -100, 10, 5, -100, 2])


def drawn(name: str = "x") -> Tensor:
    return (3 * Source(name).normal(ROWS, CLASSES)).requires_grad_()


def by_definition(logits: Tensor, labels: Tensor, smoothing: float, scale: float, z: float, ignored: int) -> Any:
    """(losses, z-losses): cross-entropy to the smoothed labels, and z times the squared log-sum-exp."""
    logp = (scale * logits).log_softmax(-1)
    lse = torch.logsumexp(scale * logits, -1)
    aim = (
        torch.nn.functional.one_hot(labels.clamp(min=0), logits.shape[1]) * (1 - smoothing)
        + smoothing / logits.shape[1]
    )
    counts = labels != ignored
    return -(aim * logp).sum(-1) * counts + z * lse.square() * counts, z * lse.square() * counts


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("z", [0.0, 0.02])
@pytest.mark.parametrize("inplace", [False, True], ids=["new", "in place"])
@pytest.mark.parametrize("given_lse", [False, True], ids=["", "lse"])
def test_loss_and_gradient_are_their_definition(
    given_lse: bool, inplace: bool, z: float, scale: float, smoothing: float, reduction: str
) -> None:
    loss_fn = CrossEntropyLoss(
        reduction=reduction, label_smoothing=smoothing, logit_scale=scale, lse_square_scale=z,
        inplace_backward=inplace, return_z_loss=True,
    )  # fmt: skip
    x = drawn()
    logits = x * 1
    lse = torch.logsumexp(x.detach(), -1) if given_lse else None
    loss, z_loss = loss_fn(logits, LABELS, lse)
    true, true_z = by_definition(x, LABELS, smoothing, scale, z, -100)
    if reduction != "none":
        true, true_z = (each.sum() / (5 if reduction == "mean" else 1) for each in (true, true_z))
    torch.testing.assert_close((loss, z_loss), (true, true_z.detach()))
    assert not z_loss.requires_grad
    push = Source("cotangent").normal(*loss.shape)
    (truth,) = torch.autograd.grad(true, x, push)
    (mine,) = torch.autograd.grad(loss, x, push)
    torch.testing.assert_close(mine, truth)
    assert torch.equal(logits, mine if inplace else x)


def test_another_ignored_label_and_a_loss_alone() -> None:
    x, labels = drawn(), LABELS.clamp(min=0)
    loss = CrossEntropyLoss(ignore_index=0, reduction="none")(x, labels)
    torch.testing.assert_close(loss, by_definition(x, labels, 0.0, 1.0, 0.0, 0)[0])


def test_an_lse_of_other_logits_is_not_used() -> None:
    x, wrong = drawn(), torch.zeros(ROWS)
    assert torch.equal(*(cross_entropy_loss(x, LABELS, lse, logit_scale=0.5)[0] for lse in (None, wrong)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_halves_are_summed_in_float32(dtype: torch.dtype) -> None:
    x = drawn().detach().to(dtype).requires_grad_()
    loss = CrossEntropyLoss()(x, LABELS.int())
    assert loss.dtype == torch.float32
    loss.backward()
    assert x.grad is not None
    assert x.grad.dtype == dtype
    wide = x.detach().double().requires_grad_()
    true = torch.nn.functional.cross_entropy(wide, LABELS)
    true.backward()
    torch.testing.assert_close(loss.double(), true, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(x.grad, wide.grad.to(dtype))


def test_a_backward_pass_over_overwritten_logits_is_an_error_and_not_wrong() -> None:
    logits = drawn() * 1
    loss = CrossEntropyLoss(inplace_backward=True)(logits, LABELS)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_loss_compiles_whole() -> None:
    torch._dynamo.reset()
    x, loss_fn = drawn(), CrossEntropyLoss(label_smoothing=0.1, lse_square_scale=0.1, inplace_backward=True)
    grads = []
    for run in (loss_fn, torch.compile(loss_fn, fullgraph=True, backend="aot_eager")):
        loss = run(x * 1, LABELS)
        grads.append((loss.detach(), *torch.autograd.grad(loss, x)))
    torch.testing.assert_close(*grads)
    torch._dynamo.reset()


X = torch.zeros(ROWS, CLASSES)
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "a label past the classes": (
        lambda: cross_entropy_loss(X, LABELS + 1, ignore_index=-99),
        "got labels outside 0 to 10",
    ),
    "a negative label": (lambda: cross_entropy_loss(X, LABELS, ignore_index=0), "got labels outside 0 to 10"),
    "three axes": (lambda: cross_entropy_loss(X[None], LABELS[None]), "takes (rows, classes) and (rows,)"),
    "fewer labels": (lambda: cross_entropy_loss(X, LABELS[:3]), "labels [3]"),
    "labels of floats": (lambda: cross_entropy_loss(X, LABELS.float()), "takes int64 class numbers"),
    "no scale": (lambda: cross_entropy_loss(X, LABELS, logit_scale=0.0), "got logit_scale=0.0"),
    "another lse": (lambda: cross_entropy_loss(X, LABELS, X[:3, 0]), "got precomputed_lse"),
    "a reduction": (lambda: CrossEntropyLoss(reduction="max"), "got reduction='max'"),
    "a group": (lambda: CrossEntropyLoss(process_group=object()), "got CrossEntropyLoss with a process_group"),
}


@pytest.mark.parametrize(("call", "words"), REFUSED.values(), ids=REFUSED)
def test_is_refused_in_words(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(RequestError) as refusal:
        call()
    assert words in str(refusal.value)

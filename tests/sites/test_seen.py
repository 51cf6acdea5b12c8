"""What one run of a model shows: who calls PyTorch's attention, and where attention is written by hand."""

from __future__ import annotations

import linecache
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headway.sites.seen import see
from headway.swap import inspect, swap


def line_of(at: str) -> str:
    path, line = at.rsplit(":", 1)
    return linecache.getline(path, int(line)).strip()


class Heads(nn.Module):
    """Attention by a function of q, k and v, each (batch, heads, length, size)."""

    def __init__(self, way: Callable[..., Tensor]) -> None:
        super().__init__()
        self.qkv, self.way = nn.Linear(8, 24), way

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (2, 4)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        return self.way(q, k, v)


def operators(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.transpose(-2, -1)) / 2
    return scores.softmax(-1) @ v


def masked_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * 0.5
    scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -1e9)
    weights = F.dropout(F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype), 0.1, False)
    return torch.einsum("bhij,bhjd->bhid", weights, v)


def in_place_baddbmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    scores = torch.baddbmm(torch.zeros(len(q), q.shape[1], k.shape[1]), q, k.transpose(1, 2), beta=0, alpha=0.5)
    scores += torch.zeros_like(scores)
    return torch.bmm(nn.Softmax(-1)(scores), v)


def softmax_by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q * 0.5, k.mT)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return (weights / weights.sum(-1, keepdim=True)) @ v


def lists_and_keywords(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bhid,bhjd->bhij", [q, k])
    return torch.einsum("bhij,bhjd->bhid", [torch.softmax(input=scores, dim=-1), v])


def log_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.where(torch.ones(3, 3) > 0, q @ k.transpose(-2, -1), torch.tensor(-9.0))
    return F.log_softmax(scores, -1).exp() @ v


def without_batch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.mm(torch.softmax(torch.mm(q[0, 0], k[0, 0].t()) / 2, -1), v[0, 0])


def one_line(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT / 2).softmax(-1).type_as(v).nan_to_num() @ v


WAYS = (
    operators, masked_einsum, in_place_baddbmm, softmax_by_hand, lists_and_keywords, log_softmax, without_batch,
    one_line,
)  # fmt: skip


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("mode", (torch.enable_grad, torch.no_grad, torch.inference_mode))
def test_attention_written_by_hand_is_found_with_its_line(way: Callable[..., Tensor], mode: Any) -> None:
    """Named by the module that runs it and the line of its softmax, with the bytes of its scores."""
    model = nn.Sequential(nn.Linear(8, 8), Heads(way))
    with mode():
        seen = see(model, lambda m: m(torch.randn(2, 3, 8)))
    ((name, at), size) = next(iter(seen.by_hand.items()))
    assert len(seen.by_hand) == 1
    assert name == "1"
    assert __file__ in at
    assert any(word in line_of(at) for word in ("softmax", "Softmax", "exp")), line_of(at)
    assert size == (3 * 3 * 4 if way is without_batch else 2 * 2 * 3 * 3 * 4)
    assert not seen.sdpa


def test_the_census_says_so() -> None:
    """Left alone, at file:line, with what a rewrite would save."""
    model = nn.Sequential(Heads(operators))
    done = swap(model, torch.randn(2, 3, 8))
    (ticket,) = done.census.tickets
    assert not ticket.swapped
    assert f"written by hand at {__file__}:" in ticket.because
    assert "of weights" in ticket.because
    assert ticket.name == "0"
    assert str(done.census).count("left alone, because") == 1


class NoAttention(nn.Module):
    """Softmaxes and products that are no attention."""

    def __init__(self) -> None:
        super().__init__()
        self.classes, self.experts = nn.Parameter(torch.randn(5, 8)), nn.Parameter(torch.randn(4, 8, 8))
        self.gate, self.head = nn.Linear(8, 4), nn.Linear(8, 5)

    def classifier(self, x: Tensor) -> Tensor:
        return self.head(x).softmax(-1)

    def tied(self, x: Tensor) -> Tensor:
        """Logits by the embedding, and the embedding mixed by their softmax."""
        return (x @ self.classes.t()).softmax(-1) @ self.classes

    def tied_einsum(self, x: Tensor) -> Tensor:
        return torch.einsum("bnd,kd->bnk", x, self.classes).softmax(-1) @ self.classes

    def mixture_of_experts(self, x: Tensor) -> Tensor:
        gates = self.gate(x).softmax(-1)
        return torch.einsum("bne,bned->bnd", gates, torch.einsum("bnd,edf->bnef", x, self.experts))

    def gates_by_matmul(self, x: Tensor) -> Tensor:
        gates = torch.matmul(x, self.experts[0, :, :4]).softmax(-1)
        return (gates.unsqueeze(-2) @ torch.einsum("bnd,edf->bnef", x, self.experts)).squeeze(-2)

    def contrast(self, x: Tensor) -> Tensor:
        """Similarities and their softmax, without a third factor."""
        return (x @ x.transpose(1, 2)).softmax(-1).diagonal(dim1=1, dim2=2).log().mean()

    def products(self, x: Tensor) -> Tensor:
        return x @ x.transpose(1, 2) @ x

    def softmax_then_projection(self, x: Tensor) -> Tensor:
        return x.softmax(-1) @ self.experts[0]

    def pooling(self, x: Tensor) -> Tensor:
        """Weights by a layer, not by a product of two activations."""
        return self.gate(x)[..., :1].softmax(1).transpose(1, 2) @ x

    def forward(self, x: Tensor, what: str) -> Tensor:
        out: Tensor = getattr(self, what)(x)
        return out


@pytest.mark.parametrize("mode", (torch.enable_grad, torch.no_grad, torch.inference_mode))
@pytest.mark.parametrize(
    "what",
    (
        "classifier", "tied", "tied_einsum", "mixture_of_experts", "gates_by_matmul", "contrast", "products",
        "softmax_then_projection", "pooling",
    ),
)  # fmt: skip
def test_what_is_no_attention_is_not_reported(what: str, mode: Any) -> None:
    model = NoAttention()
    with mode():
        seen = see(model, lambda m: m(torch.randn(2, 3, 8), what))
    assert not seen.by_hand
    assert not seen.sdpa
    assert inspect(model, (torch.randn(2, 3, 8), what)).tickets == ()


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.multihead = Heads(operators), nn.MultiheadAttention(8, 2, batch_first=True)
        self.never = nn.MultiheadAttention(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(x, x, x)
        self.inner(y)
        y = F.scaled_dot_product_attention(y, y, y)
        return self.multihead(y, y, y)[0]


def test_calls_belong_to_the_innermost_module() -> None:
    seen = see(Deep(), lambda m: m(torch.randn(2, 3, 8)))
    assert seen.sdpa == {"": 2}, "calls after a child's belong to the parent again; stock modules' own are theirs"
    assert {name for name, _ in seen.by_hand} == {"inner"}
    assert seen.ran == {"", "inner", "inner.qkv", "multihead"}
    # PyTorch reads out_proj's weight and never calls it.


def test_modules_that_did_not_run_are_left_alone_and_said_so() -> None:
    done = swap(Deep(), torch.randn(2, 3, 8))
    by_name = {ticket.name: ticket for ticket in done.census.tickets}
    assert "did not run with the example" in by_name["never"].because
    assert {name for name, ticket in by_name.items() if ticket.swapped} == {"", "multihead"}


def test_inputs_are_kept_as_they_were_at_the_call() -> None:
    """A cache that a module grows while it runs is kept as it was given."""

    class Grows(nn.Module):
        def forward(self, x: Tensor, cache: dict[str, Tensor], past: list[Tensor]) -> Tensor:
            x.add_(1)
            cache["x"] = x
            past.append(x)
            return x * 2

    x = torch.zeros(2)
    seen = see(nn.ModuleDict({"a": Grows()}), lambda m: m["a"](x, cache={}, past=[x]), keep={"a"})
    args, kwargs, _ = seen.calls["a"]
    assert torch.equal(args[0], torch.zeros(2))
    assert kwargs["cache"] == {}
    assert len(kwargs["past"]) == 1


def test_looking_leaves_no_hooks_also_after_an_exception() -> None:
    class Raises(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyError("mine")

    model = nn.Sequential(nn.Linear(2, 2), Raises(), nn.Linear(2, 2))
    own = model[0].register_forward_hook(lambda *_: None)
    with pytest.raises(KeyError, match="mine"):
        see(model, lambda m: m(torch.randn(1, 2)))
    hooks = [dict(h) for m in model.modules() for h in (m._forward_hooks, m._forward_pre_hooks) if h]
    assert hooks == [{own.id: model[0]._forward_hooks[own.id]}]
    for module in model.modules():
        assert not module._forward_hooks_always_called
        assert not module._forward_hooks_with_kwargs
        assert not module._forward_pre_hooks_with_kwargs
    assert not torch.overrides._get_current_function_mode_stack()


def test_x_transformers_without_flash() -> None:
    x_transformers = pytest.importorskip("x_transformers")
    torch.manual_seed(0)
    model = x_transformers.TransformerWrapper(
        num_tokens=20, max_seq_len=8, attn_layers=x_transformers.Decoder(dim=16, depth=2, heads=2)
    )
    census = inspect(model, torch.randint(0, 20, (1, 6)))
    assert len(census.tickets) == 2
    for ticket in census.tickets:
        assert not ticket.swapped
        assert "x_transformers/attend.py:" in ticket.because


def test_whisper_without_sdpa() -> None:
    whisper = pytest.importorskip("whisper.model")
    dims = whisper.ModelDimensions(
        n_mels=8, n_audio_ctx=6, n_audio_state=16, n_audio_head=2, n_audio_layer=1,
        n_vocab=20, n_text_ctx=8, n_text_state=16, n_text_head=2, n_text_layer=1,
    )  # fmt: skip
    model = whisper.Whisper(dims)
    with whisper.disable_sdpa():
        census = inspect(model, (torch.randn(1, 8, 12), torch.randint(0, 20, (1, 5))))
    assert len(census.tickets) == 3
    assert all("whisper/model.py:" in ticket.because for ticket in census.tickets)

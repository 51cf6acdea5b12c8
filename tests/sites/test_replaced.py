"""What took an nn.MultiheadAttention's place is recognised, turned back, proven, and given back; or refused with why.

The stand-ins do what the replacements of the bug reports do, defects included.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from headway.errors import SwapError
from headway.sites import multihead
from headway.sites.site import site_of
from headway.swap import inspect, swap, undo

SIZE, HEADS = 16, 4

pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")


class XFormersAttention(nn.Module):
    """Of seeds 000 and 001: no batch_first, no masks, no cross-attention."""

    def __init__(self, embed_dim: int, num_heads: int, dropout: float = 0.0, bias: bool = True) -> None:
        super().__init__()
        self.embed_dim, self.num_heads, self.head_dim, self.dropout = (
            embed_dim,
            num_heads,
            embed_dim // num_heads,
            dropout,
        )
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=bias)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias)

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        out: Tensor = self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out

    def forward(self, query: Tensor, key: Any = None, value: Any = None, key_padding_mask: Any = None,
                need_weights: bool = True, attn_mask: Any = None, average_attn_weights: bool = True,
                is_causal: bool = False) -> Any:  # fmt: skip
        if key is None and value is None:
            out = self.attend(query)
            return (out, None) if need_weights else out
        raise NotImplementedError("Cross-attention not supported in XFormersAttention")


class FlashAttention(XFormersAttention):
    """Of seed 002: a signature of its own, so that a key is taken for a mask; masks are ignored."""

    def __init__(self, embed_dim: int, num_heads: int, batch_first: bool = True, **options: Any) -> None:
        super().__init__(embed_dim, num_heads, **options)
        self.batch_first = batch_first

    def forward(self, x: Tensor, attn_mask: Any = None, key_padding_mask: Any = None) -> Any:  # type: ignore[override]
        return self.attend(x), None


class Split(nn.Module):
    """The three projections apart."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(SIZE, SIZE, bias=bias) for _ in range(3))
        self.o_proj = nn.Linear(SIZE, SIZE, bias=False)

    def forward(self, x: Tensor, attn_mask: Any = None, key_padding_mask: Any = None) -> Any:
        heads = (p(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)), None


class Sigma(nn.Module):
    """A wrapper without a weight of its own, as in seed 002."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.sigma = nn.Parameter(torch.full((), 1.7, dtype=linear.weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.sigma * F.normalize(self.linear.weight), self.linear.bias)


class Interleaved(FlashAttention):
    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (self.num_heads, 3, self.head_dim)).permute(3, 0, 2, 1, 4)
        out: Tensor = self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


class Masked(FlashAttention):
    """With a mask of its own, or one that means something else."""

    def keep(self, length: int) -> Tensor:
        raise NotImplementedError

    def attend(self, x: Tensor, keep: Any = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        keep = self.keep(x.shape[1]) if keep is None else keep
        out: Tensor = self.out_proj(F.scaled_dot_product_attention(q, k, v, keep).transpose(1, 2).flatten(2))
        return out


class Near(Masked):
    def keep(self, length: int) -> Tensor:
        return (torch.arange(length)[:, None] - torch.arange(length)).abs() <= 8


class CausalFromZero(Masked):
    """Whose result shows nothing before it has learnt."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        nn.init.zeros_(self.out_proj.weight)

    def keep(self, length: int) -> Tensor:
        return torch.ones(length, length, dtype=torch.bool).tril()


class KeepsWhereTrue(Masked):
    """flash_attn's own MHA takes its key_padding_mask so."""

    def forward(self, x: Tensor, attn_mask: Any = None, key_padding_mask: Any = None) -> Any:  # type: ignore[override]
        keep = torch.ones(x.shape[:2], dtype=torch.bool) if key_padding_mask is None else key_padding_mask
        return self.attend(x, keep[:, None, None]), None


class Bare(FlashAttention):
    def forward(self, x: Tensor, attn_mask: Any = None, key_padding_mask: Any = None) -> Any:  # type: ignore[override]
        return self.attend(x)


class Lists(FlashAttention):
    def forward(self, x: Tensor, attn_mask: Any = None, key_padding_mask: Any = None) -> Any:  # type: ignore[override]
        return [self.attend(x)]


class NeverRuns(FlashAttention):
    def attend(self, x: Tensor) -> Tensor:
        raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.")


def like(old: nn.MultiheadAttention, kind: type[XFormersAttention]) -> XFormersAttention:
    """As the bug reports' replacers: a new module with copied weights."""
    new = kind(old.embed_dim, old.num_heads)
    with torch.no_grad():
        new.qkv.weight.copy_(old.in_proj_weight)
        new.qkv.bias.copy_(old.in_proj_bias)
        new.out_proj.weight.copy_(old.out_proj.weight)
        new.out_proj.bias.copy_(old.out_proj.bias)
    return new.to(old.in_proj_weight.dtype)


def encoder(layers: int = 2) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(SIZE, HEADS, 2 * SIZE, 0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def replaced(kind: type[XFormersAttention]) -> tuple[nn.TransformerEncoder, nn.TransformerEncoder]:
    """An encoder, and the same with its attention replaced."""
    stock = encoder()
    model = copy.deepcopy(stock)
    for layer in model.layers:
        layer.self_attn = like(layer.self_attn, kind)
    return stock, model


def padded() -> dict[str, Tensor]:
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[1, 4:] = True
    return {"src": torch.randn(2, 6, SIZE, dtype=torch.float64), "src_key_padding_mask": padding}


@pytest.mark.parametrize("kind", [XFormersAttention, FlashAttention])
@pytest.mark.parametrize("training", [False, True])
def test_an_encoder_that_crashed_runs_and_is_what_it_was_before_the_replacement(kind: Any, training: bool) -> None:
    """Seeds 000 and 001: AttributeError batch_first, then NotImplementedError."""
    stock, model = replaced(kind)
    stock.train(training), model.train(training)
    batch = padded()
    with pytest.raises((AttributeError, NotImplementedError, TypeError)):
        model(**batch)
    swapped = swap(model, batch)
    assert [ticket.kind for ticket in swapped.census.swapped] == ["replaced attention"] * 2
    assert swapped.certificate is not None
    assert swapped.certificate.passed
    assert f"{kind.__name__} took an nn.MultiheadAttention's place (layers.0.self_attn, layers.1.self_attn)" in str(
        swapped.census
    )
    seen = ~batch["src_key_padding_mask"]
    torch.testing.assert_close(model(**batch)[seen], stock(**batch)[seen])
    assert model.state_dict().keys() == stock.state_dict().keys()
    model.load_state_dict(stock.state_dict(), strict=True)


@pytest.mark.parametrize("kind", [XFormersAttention, FlashAttention])
def test_undo_gives_back_the_very_objects(kind: Any) -> None:
    _, model = replaced(kind)
    model.eval()
    for parameter in model.layers[0].self_attn.parameters():
        parameter.requires_grad_(False)
    model.layers[1].self_attn.note = "mine"
    handle = model.layers[1].self_attn.register_forward_hook(lambda *_: None)
    objects = [(name, module, type(module), dict(vars(module))) for name, module in model.named_modules()]
    parameters = list(model.named_parameters())
    swapped = swap(model, padded())
    assert {id(p) for p in model.parameters()} == {id(p) for _, p in parameters}
    assert model.layers[1].self_attn.note == "mine"
    assert not any(p.requires_grad for p in model.layers[0].self_attn.parameters())
    swapped.undo()
    assert [(name, p) for name, p in model.named_parameters() if p is not dict(parameters)[name]] == []
    for (name, module, kind_, held), (again, now) in zip(objects, model.named_modules(), strict=True):
        assert (name, module, kind_) == (again, now, type(now))
        assert vars(now).keys() == held.keys()
        assert all(vars(now)[key] is value for key, value in held.items() if key not in ("_modules", "_parameters"))
        assert vars(now)["_modules"] == held["_modules"]
    handle.remove()


def test_what_changes_while_it_is_swapped_is_there_after_undo() -> None:
    _, model = replaced(FlashAttention)
    swap(model, padded())
    attention = model.layers[0].self_attn
    attention.train(False)
    model.to(torch.float32)
    attention.in_proj_weight = nn.Parameter(torch.ones(3 * SIZE, SIZE))
    attention.added = 3
    undo(model)
    assert type(attention) is FlashAttention
    assert bool((attention.qkv.weight == 1).all())
    assert attention.qkv.bias.dtype == torch.float32
    assert not attention.qkv.training
    assert attention.added == 3
    assert "in_proj_weight" not in dict(attention.named_parameters())


def test_alone_and_as_the_model_itself() -> None:
    torch.manual_seed(0)
    module = FlashAttention(SIZE, HEADS).double().eval()
    x = torch.randn(2, 6, SIZE, dtype=torch.float64)
    before = module(x)[0]
    with swap(module, x) as swapped:
        assert swapped.certificate is not None
        assert swapped.certificate.passed
        torch.testing.assert_close(module(x, need_weights=False)[0], before)
        other = torch.randn(2, 3, SIZE, dtype=torch.float64)
        assert not torch.allclose(module(x, other, other)[0], before), "a key was taken for a mask"
    torch.testing.assert_close(module(x)[0], before, rtol=0, atol=0)


def test_apart_and_wrapped_projections() -> None:
    torch.manual_seed(0)
    split = Split().double().eval()
    x = torch.randn(2, 6, SIZE, dtype=torch.float64)
    before = split(x)[0]
    with swap(split, x) as swapped:
        assert len(swapped.census.swapped) == 1
        assert "q_proj_weight" in split.state_dict()
        torch.testing.assert_close(split(x)[0], before)
    flash = FlashAttention(SIZE, HEADS).double().eval()
    flash.out_proj = Sigma(flash.out_proj)  # type: ignore[assignment]
    before = flash(x)[0]
    with swap(flash, x) as swapped:
        assert len(swapped.census.swapped) == 1
        torch.testing.assert_close(flash(x)[0], before)


def test_shared_is_one_site() -> None:
    _, model = replaced(FlashAttention)
    model.layers[1].self_attn = model.layers[0].self_attn
    swapped = swap(model, padded())
    (ticket,) = swapped.census.swapped
    assert (ticket.name, ticket.aliases) == ("layers.0.self_attn", ("layers.1.self_attn",))
    assert model.layers[1].self_attn is model.layers[0].self_attn


def test_a_copy_of_a_swapped_model_is_swapped_and_can_be_undone() -> None:
    _, model = replaced(FlashAttention)
    batch = padded()
    swap(model, batch)
    again = copy.deepcopy(model)
    torch.testing.assert_close(again(**batch), model(**batch))
    undo(again)
    assert type(again.layers[0].self_attn) is FlashAttention
    assert site_of(model.layers[0].self_attn) is not None
    assert again.layers[0].self_attn.qkv.weight is not model.layers[0].self_attn.in_proj_weight


def broken(change: Callable[[Any], None], kind: Any = FlashAttention) -> nn.Module:
    torch.manual_seed(0)
    module: nn.Module = kind(SIZE, HEADS).double()
    change(module)
    return module


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "interleaved": (lambda: broken(lambda m: None, Interleaved), "gives something else than nn.MultiheadAttention"),
    "a window": (lambda: broken(lambda m: None, Near), "gives something else than nn.MultiheadAttention"),
    "causal, from zero": (lambda: broken(lambda m: None, CausalFromZero), "gives something else than"),
    "an inverted mask": (
        lambda: broken(lambda m: None, KeepsWhereTrue),
        "its key_padding_mask says which keys are seen",
    ),
    "a bare result": (lambda: broken(lambda m: None, Bare), "returns no pair of result and weights"),
    "a list": (lambda: broken(lambda m: None, Lists), "gives something else than"),
    "another dropout": (lambda: broken(lambda m: m.add_module("proj_drop", nn.Dropout(0.5))), "it holds proj_drop too"),
    "no heads": (lambda: broken(lambda m: setattr(m, "num_heads", 0)), "its 0 heads do not divide its size"),
    "on meta": (lambda: broken(lambda m: None).to("meta"), "its parameters are on the meta device"),
    "never runs": (lambda: broken(lambda m: None, NeverRuns), "only supports Ampere GPUs"),
    "wrapped qkv": (
        lambda: broken(lambda m: parametrizations.weight_norm(m.qkv)),
        "its qkv is a ParametrizedLinear, and in_proj_weight can only stand for a plain Linear",
    ),
    "norms": (lambda: broken(lambda m: m.add_module("q_norm", nn.LayerNorm(4))), "it holds q_norm too"),
    "biases apart": (lambda: Split(bias=True).double(), "have a bias each"),
    "heads": (lambda: broken(lambda m: setattr(m, "num_heads", 5)), "5 heads do not divide its size of 16"),
    "another factor": (
        lambda: broken(lambda m: setattr(m, "qkv", nn.Linear(SIZE, 2 * SIZE).double())),
        "its qkv makes 32 of 16; in_proj_weight makes 3 times as many",
    ),
}


@pytest.mark.parametrize(("make", "because"), REFUSED.values(), ids=REFUSED)
def test_refused_with_the_reason_and_left_as_it_is(make: Callable[[], nn.Module], because: str) -> None:
    model = nn.Sequential(make())
    kept = dict(vars(model[0]))
    census = inspect(model)
    (ticket,) = census.tickets
    assert because in ticket.because
    assert not swap(model).census.swapped
    assert dict(vars(model[0])) == kept


def test_in_a_layer_whatever_it_is_called_and_holds() -> None:
    class Other(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    model = encoder(1)
    model.layers[0].self_attn = Other()
    (ticket,) = inspect(model).tickets
    assert ticket.because.startswith("Other holds nothing that would be in_proj_weight")


def test_a_failure_midway_leaves_all_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = replaced(FlashAttention)

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(multihead, "apply", fail)
    with pytest.raises(KeyboardInterrupt):
        swap(model, padded())
    assert all(type(layer.self_attn) is FlashAttention for layer in model.layers)
    assert "qkv.weight" in model.layers[0].self_attn.state_dict()


def test_what_comes_while_it_is_swapped_is_there_after_undo() -> None:
    model = FlashAttention(SIZE, HEADS).double()
    swap(model)
    model.register_buffer("seen", torch.zeros(1))
    model.extra = nn.Linear(2, 2)
    model.learnt = nn.Parameter(torch.zeros(3))
    undo(model)
    assert {"seen", "extra.weight", "learnt", "qkv.weight"} <= model.state_dict().keys()


def test_undo_refuses_all_or_nothing_where_a_weight_was_reparametrized() -> None:
    model = nn.ModuleDict({"a": FlashAttention(SIZE, HEADS), "b": FlashAttention(SIZE, HEADS)})
    swap(model)
    prune.l1_unstructured(model["a"], "in_proj_weight", 0.3)
    with pytest.raises(SwapError, match="got 'a' with in_proj_weight parametrized or pruned since the swap"):
        undo(model)
    assert site_of(model["a"]) is not None
    assert site_of(model["b"]) is not None
    prune.remove(model["a"], "in_proj_weight")
    undo(model)
    assert all(type(module) is FlashAttention for module in model.values())
    assert bool((model["a"].qkv.weight == 0).any())


# -- what the bug reports' tools lost -------------------------------------------------------------------------------


def _late(query: Tensor, key: Any = None, value: Any = None, **kwargs: Any) -> Any:
    return query, None


@pytest.mark.parametrize("fix", (_late, lambda self, query, key=None, value=None, **kwargs: (query, None)))
def test_a_forward_patched_on_a_replacement_is_left_alone(fix: Any) -> None:
    """No class can override it: swapped it would still run, and be said to be ours."""
    _, model = replaced(XFormersAttention)
    alone = like(nn.MultiheadAttention(SIZE, HEADS), XFormersAttention)
    for module in (alone, *(layer.self_attn for layer in model.layers)):
        module.forward = fix  # type: ignore[method-assign]
    for each, sites in ((alone, 1), (model, 2)):
        tickets = inspect(each).tickets
        assert len(tickets) == sites
        assert all("its forward was replaced on the instance (by " in ticket.because for ticket in tickets)
        assert not swap(each).census.swapped


def test_a_model_that_stays_broken_says_what_could_not_be_turned_back() -> None:
    """Its own AttributeError about batch_first or in_proj_bias names nothing that anybody could change."""
    _, model = replaced(FlashAttention)
    model.layers[1].self_attn.q_norm = nn.LayerNorm(4)
    before = [(type(module), list(vars(module))) for module in model.modules()]
    with pytest.raises(
        SwapError, match=r"does not run with the example \(\w+Error: .*layers.1.self_attn: it holds q_n"
    ):
        swap(model, padded())
    assert [(type(module), list(vars(module))) for module in model.modules()] == before


def calls(batch_first: bool) -> dict[str, tuple[tuple[Tensor, ...], dict[str, Any]]]:
    """By name: how nn.MultiheadAttention may be called, the batch being as large as the heads are many."""
    x, y, z = (torch.randn(HEADS, length, SIZE, dtype=torch.float64) for length in (5, 7, 7))
    one, other = x[0], y[0]
    if not batch_first:
        x, y, z = (each.transpose(0, 1) for each in (x, y, z))
    causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
    scores = torch.randn(5, 7, dtype=torch.float64)
    filler = torch.zeros(HEADS, 7, dtype=torch.bool)
    filler[1, 4:] = True
    added = torch.zeros(HEADS, 7, dtype=torch.float64).masked_fill(filler, float("-inf"))
    per_head = torch.randn(HEADS * HEADS, 5, 7, dtype=torch.float64)
    return {
        "cross, by position": ((x, y, z), {}),
        "cross, by keyword": ((), {"query": x, "key": y, "value": z}),
        "without weights": ((x, y, z), {"need_weights": False}),
        "weights of each head": ((x, y, z), {"average_attn_weights": False}),
        "a bool mask": ((x, x, x), {"attn_mask": causal}),
        "causal by its hint": ((x, x, x), {"attn_mask": causal, "is_causal": True, "need_weights": False}),
        "a float mask": ((x, y, z), {"attn_mask": scores}),
        "a mask for each head": ((x, y, z), {"attn_mask": per_head}),
        "a bool padding": ((x, y, z), {"key_padding_mask": filler}),
        "a float padding": ((x, y, z), {"key_padding_mask": added}),
        "both masks": ((x, y, z), {"attn_mask": scores, "key_padding_mask": filler.double(), "need_weights": False}),
        "unbatched": ((one, other, other), {}),
    }


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch_first", "length_first"])
@pytest.mark.parametrize("kind", [XFormersAttention, FlashAttention])
def test_turned_back_it_has_the_whole_contract(kind: Any, batch_first: bool, bias: bool) -> None:
    """Keys were taken for masks, masks ignored, weights None, the batch attended over, a bare tensor returned."""
    torch.manual_seed(0)
    stock = nn.MultiheadAttention(SIZE, HEADS, bias=bias, batch_first=batch_first).double()
    if bias:
        nn.init.normal_(stock.in_proj_bias), nn.init.normal_(stock.out_proj.bias)
    module = kind(SIZE, HEADS, bias=bias).double()
    module.batch_first = batch_first  # which their tools copied, and their forwards did not read
    names = {"qkv.weight": "in_proj_weight", "qkv.bias": "in_proj_bias"}
    module.load_state_dict({name: stock.state_dict()[names.get(name, name)] for name in module.state_dict()})
    assert swap(module).census.swapped
    for name, (args, kwargs) in calls(batch_first).items():
        got, want = module(*args, **kwargs), stock(*args, **kwargs)
        assert isinstance(got, tuple), name
        assert (got[1] is None) == (want[1] is None), name
        for mine, theirs in zip(got, want, strict=True):
            torch.testing.assert_close(mine, theirs, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_mode_dtype_flags_and_hooks_stay_while_it_is_swapped(dtype: torch.dtype) -> None:
    """A new module would be in training mode, in float32, learn, and have no hooks."""
    module = like(nn.MultiheadAttention(SIZE, HEADS), FlashAttention).to(dtype).eval()
    module.dropout = 0.5
    module.qkv.weight.requires_grad_(False)
    x = torch.randn(2, 6, SIZE, dtype=dtype)
    swap(module, x)
    fired: list[str] = []
    module.register_forward_hook(lambda *_: fired.append("after"))
    module.register_forward_pre_hook(lambda *_: fired.append("before"))
    assert not any(each.training for each in module.modules())
    assert {parameter.dtype for parameter in module.parameters()} == {dtype}
    assert [name for name, p in module.named_parameters() if not p.requires_grad] == ["in_proj_weight"]
    assert torch.equal(module(x)[0], module(x)[0])
    assert fired == ["before", "after"] * 2
    module.train()
    assert not torch.equal(module(x)[0], module(x)[0])


def test_an_optimizer_from_before_moves_its_weights() -> None:
    """Its parameters are the very ones that the swapped module computes with, and undo gives back."""
    _, model = replaced(XFormersAttention)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    done = swap(model, padded())
    model(**padded()).square().sum().backward()
    optimizer.step()
    done.undo()
    still = [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
    assert still == []


def test_a_class_made_inside_a_function_under_any_name() -> None:
    """The tools looked for a class by its name, which nobody could import, and passed all others by in silence."""

    class DummyXFormersAttention(XFormersAttention):
        pass

    stock, model = replaced(DummyXFormersAttention)
    done = swap(model, padded())
    assert sum(isinstance(module, nn.MultiheadAttention) for module in model.modules()) == 2
    assert not any("XFormers" in type(module).__name__ for module in model.modules())
    seen = ~padded()["src_key_padding_mask"]
    x = padded()
    torch.testing.assert_close(copy.deepcopy(model)(**x)[seen], stock(**x)[seen])
    done.undo()
    assert {type(layer.self_attn) for layer in model.layers} == {DummyXFormersAttention}


def test_two_tools_in_one_decoder_swapped_again_and_again() -> None:
    """One on top of the other left both in the model; here a swap of a swap is one swap, and undo ends at theirs."""
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(SIZE, HEADS, 2 * SIZE, 0.0, batch_first=True)
    stock = nn.TransformerDecoder(layer, 2).double()
    model = copy.deepcopy(stock)
    for each in model.layers:
        each.self_attn = like(each.self_attn, XFormersAttention)
        each.multihead_attn = like(each.multihead_attn, FlashAttention)
    classes = [type(module) for module in model.modules()]
    texts = tuple(torch.randn(2, length, SIZE, dtype=torch.float64) for length in (5, 7))
    with pytest.raises((AttributeError, NotImplementedError, TypeError)):
        model(*texts)
    for _ in range(2):
        done = swap(model, texts)
        assert [ticket.kind for ticket in done.census.swapped] == ["replaced attention"] * 4
        torch.testing.assert_close(model(*texts), stock(*texts))
    done.undo()
    assert [type(module) for module in model.modules()] == classes


def test_a_tool_that_comes_after_the_swap() -> None:
    """It takes the swapped modules' places. The first swap still ends, and a second one takes the model as it is."""
    stock = encoder()
    model = copy.deepcopy(stock)
    first = swap(model, padded())
    for layer in model.layers:
        layer.self_attn = like(layer.self_attn, FlashAttention)
    first.undo()
    assert [type(module) for module in model.layers] == [nn.TransformerEncoderLayer] * 2
    done = swap(model, padded())
    assert len(done.census.swapped) == 2
    x = padded()
    seen = ~x["src_key_padding_mask"]
    torch.testing.assert_close(model(**x)[seen], stock(**x)[seen])
    done.undo()
    assert {type(layer.self_attn) for layer in model.layers} == {FlashAttention}

"""headway.layers.MultiheadAttention: equal to nn.MultiheadAttention, forward and backward, and what that lacks."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from deck import Source
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint

from headway import Bias, Causal, Dense, Documents, Padding, RequestError, UnknownNameError
from headway.layers import MultiheadAttention

WIDE = {"dtype": torch.float64}


@pytest.fixture(autouse=True)
def _no_programs_left() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def drawn(*shape: int, name: str = "x", learns: bool = False) -> Tensor:
    return Source(name).normal(*shape).requires_grad_(learns)


def stock(embed_dim: int = 16, num_heads: int = 4, **options: Any) -> nn.MultiheadAttention:
    module = nn.MultiheadAttention(embed_dim, num_heads, batch_first=True, dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(Source(str(tuple(parameter.shape))).normal(*parameter.shape))
    return module


def projected(module: nn.MultiheadAttention) -> dict[str, Tensor]:
    """The gradients of a stock module, by the names of ours."""
    found = {f"out_proj.{name}": value.grad for name, value in module.out_proj.named_parameters()}
    names = ("q_proj", "k_proj", "v_proj")
    if module.in_proj_weight is not None:
        found |= zip((f"{n}.weight" for n in names), module.in_proj_weight.grad.chunk(3), strict=True)  # type: ignore[union-attr]
    else:
        found |= {f"{name}.weight": getattr(module, f"{name}_weight").grad for name in names}
    if module.in_proj_bias is not None:
        found |= zip((f"{n}.bias" for n in names), module.in_proj_bias.grad.chunk(3), strict=True)  # type: ignore[union-attr]
    return found  # type: ignore[return-value]


STOCKS = {
    "plain": {},
    "no bias": {"bias": False},
    "kdim": {"kdim": 6, "vdim": 6},
    "kdim and vdim": {"kdim": 6, "vdim": 5},
    "vdim, no bias": {"vdim": 5, "bias": False},
    "one head": {"num_heads": 1},
}


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", STOCKS)
def test_equal_to_torch_forward_and_backward(name: str, mode: bool) -> None:
    torchs = stock(**STOCKS[name]).train(mode)
    ours = MultiheadAttention.from_torch(torchs)
    assert ours.training is mode
    kdim, vdim = torchs.kdim, torchs.vdim
    inputs = [
        drawn(2, 5, 16, learns=True),
        drawn(2, 7, kdim, name="k", learns=True),
        drawn(2, 7, vdim, name="v", learns=True),
    ]
    others = [x.detach().clone().requires_grad_() for x in inputs]
    got, truth = ours(inputs[0], (inputs[1], inputs[2])), torchs(*others, need_weights=False)[0]
    torch.testing.assert_close(got, truth)
    push = drawn(2, 5, 16, name="push")
    got.backward(push)
    truth.backward(push)
    for x, other in zip(inputs, others, strict=True):
        torch.testing.assert_close(x.grad, other.grad)
    expected = projected(torchs)
    assert expected.keys() == dict(ours.named_parameters()).keys()
    for key, value in ours.named_parameters():
        torch.testing.assert_close(value.grad, expected[key], msg=lambda words, key=key: f"{key}: {words}")


def test_self_and_cross() -> None:
    torchs = stock()
    ours, x, context = MultiheadAttention.from_torch(torchs), drawn(2, 5, 16), drawn(2, 7, 16, name="context")
    torch.testing.assert_close(ours(x), torchs(x, x, x)[0])
    torch.testing.assert_close(ours(x, context), torchs(x, context, context)[0])
    torch.testing.assert_close(ours(x, (context, 2 * context)), torchs(x, context, 2 * context)[0])


def test_unbatched() -> None:
    ours, x, context = MultiheadAttention(16, 4, **WIDE), drawn(5, 16), drawn(7, 16, name="context")  # type: ignore[arg-type]
    torch.testing.assert_close(ours(x), ours(x[None])[0])
    torch.testing.assert_close(ours(x, context), ours(x[None], context[None])[0])
    torch.testing.assert_close(ours(x, mask=Causal()), ours(x[None], mask=Causal())[0])


def test_masks() -> None:
    torchs, x = stock(), drawn(2, 5, 16)
    ours = MultiheadAttention.from_torch(torchs)
    blocked = torch.ones(5, 5, dtype=torch.bool).triu(1)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    bias = drawn(5, 5, name="bias")
    for mask, options in (
        (Causal(), {"attn_mask": blocked}),
        (Dense(~blocked), {"attn_mask": blocked}),
        (Padding([5, 3]), {"key_padding_mask": padding}),
        (Causal() & Padding([5, 3]), {"attn_mask": blocked, "key_padding_mask": padding}),
        (Bias(bias), {"attn_mask": bias}),
    ):
        torch.testing.assert_close(ours(x, mask=mask), torchs(x, x, x, **options)[0], msg=lambda w, m=mask: f"{m}: {w}")


def test_documents_do_not_see_each_other() -> None:
    ours, x = MultiheadAttention(16, 4, **WIDE), drawn(1, 7, 16)  # type: ignore[arg-type]
    apart = torch.cat([ours(x[:, :3]), ours(x[:, 3:])], 1)
    torch.testing.assert_close(ours(x, mask=Documents([3, 4])), apart)


def test_a_row_that_sees_nothing_gives_the_bias_alone() -> None:
    ours = MultiheadAttention(16, 4, **WIDE)  # type: ignore[arg-type]
    nn.init.normal_(ours.out_proj.bias)
    out = ours(drawn(2, 5, 16, learns=True), mask=Padding([5, 0]))
    assert torch.equal(out[1], ours.out_proj.bias.expand(5, 16))
    out.sum().backward()
    assert all(bool(value.grad.isfinite().all()) for value in ours.parameters())  # type: ignore[union-attr]


def test_a_tensor_is_no_mask() -> None:
    for x in (drawn(2, 5, 16), drawn(5, 16)):
        with pytest.raises(RequestError, match=r"from_sdpa\(tensor\)"):
            MultiheadAttention(16, 4, **WIDE)(x, mask=torch.ones(5, 5, dtype=torch.bool))  # type: ignore[arg-type]


# -- heads ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_shared_heads_are_repeated_heads(kv_heads: int) -> None:
    shared = MultiheadAttention(16, 4, kv_heads=kv_heads, **WIDE)  # type: ignore[arg-type]
    full, times = MultiheadAttention(16, 4, **WIDE), 4 // kv_heads  # type: ignore[arg-type]
    state = shared.state_dict()
    for name in ("k_proj", "v_proj"):
        for part in ("weight", "bias"):
            heads = state[f"{name}.{part}"].unflatten(0, (kv_heads, 4))
            state[f"{name}.{part}"] = heads.repeat_interleave(times, 0).flatten(0, 1)
    full.load_state_dict(state)
    x, context = drawn(2, 5, 16), drawn(2, 7, 16, name="context")
    got, truth = shared(x, context), full(x, context)
    torch.testing.assert_close(got, truth)
    got.square().sum().backward()
    truth.square().sum().backward()
    grad = full.k_proj.weight.grad.unflatten(0, (kv_heads, times, 4)).sum(1).flatten(0, 1)  # type: ignore[union-attr]
    torch.testing.assert_close(shared.k_proj.weight.grad, grad)


def test_a_head_size_of_its_own() -> None:
    layer = MultiheadAttention(10, 4, kv_heads=2, head_dim=8)
    shapes = {name: tuple(value.shape) for name, value in layer.named_parameters() if name.endswith("weight")}
    assert shapes == {
        "q_proj.weight": (32, 10),
        "k_proj.weight": (16, 10),
        "v_proj.weight": (16, 10),
        "out_proj.weight": (10, 32),
    }
    assert layer(torch.randn(3, 5, 10)).shape == (3, 5, 10)


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_queries_and_keys_are_normed_per_head(kind: Any) -> None:
    layer, x = MultiheadAttention(16, 4, kv_heads=2, qk_norm=kind, **WIDE), drawn(2, 5, 16)  # type: ignore[arg-type]
    with torch.no_grad():
        layer.q_norm.weight.copy_(drawn(4, name="q"))  # type: ignore[union-attr]
        layer.k_norm.weight.copy_(drawn(4, name="k"))  # type: ignore[union-attr]

    def normed(y: Tensor, weight: Tensor) -> Tensor:
        y = y - y.mean(-1, keepdim=True) if kind == "layer" else y
        return y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    q = normed(layer.q_proj(x).view(2, 5, 4, 4), drawn(4, name="q"))
    k = normed(layer.k_proj(x).view(2, 5, 2, 4), drawn(4, name="k"))[:, :, [0, 0, 1, 1]]
    v = layer.v_proj(x).view(2, 5, 2, 4)[:, :, [0, 0, 1, 1]]
    weights = (torch.einsum("blhd,bshd->bhls", q, k) / 2).softmax(-1)
    truth = layer.out_proj(torch.einsum("bhls,bshd->blhd", weights, v).flatten(2))
    torch.testing.assert_close(layer(x), truth)
    with torch.no_grad():  # the scale of queries is gone, so that no logit can grow by it
        before = layer(x)
        layer.q_proj.weight.mul_(3)
        layer.q_proj.bias.mul_(3)
    torch.testing.assert_close(layer(x), before, atol=1e-4, rtol=1e-4)


# -- training ---------------------------------------------------------------------------------------------------------


def test_dropout_acts_in_training_alone() -> None:
    layer, x = MultiheadAttention(16, 4, dropout=0.5, **WIDE), drawn(2, 5, 16)  # type: ignore[arg-type]
    plain = MultiheadAttention(16, 4, **WIDE)  # type: ignore[arg-type]
    plain.load_state_dict(layer.state_dict())
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), plain(x))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing(dropout: float, reentrant: bool) -> None:
    layer = MultiheadAttention(16, 4, dropout=dropout, **WIDE)  # type: ignore[arg-type]
    grads = []
    for run in (layer, lambda *args: checkpoint(layer, *args, use_reentrant=reentrant)):
        torch.manual_seed(3)
        x = drawn(2, 5, 16, learns=True)
        run(x, None, Causal()).square().sum().backward()
        grads.append([x.grad, *(value.grad for value in layer.parameters())])
        layer.zero_grad()
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("options", [{}, {"kv_heads": 2, "qk_norm": "rms"}], ids=["plain", "shared, normed"])
def test_compiles_in_one_graph(options: dict[str, Any]) -> None:
    layer, x, context = MultiheadAttention(16, 4, **options), torch.randn(2, 5, 16), torch.randn(2, 7, 16)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), layer(x))
    torch.testing.assert_close(compiled(x, context), layer(x, context))
    torch.testing.assert_close(compiled(x, mask=Causal()), layer(x, mask=Causal()))
    torch.testing.assert_close(compiled(x[0], mask=Padding([3])), layer(x[0], mask=Padding([3])))
    compiled(x).sum().backward()


@pytest.mark.parametrize("norm", [None, "rms", "layer"])
def test_narrow_dtypes_and_autocast(norm: Any) -> None:
    layer, x = MultiheadAttention(64, 4, qk_norm=norm), torch.randn(2, 5, 64)
    truth = copy.deepcopy(layer).double()(x.double())
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x, mask=Causal() | ~Causal())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), truth, atol=0.03, rtol=0.03)
    out = layer.bfloat16()(x.bfloat16())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), truth, atol=0.03, rtol=0.03)


def test_projections_are_called() -> None:
    layer, seen = MultiheadAttention(16, 4), list[str]()
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        layer.get_submodule(name).register_forward_hook(lambda *_, name=name: seen.append(name))
    layer(torch.randn(2, 5, 16))
    assert seen == ["q_proj", "k_proj", "v_proj", "out_proj"]


def test_copies() -> None:
    layer, x = MultiheadAttention(16, 4, qk_norm="layer", require=("deterministic",)), torch.randn(2, 5, 16)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))
        assert str(other) == str(layer)


# -- from torch -------------------------------------------------------------------------------------------------------


def test_from_torch_copies() -> None:
    torchs = stock(dropout=0.25)
    torchs.in_proj_weight.requires_grad_(False)  # type: ignore[union-attr]
    state = torch.get_rng_state()
    ours = MultiheadAttention.from_torch(torchs.eval(), backend="reference", require=["deterministic"])
    assert torch.equal(torch.get_rng_state(), state)
    assert (ours.dropout, ours.backend, ours.require, ours.training) == (0.25, "reference", ("deterministic",), False)
    still = {name for name, value in ours.named_parameters() if not value.requires_grad}
    assert still == {"q_proj.weight", "k_proj.weight", "v_proj.weight"}
    x = drawn(2, 5, 16)
    before = ours(x)
    with torch.no_grad():
        for parameter in torchs.parameters():
            parameter.zero_()
    assert torch.equal(ours(x), before)


def test_from_torch_takes_the_weight_that_acts() -> None:
    torchs, x = stock(), drawn(2, 5, 16)
    spectral_norm(torchs, "in_proj_weight")
    spectral_norm(torchs.out_proj)
    torchs.eval()
    torch.testing.assert_close(MultiheadAttention.from_torch(torchs)(x), torchs(x, x, x)[0])


class Other(nn.MultiheadAttention):
    def forward(self, *args: Any, **options: Any) -> Any:
        return super().forward(*args, **options)


def wrapped() -> nn.MultiheadAttention:
    module = stock()
    module.out_proj = nn.Sequential(nn.Linear(16, 16))  # type: ignore[assignment]
    return module


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: stock(add_bias_kv=True), "got add_bias_kv=True"),
        (lambda: stock(add_zero_attn=True), "got add_zero_attn=True"),
        (lambda: Other(16, 4), "got Other with a forward of its own"),
        (lambda: nn.Linear(4, 4), "got a Linear; takes an nn.MultiheadAttention"),
        (wrapped, "got out_proj wrapped as Sequential"),
    ],
    ids=["bias_kv", "zero_attn", "subclass", "linear", "wrapped"],
)
def test_from_torch_refuses(make: Any, words: str) -> None:
    with pytest.raises(RequestError) as refused:
        MultiheadAttention.from_torch(make())
    assert words in str(refused.value)


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, words",
    [
        ({"embed_dim": 10}, "got embed_dim=10 for num_heads=4"),
        ({"kv_heads": 3}, "got num_heads=4 and kv_heads=3"),
        ({"kv_heads": 0}, "kv_heads=0"),
        ({"head_dim": -1}, "head_dim=-1"),
        ({"dropout": 1.0}, "got dropout=1.0"),
        ({"qk_norm": "batch"}, "got qk_norm='batch'; takes 'rms', 'layer' or None"),
    ],
    ids=str,
)
def test_arguments_that_make_no_sense(options: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError) as refused:
        MultiheadAttention(**{"embed_dim": 16, "num_heads": 4, **options})
    assert words in str(refused.value)


@pytest.mark.parametrize("options", [{"backend": "flash9"}, {"require": ("speed",)}, {"require": "speed"}], ids=str)
def test_unknown_names(options: Any) -> None:
    with pytest.raises(UnknownNameError):
        MultiheadAttention(16, 4, **options)


@pytest.mark.parametrize(
    "inputs, words",
    [
        ([(5, 16), (1, 7, 16)], "takes (B, L, C) for each, or (L, C) for each"),
        ([(16,)], "takes (B, L, C) for each"),
        ([(2, 5, 15)], "takes 16 features for x"),
        ([(2, 5, 16), (2, 7, 6)], "takes 16 features for x, 16 for keys, 16 for values: give kdim and vdim"),
        ([(2, 5, 16), (3, 7, 16)], "takes one batch for all"),
    ],
    ids=str,
)
def test_inputs_that_do_not_fit(inputs: list[tuple[int, ...]], words: str) -> None:
    with pytest.raises(RequestError) as refused:
        MultiheadAttention(16, 4)(*(torch.zeros(shape) for shape in inputs))
    assert words in str(refused.value)


def test_what_it_says_of_itself() -> None:
    layer = MultiheadAttention(
        16, 4, 2, dropout=0.1, qk_norm="rms", backend="reference", require="deterministic", vdim=5
    )
    words = "embed_dim=16, num_heads=4, kv_heads=2, head_dim=4, kdim=16, vdim=5, dropout=0.1, qk_norm='rms'"
    assert layer.extra_repr() == f"{words}, backend='reference', require=('deterministic',)"

"""flash_attn.modules.mha: against projections and softmax written out in float64, under flash-attn's names."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from deck import Source
from torch import Tensor, nn

from headway.errors import RequestError
from headway.shims.flash_attn.modules.mha import (
    MHA,
    CrossAttention,
    FlashCrossAttention,
    FlashSelfAttention,
    ParallelMHA,
    SelfAttention,
    get_alibi_slopes,
)

BATCH, LENGTH, HEADS, SIZE = 2, 7, 4, 8
DIM = HEADS * SIZE


@pytest.fixture(autouse=True)
def _no_programs_left() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def drawn(*shape: int, name: str = "x") -> Tensor:
    return Source(name).normal(*shape).requires_grad_()


def plain(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor, bias: Tensor | float = 0.0, scale: float | None = None
) -> Tensor:
    """(batch, length, heads, size) each; keep and bias broadcast to (batch, heads, queries, keys)."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale) + bias
    weights = scores.masked_fill(~keep, -math.inf).softmax(-1).nan_to_num(0.0)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


def distance(queries: int, keys: int) -> Tensor:
    """How far to the right of each query, lined up at the end, each key is."""
    return torch.arange(keys) - torch.arange(queries)[:, None] - (keys - queries)


def band(queries: int, keys: int, causal: bool, window: tuple[int, int] = (-1, -1)) -> Tensor:
    far = distance(queries, keys)
    left, right = window
    right = 0 if causal else right
    return ((left < 0) | (far >= -left)) & ((right < 0) | (far <= right))


def close(mine: Tensor, truth: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(mine, truth)
    push = drawn(*truth.shape, name="cotangent").detach()
    pairs = (torch.autograd.grad(end, inputs, push, allow_unused=True) for end in (mine, truth))
    for one, other in zip(*pairs, strict=True):
        torch.testing.assert_close(one, other)


# -- attention without projections ------------------------------------------------------------------------------------

REAL = torch.tensor([[True] * 4 + [False] * 3, [True] * 7])
HOLES = torch.tensor([[False, True, True, False, True, False, True], [True] * 6 + [False]])


@pytest.mark.parametrize("causal", [False, True, None], ids=["full", "causal", "as built"])
@pytest.mark.parametrize("window", [(-1, -1), (2, 1), (2, -1)], ids=str)
@pytest.mark.parametrize("alibi", [False, True], ids=["", "alibi"])
@pytest.mark.parametrize("scale", [None, 0.2])
def test_flash_self_attention(scale: float | None, alibi: bool, window: tuple[int, int], causal: bool | None) -> None:
    slopes = torch.tensor(get_alibi_slopes(HEADS)) if alibi else None
    attend = FlashSelfAttention(True, scale, 0.0, window, slopes)
    qkv = drawn(BATCH, LENGTH, 3, HEADS, SIZE)
    bias = -distance(LENGTH, LENGTH).abs() * slopes.double()[:, None, None] if slopes is not None else 0.0
    keep = band(LENGTH, LENGTH, causal is not False, window)
    close(attend(qkv, causal), plain(*qkv.unbind(2), keep, bias, scale), [qkv])
    assert not attend.state_dict()


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("queries", [3, 7, 9])
@pytest.mark.parametrize("heads_kv", [HEADS, 2, 1])
def test_flash_cross_attention(heads_kv: int, queries: int, causal: bool) -> None:
    q, kv = drawn(BATCH, queries, HEADS, SIZE), drawn(BATCH, LENGTH, 2, heads_kv, SIZE, name="kv")
    mine = FlashCrossAttention(causal)(q, kv)
    close(mine, plain(q, *kv.unbind(2), band(queries, LENGTH, causal)), [q, kv])


LENGTHS = [3, 0, 1, 6]


def starts(lengths: list[int]) -> Tensor:
    return nn.functional.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("window", [(-1, -1), (2, 0)], ids=str)
def test_packed_sequences_attend_each_to_itself(window: tuple[int, int], causal: bool) -> None:
    qkv = drawn(sum(LENGTHS), 3, HEADS, SIZE)
    mine = FlashSelfAttention(causal, window_size=window)(qkv, cu_seqlens=starts(LENGTHS), max_seqlen=6)
    each = [plain(*x[None].unbind(2), band(len(x), len(x), causal, window))[0] for x in qkv.split(LENGTHS)]
    close(mine, torch.cat(each), [qkv])


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_packed_queries_attend_to_packed_keys(causal: bool) -> None:
    keys = [5, 2, 4, 1]
    q, kv = drawn(sum(LENGTHS), HEADS, SIZE), drawn(sum(keys), 2, 2, SIZE, name="kv")
    mine = FlashCrossAttention(causal)(q, kv, None, starts(LENGTHS), 6, starts(keys), 5)
    each = [
        plain(one[None], *other[None].unbind(2), band(len(one), len(other), causal))[0]
        for one, other in zip(q.split(LENGTHS), kv.split(keys), strict=True)
    ]
    close(mine, torch.cat(each), [q, kv])


@pytest.mark.parametrize("causal", [False, True, None], ids=["full", "causal", "as built"])
@pytest.mark.parametrize("mask", [None, REAL, HOLES], ids=["", "padding", "holes"])
@pytest.mark.parametrize("scale", [None, 0.2])
def test_self_attention_with_a_mask(scale: float | None, mask: Tensor | None, causal: bool | None) -> None:
    qkv = drawn(BATCH, LENGTH, 3, HEADS, SIZE)
    mine = SelfAttention(True, scale)(qkv, causal, mask)
    keep = band(LENGTH, LENGTH, causal is not False)
    keep = keep if mask is None else keep & mask[:, None, None]
    close(mine, plain(*qkv.unbind(2), keep, scale=scale), [qkv])


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("mask", [None, REAL, HOLES], ids=["", "padding", "holes"])
@pytest.mark.parametrize("queries", [2, 7, 9])
@pytest.mark.parametrize("heads_kv", [HEADS, 2])
def test_cross_attention_with_a_mask(heads_kv: int, queries: int, mask: Tensor | None, causal: bool) -> None:
    q, kv = drawn(BATCH, queries, HEADS, SIZE), drawn(BATCH, LENGTH, 2, heads_kv, SIZE, name="kv")
    keep = band(queries, LENGTH, causal)
    if mask is not None:
        ends = mask.sum(-1)[:, None, None, None]
        keep = torch.arange(LENGTH) <= torch.arange(queries)[:, None] + ends - queries if causal else keep
        keep = keep & mask[:, None, None]
    close(CrossAttention(causal)(q, kv, key_padding_mask=mask), plain(q, *kv.unbind(2), keep), [q, kv])


INNER: list[Any] = [FlashSelfAttention, SelfAttention]


@pytest.mark.parametrize("kind", INNER)
def test_dropout_is_of_weights_scaled_and_of_training_alone(kind: Any) -> None:
    length = 64
    q = torch.zeros(8, length, 1, length)
    qkv = torch.stack((q, q, torch.eye(length).expand(8, -1, -1)[:, :, None] * length), 2)  # weights become the result
    attend = kind(attention_dropout=0.25)
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(attend(qkv))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
    dropped = (outs[0] == 0).float().mean()
    assert abs(dropped - 0.25) < 0.02
    kept = outs[0][outs[0] != 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / 0.75))
    torch.testing.assert_close(attend.eval()(qkv), torch.ones(8, length, 1, length))


def test_alibi_slopes_are_those_of_the_paper() -> None:
    assert get_alibi_slopes(8) == [2.0**-i for i in range(1, 9)]
    assert get_alibi_slopes(12) == get_alibi_slopes(8) + get_alibi_slopes(16)[0:8:2]


# -- MHA --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    options: dict[str, Any]
    names: dict[str, tuple[int, ...]]
    """Parameters as flash-attn names and shapes them, but for out_proj."""


KV = 2 * 2 * SIZE
WHOLE = {"Wqkv.weight": (3 * DIM, DIM), "Wqkv.bias": (3 * DIM,)}
GROUPED = {"Wqkv.weight": (DIM + KV, DIM), "Wqkv.bias": (DIM + KV,)}
CROSSED = {"Wq.weight": (DIM, DIM), "Wq.bias": (DIM,), "Wkv.weight": (2 * DIM, DIM), "Wkv.bias": (2 * DIM,)}
CASES = {
    "plain": Case({}, WHOLE),
    "flash": Case({"use_flash_attn": True}, WHOLE),
    "causal": Case({"causal": True, "softmax_scale": 0.2}, WHOLE),
    "no bias": Case({"qkv_proj_bias": False}, {"Wqkv.weight": (3 * DIM, DIM)}),
    "grouped": Case({"num_heads_kv": 2, "causal": True}, GROUPED),
    "grouped flash": Case({"num_heads_kv": 2, "causal": True, "use_flash_attn": True}, GROUPED),
    "window": Case({"use_flash_attn": True, "window_size": (2, 1)}, WHOLE),
    "alibi": Case({"use_flash_attn": True, "use_alibi": True, "causal": True}, WHOLE),
    "rotary": Case({"rotary_emb_dim": SIZE, "causal": True, "use_flash_attn": True}, WHOLE),
    "rotary of a part": Case({"rotary_emb_dim": 4, "rotary_emb_interleaved": True, "num_heads_kv": 2}, GROUPED),
    "xpos": Case({"rotary_emb_dim": SIZE, "rotary_emb_scale_base": 512, "causal": True}, WHOLE),
    "convolved": Case(
        {"dwconv": True, "causal": True},
        WHOLE | {"dwconv_qkv.weight": (3 * DIM, 1, 3), "dwconv_qkv.bias": (3 * DIM,)},
    ),
    "convolved, grouped": Case(
        {"dwconv": True, "num_heads_kv": 2},
        GROUPED
        | {"dwconv_q.weight": (DIM, 1, 3), "dwconv_q.bias": (DIM,)}
        | {"dwconv_kv.weight": (KV, 1, 3), "dwconv_kv.bias": (KV,)},
    ),
    "checkpointed": Case({"checkpointing": True, "use_flash_attn": True}, WHOLE),
    "checkpointed, grouped": Case({"checkpointing": True, "num_heads_kv": 2}, GROUPED),
    "cross": Case({"cross_attn": True}, CROSSED),
    "cross, flash": Case({"cross_attn": True, "use_flash_attn": True}, CROSSED),
}  # fmt: skip


def built(options: dict[str, Any]) -> MHA:
    torch.manual_seed(1)
    return MHA(DIM, HEADS, dtype=torch.float64, **options)


def turned(x: Tensor, dim: int, interleaved: bool, xpos: float | None, sign: int) -> Tensor:
    """Rotary embeddings by complex numbers; XPos grows queries (+1) and shrinks keys (-1)."""
    length = x.shape[1]
    places = torch.arange(length, dtype=torch.float32)
    angles = torch.outer(places, 10000.0 ** -(torch.arange(0, dim, 2, dtype=torch.float32) / dim)).double()
    size = torch.ones(1, 1)
    if xpos is not None:
        zeta = (torch.arange(0, dim, 2) + 0.4 * dim) / (1.4 * dim)
        size = zeta ** (sign * (places - length // 2) / xpos)[:, None]
    unit = torch.polar(size.double().expand_as(angles), angles)[:, None]
    head, tail = x[..., :dim], x[..., dim:]
    apart = (head[..., 0::2], head[..., 1::2]) if interleaved else head.chunk(2, -1)
    product = torch.complex(*apart) * unit
    ends = (product.real, product.imag)
    return torch.cat((torch.stack(ends, -1).flatten(-2) if interleaved else torch.cat(ends, -1), tail), -1)


def by_hand(
    mha: MHA, options: dict[str, Any], x: Tensor, x_kv: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    weights = dict(mha.named_parameters())

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", torch.zeros(()))

    def convolved(name: str, x: Tensor) -> Tensor:
        if not options.get("dwconv"):
            return x
        taps, length = weights[f"{name}.weight"][:, 0], x.shape[1]
        past = nn.functional.pad(x, (0, 0, 2, 0))
        return sum((past[:, i : i + length] * taps[:, i] for i in range(3)), weights[f"{name}.bias"])

    heads_kv = options.get("num_heads_kv", HEADS)
    if options.get("cross_attn"):
        q, kv = linear("Wq", x), linear("Wkv", x if x_kv is None else x_kv)
    elif heads_kv == HEADS:
        q, kv = convolved("dwconv_qkv", linear("Wqkv", x)).split([DIM, 2 * DIM], -1)
    else:
        q, kv = linear("Wqkv", x).split([DIM, 2 * heads_kv * SIZE], -1)
        q, kv = convolved("dwconv_q", q), convolved("dwconv_kv", kv)
    q, k, v = (y.unflatten(-1, (-1, SIZE)) for y in (q, *kv.chunk(2, -1)))
    if dim := options.get("rotary_emb_dim", 0):
        how = (dim, options.get("rotary_emb_interleaved", False), options.get("rotary_emb_scale_base"))
        q, k = turned(q, *how, 1), turned(k, *how, -1)
    lengths = q.shape[1], k.shape[1]
    keep = band(*lengths, options.get("causal", False), options.get("window_size", (-1, -1)))
    keep = keep if mask is None else keep & mask[:, None, None]
    slopes = torch.tensor(get_alibi_slopes(HEADS)).double()[:, None, None]
    bias = -distance(*lengths).abs() * slopes if options.get("use_alibi") else 0.0
    return linear("out_proj", plain(q, k, v, keep, bias, options.get("softmax_scale")).flatten(2))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_parameters_have_flash_attns_names_and_shapes(case: Case) -> None:
    found = {name: tuple(each.shape) for name, each in built(case.options).state_dict().items()}
    assert found == case.names | {"out_proj.weight": (DIM, DIM), "out_proj.bias": (DIM,)}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_mha_is_its_projections_and_attention(case: Case) -> None:
    mha, x = built(case.options), drawn(BATCH, LENGTH, DIM)
    near = {"rtol": 1e-5, "atol": 1e-6} if "rotary_emb_scale_base" in case.options else {}
    truth = by_hand(mha, case.options, x)
    torch.testing.assert_close(mha(x), truth, **near)
    if not near:
        close(mha(x), truth, [x, *mha.parameters()])


@pytest.mark.parametrize("use_flash_attn", [False, True], ids=["", "flash"])
def test_cross_attention_asks_of_another_text_and_for_some_tokens(use_flash_attn: bool) -> None:
    options = {"cross_attn": True, "use_flash_attn": use_flash_attn}
    mha, x, other = built(options), drawn(BATCH, LENGTH, DIM), drawn(BATCH, 5, DIM, name="other")
    close(mha(x, other), by_hand(mha, options, x, other), [x, other])
    some = torch.tensor([0, 3])
    torch.testing.assert_close(mha(x, mixer_subset=some), mha(x)[:, some])


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"num_heads_kv": 2}], ids=str)
def test_packed_and_padded_batches_agree(options: dict[str, Any]) -> None:
    padded, packed = built(options), built(options | {"use_flash_attn": True})
    packed.load_state_dict(padded.state_dict())
    x = drawn(BATCH, LENGTH, DIM)
    if options.get("num_heads_kv"):
        want = padded(x, key_padding_mask=REAL)
    else:
        want = by_hand(padded, options, x, mask=REAL)
        torch.testing.assert_close(padded(x, key_padding_mask=REAL), want)
    mine = packed(x[REAL], cu_seqlens=starts([4, 7]), max_seqlen=7)
    close(mine, want[REAL], [x])


def test_cross_attention_over_packed_sequences() -> None:
    mha = built({"cross_attn": True, "use_flash_attn": True})
    x, other, keys = drawn(sum(LENGTHS), DIM), drawn(12, DIM, name="other"), [5, 2, 4, 1]
    mine = mha(x, other, cu_seqlens=starts(LENGTHS), max_seqlen=6, cu_seqlens_k=starts(keys), max_seqlen_k=5)
    each = [
        by_hand(mha, {"cross_attn": True}, one[None], two[None])[0]
        for one, two in zip(x.split(LENGTHS), other.split(keys), strict=True)
    ]
    close(mine, torch.cat(each), [x, other])


def test_the_input_is_returned_if_asked_for() -> None:
    mha, x = built({"return_residual": True}), drawn(BATCH, LENGTH, DIM)
    out, same = mha(x)
    assert same is x
    torch.testing.assert_close(out, by_hand(mha, {}, x))


def test_a_call_may_be_causal_where_the_module_is_not() -> None:
    mha, x = built({"use_flash_attn": True}), drawn(BATCH, LENGTH, DIM)
    torch.testing.assert_close(mha(x, causal=True), by_hand(mha, {"causal": True}, x))


@pytest.mark.parametrize("name", ["flash", "grouped flash", "rotary", "alibi", "plain"])
def test_mha_compiles_whole(name: str) -> None:
    mha, x = built(CASES[name].options), drawn(BATCH, LENGTH, DIM)
    mine = torch.compile(mha, fullgraph=True, backend="aot_eager")(x)
    close(mine, mha(x), [x, *mha.parameters()])


# -- generation -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Cache:
    """What flash_attn.utils.generation.InferenceParams has."""

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    batch_size_offset: int = 0
    key_value_memory_dict: dict[Any, Tensor] = dataclasses.field(default_factory=dict)
    lengths_per_sample: Tensor | None = None


GENERATE = {
    "flash": {"use_flash_attn": True},
    "plain": {},
    "grouped": {"use_flash_attn": True, "num_heads_kv": 2},
    "grouped, plain": {"num_heads_kv": 2},
    "rotary": {"use_flash_attn": True, "rotary_emb_dim": SIZE},
    "rotary, grouped": {"use_flash_attn": True, "rotary_emb_dim": 4, "num_heads_kv": 1, "rotary_emb_interleaved": True},
    "window": {"use_flash_attn": True, "window_size": (2, -1)},
    "alibi": {"use_flash_attn": True, "use_alibi": True},
    "scaled": {"use_flash_attn": True, "softmax_scale": 0.2},
}


@pytest.mark.parametrize("steps", [[4, 1, 1, 1], [1] * 7, [3, 4]], ids=str)
@pytest.mark.parametrize("options", GENERATE.values(), ids=GENERATE)
def test_tokens_one_after_another_are_the_whole_text(options: dict[str, Any], steps: list[int]) -> None:
    options = options | {"causal": True}
    mha, x = built(options | {"layer_idx": 3}).eval(), drawn(BATCH, LENGTH, DIM).detach()
    cache = Cache(max_seqlen=9, max_batch_size=3)
    outs = []
    with torch.no_grad():
        for part in x.split(steps, 1):
            outs.append(mha(part, inference_params=cache))
            cache.seqlen_offset += part.shape[1]
    torch.testing.assert_close(torch.cat(outs, 1), by_hand(mha, options, x).detach())
    assert cache.key_value_memory_dict.keys() == {3}


@pytest.mark.parametrize("options", GENERATE.values(), ids=GENERATE)
def test_texts_of_several_lengths_go_on_each_from_its_own_end(options: dict[str, Any]) -> None:
    options = options | {"causal": True}
    mha, x = built(options | {"layer_idx": 0}).eval(), drawn(BATCH, LENGTH, DIM).detach()
    memory = {0: mha.allocate_inference_cache(4, 9).fill_(math.nan)}
    cache = Cache(9, 4, batch_size_offset=1, key_value_memory_dict=memory)
    lengths, longest = [3, 5], 5
    with torch.no_grad():
        mha(x[:, :longest], inference_params=cache)
        cache.seqlen_offset, cache.lengths_per_sample = longest, torch.tensor(lengths).int()
        new = torch.stack([x[i, n : n + 1] for i, n in enumerate(lengths)])
        out = mha(new, inference_params=cache)
    truth = torch.stack([by_hand(mha, options, x[i : i + 1, : n + 1])[0, -1:] for i, n in enumerate(lengths)])
    torch.testing.assert_close(out, truth.detach())
    assert memory[0][[0, 3]].isnan().all()
    assert not memory[0][1:3, :longest].isnan().any()


# -- what is refused --------------------------------------------------------------------------------------------------

X, PACKED, MASK = torch.zeros(BATCH, LENGTH, DIM), torch.zeros(9, DIM), torch.ones(BATCH, LENGTH, dtype=torch.bool)
FLASH = {"use_flash_attn": True}
CU = {"cu_seqlens": starts([9]), "max_seqlen": 9}


def call(options: dict[str, Any], x: Tensor = X, **inputs: Any) -> Callable[[], Any]:
    return lambda: MHA(DIM, HEADS, **options)(x, **inputs)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "heads of no whole size": (lambda: MHA(DIM, 3), "got embed_dim=32, num_heads=3"),
    "no whole number of heads to a key": (lambda: MHA(DIM, 4, 3), "num_heads_kv=3"),
    "a window without flash": (lambda: MHA(DIM, HEADS, window_size=(2, 0)), "takes use_flash_attn=True"),
    "alibi without flash": (lambda: MHA(DIM, HEADS, use_alibi=True), "takes use_flash_attn=True"),
    "rotary across": (lambda: MHA(DIM, HEADS, cross_attn=True, rotary_emb_dim=4), "rotary_emb_dim=4 with cross_attn"),
    "lengths alone": (call(FLASH, PACKED, cu_seqlens=starts([9])), "got cu_seqlens or max_seqlen alone"),
    "a longest alone": (call(FLASH, max_seqlen=9), "got cu_seqlens or max_seqlen alone"),
    "lengths without flash": (call({}, PACKED, **CU), "got cu_seqlens in MHA, takes it with use_flash_attn"),
    "lengths with rotary": (call(FLASH | {"rotary_emb_dim": 4}, PACKED, **CU), "got cu_seqlens with rotary_emb_dim"),
    "lengths with convolution": (call(FLASH | {"dwconv": True}, PACKED, **CU), "got cu_seqlens with dwconv"),
    "lengths and a mask": (call(FLASH, PACKED, key_padding_mask=MASK, **CU), "got cu_seqlens and key_padding_mask"),
    "a mask with flash": (call(FLASH, key_padding_mask=MASK), "got key_padding_mask with use_flash_attn=True"),
    "a mask of ones": (call({}, key_padding_mask=MASK.int()), "takes bool, True for real keys"),
    "a mask, causal, grouped": (
        call({"num_heads_kv": 2, "causal": True}, key_padding_mask=MASK),
        "got key_padding_mask with causal and fewer key heads",
    ),
    "another text without cross": (call({}, x_kv=X), "got x_kv without cross_attn"),
    "another text, grouped": (call({"num_heads_kv": 2}, x_kv=X), "got x_kv without cross_attn"),
    "a subset without cross": (call({"num_heads_kv": 2}, mixer_subset=0), "got mixer_subset without cross_attn"),
    "a cache beside a mask": (
        call({"layer_idx": 0}, inference_params=Cache(9, 2), key_padding_mask=MASK), "inference_params beside masks",
    ),
    "a cache without a layer": (call({}, inference_params=Cache(9, 2)), "got inference_params without layer_idx"),
    "a cache and convolution": (call({"dwconv": True, "layer_idx": 0}, inference_params=Cache(9, 2)), "with dwconv"),
    "a cache too short": (call({"layer_idx": 0}, inference_params=Cache(5, 2)), "takes what a cache [2, 5,"),
    "a cache too small": (call({"layer_idx": 0}, inference_params=Cache(9, 1)), "takes what a cache [1, 9,"),
    "a group": (lambda: ParallelMHA(DIM, HEADS, object()), "got ParallelMHA"),
    "unpacked qkv": (lambda: SelfAttention()(X), "takes (batch, length, 3, heads, head_dim)"),
    "unpacked kv": (lambda: CrossAttention()(X, X), "(batch, length, 2, key heads, head_dim)"),
    "lengths of queries alone": (
        lambda: FlashCrossAttention()(PACKED, PACKED, cu_seqlens=starts([9]), max_seqlen=9),
        "got no cu_seqlens_k and no max_seqlen_k",
    ),
    "a longest alone to the inner": (lambda: FlashSelfAttention()(X, max_seqlen=3), "got no cu_seqlens"),
}  # fmt: skip


@pytest.mark.parametrize(("run", "words"), REFUSED.values(), ids=REFUSED)
def test_is_refused_in_words(run: Callable[[], Any], words: str) -> None:
    with pytest.raises(RequestError) as refusal:
        run()
    assert words in str(refusal.value)

"""flash_attn.layers.rotary: against multiplication by complex numbers of length 1, in float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from deck import Source
from torch import Tensor

from headway.errors import RequestError
from headway.shims.flash_attn.layers.rotary import (
    RotaryEmbedding,
    apply_rotary_emb,
    apply_rotary_emb_kv_,
    apply_rotary_emb_qkv_,
    apply_rotary_emb_torch,
    rotate_half,
)
from headway.shims.flash_attn.ops.triton.rotary import apply_rotary

BATCH, LENGTH, HEADS, SIZE, ROWS = 3, 7, 2, 16, 12


@pytest.fixture(autouse=True)
def _no_programs_left() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def drawn(*shape: int, name: str = "x") -> Tensor:
    return Source(name).normal(*shape)


def tables(turned: int = SIZE, rows: int = ROWS, name: str = "angles") -> tuple[Tensor, Tensor]:
    angles = drawn(rows, turned // 2, name=name)
    return angles.cos(), angles.sin()


def turned(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """x (..., tokens, heads, size) with pairs as complex numbers, at positions (..., tokens)."""
    pairs = cos.shape[-1]
    head, tail = x[..., : 2 * pairs], x[..., 2 * pairs :]
    apart = (head[..., 0::2], head[..., 1::2]) if interleaved else (head[..., :pairs], head[..., pairs:])
    unit = torch.complex(cos, sin)[positions].unsqueeze(-2)
    product = torch.complex(*apart) * unit
    ends = (product.real, product.imag)
    joined = torch.stack(ends, -1).flatten(-2) if interleaved else torch.cat(ends, -1)
    return torch.cat((joined, tail), -1)


OFFSETS: dict[str, Any] = {
    "from 0": 0,
    "from 5": 5,
    "per row": torch.tensor([0, 5, 2]),
    "per row, int32": torch.tensor([5, 1, 0], dtype=torch.int32),
}


def places(offsets: Any) -> Tensor:
    return torch.as_tensor(offsets).view(-1, 1).expand(BATCH, 1) + torch.arange(LENGTH)


def learnt(run: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
    """What comes out, and gradients of the inputs for a fixed random cotangent."""
    out = run(*inputs)
    return out.detach(), *torch.autograd.grad(out, inputs, drawn(*out.shape, name="cotangent").to(out.dtype))


@pytest.mark.parametrize("inplace", [False, True], ids=["new", "in place"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "neighbours"])
@pytest.mark.parametrize("offsets", OFFSETS.values(), ids=OFFSETS)
@pytest.mark.parametrize(
    ("rotary_dim", "compiled"), [(SIZE, False), (10, False), (10, True)], ids=["whole heads", "parts", "compiled"]
)
def test_each_pair_is_turned_by_the_angle_of_its_position(
    rotary_dim: int, offsets: Any, interleaved: bool, inplace: bool, compiled: bool
) -> None:
    cos, sin = tables(rotary_dim)

    def ours(x: Tensor) -> Tensor:
        made = x * 2  # not a leaf
        out = apply_rotary_emb(made, cos, sin, interleaved, inplace, offsets)
        return out + 0 * made if inplace else out

    x = drawn(BATCH, LENGTH, HEADS, SIZE).requires_grad_()
    run = torch.compile(ours, fullgraph=True, backend="aot_eager") if compiled else ours
    truth = learnt(lambda x: turned(2 * x, cos, sin, places(offsets), interleaved), x)
    for mine, true in zip(learnt(run, x), truth, strict=True):
        torch.testing.assert_close(mine, true)


LENGTHS = {"ragged": [3, 0, 1, 5], "one": [9], "some at the end empty": [9, 0, 0], "nothing": [0]}


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "neighbours"])
@pytest.mark.parametrize("offset", [0, 2, "each"])
@pytest.mark.parametrize("inplace", [False, True], ids=["new", "in place"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_packed_sequences_each_start_at_their_own_offset(
    lengths: list[int], inplace: bool, offset: Any, interleaved: bool
) -> None:
    cos, sin = tables()
    x = drawn(sum(lengths), HEADS, SIZE).requires_grad_()
    offsets = torch.arange(len(lengths)) if offset == "each" else offset
    starts = torch.nn.functional.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
    own = [torch.arange(length) + (i if offset == "each" else offset) for i, length in enumerate(lengths)]
    mine = learnt(lambda x: apply_rotary_emb(x * 1, cos, sin, interleaved, inplace, offsets, starts, max(lengths)), x)
    for one, true in zip(mine, learnt(lambda x: turned(x, cos, sin, torch.cat(own), interleaved), x), strict=True):
        torch.testing.assert_close(one, true)


def parts(x: Tensor, heads_q: int | None) -> tuple[Tensor, Tensor, Tensor]:
    if x.dim() == 5:
        return x.unbind(2)
    others = (x.shape[2] - (heads_q or 0)) // 2
    return x.split([heads_q or 0, others, others], 2)


@pytest.mark.parametrize("leaf", [True, False], ids=["leaf", "made"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "neighbours"])
@pytest.mark.parametrize("offsets", OFFSETS.values(), ids=OFFSETS)
@pytest.mark.parametrize("own_k", [False, True], ids=["shared tables", "tables for keys"])
@pytest.mark.parametrize("heads_q", [None, 4])
@pytest.mark.parametrize("rotary_dim", [SIZE, 10])
def test_qkv_is_turned_in_place_and_its_values_are_left(
    rotary_dim: int, heads_q: int | None, own_k: bool, offsets: Any, interleaved: bool, leaf: bool
) -> None:
    (cos, sin), (cos_k, sin_k) = tables(rotary_dim), tables(rotary_dim, name="keys")
    shape = (BATCH, LENGTH, 3, HEADS, SIZE) if heads_q is None else (BATCH, LENGTH, heads_q + 2 * HEADS, SIZE)
    x = drawn(*shape).requires_grad_()
    known = x.detach().clone()
    written: list[Tensor] = []

    def ours(x: Tensor) -> Tensor:
        qkv = x if leaf else x * 1
        keys = (cos_k, sin_k) if own_k else (None, None)
        out = apply_rotary_emb_qkv_(qkv, cos, sin, *keys, interleaved, offsets, heads_q)
        written.append(qkv.detach())
        return out

    def plain(x: Tensor) -> Tensor:
        q, k, v = parts(x, heads_q)
        q = turned(q, cos, sin, places(offsets), interleaved)
        k = turned(k, *((cos_k, sin_k) if own_k else (cos, sin)), places(offsets), interleaved)
        return torch.stack((q, k, v), 2) if heads_q is None else torch.cat((q, k, v), 2)

    mine, truth = learnt(ours, x), learnt(plain, known.requires_grad_())
    for one, true in zip(mine, truth, strict=True):
        torch.testing.assert_close(one, true)
    torch.testing.assert_close(written[0], truth[0])


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "neighbours"])
@pytest.mark.parametrize("offsets", OFFSETS.values(), ids=OFFSETS)
def test_keys_of_kv_are_turned_in_place(offsets: Any, interleaved: bool) -> None:
    cos, sin = tables()
    x = drawn(BATCH, LENGTH, 2, HEADS, SIZE).requires_grad_()
    mine = learnt(lambda x: apply_rotary_emb_kv_(x * 1, cos, sin, interleaved, offsets), x)
    truth = learnt(
        lambda x: torch.stack((turned(x[:, :, 0], cos, sin, places(offsets), interleaved), x[:, :, 1]), 2), x
    )
    for one, true in zip(mine, truth, strict=True):
        torch.testing.assert_close(one, true)


VIEWS = {
    "a leaf's view": lambda x: x[:, :, 0],
    "one of several views": lambda x: (x * 1).unbind(2)[0],
    "a view of one of several": lambda x: (x * 1).unbind(2)[0].transpose(1, 2).transpose(1, 2),
    "a view": lambda x: (x * 1)[:, :, 0],
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_what_autograd_lets_nobody_write_to_is_written_and_gets_its_gradient(view: Any) -> None:
    cos, sin = tables()
    x = drawn(BATCH, LENGTH, 3, HEADS, SIZE).requires_grad_()
    known = x.detach().clone().requires_grad_()
    q = view(x)
    out = apply_rotary_emb(q, cos, sin, inplace=True)
    true = turned(known[:, :, 0], cos, sin, places(0), False)
    torch.testing.assert_close(q.detach(), true.detach())
    for end in (out, true):
        end.backward(drawn(*end.shape, name="cotangent"))
    torch.testing.assert_close(x.grad, known.grad)


def test_in_place_is_the_same_memory() -> None:
    qkv = drawn(BATCH, LENGTH, 3, HEADS, SIZE)
    assert apply_rotary_emb_qkv_(qkv, *tables()) is qkv
    grown = qkv.requires_grad_() * 1
    assert apply_rotary_emb_qkv_(grown, *tables()) is grown


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "neighbours"])
def test_conjugate_turns_back(interleaved: bool) -> None:
    x, (cos, sin) = drawn(BATCH, LENGTH, HEADS, SIZE), tables()
    there = apply_rotary(x, cos, sin, 3, interleaved=interleaved)
    torch.testing.assert_close(apply_rotary(there, cos, sin, 3, interleaved=interleaved, conjugate=True), x)


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "neighbours"])
def test_the_plain_function_takes_tables_of_each_row(interleaved: bool) -> None:
    x, (cos, sin) = drawn(BATCH, LENGTH, HEADS, SIZE), tables(10)
    at = places(OFFSETS["per row"])
    truth = turned(x, cos, sin, at, interleaved)
    torch.testing.assert_close(apply_rotary_emb_torch(x, cos[at], sin[at], interleaved), truth)
    cos, sin = (t[at].repeat_interleave(2, -1) if interleaved else t[at].repeat(1, 1, 2) for t in (cos, sin))
    head = x[..., :10]
    by_half = head * cos.unsqueeze(2) + rotate_half(head, interleaved) * sin.unsqueeze(2)
    torch.testing.assert_close(by_half, truth[..., :10])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_halves_are_turned_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    x, (cos, sin) = drawn(BATCH, LENGTH, HEADS, SIZE).to(dtype), tables()
    out = apply_rotary_emb(x, cos.to(dtype), sin.to(dtype))
    assert out.dtype == dtype
    truth = turned(x.double(), cos.to(dtype).double(), sin.to(dtype).double(), places(0), False)
    torch.testing.assert_close(out, truth.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_no_tables_learn_as_in_flash_attn() -> None:
    x, (cos, sin) = drawn(BATCH, LENGTH, HEADS, SIZE).requires_grad_(), tables()
    out = apply_rotary_emb(x, cos.requires_grad_(), sin)
    out.sum().backward()
    assert cos.grad is None
    assert x.grad is not None


# -- the module -------------------------------------------------------------------------------------------------------


def by_definition(
    length: int, dim: int, base: float, scale_base: float | None
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Tables for queries and keys; angles are rounded to float32, as published."""
    inv_freq = 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    angles = torch.outer(torch.arange(length, dtype=torch.float32), inv_freq).double()
    if scale_base is None:
        return ((angles.cos(), angles.sin()),) * 2
    xi = (torch.arange(0, dim, 2).double() + 0.4 * dim) / (1.4 * dim)
    scale = xi ** ((torch.arange(length).double() - length // 2) / scale_base)[:, None]
    return (angles.cos() * scale, angles.sin() * scale), (angles.cos() / scale, angles.sin() / scale)


@pytest.mark.parametrize("offset", [0, 4, torch.tensor([0, 3, 1])], ids=["from 0", "from 4", "per row"])
@pytest.mark.parametrize("form", ["qkv", "grouped", "q and kv"])
@pytest.mark.parametrize("scale_base", [None, 512], ids=["rotary", "xpos"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "neighbours"])
def test_the_embedding_makes_its_tables(interleaved: bool, scale_base: int | None, form: str, offset: Any) -> None:
    rotary = RotaryEmbedding(10, base=100.0, interleaved=interleaved, scale_base=scale_base)
    assert not rotary.state_dict()
    per_row = isinstance(offset, Tensor)
    q_tables, k_tables = by_definition(11 if per_row else LENGTH + offset, 10, 100.0, scale_base)
    shapes = {"qkv": (3, HEADS), "grouped": (4 + 2 * HEADS,), "q and kv": (4,)}
    x = drawn(BATCH, LENGTH, *shapes[form], SIZE)
    kv = drawn(BATCH, LENGTH, 2, HEADS, SIZE, name="kv")
    q, k, v = (x, *kv.unbind(2)) if form == "q and kv" else parts(x, 4)
    q, k = turned(q, *q_tables, places(offset), interleaved), turned(k, *k_tables, places(offset), interleaved)
    longest = 11 if per_row else None
    close = {"rtol": 1e-5, "atol": 1e-5} if scale_base else {}
    if form == "q and kv":
        out, both = rotary(x.clone(), kv.clone(), offset, longest)
        torch.testing.assert_close(out, q, **close)
        torch.testing.assert_close(both, torch.stack((k, v), 2), **close)
    else:
        out = rotary(x.clone(), None, offset, longest, 4 if form == "grouped" else None)
        torch.testing.assert_close(
            out, torch.stack((q, k, v), 2) if form == "qkv" else torch.cat((q, k, v), 2), **close
        )


def test_tables_grow_are_kept_and_follow_the_dtype() -> None:
    rotary = RotaryEmbedding(SIZE)
    rotary(drawn(1, 5, 3, 1, SIZE))
    short = rotary._cos_cached
    rotary(drawn(1, 3, 3, 1, SIZE))
    assert rotary._cos_cached is short
    rotary(drawn(1, 9, 3, 1, SIZE))
    assert rotary._cos_cached is not None
    assert rotary._cos_cached.shape == (9, SIZE // 2)
    rotary(drawn(1, 3, 3, 1, SIZE).bfloat16())
    assert rotary._cos_cached.dtype == torch.bfloat16


def test_a_module_cast_to_half_still_has_float32_angles() -> None:
    wide, narrow = RotaryEmbedding(SIZE), RotaryEmbedding(SIZE).bfloat16()
    for rotary in (wide, narrow):
        rotary(drawn(1, 200, 3, 1, SIZE).float())
    assert wide._cos_cached is not None
    torch.testing.assert_close(narrow._cos_cached, wide._cos_cached)


def test_tables_made_in_inference_mode_do_not_stop_training() -> None:
    rotary = RotaryEmbedding(SIZE)
    with torch.inference_mode():
        rotary(drawn(1, 5, 3, 1, SIZE))
    x = drawn(1, 5, 3, 1, SIZE).requires_grad_()
    rotary(x * 1).sum().backward()
    assert x.grad is not None


def test_the_embedding_compiles_whole() -> None:
    rotary = RotaryEmbedding(SIZE, scale_base=512)
    x = drawn(BATCH, LENGTH, 3, HEADS, SIZE)
    run = torch.compile(lambda x: rotary(x * 1), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(x), RotaryEmbedding(SIZE, scale_base=512)(x.clone()))


# -- what is refused --------------------------------------------------------------------------------------------------

X, PACKED = (BATCH, LENGTH, HEADS, SIZE), (9, HEADS, SIZE)
REFUSED: dict[str, tuple[tuple[int, ...], dict[str, Any], str]] = {
    "table too short": (X, {"seqlen_offsets": 6}, "got cos and sin of 12 rows for 7 tokens from position 6"),
    "negative offset": (X, {"seqlen_offsets": -1}, "from position -1"),
    "offset past the table": (X, {"seqlen_offsets": torch.tensor([0, 6, 0])}, "got positions outside cos and sin"),
    "negative row offset": (X, {"seqlen_offsets": torch.tensor([0, -1, 0])}, "got positions outside cos and sin"),
    "offsets of another batch": (X, {"seqlen_offsets": torch.tensor([0, 0])}, "takes an int, or int32 or int64 (3,)"),
    "offsets of floats": (X, {"seqlen_offsets": torch.zeros(BATCH)}, "takes an int, or int32 or int64 (3,)"),
    "packed without lengths": (PACKED, {}, "takes (batch, length, heads, head_dim)"),
    "a batch with lengths": (X, {"cu_seqlens": torch.tensor([0, 9])}, "or (tokens, heads, head_dim)"),
    "no max_seqlen": (PACKED, {"cu_seqlens": torch.tensor([0, 9])}, "got cu_seqlens without max_seqlen"),
    "no leading 0": (PACKED, {"cu_seqlens": torch.tensor([4, 9]), "max_seqlen": 9}, "do not rise from 0 to 9"),
    "not to the end": (PACKED, {"cu_seqlens": torch.tensor([0, 8]), "max_seqlen": 9}, "do not rise from 0 to 9"),
    "decreasing": (PACKED, {"cu_seqlens": torch.tensor([0, 5, 3, 9]), "max_seqlen": 9}, "do not rise from 0 to 9"),
    "max_seqlen too small": (PACKED, {"cu_seqlens": torch.tensor([0, 9]), "max_seqlen": 8}, "at most max_seqlen=8"),
    "lengths of floats": (PACKED, {"cu_seqlens": torch.tensor([0.0, 9.0]), "max_seqlen": 9}, "takes 1-D int32"),
}


@pytest.mark.parametrize(("shape", "options", "words"), REFUSED.values(), ids=REFUSED)
def test_is_refused_in_words_and_changes_nothing(shape: tuple[int, ...], options: dict[str, Any], words: str) -> None:
    x = drawn(*shape)
    known = x.clone()
    with pytest.raises(RequestError) as refusal:
        apply_rotary_emb(x, *tables(), inplace=True, **options)
    assert words in str(refusal.value)
    assert torch.equal(x, known)


@pytest.mark.parametrize("cos", [torch.ones(ROWS, SIZE), torch.ones(ROWS, 3), torch.ones(SIZE // 2)], ids=str)
def test_tables_that_do_not_fit_are_refused(cos: Tensor) -> None:
    with pytest.raises(RequestError, match="takes the same"):
        apply_rotary_emb(drawn(*X), cos, torch.ones(ROWS, SIZE))


def test_other_shapes_are_refused() -> None:
    with pytest.raises(RequestError, match="num_heads_q=None"):
        apply_rotary_emb_qkv_(drawn(BATCH, LENGTH, 8, SIZE), *tables())
    with pytest.raises(RequestError, match="num_heads_q=3"):
        apply_rotary_emb_qkv_(drawn(BATCH, LENGTH, 8, SIZE), *tables(), num_heads_q=3)
    with pytest.raises(RequestError, match="takes .batch, length, 2"):
        apply_rotary_emb_kv_(drawn(BATCH, LENGTH, 3, HEADS, SIZE), *tables())
    with pytest.raises(RequestError, match="takes max_seqlen with it"):
        RotaryEmbedding(SIZE)(drawn(BATCH, LENGTH, 3, HEADS, SIZE), seqlen_offset=torch.tensor([0, 1, 2]))
    with pytest.raises(RequestError, match="beside kv"):
        RotaryEmbedding(SIZE)(drawn(*X), drawn(BATCH, LENGTH, 2, HEADS, SIZE), num_heads_q=2)

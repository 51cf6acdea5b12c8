"""Tests of Hugging Face models swapped: the same answers, nothing lost on the way, and all of it undone."""

from __future__ import annotations

import ast
import copy
import functools
import importlib
import io
import pickle
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import fresh
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask

import headway
from headway.errors import RequestError, SwapError
from headway.masks import Causal, Documents, Padding, Window
from headway.sites import transformers as ours
from headway.sites.site import HELD, Site, Ticket, site_of

tf = pytest.importorskip("transformers")
from sites.test_transformers_models import (  # noqa: E402
    BASE,
    DECODERS,
    ENCODERS,
    FLAGS,
    GQA,
    answers,
    decoder,
    filled,
    ids,
    numbers,
    real,
    swap,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers.*"),
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers.*"),
]


def attention_of(model: Any) -> list[nn.Module]:
    return [site.module for site in ours.find(model)]


def state(model: nn.Module) -> list[Any]:
    """All objects of all modules and configs, to be compared by identity."""
    configs = {id(c): c for m in model.modules() if (c := m.__dict__.get("config")) is not None}
    held = [(id(m), type(m), key, id(value)) for m in model.modules() for key, value in m.__dict__.items()]
    return held + [(at, type(c), key, id(value)) for at, c in configs.items() for key, value in c.__dict__.items()]


@pytest.fixture(scope="module", autouse=True)
def _registered() -> None:
    ours.register()


@functools.cache
def llama() -> Any:
    """One model for tests that leave it as it was."""
    return decoder("llama")


@pytest.mark.parametrize("side", ["left", "right", "none"])
def test_dropout_is_the_callers(side):
    model = filled(tf.AutoModelForCausalLM.from_config(tf.LlamaConfig(**GQA, attention_dropout=0.5)))
    inputs = {"input_ids": ids(2, 9), "attention_mask": real(side) if side != "none" else None}
    swap(model)
    assert torch.equal(model(**inputs).logits, model(**inputs).logits)
    model.train()
    assert not torch.allclose(model(**inputs).logits, model(**inputs).logits)


# -- masks ------------------------------------------------------------------------------------------------------------


def test_a_left_padded_row_is_as_if_it_were_alone():
    # Registered without its mask function, attention sees the filler: 0.17 off in the logits (L3).
    model = llama()
    model.set_attn_implementation("headway")
    padded = model(ids(2, 9), attention_mask=real("left"), position_ids=_positions(real("left"))).logits[0, 3:]
    alone = model(ids(2, 9)[:1, 3:]).logits[0]
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(padded, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("batch", [lambda m, a: (m, a), lambda m, a: {"input_ids": m, "attention_mask": a}])
def test_filler_is_left_out_of_a_proof_however_the_mask_is_given(batch):
    # Eager attention makes the mean of all values of a row that sees nothing, and its gradients are no one's.
    model = copy.deepcopy(llama())
    model.set_attn_implementation("eager")
    assert headway.swap(model, batch(ids(2, 9), real("left"))).certificate.passed


def _positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(1) - 1).clamp_min(0)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gpt_oss", "qwen3"])
def test_packed_documents_do_not_leak(name):
    # axolotl#3796: one document's change moved another's logits.
    model = decoder(name)
    model.set_attn_implementation("headway")
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]])
    tokens = ids(1, 9)
    other = tokens.clone()
    other[:, :5] = ids(1, 5, seed=1)
    wants = {"position_ids": positions, **FLAGS}
    if name == "gpt_oss":  # it makes its masks without positions, and leaks with eager attention too
        starts = torch.tensor([0, 5, 9], dtype=torch.int32)
        wants |= {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": 5, "max_length_k": 5}
    one, two = (model(x, **wants).logits[0] for x in (tokens, other))
    assert not torch.allclose(one[:5], two[:5])
    _same(name, one[5:], two[5:])
    alone = model(tokens[:, 5:], **FLAGS).logits[0]
    torch.testing.assert_close(one[5:], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("name", DECODERS)
def test_no_token_sees_a_later_one(name, side):
    model = decoder(name, "headway")
    mask = torch.ones(2, 9, dtype=torch.long) if side == "none" else real(side)
    other = ids(2, 9)
    other[:, 5] = other[:, 5] % 60 + 3
    one, two = (model(x, attention_mask=mask, **FLAGS).logits for x in (ids(2, 9), other))
    _same(name, one[:, :5], two[:, :5])
    assert not torch.allclose(one[:, 5:], two[:, 5:])


def _same(name, one, two):
    # gpt_oss computes the tokens of an expert together, and how many they are may change how a processor rounds.
    off = 1e-5 if name == "gpt_oss" else 0
    torch.testing.assert_close(one, two, atol=off, rtol=off)


def test_prefix_tokens_see_each_other():
    config = tf.Gemma3Config(
        text_config={**GQA, "sliding_window": 4, "query_pre_attn_scalar": 8, "layer_types": ["full_attention"] * 2},
        vision_config={"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48,
                       "image_size": 16, "patch_size": 4},
        mm_tokens_per_image=4, image_token_id=63, boi_token_id=61, eoi_token_id=62,
    )  # fmt: skip
    model = filled(tf.Gemma3ForConditionalGeneration._from_config(config, attn_implementation="sdpa"))
    tokens = ids(1, 12).clamp_max(60)
    tokens[:, 3:7] = 63
    inputs = {"input_ids": tokens, "pixel_values": numbers(1, 3, 16, 16), "token_type_ids": (tokens == 63).long()}
    before = model(**inputs).logits
    undo, tickets = swap(model)
    after = model(**inputs).logits
    undo()
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)
    assert all(ticket.runs for ticket in tickets)
    no_image = model(**(inputs | {"token_type_ids": torch.zeros_like(tokens)})).logits
    assert not torch.allclose(no_image, before)


@pytest.mark.parametrize("kind", ["bool", "-inf", "finfo.min"])
def test_a_users_own_4d_mask_is_taken_as_it_is(kind):
    model = llama()
    keep = numbers(2, 1, 9, 9) > 0
    keep |= torch.eye(9, dtype=torch.bool)
    keep[0, 0, 4] = False  # a row that sees nothing: sdpa says 0 too
    lowest = float("-inf") if kind == "-inf" else torch.finfo(torch.float32).min
    mask = keep if kind == "bool" else torch.zeros(2, 1, 9, 9).masked_fill(~keep, lowest)
    before = model(ids(2, 9), attention_mask=keep).logits
    undo, _ = swap(model)
    after = model(ids(2, 9), attention_mask=mask).logits
    undo()
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)


MASKING = importlib.import_module("transformers.masking_utils")
PADDING = {
    "none": lambda length: None,
    "real": lambda length: torch.ones(2, length, dtype=torch.bool),
    "left": lambda length: real("left", length=length).bool(),
    "right": lambda length: real("right", length=length).bool(),
    "hole": lambda length: real("left", length=length).roll(2, 1).bool(),
    "empty": lambda length: torch.arange(2)[:, None].expand(2, length).bool(),
    "short": lambda length: torch.ones(2, length - 2, dtype=torch.bool),
}
FUNCTIONS = {
    "causal": lambda: MASKING.causal_mask_function,
    "bidirectional": lambda: MASKING.bidirectional_mask_function,
    "window": lambda: MASKING.sliding_window_causal_mask_function(3),
    "both ways": lambda: MASKING.sliding_window_bidirectional_mask_function(2),
    "chunks": lambda: MASKING.chunked_causal_mask_function(3, torch.zeros(2, dtype=torch.long)),
    "shifted chunks": lambda: MASKING.chunked_causal_mask_function(3, torch.tensor([3, 0])),
    "blocks": lambda: MASKING.or_masks(
        MASKING.causal_mask_function, MASKING.blockwise_overlay(torch.tensor([[-1, 0, 0, 0] + [-1] * 20] * 2))
    ),
}
"""queries, keys, q_offset, kv_offset: none, a cache to continue, a static one, its middle, a sliding one."""
PLACES = {
    "square": (7, 7, 0, 0),
    "continued": (3, 9, 6, 0),
    "room ahead": (5, 12, 0, 0),
    "middle": (3, 12, 4, 0),
    "sliding": (4, 6, 8, 6),
    "one": (1, 9, 8, 0),
    "one, room ahead": (1, 12, 5, 0),
}


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_masks_are_what_sdpa_would_have(function, padding, skip, as_tensor):
    for q_len, kv_len, q_offset, kv_offset in PLACES.values():
        wants = {
            "batch_size": 2, "q_length": q_len, "kv_length": kv_len, "kv_offset": kv_offset,
            "q_offset": torch.tensor(q_offset) if as_tensor else q_offset, "mask_function": FUNCTIONS[function](),
            "attention_mask": PADDING[padding](kv_len + kv_offset), "local_size": 3 if function != "causal" else None,
            "allow_is_causal_skip": skip and function in ("causal", "window"),
            "allow_is_bidirectional_skip": skip and function == "bidirectional",
        }  # fmt: skip
        theirs = MASKING.sdpa_mask(**wants)
        mine = ours.mask(**wants)
        if isinstance(mine, ours.Typed):
            assert mine.skips == (theirs is None)
        elif theirs is None:
            assert mine is None
            continue
        full = MASKING.sdpa_mask(**(wants | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}))
        assert mine is not None
        assert mine.shape == full.shape
        assert mine.dtype == torch.bool
        assert torch.equal(mine & True, full)


STRUCTURES = {
    "causal": ({}, Causal()),
    "continued": ({"q_length": 3, "q_offset": 6}, Causal("lower-right")),
    "room ahead": ({"q_length": 3}, Causal("upper-left")),
    "window": ({"mask_function": "window"}, (Window(2), Causal())),
    "left": ({"attention_mask": "left"}, (Causal(), Padding([6, 9], side="left"))),
    "right": ({"attention_mask": "right"}, (Causal(), Padding([6, 9]))),
    "chunks": ({"mask_function": "chunks"}, (Documents([3, 3, 3]), Causal())),
}


@pytest.mark.parametrize("case", STRUCTURES)
def test_masks_keep_their_structure(case):
    wants, expected = STRUCTURES[case]
    if "mask_function" in wants:
        wants = wants | {"mask_function": FUNCTIONS[wants["mask_function"]]()}
    if "attention_mask" in wants:
        wants = wants | {"attention_mask": PADDING[wants["attention_mask"]](9)}
    found = ours.mask(**({"batch_size": 2, "q_length": 9, "kv_length": 9} | wants))
    assert isinstance(found, ours.Typed)
    parts = expected if isinstance(expected, tuple) else (expected,)
    assert repr(found.typed) == " & ".join(map(repr, parts))


def test_a_packed_mask_keeps_its_documents():
    config = llama().config
    config._attn_implementation_internal = "headway"
    wants = {"inputs_embeds": torch.zeros(1, 6, 8), "attention_mask": None, "past_key_values": None}
    try:
        found = MASKING.create_causal_mask(config, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1]]), **wants)
        assert repr(found.typed) == repr(Documents([4, 2]) & Causal())
        # A jump inside a document makes another of it, as transformers has it.
        jumped = MASKING.create_causal_mask(config, position_ids=torch.tensor([[0, 1, 5, 6, 0, 1]]), **wants)
        assert repr(jumped.typed) == repr(Documents([2, 2, 2]) & Causal())
    finally:
        config._attn_implementation_internal = "sdpa"


def test_a_function_that_is_not_transformers_own_becomes_numbers():
    def odd(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q - k) % 2 == 0

    function = MASKING.and_masks(MASKING.causal_mask_function, odd)
    found = ours.mask(batch_size=1, q_length=5, kv_length=5, mask_function=function, allow_is_causal_skip=False)
    assert type(found) is Tensor
    assert torch.equal(found, MASKING.sdpa_mask(1, 5, 5, mask_function=function, allow_is_causal_skip=False))


def test_positions_that_do_not_count_up_become_numbers():
    positions, packing = torch.tensor([[0, 3, 1, 2, 0, 1]]), torch.tensor([[0, 0, 0, 0, 1, 1]])
    function = MASKING.packed_sequence_compatibility_function(MASKING.causal_mask_function, positions, packing)
    found = ours.mask(batch_size=1, q_length=6, kv_length=6, mask_function=function, allow_is_causal_skip=False)
    assert torch.equal(found, MASKING.sdpa_mask(1, 6, 6, mask_function=function, allow_is_causal_skip=False))


def test_a_mask_that_sdpa_would_go_without_leaves_the_word_to_is_causal():
    q = numbers(2, 2, 5, 8)
    for is_causal in (True, False):
        out, _ = ours.attend(Asks(), q, q, q, typed(), is_causal=is_causal)
        want = nn.functional.scaled_dot_product_attention(q, q, q, is_causal=is_causal)
        torch.testing.assert_close(out.transpose(1, 2), want)


def test_a_mask_changed_in_place_is_read_again():
    q, mask = numbers(1, 2, 5, 8), torch.zeros(1, 1, 5, 5)
    for key in range(4):
        mask[..., key] = torch.finfo(torch.float32).min
        out, _ = ours.attend(Asks(False), q, q, q, mask)
        torch.testing.assert_close(out.transpose(1, 2), nn.functional.scaled_dot_product_attention(q, q, q, mask))


def typed(**wants: Any) -> Any:
    return ours.mask(**({"batch_size": 2, "q_length": 5, "kv_length": 5} | wants))


def test_a_mask_that_a_model_looks_into_is_plain_numbers():
    found, full = typed(), torch.ones(5, 5, dtype=torch.bool).tril().expand(2, 1, 5, 5)
    assert found.typed is not None
    part = found[:, :, -2:, :]
    assert type(part) is Tensor
    assert torch.equal(part, full[:, :, -2:, :])
    assert found.typed is None
    part.zero_()  # a view: what it changes, the mask must show
    assert torch.equal(found[:, :, -2:, :], part)


def test_a_mask_that_is_written_to_says_so():
    found = typed()
    found[..., 0] = False
    assert found.typed is None
    q = numbers(2, 2, 5, 8)
    out, _ = ours.attend(nn.Module(), q, q, q, found)
    keep = torch.ones(5, 5, dtype=torch.bool).tril()
    keep[:, 0] = False
    torch.testing.assert_close(out.transpose(1, 2), nn.functional.scaled_dot_product_attention(q, q, q, keep))


def test_a_mask_is_copied_and_saved():
    found = typed(attention_mask=torch.tensor([[1, 1, 1, 1, 0]] * 2))
    assert copy.deepcopy(found).typed is found.typed
    assert found.detach().typed is found.typed
    saved = pickle.loads(pickle.dumps(found))
    assert type(saved) is Tensor
    assert torch.equal(saved, found & True)


def test_queries_dropped_after_the_mask_was_made_keep_their_place():
    # As Gemma 4 does: with no mask at hand, the last queries would be taken for the first.
    q, k = numbers(2, 4, 2, 8), numbers(2, 2, 5, 8)
    out, _ = ours.attend(nn.Module(), q, k, k, typed()[:, :, -2:, :])
    want = nn.functional.scaled_dot_product_attention(
        q, k, k, torch.ones(2, 5, dtype=torch.bool).tril(3), enable_gqa=True
    )
    torch.testing.assert_close(out.transpose(1, 2), want)


@pytest.fixture
def unmasked() -> Iterator[str]:
    """sdpa by another name, which transformers makes no masks for."""
    modeling = importlib.import_module("transformers.modeling_utils")
    sdpa = importlib.import_module("transformers.integrations.sdpa_attention").sdpa_attention_forward
    modeling.AttentionInterface.register("unmasked", sdpa)
    yield "unmasked"
    modeling.AttentionInterface._global_mapping.pop("unmasked")


def test_attention_that_was_given_no_masks_is_named(unmasked):
    """Padding was lost before the swap (transformers#46132); to be proven right against that is no proof."""
    model = decoder("llama", "sdpa")
    inputs = {"input_ids": ids(2, 9), "attention_mask": real("left")}
    valid = real("left").bool()
    want = model(**inputs).logits[valid]
    model.set_attn_implementation(unmasked)
    before, lost = state(model), model(**inputs).logits[valid]
    assert not torch.allclose(lost, want, atol=0.1)
    with pytest.raises(SwapError, match="'unmasked' was registered without a mask function"):
        headway.swap(model, inputs)
    assert state(model) == before
    assert torch.equal(model(**inputs).logits[valid], lost)
    assert any("'unmasked' was registered" in note for note in headway.swap(model).census.notes)
    torch.testing.assert_close(model(**inputs).logits[valid], want, atol=1e-5, rtol=1e-5)  # which now has its masks
    headway.undo(model)
    model.set_attn_implementation("sdpa")
    assert headway.swap(model, inputs).census.notes == ()


def test_rows_of_filler_are_not_judged_and_the_certificate_says_so():
    """There backends differ by design (transformers#36585): eager attention gives them a mean, sdpa 0."""
    model = decoder("llama", "eager")
    inputs = {"input_ids": ids(2, 9), "attention_mask": real("left")}
    before = model(**inputs).logits
    done = headway.swap(model, inputs)
    assert done.certificate.passed, str(done)
    judged = {errors.what: errors.judged for errors in done.certificate.whole.errors}
    assert judged.pop("forward") == pytest.approx(15 / 18)
    assert set(judged.values()) == {1.0}
    assert "judged on 83.3% of its answer, the rest is of rows that see nothing" in str(done)
    filler = ~real("left").bool()
    assert not torch.allclose(model(**inputs).logits[filler], before[filler], atol=1e-2)


@pytest.mark.parametrize("base", ["eager", "sdpa"])
def test_a_model_that_loses_its_padding_fails_the_proof(base, monkeypatch):
    """In float64 eager attention makes rows of filler NaN, and then all: nothing padded was judged, and it passed."""
    monkeypatch.setattr(ours, "_padding", lambda *_: None)
    model = decoder("llama", base)
    with pytest.raises(SwapError, match="not the whole model: (forward|gradient)"):
        headway.swap(model, {"input_ids": ids(2, 9), "attention_mask": real("left")})


# -- the call ---------------------------------------------------------------------------------------------------------


class Asks(nn.Module):
    """A module as transformers' are to attention."""

    def __init__(self, is_causal: bool | None = None, groups: int = 2) -> None:
        super().__init__()
        if is_causal is not None:
            self.is_causal = is_causal
        self.num_key_value_groups = groups


@pytest.mark.parametrize("said", [None, True, False])
@pytest.mark.parametrize("own", [None, True, False])
@pytest.mark.parametrize("q_len,kv_len", [(5, 5), (1, 5), (3, 7), (1, 1)])
@pytest.mark.parametrize("bias", [False, True])
def test_is_causal_is_read_as_sdpa_reads_it(q_len, kv_len, own, said, bias):
    sdpa = importlib.import_module("transformers.integrations.sdpa_attention").sdpa_attention_forward
    q, k, v = numbers(2, 4, q_len, 8), numbers(2, 2, kv_len, 8), numbers(2, 2, kv_len, 6)
    wants = {"is_causal": said, "scaling": 0.3, "position_bias": numbers(1, 4, q_len, kv_len) if bias else None}
    for mask in (None, numbers(2, 1, q_len, kv_len) > -1, numbers(2, 4, q_len, kv_len)):
        theirs, _ = sdpa(Asks(own), q, k, v, mask, **wants)
        mine, _ = ours.attend(Asks(own), q, k, v, mask, **wants)
        torch.testing.assert_close(mine, theirs)


def test_a_window_without_a_mask_counts():
    q, k = numbers(1, 2, 6, 8), numbers(1, 2, 6, 8)
    near = torch.ones(6, 6, dtype=torch.bool).tril().triu(-2)
    for causal, keep in ((True, near), (False, near | near.T)):
        out, _ = ours.attend(Asks(causal), q, k, k, None, sliding_window=3)
        torch.testing.assert_close(out.transpose(1, 2), nn.functional.scaled_dot_product_attention(q, k, k, keep))
    out, _ = ours.attend(Asks(True), q[:, :, -1:], k, k, None, sliding_window=3)
    want = nn.functional.scaled_dot_product_attention(q[:, :, -1:], k[:, :, -3:], k[:, :, -3:])
    torch.testing.assert_close(out.transpose(1, 2), want)


def test_learned_queries_and_scales_are_honoured():
    q, k, scale = numbers(1, 2, 3, 8), numbers(4, 2, 6, 8), torch.tensor(0.7, requires_grad=True)
    out, _ = ours.attend(Asks(False), q, k, k, None, scaling=scale)
    want = nn.functional.scaled_dot_product_attention(q.expand(4, -1, -1, -1), k, k, scale=0.7)
    torch.testing.assert_close(out.transpose(1, 2), want)
    out.sum().backward()
    assert scale.grad is not None


@pytest.mark.parametrize("longest", [3, None])
def test_cumulative_lengths_are_honoured(longest):
    q, starts = numbers(1, 2, 5, 8), torch.tensor([0, 3, 5], dtype=torch.int32)
    lengths = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": longest, "max_length_k": longest}
    out, _ = ours.attend(Asks(True), q, q, q, None, **lengths)
    parts = [nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True) for x in q.split([3, 2], 2)]
    torch.testing.assert_close(out.transpose(1, 2), torch.cat(parts, 2))
    with pytest.raises(RequestError, match="takes both, and a batch of 1"):
        ours.attend(Asks(True), q, q, q, None, cu_seq_lens_q=starts)


def test_what_is_not_known_is_refused():
    q = numbers(1, 2, 5, 8)
    with pytest.raises(RequestError, match="got indices=Tensor for attention"):
        ours.attend(Asks(), q, q, q, None, indices=torch.zeros(1))
    with pytest.raises(RequestError, match="got a 2-D attention_mask"):
        ours.attend(Asks(), q, q, q, torch.ones(1, 5))
    with pytest.raises(RequestError, match="got a BlockMask attention_mask"):
        ours.attend(Asks(), q, q, q, create_block_mask(lambda b, h, q, k: q >= k, 1, 1, 5, 5, device="cpu"))
    ours.attend(Asks(), q, q, q, None, indices=None, cache=None, position_ids=torch.zeros(1, 5), use_cache=True)


@pytest.mark.parametrize("swapped", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt_oss", "gemma2", "mistral"])
def test_attention_weights_are_returned_where_they_are_wanted(name, swapped):
    # sdpa answers with an empty tuple (L4).
    inputs = {"input_ids": ids(2, 9), "attention_mask": real("left"), "output_attentions": True}
    model = decoder(name, "eager")
    want = model(**inputs)
    if swapped:
        _, tickets = swap(model)
    else:
        model.set_attn_implementation("headway")
    got = model(**inputs)
    assert len(got.attentions) == len(want.attentions) == 2
    valid = real("left").bool()
    for mine, theirs in zip(got.attentions, want.attentions, strict=True):
        rows = valid[:, None].expand(2, 4, 9)
        torch.testing.assert_close(mine[rows], theirs[rows], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(got.logits[valid], want.logits[valid], atol=1e-4, rtol=1e-4)
    if swapped:
        assert [ticket.in_full for ticket in tickets] == [1, 1]


@pytest.mark.parametrize("name", ["bert", "vit", "clip", "whisper", "t5"])
def test_encoders_return_weights_too(name):
    config, inputs = ENCODERS[name]
    model = filled(tf.AutoModel.from_config(config(), attn_implementation="eager"))
    tower = model.vision_model if name == "clip" else model
    inputs = {"pixel_values": inputs["pixel_values"]} if name == "clip" else inputs

    def weights() -> list[Tensor]:
        out = tower(**inputs, output_attentions=True)
        return [w for key in ("attentions", "encoder_attentions", "cross_attentions") for w in out.get(key) or ()]

    want = weights()
    swap(model)
    got = weights()
    assert len(got) == len(want) > 1
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


# -- which modules ----------------------------------------------------------------------------------------------------


def test_every_attention_of_a_composite_is_found():
    model = tf.AutoModel.from_config(ENCODERS["siglip"][0]())
    before = state(model)
    found = ours.find(model)
    assert state(model) == before
    towers = [f"{tower}_model.encoder.layers.{i}.self_attn" for tower in ("text", "vision") for i in (0, 1)]
    assert [site.name for site in found] == towers  # the pooling head's nn.MultiheadAttention is another kind's
    assert all(site.kind == ours.KIND and not site.because and not site.aliases for site in found)


def test_a_shared_module_is_one_site():
    model = decoder("llama")
    model.model.layers[1].self_attn = model.model.layers[0].self_attn
    (found,) = ours.find(model)
    assert (found.name, found.aliases) == ("model.layers.0.self_attn", ("model.layers.1.self_attn",))


def test_what_cannot_be_switched_says_why():
    by_hand = tf.GPTJConfig(vocab_size=64, n_embd=32, n_layer=1, n_head=4, rotary_dim=4)
    (found,) = ours.find(tf.AutoModelForCausalLM.from_config(by_hand))
    assert "does not go through transformers' AttentionInterface" in found.because
    eager_only = tf.Speech2TextConfig(
        vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, input_feat_per_channel=8, conv_channels=16,
    )  # fmt: skip
    found = ours.find(tf.AutoModel.from_config(eager_only))
    assert len(found) == 3
    assert all("supports eager attention only" in site.because for site in found)


def test_sparse_attention_says_why():
    home = importlib.import_module("transformers.models.deepseek_v32.modeling_deepseek_v32")
    config = tf.DeepseekV32Config(
        **BASE, moe_intermediate_size=16, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8,
        v_head_dim=8, n_routed_experts=2, num_experts_per_tok=1, first_k_dense_replace=2, n_group=1, topk_group=1,
    )  # fmt: skip
    found = ours.find(filled(tf.AutoModelForCausalLM.from_config(config)))
    assert found
    assert all(type(site.module) is home.DeepseekV32Attention and "'sdpa'" in site.because for site in found)


def test_a_model_of_nobody_elses_has_no_sites():
    assert ours.find(nn.TransformerEncoderLayer(16, 2)) == []


def test_a_wrapper_whose_config_says_eager_is_told_by_what_it_runs():
    """A wrapped model of another library asks no config (transformers#47939): the label lies, the census does not."""

    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, x)

    class Wrapper(tf.PreTrainedModel):
        config_class = tf.TimmWrapperConfig

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.timm_model = Inner()
            self.post_init()

        def forward(self, x: Tensor) -> Tensor:
            return self.timm_model(x)

    model, x = Wrapper(tf.TimmWrapperConfig()), numbers(1, 2, 5, 8)
    for label in ("eager", "headway"):
        model.config._attn_implementation = label
        with headway.swap(model, x, backend="sdpa-math") as done:
            (ticket,) = done.census.swapped
            assert (ticket.name, ticket.kind) == ("timm_model", "F.scaled_dot_product_attention")
            model(x)
            assert ticket.runs == {"sdpa-math": 1}


@pytest.mark.parametrize("part", ["text_config", "vision_config"])
def test_a_part_of_a_composite_switched_by_name(part):
    """That part alone computes by Headway, with the masks it makes for itself; a swap then takes both."""
    config, inputs = ENCODERS["llava"]
    model = filled(tf.AutoModel.from_config(config(), attn_implementation="sdpa"))
    valid = inputs["attention_mask"].bool()
    want = model(**inputs).last_hidden_state[valid]
    ran = []
    model.set_attn_implementation({part: "headway"})
    for name, module in model.named_modules():
        if name.endswith("self_attn"):
            module.register_forward_hook(lambda module, *_: ran.append(module.config._attn_implementation))
    torch.testing.assert_close(model(**inputs).last_hidden_state[valid], want, atol=1e-5, rtol=1e-5)
    assert sorted(ran) == ["headway"] * 2 + ["sdpa"] * 2
    done = headway.swap(model, inputs)
    assert len(done.census.swapped) == 4
    done.undo()
    labels = {name: getattr(model.config, name)._attn_implementation for name in ("text_config", "vision_config")}
    assert labels.pop(part) == "headway"
    assert set(labels.values()) == {"sdpa"}


# -- in and out -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "gemma3"])
def test_undo_gives_back_the_very_objects(name):
    model = decoder(name)
    before, weights = state(model), {k: id(v) for k, v in model.named_parameters()}
    undo, _ = swap(model)
    assert model.config._attn_implementation == "headway"
    assert {k: id(v) for k, v in model.named_parameters()} == weights
    undo()
    assert state(model) == before
    undo()  # twice does no harm
    assert state(model) == before


def test_a_failure_half_way_leaves_everything(monkeypatch):
    model = llama()
    before = state(model)

    def fail(*_: Any) -> None:
        raise ValueError("half-way")

    monkeypatch.setattr(ours, "_settle", fail)
    with pytest.raises(ValueError, match="half-way"):
        swap(model)
    assert state(model) == before
    with pytest.raises(KeyError):
        ours.apply(model, {"nowhere": Site(Ticket("nowhere", ours.KIND))})
    assert state(model) == before


@pytest.mark.parametrize("base", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_one_layer_alone_is_swapped(base, side):
    model = decoder("mistral", base)
    inputs = {"input_ids": ids(2, 9), "attention_mask": real(side)}
    before = model(**inputs).logits
    undo, (ticket,) = swap(model, lambda name: ".1." in name)
    assert ticket.name == "model.layers.1.self_attn"
    assert model.config._attn_implementation == base
    assert model.model.layers[0].self_attn.config is model.config
    after = model(**inputs).logits
    assert sum(ticket.runs.values()) == 1
    torch.testing.assert_close(after[real(side).bool()], before[real(side).bool()], atol=1e-5, rtol=1e-5)
    undo()
    assert torch.equal(model(**inputs).logits, before)


def test_one_of_all_is_put_back():
    model = decoder("llama", "eager")
    before = model(ids(2, 9)).logits
    _, (first, second) = swap(model)
    ours.restore(model, {first.name})
    assert model.config._attn_implementation == "eager"
    torch.testing.assert_close(model(ids(2, 9)).logits, before, atol=1e-5, rtol=1e-5)
    assert not first.runs
    assert sum(second.runs.values()) == 1
    ours.restore(model)
    assert HELD not in second.__dict__
    assert torch.equal(model(ids(2, 9)).logits, before)


def test_masks_made_for_flash_attention_are_refused():
    model = decoder("llama")
    swap(model, lambda name: ".1." in name)
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(RequestError, match="got a mask made for 'flash_attention_2'"):
        ours.attend(model.model.layers[1].self_attn, *[numbers(1, 4, 3, 8)] * 3, None)


@pytest.mark.parametrize("all_of_it", [True, False])
def test_another_model_of_the_same_config_is_untouched(all_of_it):
    config = DECODERS["llama"]()
    model, other = (filled(tf.LlamaForCausalLM(config)) for _ in range(2))
    assert attention_of(model)[0].config is attention_of(other)[0].config is other.config
    inputs = {"input_ids": ids(2, 9), "attention_mask": real("left")}
    want = other(**inputs).logits
    before = state(other)
    undo, _ = swap(model, lambda name: all_of_it or ".0." in name)
    assert state(other) == before
    assert torch.equal(other(**inputs).logits, want)
    torch.testing.assert_close(model(**inputs).logits[1], want[1], atol=1e-5, rtol=1e-5)
    undo()
    assert model.config is config


def test_the_config_of_a_swapped_model_is_copied_without_the_swap():
    model = decoder("llama")
    swap(model)
    for config in (copy.deepcopy(model.config), copy.copy(model.config)):
        assert type(config) is tf.LlamaConfig
        assert config._attn_implementation == "sdpa"


MAKE = {
    "its class": lambda model: type(model)(model.config),
    "_from_config": lambda model: type(model)._from_config(model.config),
    "AutoModel": lambda model: tf.AutoModelForCausalLM.from_config(model.config),
}


@pytest.mark.parametrize("make", MAKE)
def test_a_model_made_of_a_swapped_models_config_works_and_leaves_no_trace(make):
    model = decoder("llama")
    config, inputs = model.config, {"input_ids": ids(2, 9), "attention_mask": real("left")}
    want = model(**inputs).logits
    before = dict(config.__dict__)
    undo, tickets = swap(model)
    other = MAKE[make](model).eval()
    assert dict(config.__dict__) == before  # it said 'headway' for good
    assert model.config._attn_implementation == "headway"
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(**inputs).logits[1], want[1], atol=1e-5, rtol=1e-5)
    assert not any(ticket.runs for ticket in tickets)
    assert all(site_of(module) is None for module in other.modules())
    undo()
    assert other.config._attn_implementation == "sdpa"
    assert torch.equal(other(**inputs).logits, want)
    swap(model)
    assert other.config._attn_implementation == "sdpa"


def test_a_model_made_of_a_swapped_models_config_is_swapped_and_undone_alone():
    model = decoder("llama")
    swap(model)
    other = filled(type(model)(model.config))
    ours.restore(other)
    assert type(other.config) is tf.LlamaConfig
    assert other.config._attn_implementation == "sdpa"
    assert model.config._attn_implementation == "headway"
    undo, _ = swap(other)
    undo()
    assert other.config._attn_implementation == "sdpa"
    assert model.config._attn_implementation == "headway"


@pytest.mark.parametrize("other", ["sdpa", "eager"])
def test_another_attention_set_by_name_is_what_runs(other):
    model = decoder("llama")
    want = model(ids(2, 9)).logits
    undo, tickets = swap(model)
    model.set_attn_implementation(other)
    torch.testing.assert_close(model(ids(2, 9)).logits, want, atol=1e-5, rtol=1e-5)
    assert not any(ticket.runs for ticket in tickets)
    undo()
    assert type(model.config) is tf.LlamaConfig
    assert model.config._attn_implementation == other
    swap(model)
    assert model.config._attn_implementation == "headway"


def test_a_config_that_wants_weights_keeps_its_word():
    model = decoder("llama", "eager")
    model.config.output_attentions = True
    want = model(ids(2, 9))
    swap(model)
    model.config.validate_output_attentions()
    got = model(ids(2, 9))
    assert len(got.attentions) == 2
    torch.testing.assert_close(got.attentions[1], want.attentions[1], atol=1e-5, rtol=1e-5)


def test_a_swapped_model_is_copied_saved_and_undone():
    model = decoder("llama")
    keys, want = list(model.state_dict()), model(ids(2, 9)).logits
    _, tickets = swap(model)
    assert list(model.state_dict()) == keys
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        torch.testing.assert_close(other(ids(2, 9)).logits, want, atol=1e-5, rtol=1e-5)
        assert site_of(attention_of(other)[0]).ticket.runs
        assert not tickets[0].runs
        ours.restore(other)
        assert other.config._attn_implementation == "sdpa"
        assert all(module.config is other.config for module in attention_of(other))
    assert model.config._attn_implementation == "headway"


_LOADS = """
import sys, warnings, torch
warnings.simplefilter("ignore")
for path in sys.argv[1:]:
    model, ids, want = torch.load(path, weights_only=False)
    torch.testing.assert_close(model(ids)[0], want, atol=1e-5, rtol=1e-5)
    from headway.sites.site import site_of
    assert all(site.ticket.runs for site in map(site_of, model.modules()) if site is not None)
    assert any(map(site_of, model.modules()))
"""


def test_swapped_models_run_in_a_process_that_never_swapped(tmp_path):
    models = tf.BertModel(tf.BertConfig(**BASE)), tf.LlamaModel(tf.LlamaConfig(**GQA))
    paths = [tmp_path / f"{at}.pt" for at in range(len(models))]
    for model, path in zip(models, paths, strict=True):
        headway.swap(model.eval(), ids(2, 9))
        with torch.no_grad():
            torch.save((model, ids(2, 9), model(ids(2, 9))[0]), path)
    status, told = fresh(_LOADS, *paths, folder=tmp_path)
    assert status == 0, told


@pytest.mark.parametrize("other", ["sdpa", "eager"])
def test_a_swap_set_aside_by_name_says_so(other):
    model = decoder("llama")
    done = headway.swap(model, ids(2, 9))
    assert "no longer" not in str(done)
    model.set_attn_implementation(other)
    said = rf"2 sites no longer run through Headway: attn_implementation was set to '{other}' since; swap again"
    assert re.search(said, str(done))
    with pytest.raises(SwapError, match=said):
        headway.maps(model, ids(2, 9))
    again = headway.swap(model, ids(2, 9))
    assert "no longer" not in str(again)
    assert headway.maps(model, ids(2, 9))["model.layers.0.self_attn"]


def test_other_weights_are_checked_in_transformers_too(monkeypatch):
    model = decoder("llama")
    headway.swap(model, ids(2, 9))
    sites = [site for module in model.modules() if (site := site_of(module)) is not None]
    model(ids(2, 9))
    assert all(site.ticket.decisions for site in sites)
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        each.load_state_dict(model.state_dict())
        assert not any(site_of(module).ticket.decisions for module in attention_of(each))
    headway.undo(model)
    assert not any("_load_from_state_dict" in vars(module) for module in model.modules())


def test_a_swapped_models_config_saves_as_before(tmp_path):
    model = decoder("llama")
    before = model.config.to_json_string()
    swap(model)
    assert model.config.to_json_string() == before
    assert attention_of(model)[0].config.to_json_string() == before
    model.save_pretrained(tmp_path)
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(ids(1, 5)).logits, model(ids(1, 5)).logits, atol=1e-5, rtol=1e-5)


def test_a_view_is_the_config_itself():
    model = decoder("llama")
    swap(model)
    view = attention_of(model)[0].config
    assert isinstance(view, type(model.config))
    assert view == model.config
    assert model.config == view
    model.config.attention_dropout = 0.25
    assert view.attention_dropout == 0.25
    view.rms_norm_eps = 0.5
    assert model.config.rms_norm_eps == 0.5


def test_switching_by_name_and_back():
    model = llama()
    before, want = state(model), model(ids(2, 9)).logits
    ours.register()
    ours.register()
    model.set_attn_implementation("headway")
    torch.testing.assert_close(model(ids(2, 9)).logits, want, atol=1e-5, rtol=1e-5)
    model.set_attn_implementation("sdpa")
    assert state(model) == before
    made = filled(tf.AutoModel.from_config(DECODERS["llama"](), attn_implementation="headway"))
    assert made.config._attn_implementation == "headway"


@pytest.mark.parametrize("name", ["llama", "mistral", "phi3", "qwen3"])
def test_gradient_checkpointing(name):
    model = decoder(name).train()
    swap(model)
    inputs = {"input_ids": ids(2, 9), "attention_mask": real("right"), **FLAGS}
    plain = answers(model, inputs)
    model.gradient_checkpointing_enable()
    for one, other in zip(answers(model, inputs), plain, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", ["dinov2", "vit", "bert", "whisper"])
def test_gradient_checkpointing_of_backbones(name):
    """Also of those that a tool for nn.TransformerEncoder alone passes by; each layer is computed once more."""
    config, inputs = ENCODERS[name]
    model = filled(tf.AutoModel.from_config(config())).train()
    undo, tickets = swap(model)
    plain = answers(model, inputs)
    once = [sum(ticket.runs.values()) for ticket in tickets]
    model.gradient_checkpointing_enable()
    for one, other in zip(answers(model, inputs), plain, strict=True):
        torch.testing.assert_close(one, other)
    assert [sum(ticket.runs.values()) for ticket in tickets] == [3 * count for count in once]
    undo()


@pytest.mark.parametrize("padding, swapped", [(None, True), ("left", False)])
def test_a_whole_forward_compiles(padding, swapped):
    model = decoder("llama")
    model.model.layers = model.model.layers[:1]
    inputs = {"input_ids": ids(2, 9), "attention_mask": None if padding is None else real(padding), **FLAGS}
    want = model(**inputs).logits
    if swapped:
        swap(model)
    else:
        model.set_attn_implementation("headway")
    torch._dynamo.reset()
    got = torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs).logits
    valid = real(padding).bool() if padding else slice(None)
    torch.testing.assert_close(got[valid], want[valid], atol=1e-5, rtol=1e-5)


def test_compiled_layers_take_the_models_mask():
    model = decoder("mistral")
    inputs = {"input_ids": ids(2, 9), "attention_mask": real("left"), **FLAGS}
    want = model(**inputs).logits
    swap(model)
    torch._dynamo.reset()
    model.model.layers[1].compile(backend="aot_eager")
    got = model(**inputs).logits
    valid = real("left").bool()
    torch.testing.assert_close(got[valid], want[valid], atol=1e-5, rtol=1e-5)


def test_nothing_imports_transformers_before_it_is_used(monkeypatch):
    tree = ast.parse(Path(ours.__file__).read_text())
    homes = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert "transformers" not in {name.split(".")[0] for name in homes | names}
    monkeypatch.delitem(sys.modules, "transformers.modeling_utils")
    assert ours.find(llama()) == []

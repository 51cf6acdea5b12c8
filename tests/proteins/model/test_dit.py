"""The network: packed documents are computed as each alone, and nothing that is asked of it is left out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from deck import Source
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from headway import MaskError, RequestError
from headway.backends import flex
from headway_apps.proteins.diffusion.graphs import log_expm1
from headway_apps.proteins.model import dit as room
from headway_apps.proteins.model.config import DiTConfig
from headway_apps.proteins.model.dit import Block, DiT, rotations
from headway_apps.proteins.model.packed import Packed

SMALL = DiTConfig(width=32, blocks=2, heads=4, cond=8, embedded=13, scored=13, mask=12)
VARIANTS = {
    "as the original": {},
    "as the V100 model": {"head_bias": False, "gelu": "erf", "silu_after_time": False},
    "no score of the mask": {"scored": 12, "final": "scale"},
    "uniform noise": {"mask": None, "scale_by_sigma": False},
}
LENGTHS = {
    "ragged": [5, 1, 9, 3],
    "one": [7],
    "equal": [4, 4, 4],
    "some empty": [0, 6, 0, 2, 0],
    "one far longer": [40, 1, 1, 1, 2, 1, 1, 1],
}


def stirred(config: DiTConfig = SMALL, **changes: Any) -> DiT:
    """In float64, with weights of which none is 0, so that each counts."""
    model = DiT(dataclasses.replace(config, **changes)).double().eval()
    with torch.no_grad():
        for name, each in model.named_parameters():
            each.copy_(0.3 * Source(name).normal(*each.shape))
    return model


def drawn(count: int, sequences: int, symbols: int = 12) -> tuple[Tensor, Tensor]:
    source = Source("tokens")
    tokens = (source.normal(count).abs() * 100).long() % symbols
    return tokens.where(source.yes(count), torch.tensor(12)), source.normal(sequences).abs() + 0.01


def alone(model: DiT, tokens: Tensor, sigma: Tensor, lengths: list[int]) -> Tensor:
    """Each document in a call of its own."""
    parts = zip(tokens.split(lengths), sigma, strict=True)
    return torch.cat([model(part[None], level[None])[0] for part, level in parts if len(part)])


# -- packing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", LENGTHS)
def test_packed_documents_are_scored_as_each_alone(name: str, variant: str, device: str) -> None:
    """Forward and backward: positions, attention and noise level are each document's own, and nothing is filler's."""
    lengths, model = LENGTHS[name], stirred(**VARIANTS[variant]).to(device)
    tokens, sigma = (x.to(device) for x in drawn(sum(lengths), len(lengths), symbols=11))
    push = Source("push").normal(sum(lengths), model.config.scored).to(device)
    answers = []
    for out in (model(tokens, sigma, torch.tensor(lengths)), alone(model, tokens, sigma, lengths)):
        grads = torch.autograd.grad(out, list(model.parameters()), push)
        assert out.shape == push.shape
        answers.append((out, *grads))
    assert all(bool(grad.any()) for grad in answers[0][1:])
    torch.testing.assert_close(*answers)


def test_both_ways_to_attend_are_tried() -> None:
    """Rows with filler, and the documents as they are where filler would be more work."""
    ways = {name: stirred().pack(torch.zeros(sum(of)), torch.tensor(of)).places is None for name, of in LENGTHS.items()}
    assert not ways["ragged"]
    assert ways["one far longer"]


@pytest.mark.usefixtures("flex_uncompiled")
@pytest.mark.parametrize(
    ("lengths", "met"),
    [([400, 5, 256], 768), ([700, 9], 768), ([60, 0, 700], 768), ([760, 8], 768), ([700, 69], 1024), ([3, 4], 64)],
)
def test_a_kernel_that_is_compiled_for_each_length_meets_few(
    monkeypatch: pytest.MonkeyPatch, device: str, lengths: list[int], met: int
) -> None:
    """With gradients where it has them. It errs as plain attention to each document does: float64 judges."""
    model, seen, attend = stirred(width=128).to(device), set(), flex.attend
    monkeypatch.setattr(flex, "attend", lambda q, *rest: seen.add(q.shape[2]) or attend(q, *rest))
    tokens, sigma = (x.to(device) for x in drawn(sum(lengths), len(lengths)))
    push = Source("push").normal(sum(lengths), 13).to(device)

    def answer(of: DiT, out: Tensor) -> list[Tensor]:
        grads = torch.autograd.grad(out, list(of.parameters()), push.to(out)) if out.requires_grad else ()
        return [x.double() for x in (out, *grads)]

    with torch.set_grad_enabled(device == "cuda"):
        truth = answer(model, alone(model, tokens, sigma, lengths))
        model.float()
        plain = answer(model, alone(model, tokens, sigma.float(), lengths))
        monkeypatch.setenv("HEADWAY_BACKEND", "flex")
        got = answer(model, model(tokens, sigma.float(), torch.tensor(lengths)))
    assert seen == {met}
    for ours, theirs, right in zip(got, plain, truth, strict=True):
        assert (ours - right).norm() <= 3 * (theirs - right).norm() + 1e-7 * right.norm()


@pytest.mark.parametrize("lengths", [[0], [0, 0]])
def test_nothing_is_packed_without_filler(monkeypatch: pytest.MonkeyPatch, lengths: list[int]) -> None:
    monkeypatch.setenv("HEADWAY_BACKEND", "flex")
    assert Packed.of(torch.tensor(lengths), torch.empty(1, 4, 0, 32)).filler == 0


@pytest.mark.parametrize("lengths", [[5, 1, 9, 3], [6, 6, 6]], ids=str)
def test_one_document_tells_the_others_nothing(lengths: list[int]) -> None:
    model = stirred()
    tokens, sigma = drawn(18, len(lengths))
    others_tokens, others_sigma = tokens.clone(), sigma.clone()
    others_tokens[: lengths[0]] = (others_tokens[: lengths[0]] + 1) % 13
    others_sigma[0] += 1
    before, after = (model(t, s, torch.tensor(lengths)) for t, s in ((tokens, sigma), (others_tokens, others_sigma)))
    assert bool((before[: lengths[0]] != after[: lengths[0]]).any(1).all())
    torch.testing.assert_close(before[lengths[0] :], after[lengths[0] :], rtol=0, atol=0)


def test_positions_start_anew_in_each_document(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only differences of positions matter to attention, but angles of large ones are rounded more."""
    seen: list[list[int]] = []
    monkeypatch.setattr(room, "rotations", lambda at, *rest: (seen.append(at.tolist()), rotations(at, *rest))[1])
    tokens, sigma = drawn(18, 4)
    stirred()(tokens, sigma, torch.tensor(LENGTHS["ragged"]))
    assert seen == [[0, 1, 2, 3, 4, 0, *range(9), 0, 1, 2]]


def test_axes_of_packed_tokens_stay() -> None:
    model, (tokens, sigma) = stirred(), drawn(18, 4)
    lengths = torch.tensor(LENGTHS["ragged"])
    flat, row = model(tokens, sigma, lengths), model(tokens[None], sigma, lengths)
    assert (flat.shape, row.shape) == ((18, 13), (1, 18, 13))
    assert torch.equal(flat, row[0])
    assert torch.equal(flat, model(tokens, sigma, lengths.int()))


def test_gradients_of_what_a_document_has_count_every_token_in_bfloat16() -> None:
    """Added up one by one they would stop at 256."""
    values = torch.zeros(2, 3, dtype=torch.bfloat16, requires_grad=True)
    packed = Packed.of(torch.tensor([1000, 24]), torch.empty(1, 1, 1024, 8))
    packed.spread(values).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [[1000.0] * 3, [24.0] * 3]


@pytest.mark.parametrize("batch, length", [(1, 5), (5, 5), (3, 7), (7, 3), (2, 1), (2, 0), (0, 4)])
def test_rows_are_scored_as_each_alone(batch: int, length: int) -> None:
    """B = L is where operands with an axis too many have broadcast unseen."""
    model = stirred()
    tokens, sigma = drawn(batch * length, batch)
    tokens = tokens.view(batch, length)
    got = model(tokens, sigma)
    assert got.shape == (batch, length, 13)
    for row in range(batch if length else 0):
        torch.testing.assert_close(got[row], model(tokens[row : row + 1], sigma[row : row + 1])[0])


# -- scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"scored": 12}], ids=["mask scored", "mask not scored"])
def test_before_training_it_guesses(changes: dict[str, Any]) -> None:
    """Masked tokens' true ratios add up to 1 / (exp(sigma_bar) - 1); a guess shares that out evenly."""
    model = DiT(dataclasses.replace(SMALL, **changes)).double()
    sigma = torch.tensor([0.1, 3.0], dtype=torch.float64)
    ratios = model(torch.full((2, 4), 12), sigma)[..., :12].exp()
    torch.testing.assert_close(ratios, (1 / (12 * sigma.expm1()))[:, None, None].expand(2, 4, 12))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_token_that_stands_there_has_ratio_1(variant: str) -> None:
    model = stirred(**VARIANTS[variant])
    tokens = torch.arange(model.config.scored)
    scores = model(tokens[None], torch.tensor([0.7]).double())[0]
    assert bool((scores.diagonal() == 0).all())
    assert int((scores == 0).sum()) == len(tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("level", [0.0, 1e-40, 1e-12, 1e-6, 1e-4, 0.5, 20.0, 100.0, 1e4])
def test_scores_are_finite_at_any_noise(level: float, dtype: torch.dtype) -> None:
    model = stirred().to(dtype)
    tokens, _ = drawn(6, 1)
    scores = model(tokens[None], torch.tensor([level], dtype=dtype))
    scores.sum().backward()
    assert bool(scores.isfinite().all())
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_scale_of_scores_is_exact_where_its_formula_is_not(dtype: torch.dtype) -> None:
    levels = [1e-10, 1e-5, 1e-3, 0.1, 0.69, 1.0, 5.0, 30.0, 300.0]
    # log(exp(x) - 1): of which the first overflows, and the second is 0, in float32
    truth = [x + math.log(-math.expm1(-x)) for x in levels]
    got, room = log_expm1(torch.tensor(levels, dtype=dtype)).double(), 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(got, torch.tensor(truth, dtype=torch.float64), rtol=room, atol=room)


# -- precision and speed ----------------------------------------------------------------------------------------------


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


@pytest.mark.parametrize("way", ["autocast", "weights"])
@pytest.mark.parametrize("lengths", [LENGTHS["ragged"], LENGTHS["equal"]], ids=["packed", "rows"])
def test_in_bfloat16_scores_are_float32_and_near(way: str, lengths: list[int]) -> None:
    model = stirred()
    tokens, sigma = drawn(sum(lengths), len(lengths))
    truth = model(tokens, sigma, torch.tensor(lengths))
    model = model.to(torch.bfloat16 if way == "weights" else torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        got = model(tokens, sigma.float(), torch.tensor(lengths))
    got.sum().backward()
    assert got.dtype == torch.float32
    assert rms(got - truth) < 0.03 * rms(truth)
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in model.parameters())


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_dropout_is_honoured_and_ends_with_training(share: float) -> None:
    block = Block(dataclasses.replace(SMALL, dropout=share))
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.zero_()
        block.modulation.bias.fill_(1.0)  # gates are open
        block.mlp_out.bias.fill_(1.0)  # and the MLP adds 1
    x, told, turns = torch.zeros(4, 100, 32), torch.zeros(4, 8), (torch.ones(100, 4), torch.zeros(100, 4))
    out = block.train()(x, told, turns, None)
    values = {0.0, 1 / (1 - share)} if share else {1.0}
    assert {round(value, 5) for value in out.unique().tolist()} == {round(value, 5) for value in values}
    assert abs((out == 0).double().mean().item() - share) < 0.02
    assert bool((block.eval()(x, told, turns, None) == 1).all())


def test_dropout_changes_scores_in_training_alone() -> None:
    model, (tokens, sigma) = stirred(dropout=0.5), drawn(18, 4)
    lengths = torch.tensor(LENGTHS["ragged"])
    still = [model(tokens, sigma, lengths) for _ in range(2)]
    model.train()
    moving = [model(tokens, sigma, lengths) for _ in range(2)]
    assert torch.equal(*still)
    assert not torch.equal(*moving)


def kept_bytes(model: DiT, inputs: tuple[Tensor, ...]) -> tuple[int, Tensor, tuple[Tensor, ...]]:
    """What is held for the backward pass, the scores, and all gradients."""
    held: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    torch.manual_seed(3)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        out = model(*inputs)
        total = sum(held.values())
    return total, out, torch.autograd.grad(out.square().sum(), list(model.parameters()))


@pytest.mark.parametrize("name", ["ragged", "equal"])
def test_checkpointing_keeps_less_and_changes_nothing(name: str) -> None:
    """With dropout: the second run of a block drops what the first dropped."""
    lengths = LENGTHS[name]
    model, inputs = stirred(dropout=0.3, blocks=4).train(), (*drawn(sum(lengths), len(lengths)), torch.tensor(lengths))
    plain, *answers = kept_bytes(model, inputs)
    model.checkpointing = True
    less, *again = kept_bytes(model, inputs)
    assert less < 0.4 * plain
    assert torch.equal(answers[0], again[0])
    assert all(torch.equal(*pair) for pair in zip(answers[1], again[1], strict=True))


@pytest.fixture
def afresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("afresh")
def test_it_compiles_whole_forward_and_backward() -> None:
    model, (tokens, sigma) = stirred(blocks=1), drawn(18, 4)
    packed = model.pack(tokens, torch.tensor(LENGTHS["ragged"]))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    outs = [each(tokens, sigma, packed) for each in (compiled, model)]
    torch.testing.assert_close(*outs)
    torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), list(model.parameters())) for out in outs))


@pytest.mark.usefixtures("afresh")
def test_other_lengths_are_no_other_program() -> None:
    """One is made for what was seen first, one where lengths change, one where their number does."""
    model, counter = stirred(blocks=1), CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        for lengths in ([5, 1, 9, 3], [2, 6, 6, 4], [8, 1, 4, 4, 1], [3, 3, 3, 3, 4, 2], [7, 7, 4]):
            tokens, sigma = drawn(18, len(lengths))
            packed = model.pack(tokens, torch.tensor(lengths))
            torch.testing.assert_close(compiled(tokens, sigma, packed), model(tokens, sigma, packed))
    assert counter.frame_count <= 3


@pytest.mark.usefixtures("afresh")
def test_a_compiled_model_reads_lengths_outside_of_its_graph() -> None:
    model, (tokens, sigma) = stirred(blocks=1), drawn(18, 4)
    lengths = torch.tensor(LENGTHS["ragged"])
    got = torch.compile(model, backend="eager")(tokens, sigma, lengths)
    torch.testing.assert_close(got, model(tokens, sigma, lengths))


def test_passes_are_not_recorded_where_attention_compiles_or_reads_lengths() -> None:
    said = stirred().float().not_recordable([4, 3])
    assert said is not None
    assert said.startswith("in float32 by ")
    assert "takes one of flash2, flash3, flash4, torch-varlen" in said


@pytest.mark.usefixtures("afresh")
@pytest.mark.parametrize(("one_shape", "blocks"), [(False, 1), (True, 2)])
def test_parts_that_are_compiled_compute_the_same_for_batches_of_any_shape(
    monkeypatch: pytest.MonkeyPatch, one_shape: bool, blocks: int
) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    model, plain = stirred(blocks=blocks), stirred(blocks=blocks)
    model.compile_parts(one_shape=one_shape)
    for lengths in ([5, 1, 9, 3], [2, 8]):
        tokens, sigma = drawn(sum(lengths), len(lengths))
        outs = [each(tokens, sigma, torch.tensor(lengths)) for each in (model, plain)]
        torch.testing.assert_close(*outs)
        grads = (
            torch.autograd.grad(out.square().sum(), list(of.parameters()))
            for out, of in zip(outs, (model, plain), strict=True)
        )
        torch.testing.assert_close(*grads)
    with torch.no_grad():
        torch.testing.assert_close(*(each(*drawn(4, 1), torch.tensor([4])) for each in (model, plain)))


def test_it_learns() -> None:
    """Which symbol follows which, from 7 of 10 that are masked."""
    model = DiT(dataclasses.replace(SMALL, dropout=0.0))
    clean = (torch.arange(48) * 5 % 12).repeat(4)
    tokens = clean.where(Source("seen").yes(192, share=0.3), torch.tensor(12))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(90):
        logits = model(tokens, torch.full((4,), 1.2), torch.tensor([48] * 4))[tokens == 12][:, :12]
        loss = torch.nn.functional.cross_entropy(logits, clean[tokens == 12])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert abs(losses[0] - math.log(12)) < 1e-4
    assert losses[-1] < 0.1 * losses[0]


# -- refusals ---------------------------------------------------------------------------------------------------------

ROW, LEVEL, COUNT = torch.zeros(1, 6, dtype=torch.long), torch.ones(1), torch.tensor([6])
REFUSED: dict[str, tuple[tuple[Tensor, ...], str]] = {
    "levels with an axis too many": ((ROW, LEVEL[:, None]), r"got sigma_bar \[1, 1\]"),
    "one level for all": ((ROW, torch.tensor(0.5)), r"got sigma_bar \[\]"),
    "levels of tokens": ((ROW[0], torch.ones(6), COUNT), r"for 1 sequences"),
    "levels in bfloat16": ((ROW, LEVEL.bfloat16()), "bfloat16 cannot tell"),
    "a level below 0": ((ROW, -LEVEL), "below 0 or NaN"),
    "a level that is none": ((ROW, LEVEL * math.nan), "below 0 or NaN"),
    "tokens as numbers": ((ROW.float(), LEVEL), "takes int64"),
    "tokens in int32": ((ROW.int(), LEVEL), "takes int64"),
    "tokens without lengths": ((ROW[0], LEVEL), "give lengths for packed tokens"),
    "tokens of three axes": ((ROW[None], LEVEL), r"takes \(B, L\)"),
    "rows with lengths": ((ROW.view(2, 3), LEVEL, COUNT), "lay documents end to end"),
    "a token too large": ((ROW + 13, LEVEL), "takes ids from 0 to 12"),
    "a token below 0": ((ROW - 1, LEVEL), "takes ids from 0 to 12"),
    "a token too large, packed": ((ROW + 13, LEVEL, COUNT), "takes ids from 0 to 12"),
    "lengths of fewer tokens": ((ROW[0], LEVEL, COUNT - 1), "documents of 5 tokens in all for 6"),
    "lengths of more tokens": ((ROW[0], LEVEL, COUNT + 1), "documents of 7 tokens in all for 6"),
    "lengths below 0": ((ROW[0], torch.ones(2), torch.tensor([7, -1])), "length -1"),
    "lengths as numbers": ((ROW[0], LEVEL, COUNT.float()), "takes one int64 per document"),
    "no lengths": ((ROW[0], LEVEL, COUNT[:0]), "takes one int64 per document"),
    "cumulative lengths": ((ROW[0], torch.ones(2), torch.tensor([0, 6, 6])), "documents of 12 tokens"),
    "as many levels as lengths": ((ROW[0], torch.ones(3), torch.tensor([2, 4])), "for 2 sequences"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_broadcast_or_be_cut_is_refused(name: str) -> None:
    given, words = REFUSED[name]
    with pytest.raises((RequestError, MaskError), match=words):
        stirred().float()(*given)


def test_what_was_packed_for_other_tokens_is_refused() -> None:
    model, (tokens, sigma) = stirred(), drawn(18, 4)
    packed = model.pack(tokens, torch.tensor(LENGTHS["ragged"]))
    with pytest.raises(RequestError, match="documents of 18 tokens for 17"):
        model(tokens[:17], sigma, packed)

"""New proteins come of the model, have what was asked for, and nothing that is no residue."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence

import pytest
import torch
from proteins.generate import tiny

from headway import RequestError, UnknownNameError
from headway_apps.proteins.alphabet import ESM, SEED, STANDARD, Alphabet
from headway_apps.proteins.diffusion.samplers import Euler
from headway_apps.proteins.generate.sample import SAMPLERS, generate, named
from headway_apps.proteins.generate.templates import Template

EVERY = [("first-hitting", None, False), *itertools.product(("euler", "analytic"), (12,), (False, True))]
every = pytest.mark.parametrize("sampler, steps, uniform", EVERY)


def test_every_sampler_is_tried_and_is_the_one_of_its_name() -> None:
    assert {name for name, *_ in EVERY} == set(SAMPLERS)
    assert {name: name.title().replace("-", "") for name in SAMPLERS} == {
        name: type(named(name)).__name__ for name in SAMPLERS
    }
    assert named("euler", 7) == Euler(7)


@pytest.mark.parametrize("alphabet", [ESM, SEED], ids=lambda each: each.name)
@every
def test_nothing_but_residues_comes_out_of_a_model_that_prefers_the_rest(
    sampler: str, steps: int | None, uniform: bool, alphabet: Alphabet
) -> None:
    others = [each for each in range(alphabet.size) if each not in alphabet.residues]
    ids = tuple(each for each in range(alphabet.size) if uniform or each != alphabet.mask)
    model = tiny.untrained(alphabet, uniform=uniform, ids=ids)
    with torch.no_grad():
        model.model.head.linear.bias[others] = 8.0
    made = generate(model, [1, 40, 7], sampler=sampler, steps=steps).proteins
    assert [len(each) for each in made] == [1, 40, 7]
    assert set("".join(made)) <= set(STANDARD)


@every
def test_what_is_given_stays(sampler: str, steps: int | None, uniform: bool) -> None:
    model = tiny.untrained(uniform=uniform) if uniform else tiny.trained()
    wanted = [Template.parse(each) for each in ("WWW_9CC", "_", "H_H_H_H_", "_20W")]
    made = generate(model, wanted, sampler=sampler, steps=steps, seed=5).proteins
    assert all(template.fits(protein) for template, protein in zip(wanted, made, strict=True))
    other = generate(model, wanted, sampler=sampler, steps=steps, seed=6).proteins
    assert made != other


def test_what_is_given_is_told_to_the_model() -> None:
    """One residue of eight in the repeat is Y, and it stands after MKTA."""
    counts = [
        sum(each[4] == "Y" for each in generate(tiny.trained(), [Template.parse(text)] * 60, seed=1).proteins)
        for text in ("MKTA_4MKTAYIAK", "_16")
    ]
    assert counts[0] > 2 * counts[1] + 5


def test_a_trained_models_proteins_are_what_it_was_trained_on() -> None:
    known = _kmers(tiny.repeats(), 3).keys()
    assert _share(generate(tiny.trained(), [24] * 40, seed=1).proteins, known) > 0.3
    assert _share(generate(tiny.untrained(), [24] * 40, seed=1).proteins, known) < 0.02


def _kmers(proteins: Sequence[str], k: int) -> Counter[str]:
    return Counter(each[at : at + k] for each in proteins for at in range(len(each) - k + 1))


def _share(proteins: Sequence[str], known: Iterable[str]) -> float:
    found = _kmers(proteins, 3)
    return sum(found[each] for each in known) / found.total()


def test_first_hitting_comes_as_near_as_a_thousand_steps_in_far_fewer_calls() -> None:
    few = generate(tiny.trained(), [16] * 20, seed=2)
    many = generate(tiny.trained(), [16] * 20, sampler="euler", steps=1000, seed=2)
    noise = generate(tiny.untrained(), [16] * 20, seed=2)
    assert (few.calls, many.calls) == (16, 1001)
    for k in (1, 2, 3):
        off = [_divergence(each.proteins, tiny.repeats(), k) for each in (few, many, noise)]
        assert off[0] < off[1] + 0.05
        assert max(off[:2]) < 0.5 * off[2]


def _divergence(one: Sequence[str], other: Sequence[str], k: int) -> float:
    """Jensen-Shannon, of k-mers, in bits."""
    p, q = _kmers(one, k), _kmers(other, k)
    total = 0.0
    for each in p.keys() | q.keys():
        shares = (p[each] / p.total(), q[each] / q.total())
        total += sum(x * math.log2(2 * x / sum(shares)) / 2 for x in shares if x)
    return total


@pytest.mark.parametrize("tokens, batches", [(10_000, [30]), (40, [9, 30]), (1, [3, 5, 9, 30])])
def test_calls_are_those_of_the_network_and_told_as_they_are_made(tokens: int, batches: list[int]) -> None:
    model, told, seen = tiny.untrained(), [], []
    handle = model.model.register_forward_pre_hook(lambda *_: seen.append(1))
    made = generate(model, [9, 30, 3, 5], tokens=tokens, progress=lambda *each: told.append(each))
    handle.remove()
    assert made.calls == sum(batches) == len(seen)
    assert told == [("network calls", at, made.calls) for at in range(1, made.calls + 1)]
    assert [len(each) for each in made.proteins] == [9, 30, 3, 5]


def test_stepped_samplers_ask_once_a_step_and_once_more() -> None:
    told: list[tuple[str, int, int | None]] = []
    made = generate(
        tiny.untrained(), [9, 30], sampler="analytic", steps=6, tokens=20, progress=lambda *each: told.append(each)
    )
    assert told == [("network calls", at, 14) for at in range(1, 15)]
    assert made.calls == 14


def test_the_network_packs_once_a_batch_and_for_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    model, grads = tiny.untrained(), []
    pack = model.model.pack

    def watched(*given: torch.Tensor) -> object:
        grads.append(torch.is_grad_enabled())
        return pack(*given)

    monkeypatch.setattr(model.model, "pack", watched)
    generate(model, [9, 30], tokens=20)
    assert grads == [False, False]


def test_no_batch_is_over_its_budget() -> None:
    sizes: list[int] = []
    model = tiny.untrained()
    model.model.register_forward_pre_hook(lambda _, given: sizes.append(given[0].numel()))
    generate(model, [9, 30, 3, 5, 60, 9, 9], tokens=40)
    assert sorted(set(sizes)) == [11, 32, 34, 62]  # 62 is one protein that is longer than the budget by itself


def test_the_seed_decides_and_nothing_else_of_the_process_does() -> None:
    one = generate(tiny.trained(), [16, 24] * 3, seed=9).proteins
    torch.manual_seed(1234)
    before = torch.get_rng_state()
    assert generate(tiny.trained(), [16, 24] * 3, seed=9).proteins == one
    assert torch.equal(torch.get_rng_state(), before)
    assert generate(tiny.trained(), [16, 24] * 3, seed=10).proteins != one


def test_dropout_is_off_while_it_samples_and_every_mode_is_as_it_was_afterwards() -> None:
    model = tiny.untrained()
    expected = generate(model, [12], seed=1).proteins
    model.model.train()
    model.model.blocks[1].eval()
    modes = [each.training for each in model.model.modules()]
    during: list[bool] = []
    model.model.blocks[0].register_forward_pre_hook(lambda module, _: during.append(module.training))
    assert generate(model, [12], seed=1).proteins == expected
    assert during == [False] * 12
    assert [each.training for each in model.model.modules()] == modes
    assert all(each.grad is None for each in model.model.parameters())


def test_every_mode_is_as_it_was_after_a_failure() -> None:
    model = tiny.untrained()
    torch.nn.init.constant_(model.model.head.linear.bias, math.nan)
    model.model.train()
    with pytest.raises(RequestError, match="NaN"):
        generate(model, [12])
    assert all(each.training for each in model.model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_network_computes_in_the_dtype_asked_for(dtype: torch.dtype) -> None:
    seen: set[torch.dtype] = set()
    model = tiny.untrained()
    model.model.blocks[0].mlp_in.register_forward_hook(lambda *each: seen.add(each[-1].dtype))
    made = generate(model, [12, 16], dtype=dtype).proteins
    assert seen == {dtype}
    assert [len(each) for each in made] == [12, 16]


def test_first_hitting_in_fewer_calls_for_every_batch() -> None:
    model, expected = tiny.untrained(), []
    made = generate(model, [30, 4, 12], steps=9, tokens=32, progress=lambda _, done, every: expected.append(every))
    assert [len(each) for each in made.proteins] == [30, 4, 12]
    assert made.calls == expected[-1] == 9 + 9  # of the two short ones in one batch, and of the long one


@pytest.mark.parametrize(
    ("changed", "error", "said"),
    [
        ({"sampler": "ddim"}, UnknownNameError, "first-hitting, euler, analytic"),
        ({"steps": 0}, RequestError, "1 step or more"),
        ({"sampler": "euler", "steps": 0}, RequestError, "1 step or more"),
        ({"seed": -1}, RequestError, "seed -1"),
        ({"seed": 2**63}, RequestError, "seed 9223372036854775808"),
        ({"tokens": 0}, RequestError, "budget of 0"),
        ({"wanted": []}, RequestError, "one or more"),
        ({"wanted": [0]}, RequestError, "1 free or more"),
        ({"wanted": [10**9]}, RequestError, "100,000 in all"),
    ],
)
def test_what_makes_no_sense_is_refused(changed: dict[str, object], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        generate(tiny.untrained(), **{"wanted": [5], **changed})


def test_first_hitting_is_refused_where_noise_does_not_mask() -> None:
    with pytest.raises(RequestError, match="take analytic"):
        generate(tiny.untrained(uniform=True), [5])

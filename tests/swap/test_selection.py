"""Which sites a swap is about, and what backend each is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from headway.errors import SwapError, UnknownNameError
from headway.swap import inspect, swap
from headway.swap.verify import verify


class ByHand(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x @ x.transpose(1, 2)).softmax(-1) @ x


class Mine(nn.MultiheadAttention):
    pass


def model() -> nn.Module:
    shared = nn.MultiheadAttention(8, 2)
    return nn.ModuleDict(
        {
            "encoder": nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), 2),
            "decoder": nn.TransformerDecoderLayer(8, 2, 8),
            "mine": Mine(8, 2),
            "shared": shared,
            "again": shared,
        }
    )


E0, E1 = "encoder.layers.0.self_attn", "encoder.layers.1.self_attn"
SELF, CROSS = "decoder.self_attn", "decoder.multihead_attn"
EVERY = {E0, E1, SELF, CROSS, "mine", "shared"}
CHOICES: dict[str, tuple[Any, set[str]]] = {
    "all": ("*", EVERY),
    "a name": (E1, {E1}),
    "a glob": ("encoder.*", {E0, E1}),
    "a glob in the middle": ("*.layers.?.self_attn", {E0, E1}),
    "an alias": ("again", {"shared"}),
    "a class": (Mine, {"mine"}),
    "the base class": (nn.MultiheadAttention, EVERY),
    "a predicate": (lambda name, module: "cross" in name or name.endswith("multihead_attn"), {CROSS}),
    "a predicate of the module": (lambda name, module: module.batch_first, {E0, E1}),
    "several": ([E0, Mine, lambda name, _: name == SELF], {E0, "mine", SELF}),
    "a set": ({"mine", "again"}, {"mine", "shared"}),
    "a generator": ((name for name in (E0, E1)), {E0, E1}),
}


@pytest.mark.parametrize("word", ("only", "skip"))
@pytest.mark.parametrize("case", [case for case in CHOICES if case != "a generator"])
def test_only_and_skip(word: str, case: str) -> None:
    selection, names = CHOICES[case]
    expected = names if word == "only" else EVERY - names
    made = model()
    census = swap(made, **{word: selection}).census
    assert {ticket.name for ticket in census.swapped} == expected
    for ticket in census.tickets:
        assert ticket.swapped or "left out by only= or skip=" in ticket.because
    changed = {n for n, m in made.named_modules() if type(m).__dict__.get("_original") and hasattr(m, "num_heads")}
    assert changed == expected
    assert {t.name for t in inspect(model(), **{word: selection}).swapped} == expected


def test_a_generator_is_read_once() -> None:
    census = swap(model(), only=(name for name in (E0, E1))).census
    assert {ticket.name for ticket in census.swapped} == {E0, E1}


def test_only_and_skip_together() -> None:
    census = swap(model(), only="encoder.*", skip="*.1.*").census
    assert {ticket.name for ticket in census.swapped} == {E0}


@pytest.mark.parametrize("word", ("only", "skip"))
@pytest.mark.parametrize(
    "selection",
    ("encodr.*", "", nn.Linear, lambda name, module: False, ["encoder.*", "decodr.*"], "Encoder.*", r"encoder\..*"),
    ids=("misspelt", "empty", "a class of no site", "false", "one of two", "another case", "a regular expression"),
)
def test_what_matches_no_site_is_refused(word: str, selection: Any) -> None:
    """With the names that there are; and nothing is changed."""
    made = model()
    with pytest.raises(SwapError, match=f"{word}=.*matches no site; the sites are: 'encoder.layers.0.self_attn'"):
        swap(made, **{word: selection})
    assert all("_original" not in type(module).__dict__ for module in made.modules())


def test_nothing_to_match_in_a_model_without_sites() -> None:
    with pytest.raises(SwapError, match="the sites are: none"):
        swap(nn.Linear(2, 2), only="*")
    done = swap(nn.Linear(2, 2), torch.randn(1, 2))
    assert done.census.tickets == ()
    assert "0 sites" in str(done)


@pytest.mark.parametrize(
    ("made", "wants", "why"),
    [
        (nn.Linear(8, 2), {}, "no attention was found"),
        (nn.MultiheadAttention(8, 2, batch_first=True), {"skip": "*"}, "it is left out by only= or skip="),
        (nn.Sequential(ByHand(), ByHand()), {}, "it is written by hand"),
    ],
    ids=("nothing there", "left out", "by hand"),
)
def test_nothing_swapped_says_so_and_why(made: nn.Module, wants: Any, why: str, tmp_path: Path) -> None:
    x = torch.randn(2, 5, 8)
    done = swap(made, (x, x, x) if wants else x, **wants)
    assert done.certificate is not None
    assert not done.certificate.passed
    assert why in str(done)
    assert "nothing was swapped, so there is nothing to prove" in str(done)
    assert "0 of 0" not in str(done)
    said = str(verify(done.certificate.save(tmp_path / "certificate.json")))
    assert "nothing was swapped" in said
    assert "failed" not in said


def test_a_census_of_inspect_does_not_say_that_anything_was_swapped() -> None:
    said = str(inspect(model(), skip="encoder.*"))
    assert said.startswith("ModuleDict: 6 sites of attention, of which a swap would take 4")
    assert f"{SELF}  nn.MultiheadAttention: a swap would take it" in said
    assert f"{E0}  nn.MultiheadAttention: a swap would leave it alone, because it is left out" in said
    assert "not run" not in said
    assert "6 sites of attention, 6 swapped, 0 left alone" in str(swap(model()))


def test_an_empty_selection() -> None:
    for ask in (swap, inspect):
        with pytest.raises(SwapError, match=r"got only=\[\], which matches no site; the sites are: 'encoder"):
            ask(model(), only=[])
    assert len(swap(model(), skip=[]).census.swapped) == 6


def test_a_backend_for_all_or_by_glob() -> None:
    """Of several globs that match, the last one counts; the rest is auto."""
    census = swap(model(), backend="reference").census
    assert {ticket.asked for ticket in census.tickets} == {"reference"}
    census = swap(model(), backend={"encoder.*": "sdpa-math", E1: "reference", "again": "flex"}).census
    asked = {ticket.name: ticket.asked for ticket in census.tickets}
    assert asked == {E0: "sdpa-math", E1: "reference", SELF: "auto", CROSS: "auto", "mine": "auto", "shared": "flex"}
    census = swap(model(), backend={"*": "sdpa-math", "decoder.*": "auto"}).census
    assert {ticket.name for ticket in census.tickets if ticket.asked == "auto"} == {SELF, CROSS}


def test_unknown_names_are_refused_before_anything_is_done() -> None:
    """A misspelt backend or contract, alone or by glob, with the names there are; and a glob that matches nothing."""
    made = model()
    for backend in ("flashattention", {"encoder.*": "flesh2"}, {"nothing.*": "flesh2"}, ""):
        with pytest.raises(UnknownNameError, match="known: auto, "):
            swap(made, backend=backend)
    with pytest.raises(SwapError, match="backend='nothing.*' | backend='nothing"):
        swap(made, backend={"nothing.*": "reference"})
    for require in (("exact",), "exact", ["deterministic", "exact"]):
        with pytest.raises(UnknownNameError, match="unknown contract 'exact'"):
            swap(made, require=require)  # type: ignore[arg-type]
    assert all("_original" not in type(module).__dict__ for module in made.modules())


def test_one_contract_may_be_a_word() -> None:
    done = swap(nn.MultiheadAttention(8, 2), require="deterministic")  # type: ignore[arg-type]
    assert len(done.census.swapped) == 1
    x = torch.randn(3, 1, 8)
    done.model(x, x, x, need_weights=False)
    (decision,) = done.census.swapped[0].decisions.values()
    assert decision.request.require == frozenset({"deterministic"})


def test_what_is_left_alone_is_refused_with_its_reason() -> None:
    made = nn.Sequential(ByHand(), nn.TransformerEncoderLayer(8, 2, 8, batch_first=True))
    for selection in ("0", ["1.*", "0"]):
        with pytest.raises(SwapError, match="got only, which names '0', left alone because it is written by hand at"):
            swap(made, torch.randn(2, 3, 8), only=selection)


@pytest.mark.parametrize(
    "wrong", [3, [3], lambda module: True, [lambda: True]], ids=("number", "numbers", "of the module", "of nothing")
)
@pytest.mark.parametrize("word", ["only", "skip"])
def test_what_is_no_selection_is_refused(word: str, wrong: Any) -> None:
    with pytest.raises(SwapError, match=rf"got {word}=.*takes a glob on names, .* a predicate of two"):
        swap(model(), **{word: wrong})


@pytest.mark.parametrize("wrong", [None, ["flex"], 3], ids=repr)
def test_what_is_no_backend_is_refused(wrong: Any) -> None:
    with pytest.raises(SwapError, match="got backend=.*takes a name, or names by glob"):
        swap(model(), backend=wrong)

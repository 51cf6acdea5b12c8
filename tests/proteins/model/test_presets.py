"""Named sizes have the parameters that their origins count, and configs that make no sense are refused at once."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from headway import RequestError
from headway_apps.proteins.alphabet import ESM, SEED
from headway_apps.proteins.model.config import DiTConfig
from headway_apps.proteins.model.dit import DiT
from headway_apps.proteins.model.presets import PRESETS, preset

COUNTED_BY_OTHERS = {
    "seed-23m": 23_930_880,
    "seed-24m": 24_061_952,
    "seed-66m": 66_724_096,
    "seed-316m": 316_360_704,
    "sedd-small": 169_627_218,
    "sedd-medium": 424_477_010,
}


@pytest.mark.parametrize("name", PRESETS)
def test_a_size_has_as_many_parameters_as_its_origin_counts(name: str) -> None:
    with torch.device("meta"):
        model = DiT(preset(name))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == PRESETS[name].parameters == COUNTED_BY_OTHERS[name]


def test_all_counts_are_checked() -> None:
    assert PRESETS.keys() == COUNTED_BY_OTHERS.keys()


def test_the_inferred_size_gives_the_reported_shape_and_says_that_it_is_inferred() -> None:
    model = DiT(preset("seed-23m"))
    scores = model(torch.randint(0, 34, (2, 64)), torch.rand(2))
    assert scores.shape == (2, 64, 33)
    assert PRESETS["seed-23m"].origin.startswith("inferred")


def test_every_field_that_a_preset_changes_takes_effect() -> None:
    config = preset("seed-24m", width=64, heads=4, blocks=2, cond=16, dropout=0.25, mlp_ratio=2)
    with torch.device("meta"):
        model = DiT(config)
    assert len(model.blocks) == 2
    assert model.get_submodule("blocks.1.mlp_in").weight.shape == (128, 64)
    assert model.blocks[0].dropout == 0.25
    assert model.blocks[0].heads == 4


GOOD: dict[str, Any] = {"width": 64, "blocks": 2, "heads": 4, "cond": 16, "embedded": 33, "scored": 33, "mask": 32}
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "heads that do not divide": ({"heads": 5}, "heads=1, 2, 4, 8, 16, 32"),
    "odd heads": ({"width": 60, "heads": 12}, "heads=1, 2, 3, 5, 6, 10, 15, 30"),
    "odd width": ({"width": 33, "heads": 3}, "a width that is a multiple of 6"),
    "no blocks": ({"blocks": 0}, "blocks=0"),
    "half a block": ({"blocks": 2.0}, "whole number"),
    "more scored than read": ({"scored": 34}, "34 scored symbols of 33"),
    "a mask out of range": ({"mask": 33}, "one of the 33"),
    "scores of uniform noise scaled": ({"mask": None}, "scale_by_sigma=False"),
    "nothing but a mask": ({"scored": 1, "mask": 0}, "one more"),
    "all dropped": ({"dropout": 1.0}, "0 to below 1"),
    "another gelu": ({"gelu": "quick"}, "'tanh' or 'erf'"),
    "another end": ({"final": "shift"}, "'scale'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_config_that_makes_no_sense_is_refused_with_what_would(name: str) -> None:
    changes, words = WRONG[name]
    with pytest.raises(RequestError) as refusal:
        DiTConfig(**{**GOOD, **changes})
    assert words in str(refusal.value)


def test_unknown_names_are_refused_with_those_that_are_known() -> None:
    with pytest.raises(RequestError, match="seed-23m, seed-24m"):
        preset("seed-25m")
    with pytest.raises(RequestError, match="got n_blocks, takes fields of a config: width, blocks"):
        preset("seed-24m", n_blocks=6)


@pytest.mark.parametrize("alphabet", [ESM, SEED], ids=lambda alphabet: alphabet.name)
@pytest.mark.parametrize("name", PRESETS)
def test_symbols_must_be_those_of_the_alphabet(name: str, alphabet: Any) -> None:
    """A config's 36 tokens for data of 25 went unnoticed elsewhere, and ids that mean nothing were sampled."""
    if (name, alphabet.name) != ("seed-24m", "esm"):  # which is made for it
        with pytest.raises(RequestError, match="takes"):
            preset(name).check_alphabet(alphabet.size, alphabet.mask)
    fitting = preset(name, embedded=alphabet.size, scored=alphabet.size, mask=alphabet.mask)
    fitting.check_alphabet(alphabet.size, alphabet.mask)
    for size in (alphabet.size - 2, alphabet.size + 1):
        with pytest.raises(RequestError, match=f"got an alphabet of {size} symbols"):
            fitting.check_alphabet(size, alphabet.mask)
    with pytest.raises(RequestError, match="whose mask is 3"):
        fitting.check_alphabet(alphabet.size, 3)


def test_a_mask_after_the_scored_symbols_needs_no_score() -> None:
    config = preset("seed-23m")
    config.check_alphabet(size=34, mask=33)
    assert not config.scores_mask
    assert dataclasses.replace(config, mask=32).scores_mask

"""A config is taken whole or refused with the line and the key that is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from headway_apps.proteins.alphabet import ESM
from headway_apps.proteins.cli import app
from headway_apps.proteins.config import Config, ConfigError, parameters, parse, read
from headway_apps.proteins.diffusion.curriculum import LessNoise, Steady
from headway_apps.proteins.diffusion.graphs import Absorbing, Uniform
from headway_apps.proteins.diffusion.schedules import Geometric
from headway_apps.proteins.model.dit import DiT
from headway_apps.proteins.model.presets import PRESETS

SMALL = """
data: {folder: somewhere}
model: {width: 32, blocks: 1, heads: 2, cond: 8}
run: {steps: 3000}
"""


def test_a_small_one() -> None:
    config = parse(SMALL)
    assert config.network.mask == ESM.mask == 32
    assert config.network.scored == config.network.embedded == ESM.size
    assert config.curriculum.curriculum == Steady()


def test_numbers_are_read_as_people_write_them() -> None:
    assert parse(SMALL + "optim: {lr: 1e-4, clip: null}").optim.lr == 1e-4


def test_the_effective_config_is_the_same_config_with_every_key() -> None:
    config = parse(SMALL + "optim: {clip: null}\ncurriculum: {kind: less-noise, steps: 7}\n")
    again = parse(config.to_yaml())
    assert again.model_dump() == config.model_dump()
    assert again.optim.clip is None
    assert again.curriculum.curriculum == LessNoise(7)
    assert all(f"{name}:" in config.to_yaml() for name in ("betas", "reaches", "trackers", "shard"))


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_with_the_symbols_of_the_alphabet(name: str) -> None:
    config = parse(SMALL.replace("width: 32, blocks: 1, heads: 2, cond: 8", f"preset: {name}"))
    assert config.network.width == PRESETS[name].config.width
    assert (config.network.scored, config.network.mask) == (33, 32)
    assert parameters(PRESETS[name].config) == PRESETS[name].parameters


@pytest.mark.parametrize("changes", ["", "head_bias: false", "final: scale", "mlp_ratio: 2"])
def test_parameters_are_counted_as_the_network_has_them(changes: str) -> None:
    config = parse(SMALL.replace("cond: 8", f"cond: 8, {changes}")).network
    assert parameters(config) == sum(each.numel() for each in DiT(config).parameters())


def test_noise() -> None:
    noise = parse(SMALL + "noise: {schedule: geometric, sigma_max: 9.5, graph: uniform, loss: score-entropy}").noise
    assert noise.levels == Geometric(sigma_max=9.5)
    assert noise.of(ESM, "ACX") == Uniform(33, ids=tuple(sorted((*ESM.residues, ESM.id_of("X")))))
    assert parse(SMALL).noise.of(ESM, "AC") == Absorbing(33, mask=32, ids=tuple(sorted(ESM.residues)))


def test_changes_from_the_command_line() -> None:
    config = parse(SMALL, ["optim.lr=2e-4", "run.seed=7", "keep.trackers=[jsonl, tensorboard]", "model.dropout=0"])
    assert (config.optim.lr, config.run.seed, config.keep.trackers) == (2e-4, 7, ["jsonl", "tensorboard"])
    assert config.network.dropout == 0


@pytest.mark.parametrize(
    "more, told",
    [
        ("optim:\n  lrr: 2\n", "line 6: optim.lrr is unknown, takes lr, betas"),
        ("optim:\n  lr: fast\n", "line 6: optim.lr: Input should be a valid number, got 'fast'"),
        ("optim:\n  lr: true\n", "line 6: optim.lr"),
        ("n_blocks: 6\n", "line 5: n_blocks is unknown, takes data, model, run"),
        ("optim: {lr: 1}\noptim: {lr: 2}\n", "'optim' stands twice"),
        ("noise: {schedule: cosine, sigma_max: 0.5}\n", "jumped by t=1 with probability 0.3935"),
        ("noise: {schedule: cosine}\n", "has no sigma_max, which schedule: cosine needs"),
        ("noise: {sigma_max: 3}\n", "got sigma_max, takes reaches, eps with schedule: log-linear"),
        ("noise: {graph: uniform}\n", "takes loss: score-entropy"),
        ("curriculum: {shape: linear}\n", "got shape, which kind: none does not take"),
        ("optim: {warmup: 4000}\n", "got optim.warmup=4000 in run.steps=3000, takes less; say optim.warmup"),
        ("keep: {trackers: [wandbb]}\n", "line 5: keep.trackers"),
        ("a: [", "line 5, column 5: cannot be read as YAML: while parsing a flow node, expected the node"),
        (
            "optim: {lr: 1}\n\tbad: 2\n",
            "line 6, column 1: cannot be read as YAML: while scanning for the next token, found",
        ),
        ("a: {[b]: 1}", "line 5, column 5: cannot be read as YAML: a key is no word"),
        ("a: 2020-13-45", "cannot be read as YAML: month must be in 1..12"),
        ("a: " + "[" * 5000, "cannot be read as YAML"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(more: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(SMALL + more)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "model, told",
    [
        ("width: 100, heads: 3, blocks: 2, cond: 8", "takes heads of one even size: heads=1, 2, 5, 10, 25, 50"),
        ("preset: seed-24mm", "takes seed-23m, seed-24m"),
        ("width: 32", "has neither a preset"),
        ("width: 0, heads: 1, blocks: 1, cond: 1", "model.width"),
    ],
)
def test_a_network_that_cannot_be_is_refused(model: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        parse(SMALL.replace("width: 32, blocks: 1, heads: 2, cond: 8", model))


@pytest.mark.parametrize(
    "change, told",
    [("optim", "takes section.key=value"), ("run.steps.more=1", "is no section"), ("run.speed=3", "run.speed")],
)
def test_a_change_that_is_none_is_refused(change: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        parse(SMALL, [change])


def test_all_that_is_wrong_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse("model: {preset: x}")
    assert all(word in str(caught.value) for word in ("data is missing", "run is missing", "preset 'x'"))


def test_a_file(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(SMALL)
    assert isinstance(read(tmp_path / "run.yaml"), Config)
    with pytest.raises(ConfigError, match=r"other.yaml: No such file"):
        read(tmp_path / "other.yaml")


@pytest.mark.parametrize(
    "change, says",
    [
        ("run.steps=many", "--set run.steps=many: run.steps: Input should be a valid integer"),
        ("run={steps: many}", "--set run={steps: many}: run.steps: Input should be a valid integer"),
        ("model.heads=5", "the config: model: got width 32 for 5 heads"),
        ("model.preset=huge", "the config, line 3, --set model.preset=huge: model: got preset 'huge'"),
    ],
)
def test_a_change_is_blamed_and_not_the_line_that_it_replaced(change: str, says: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse(SMALL, ["optim.lr=1e-4", change])
    assert str(raised.value).startswith(says)


def test_a_preset_is_shown_with_what_it_stands_for(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(SMALL.replace("width: 32, blocks: 1, heads: 2, cond: 8", "preset: seed-66m"))
    done = CliRunner().invoke(app, ["show", str(tmp_path / "x.yaml")])
    assert done.stdout.startswith("# 66,717,952 parameters: width 768, blocks 8, heads 12, cond 256,")
    assert "gelu erf" in done.stdout.splitlines()[0]

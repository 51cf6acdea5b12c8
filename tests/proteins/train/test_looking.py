"""What a run looks at: the averaged weights on all that is held out, the best by that number, and the last to go on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from proteins.families import prepared
from proteins.train.runs import folder, told, weights

from headway import RequestError
from headway_apps.proteins.cli.opened import opened
from headway_apps.proteins.config import Config
from headway_apps.proteins.data import fasta
from headway_apps.proteins.data.shards import Prepared
from headway_apps.proteins.diffusion.bound import Bound
from headway_apps.proteins.evaluate.evaluation import evaluate
from headway_apps.proteins.evaluate.likelihood import likelihood
from headway_apps.proteins.generate.sample import generate
from headway_apps.proteins.train import trainer
from headway_apps.proteins.train.trainer import train
from headway_apps.training.checkpoints import Checkpoints
from headway_apps.training.errors import CheckpointError

Configs = Callable[..., Config]


def test_what_is_logged_is_of_the_averaged_weights_on_all_that_is_held_out(
    config: Configs, data: Path, tmp_path: Path
) -> None:
    train(config("look.samples=0"), tmp_path / "run")
    model, _, _ = opened(tmp_path / "run")
    part = Prepared(data)["held_out"]
    found = likelihood(model, part, tokens=128, seed=3)
    assert len(found.nats) == len(part)
    assert told(tmp_path / "run", "val/loss") == pytest.approx([found.per_residue], rel=1e-6)
    assert told(tmp_path / "run", "val/perplexity") == pytest.approx([found.perplexity], rel=1e-6)


def test_noise_is_the_same_at_every_look(config: Configs, tmp_path: Path) -> None:
    """Weights that do not move cost the same, to the bit, under a curriculum too."""
    changes = ("look.samples=0", "optim.lr=1e-30", "every.evaluate=2", "curriculum.kind=less-noise")
    train(config(*changes), tmp_path / "run")
    first, *others = told(tmp_path / "run", "val/loss")
    assert others == [first] * 3


LOSSES = 3.0, 2.5, 2.8, 2.6, 2.9


def test_the_best_is_that_of_what_was_held_out_and_a_run_goes_on_from_the_last(
    config: Configs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the loss of training rises, as it does under a curriculum."""
    looks = iter(LOSSES)
    monkeypatch.setattr(trainer, "likelihood", lambda *_, **__: Bound((next(looks),), (1,), 0.0))
    changes = ("look.samples=0", "every.evaluate=2", "every.save=2", "keep.checkpoints=1", "curriculum.kind=less-noise")
    run = tmp_path / "run"
    done = train(config(*changes), run)
    assert done.best == 2.5
    kept = Checkpoints(run / "checkpoints")
    assert kept.steps() == [4, 8]
    best = kept.best()
    assert best is not None
    assert (best.step, best.score) == (4, 2.5)
    words: list[str] = []
    assert train(config(*changes, "run.steps=10"), run, resume=True, told=words.append).best == 2.5
    assert words[0] == "going on after step 8"
    assert kept.steps() == [4, 10]
    assert told(run, "checkpoint/is_best") == [1, 1, 0, 0, 0]
    assert told(run, "val/best_loss") == [3.0, 2.5, 2.5, 2.5, 2.5]
    assert told(run, "val/loss") == list(LOSSES)


def test_samples_of_a_run_are_of_its_averaged_weights_and_as_long_as_its_data(config: Configs, tmp_path: Path) -> None:
    prepared(tmp_path / "data", ["MKTAY", "MKTAYIAKQ"] * 4, held_out=["MKTAYIAKQRQISF"])
    changes = ("look.samples=12", "run.steps=4", f"data.folder={tmp_path / 'data'}")
    train(config(*changes), tmp_path / "run")
    (file,) = tmp_path.glob("run/samples/*.fasta")
    found = list(fasta.read(file))
    lengths = [len(each.sequence) for each in found]
    assert set(lengths) == {5, 9}
    seed = int(found[0].name.removeprefix("seed").partition("-")[0])
    model, _, _ = opened(tmp_path / "run")
    assert [each.sequence for each in found] == generate(model, lengths, seed=seed).proteins


def test_samples_are_drawn_in_the_precision_of_training(
    config: Configs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    real = trainer.generate
    monkeypatch.setattr(trainer, "generate", lambda *a, **k: (asked.append(k["dtype"]), real(*a, **k))[1])
    train(config("run.precision=bfloat16", "run.steps=4", "look.samples=2"), tmp_path / "run")
    assert asked == [torch.bfloat16]


@pytest.mark.parametrize("what", ["likelihood", "generate"])
def test_a_look_that_fails_stops_the_run(
    config: Configs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RequestError("got nothing that can be measured")

    monkeypatch.setattr(trainer, what, fails)
    with pytest.raises(RequestError, match="nothing that can be measured"):
        train(config("look.samples=2"), tmp_path / "run")


def test_a_run_whose_checkpoint_is_damaged_is_neither_begun_anew_nor_written_over(
    config: Configs, tmp_path: Path
) -> None:
    changes = ("look.samples=0", "run.steps=4", "every.evaluate=4")
    train(config(*changes), tmp_path / "run")
    (damaged,) = tmp_path.glob("run/checkpoints/*/model.safetensors")
    damaged.write_bytes(damaged.read_bytes()[:-1])
    kept, lines = weights(tmp_path / "run", 4), (tmp_path / "run" / "metrics.jsonl").read_bytes()
    for resume in (True, False):
        with pytest.raises((CheckpointError, trainer.TrainingError)):
            train(config(*changes, "run.steps=6"), tmp_path / "run", resume=resume)
    assert weights(tmp_path / "run", 4) == kept
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == lines


def test_a_run_is_known_to_be_of_its_data(config: Configs, data: Path, tmp_path: Path) -> None:
    train(config("run.steps=4"), tmp_path / "run")
    model, name, trained_on = opened(tmp_path / "run")
    held_out = Prepared(data)
    assert evaluate(model, held_out, model=name, trained_on=trained_on, sequences=2).notes == []
    other = Prepared(folder(tmp_path / "other", seed=1))
    (note,) = evaluate(model, other, model=name, trained_on=trained_on, sequences=2).notes
    assert note.startswith("the model was trained on other data than other")

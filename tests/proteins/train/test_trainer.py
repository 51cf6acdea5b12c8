"""A run: it learns, goes on as if it had not stopped, and stops with a word where it cannot go on."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from proteins.families import prepared
from proteins.train.runs import weights

from headway import RequestError
from headway_apps.proteins.alphabet import STANDARD
from headway_apps.proteins.config import Config
from headway_apps.proteins.data.shards import Prepared
from headway_apps.proteins.model.dit import DiT
from headway_apps.proteins.train import trainer
from headway_apps.proteins.train.trainer import Outcome, TrainingError, train
from headway_apps.training.checkpoints import Checkpoints
from headway_apps.training.errors import TrackerError
from headway_apps.training.trackers import read

Configs = Callable[..., Config]


def test_a_run_and_what_it_leaves(config: Configs, tmp_path: Path) -> None:
    done = train(config("look.samples=2"), tmp_path / "run")
    assert isinstance(done, Outcome)
    assert done.step == 8
    assert done.best is not None
    assert 2 < done.best < 4
    told: dict[str, Any] = {}
    for line in read(tmp_path / "run" / "metrics.jsonl"):
        told |= line
    wanted = (
        "train/loss train/learning_rate train/epoch train/grad_norm train/batch_time train/samples_per_second"
        " train/residues_per_second val/loss val/perplexity val/best_loss samples/generated_proteins"
        " samples/avg_length summary/final_step summary/final_train_loss summary/training_completed checkpoint/step"
        " checkpoint/is_best"
    )
    assert set(wanted.split()) <= set(told)
    assert told["val/loss"] == done.best
    assert [Checkpoints(tmp_path / "run" / "checkpoints").steps()] == [[4, 8]]
    fasta = (tmp_path / "run" / "samples" / "step-000000008.fasta").read_text().splitlines()
    assert len(fasta) == 4
    assert set(fasta[1]) <= set(STANDARD)
    assert "seed: 3" in (tmp_path / "run" / "config.yaml").read_text()


def test_a_run_that_goes_on_is_the_run_that_was_not_stopped(config: Configs, tmp_path: Path) -> None:
    train(config(), tmp_path / "whole")
    train(config("every.save=4"), tmp_path / "parts")
    for later in Checkpoints(tmp_path / "parts" / "checkpoints").steps()[1:]:
        Checkpoints(tmp_path / "parts" / "checkpoints").rewind(later - 1)
    torch.rand(7)  # somebody else's random numbers
    done = train(config(), tmp_path / "parts", resume=True)
    assert done.step == 8
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    assert len(weights(tmp_path / "whole")) == 3
    whole, parts = (Checkpoints(tmp_path / name / "checkpoints").at(8).state for name in ("whole", "parts"))
    assert whole == parts
    lines = [json.loads(line) for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "train/loss" in line]
    assert steps == [2, 4, 6, 8]


def test_looking_changes_nothing(config: Configs, tmp_path: Path) -> None:
    train(config("every.evaluate=1", "every.samples=2", "every.log=1"), tmp_path / "often")
    train(config("look.samples=0"), tmp_path / "seldom")
    often, seldom = weights(tmp_path / "often"), weights(tmp_path / "seldom")
    assert often == seldom


@pytest.mark.parametrize("changes", [["run.checkpointing=true"], ["batch.buckets=[20]"]], ids=str)
def test_other_ways_to_compute_it(config: Configs, tmp_path: Path, changes: list[str]) -> None:
    plain, other = train(config(), tmp_path / "plain"), train(config(*changes), tmp_path / "other")
    if changes[0].startswith("run."):
        assert other.loss == pytest.approx(plain.loss, rel=1e-6)
    assert other.step == plain.step


def test_random_state_of_the_process_is_left_alone(config: Configs, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    train(config("run.steps=4", "every.samples=2"), tmp_path / "run")
    assert torch.equal(before, torch.get_rng_state())


def test_it_learns_what_stands_beside_what(config: Configs, tmp_path: Path) -> None:
    """Ten letters again and again: each as frequent, so that all there is to learn is their order."""
    turns = [("ACDEFGHIKL" * 4)[at : at + 20] for at in range(10)]
    prepared(tmp_path / "data", turns, held_out=turns)
    changes = ["run.steps=150", "optim.lr=1e-2", "look.samples=0", "model.dropout=0", "model.width=32"]
    changes += ["every.save=150", "every.evaluate=150"]
    done = train(config(*changes, f"data.folder={tmp_path / 'data'}"), tmp_path / "run")
    assert done.best is not None
    assert done.best < 1.0 < math.log(10)


def test_rates_follow_real_updates(config: Configs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that the scaler skipped move neither the learning rate nor the average."""
    skipped = iter([True, False, True, False])
    monkeypatch.setattr(
        trainer.Accelerator, "optimizer_step_was_skipped", property(lambda self: next(skipped)), raising=True
    )
    train(config("run.steps=4", "every.log=1", "every.save=4", "look.samples=0"), tmp_path / "run")
    kept = Checkpoints(tmp_path / "run" / "checkpoints").at(4).state
    assert (kept["updates"], kept["averaged"]) == (2, 2)
    rates = [line["train/learning_rate"] for line in read(tmp_path / "run" / "metrics.jsonl") if "train/loss" in line]
    assert rates[0] == rates[1] < rates[2] == rates[3]


# -- where it stops ---------------------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_stops_it(config: Configs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = trainer.Objective.noised

    def broken(self: Any, batch: Any, step: int, number: int) -> Any:
        found = real(self, batch, step, number)
        return dataclasses.replace(found, weights=(found.weights[0] * math.nan,)) if step == 5 else found

    monkeypatch.setattr(trainer.Objective, "noised", broken)
    with pytest.raises(
        TrainingError, match=r"no number at step 5, in a batch of the sequences \[\d+.*last checkpoint is"
    ):
        train(config(), tmp_path / "run")
    assert Checkpoints(tmp_path / "run" / "checkpoints").steps() == [4]


def test_no_memory_is_told_with_what_to_change(
    config: Configs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("no more")

    monkeypatch.setattr(trainer.Objective, "cost", full)
    with pytest.raises(TrainingError, match=r"batch of \d+ tokens, the longest sequence \d+: lower batch.tokens"):
        train(config(), tmp_path / "run")


def test_a_run_that_is_there_is_not_written_over(config: Configs, tmp_path: Path) -> None:
    train(config("run.steps=4"), tmp_path / "run")
    kept = weights(tmp_path / "run", 4)
    with pytest.raises(TrainingError, match="has checkpoints up to step 4"):
        train(config("run.steps=4"), tmp_path / "run")
    assert weights(tmp_path / "run", 4) == kept
    with pytest.raises(TrainingError, match="has no checkpoint"):
        train(config(), tmp_path / "other", resume=True)


@pytest.mark.parametrize("change", ["optim.lr=1e-2", "run.seed=4", "model.width=32", "batch.per_step=2"])
def test_another_run_is_not_gone_on_with(config: Configs, tmp_path: Path, change: str) -> None:
    train(config("run.steps=4"), tmp_path / "run")
    with pytest.raises(TrainingError, match=change.split("=")[0]):
        train(config("run.steps=4", change), tmp_path / "run", resume=True)


def test_no_run_is_begun_among_other_files_or_in_one(config: Configs, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.yaml").write_bytes(b"\xff mine")
    with pytest.raises(TrainingError, match="mine, which holds config.yaml and no checkpoint of this config"):
        train(config(), tmp_path / "mine")
    assert (tmp_path / "mine" / "config.yaml").read_bytes() == b"\xff mine"
    with pytest.raises(TrainingError, match="config.yaml, which is a file, takes a folder"):
        train(config(), tmp_path / "mine" / "config.yaml")


def test_a_tracker_that_is_refused_leaves_no_run_behind(
    config: Configs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(TrackerError, match="pip install wandb, or leave it out"):
        train(config("keep.trackers=[wandb]"), tmp_path / "run")
    train(config("run.steps=4"), tmp_path / "run")


def test_a_run_that_ended_before_its_first_checkpoint_is_begun_again(config: Configs, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(config("run.steps=4"), run)
    kept = weights(run, 4)
    shutil.rmtree(run / "checkpoints")
    (run / ".config.yaml.partial").write_text("half of")
    with pytest.raises(TrainingError, match="which holds config.yaml, metrics.jsonl.* and no checkpoint"):
        train(config("run.steps=4", "run.seed=9"), run)
    train(config("run.steps=4"), run)
    assert weights(run, 4) == kept
    assert [line["step"] for line in read(run / "metrics.jsonl") if "train/loss" in line] == [2, 4]


def test_it_says_what_it_trains_on_what(config: Configs, tmp_path: Path) -> None:
    words: list[str] = []
    run = config("run.steps=4", "batch.per_step=2")
    train(run, tmp_path / "run", told=words.append)
    part = Prepared(Path(run.data.folder))["train"]
    told = re.fullmatch(
        r"([\d,]+) weights; (\d+) proteins of ([\d,]+) residues, each met (\S+) times or less .*", words[1]
    )
    assert told is not None
    numbers = [float(each.replace(",", "")) for each in told.groups()]
    assert numbers[:3] == [sum(each.numel() for each in DiT(run.network).parameters()), len(part), part.residues]
    met = [line["train/epoch"] for line in read(tmp_path / "run" / "metrics.jsonl") if "train/epoch" in line][-1]
    assert 0.5 * numbers[3] < met <= numbers[3] * 1.01


def test_a_finished_run_can_be_made_longer(config: Configs, tmp_path: Path) -> None:
    train(config("run.steps=4"), tmp_path / "run")
    words: list[str] = []
    assert train(config("run.steps=6"), tmp_path / "run", resume=True, told=words.append).step == 6
    assert any("run.steps was 4, is 6: from here the learning rate falls to that step" in each for each in words)


def test_a_run_that_has_ended_is_left_as_it_is(config: Configs, tmp_path: Path) -> None:
    train(config("optim.warmup=1", "run.steps=4"), tmp_path / "run")
    kept = {each: each.read_bytes() for each in (tmp_path / "run").rglob("*") if each.is_file()}
    words: list[str] = []
    assert train(config("optim.warmup=1", "run.steps=4"), tmp_path / "run", resume=True, told=words.append).step == 4
    assert any("nothing is left to do" in each for each in words)
    with pytest.raises(TrainingError, match=r"got run.steps=3 .* which is at step 4, takes no fewer"):
        train(config("optim.warmup=1", "run.steps=3"), tmp_path / "run", resume=True)
    assert {each: each.read_bytes() for each in (tmp_path / "run").rglob("*") if each.is_file()} == kept


@pytest.mark.parametrize("change", ["run.device=cuda:9", "run.precision=float16", "run.device=tpu"])
def test_what_the_machine_lacks_is_refused(config: Configs, tmp_path: Path, change: str) -> None:
    with pytest.raises((RuntimeError, ValueError), match="takes|known: auto, cuda"):
        train(config(change), tmp_path / "run")


def test_a_batch_too_small_for_a_sequence_is_refused(config: Configs, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="takes at least"):
        train(config("batch.tokens=8"), tmp_path / "run")


def test_a_replay_is_refused_where_there_is_no_gpu(config: Configs, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="got run.replay=true on cpu, takes a GPU of CUDA; leave run.replay at"):
        train(config("run.replay=true"), tmp_path / "run")

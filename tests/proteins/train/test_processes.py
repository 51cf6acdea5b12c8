"""Runs as processes: several do what one does, and one that is killed goes on as if it had not been."""

from __future__ import annotations

import gc
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from forked import together
from proteins.train.runs import CONFIG, command, weights
from typer.testing import CliRunner

from headway_apps.proteins.cli import app
from headway_apps.proteins.config import read
from headway_apps.proteins.train.trainer import Trainer, train
from headway_apps.training import interrupts, trackers
from headway_apps.training.checkpoints import Checkpoints

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def file(data: Path, tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.format(data=data))
    return path


def losses(run: Path) -> list[float]:
    return [
        line[name]
        for line in trackers.read(run / "metrics.jsonl")
        for name in ("train/loss", "val/loss")
        if name in line
    ]


def in_two(*words: str | Path) -> str:
    """What two processes of a command tell, which succeeds."""
    ended = together(app, [str(each) for each in words])
    told = "".join(told for _, told in ended)
    assert [code for code, _ in ended] == [0, 0], told
    return told


def under_torchrun(*words: str | Path) -> str:
    done = command(*words, processes=2)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.parametrize("shard, run", [(False, under_torchrun), (True, in_two)], ids=["DDP", "FSDP2"])
def test_two_processes_do_what_one_does(file: Path, tmp_path: Path, shard: bool, run: Callable[..., str]) -> None:
    train(read(file), tmp_path / "one")
    shards = f"run.shard={str(shard).lower()}"
    told = run("train", file, "--out", tmp_path / "two", "--set", shards)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    assert len(losses(tmp_path / "one")) == 5
    assert told.count("step 8 of 8") == 1, "one process tells"
    first, second = (Checkpoints(tmp_path / name / "checkpoints").at(8) for name in ("one", "two"))
    for kind in ("model", "average", "optimizer"):
        ours, theirs = first.tensors(kind), second.tensors(kind)
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert (ours[name] - theirs[name]).abs().max() <= 1e-4, name


def test_one_process_goes_on_with_what_two_began(file: Path, tmp_path: Path) -> None:
    in_two("train", file, "--out", tmp_path / "two", "--set", "run.steps=4")
    assert train(read(file), tmp_path / "two", resume=True).step == 8
    assert Checkpoints(tmp_path / "two" / "checkpoints").steps() == [4, 8]


def killed(file: Path, folder: Path) -> None:
    """50 times a run is killed, each in a child of its own, and gone on with; then once not."""
    changed = ["every.save=1", "every.log=1", "batch.per_step=2", "run.steps=10", "every.evaluate=10"]
    config, moments, kills, runs = read(file, changed), random.Random(0), 0, 0
    gc.freeze()  # or each child would look at all that was imported

    def begun(run: Path) -> int:
        child = os.fork()
        if not child:
            train(config, run, resume=any(run.glob("checkpoints/step-*")))
            os._exit(0)
        return child

    def ended(child: int) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    before = time.monotonic()
    assert ended(begun(folder / "whole")) == 0
    life = (time.monotonic() - before) / 4
    while kills < 50:
        child = begun(folder / f"killed-{runs}")
        time.sleep(moments.uniform(0, life))
        os.kill(child, signal.SIGKILL)
        if (status := ended(child)) == 0:
            runs += 1
        else:
            assert status == -signal.SIGKILL
            kills += 1
    assert ended(begun(folder / f"killed-{runs}")) == 0


def test_a_run_that_is_killed_at_fifty_moments_is_the_run_that_was_not(file: Path, tmp_path: Path) -> None:
    ((code, told),) = together(killed, file, tmp_path, processes=1)
    assert code == 0, told
    runs = sorted(tmp_path.glob("killed-*"))
    assert runs
    for run in runs:
        assert weights(run, 10) == weights(tmp_path / "whole", 10)


@contextmanager
def after_steps(count: int, by: signal.Signals) -> Iterator[None]:
    """A run gets a signal after some steps."""
    step = Trainer._one

    def one(trainer: Trainer) -> None:
        step(trainer)
        if trainer.step == count:
            signal.raise_signal(by)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_one", one)
        yield


def interrupted(file: Path, run: Path, by: signal.Signals, *changes: str, after: int) -> tuple[int, str]:
    """The exit status of a run that gets a signal after some steps, and what it said."""
    with after_steps(after, by):
        given = [word for change in changes for word in ("--set", change)]
        done = CliRunner().invoke(app, ["train", str(file), "--out", str(run), *given])
    return done.exit_code, done.stdout


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_with_a_checkpoint_and_it_goes_on_as_if_it_had_not(
    file: Path, tmp_path: Path, by: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    changes = ("every.save=100", "every.log=100", "run.steps=5")
    before = signal.getsignal(by)
    status, said = interrupted(file, tmp_path / "run", by, *changes, after=2)
    assert (status, Checkpoints(tmp_path / "run" / "checkpoints").steps()) == (128 + by, [2])
    assert said.endswith(f"stopped before step 5; headway proteins train --out {tmp_path / 'run'} --resume goes on\n")
    assert (
        f"{by.name}: the run ends soon, with a checkpoint; after 2 s another ends it at once" in capfd.readouterr().err
    )
    assert signal.getsignal(by) is before
    done = CliRunner().invoke(app, ["train", "--out", str(tmp_path / "run"), "--resume"])  # by the run's own config
    assert done.exit_code == 0, done.output
    train(read(file, changes), tmp_path / "whole")
    assert weights(tmp_path / "run", 5) == weights(tmp_path / "whole", 5)


def one_of_two(file: Path, run: Path) -> None:
    """The first never hears a signal, the second after three steps."""
    changes = ("every.save=100", "every.log=4")
    done, said = interrupted(file, run, signal.SIGTERM, *changes, after=[99, 3][int(os.environ["RANK"])])
    print(said, f"status {done}")  # and ends well: where one process fails the others are killed


def test_two_processes_end_at_the_same_step_whichever_hears_a_signal(file: Path, tmp_path: Path) -> None:
    ended = together(one_of_two, file, tmp_path / "run")
    assert all(f"status {128 + signal.SIGTERM}" in told for _, told in ended), ended
    assert sum("--resume goes on" in told for _, told in ended) == 1, "one process tells"
    assert Checkpoints(tmp_path / "run" / "checkpoints").steps() == [4]


def test_a_second_signal_ends_it_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the same signal that comes twice: a terminal sends Ctrl-C to all, and torchrun passes it on."""
    with interrupts.heard("it ends soon") as asked:
        assert asked() is None
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert asked() is signal.SIGINT
    monkeypatch.setattr(interrupts, "SECONDS", 0.0)
    with interrupts.heard("it ends soon") as asked:
        signal.raise_signal(signal.SIGINT)
        assert asked() is signal.SIGINT
        time.sleep(0.01)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_signal_that_is_ignored_stays_so() -> None:
    """As of a job in the background, which Ctrl-C is not for."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupts.heard("it ends soon") as asked:
            signal.raise_signal(signal.SIGINT)
            assert asked() is None
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_forked_child_ends_as_it_would_have() -> None:
    with interrupts.heard("it ends soon"):
        child = os.fork()
        if not child:
            signal.raise_signal(signal.SIGTERM)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM


def unread(file: Path, run: Path) -> None:
    """A run whose reader ends by the signal that the run gets, as `| tee` does."""
    reader, writer = os.pipe()
    for stream in (1, 2):
        os.dup2(writer, stream)
    os.close(reader)
    with after_steps(2, signal.SIGINT):
        app(["train", str(file), "--out", str(run), "--set", "every.log=1"])


def test_a_run_that_nobody_reads_any_more_ends_as_well(file: Path, tmp_path: Path) -> None:
    ((code, _),) = together(unread, file, tmp_path / "run", processes=1)
    assert (code, Checkpoints(tmp_path / "run" / "checkpoints").steps()) == (128 + signal.SIGINT, [2])


@pytest.mark.parametrize(
    "words, told",
    [
        (["--resume"], "which is no run: it has no config.yaml; begin it with a config"),
        ([], "got no config, takes a YAML file; a run that was begun goes on with its own by --resume"),
    ],
)
def test_without_a_config_only_a_run_goes_on(tmp_path: Path, words: list[str], told: str) -> None:
    done = CliRunner().invoke(app, ["train", "--out", str(tmp_path / "run"), *words])
    assert done.exit_code == 1
    assert told in done.stderr


@pytest.mark.parametrize(
    "words, told",
    [
        (["--set", "optim.lrr=1"], "optim.lrr is unknown"),
        (["--set", "run.device=cuda:7"], "cuda:7"),
        (["--set", "data.folder=/nowhere"], "data.folder: got /nowhere, which is not there"),
        (["--resume"], "has no checkpoint"),
    ],
)
def test_what_fails_is_one_line_and_an_exit_status(file: Path, tmp_path: Path, words: list[str], told: str) -> None:
    done = CliRunner().invoke(app, ["train", str(file), "--out", str(tmp_path / "run"), *words])
    assert done.exit_code == 1
    *before, line = done.stderr.splitlines()
    assert all(each.startswith("on cpu, ") for each in before)
    assert line.startswith("error: ")
    assert told in line


def test_a_process_tells_its_failure_to_the_shell(tmp_path: Path) -> None:
    done = command("train", tmp_path / "no.yaml", "--out", tmp_path / "run")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: cannot read")


def test_a_config_is_shown_whole(file: Path) -> None:
    done = CliRunner().invoke(app, ["show", str(file), "--set", "optim.average=0.5"])
    assert done.exit_code == 0, done.stderr
    assert done.stdout.startswith("# ")
    assert "average: 0.5" in done.stdout

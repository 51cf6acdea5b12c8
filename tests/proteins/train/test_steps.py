"""A step of the optimizer: what it sums up, what it waits for, and what is told of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from proteins.families import prepared, protein
from proteins.train.runs import nats, told
from torch.utils._python_dispatch import TorchDispatchMode

from headway_apps.proteins.alphabet import ESM
from headway_apps.proteins.config import Config
from headway_apps.proteins.data.packing import BOUNDARIES, Batch, Batches
from headway_apps.proteins.data.shards import Prepared
from headway_apps.proteins.diffusion.curriculum import Steady
from headway_apps.proteins.model.dit import DiT
from headway_apps.proteins.train import trainer
from headway_apps.proteins.train.objective import Noised, Objective, seed_of
from headway_apps.proteins.train.trainer import train
from headway_apps.training.precision import Precision
from headway_apps.training.rates import Rate

Configs = Callable[..., Config]
QUIET = ("look.samples=0", "every.log=1", "model.dropout=0")


@pytest.fixture
def by_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise that depends on a sequence alone, not on the batch that it comes in."""

    def noised(self: Objective, batch: Batch, step: int, number: int) -> Noised:
        masked = batch.free & (batch.positions % 3 == 1)
        tokens = torch.where(masked, ESM.mask, batch.tokens)
        return Noised(tokens, batch.tokens, batch.free, 0.5 + batch.index.float(), (torch.ones(len(tokens)),))

    monkeypatch.setattr(Objective, "noised", noised)


@pytest.fixture
def eight(tmp_path: Path) -> str:
    """Eight proteins of one length: a whole epoch is one batch of 128 tokens, or four of 32."""
    rng = np.random.default_rng(2)
    made = [protein(rng, 16 - BOUNDARIES) for _ in range(8)]
    prepared(tmp_path / "eight", made, held_out=made)
    return f"data.folder={tmp_path / 'eight'}"


@pytest.mark.usefixtures("by_place")
def test_many_small_batches_make_the_step_of_one_large_one(config: Configs, eight: str, tmp_path: Path) -> None:
    for name, tokens, per_step in (("one", 128, 1), ("many", 32, 4)):
        size = (f"batch.tokens={tokens}", f"batch.per_step={per_step}")
        train(config(*QUIET, *size, eight, "run.steps=6"), tmp_path / name)
    for name in ("train/loss", "train/grad_norm", "train/learning_rate", "train/epoch"):
        assert told(tmp_path / "many", name) == pytest.approx(told(tmp_path / "one", name), rel=1e-4), name
    assert told(tmp_path / "one", "train/epoch") == [1, 2, 3, 4, 5, 6]


@pytest.mark.usefixtures("by_place")
def test_a_gradient_is_that_of_the_mean_over_all_residues_of_a_step(
    config: Configs, eight: str, tmp_path: Path
) -> None:
    """Which neither the loss told nor an optimizer that divides by the gradient's size would show."""
    run = config(*QUIET, eight, "batch.tokens=32", "batch.per_step=4", "run.steps=4", "optim.clip=null")
    train(run, tmp_path / "run")
    torch.manual_seed(seed_of(run.run.seed, 0, "weights"))
    model = DiT(run.network)
    batch = next(Batches(Prepared(Path(run.data.folder))["train"], ESM, 128))
    objective = Objective(run.noise.of(ESM, ""), run.noise.levels, Steady(), "cross-entropy", seed=0)
    cost = nats(objective, lambda noised, level: model(noised, level, batch.lengths), batch)
    (cost / (8 * 14)).backward()
    norm = torch.stack([each.grad.norm() for each in model.parameters() if each.grad is not None]).norm()
    assert told(tmp_path / "run", "train/grad_norm")[0] == pytest.approx(float(norm), rel=1e-5)
    assert told(tmp_path / "run", "train/loss")[0] == pytest.approx(cost.item() / (8 * 14), rel=1e-5)


@pytest.mark.usefixtures("by_place")
def test_no_gradient_is_left_over_for_the_next_step_or_epoch(config: Configs, eight: str, tmp_path: Path) -> None:
    """Weights that hardly move have the same gradients in each epoch."""
    size = ("batch.tokens=32", "batch.per_step=4", "optim.lr=1e-20")
    train(config(*QUIET, *size, eight, "run.steps=4", "every.save=2"), tmp_path / "run")
    train(config(*QUIET, *size, eight, "run.steps=6"), tmp_path / "run", resume=True)
    norms = told(tmp_path / "run", "train/grad_norm")
    assert norms == pytest.approx([norms[0]] * 6, rel=1e-5)
    assert norms[0] > 0


def test_gradients_are_sent_once_a_step(config: Configs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the last of its batches: between processes, sending them each time comes to the same, but later."""
    kept: list[int] = []
    calls: list[int] = []
    noised, one = Objective.noised, trainer.Trainer._one

    @contextlib.contextmanager
    def no_sync(self: Any, model: Any) -> Iterator[None]:
        kept[-1] += 1
        yield

    monkeypatch.setattr(trainer.Accelerator, "no_sync", no_sync)
    monkeypatch.setattr(Objective, "noised", lambda *given: (calls.append(sum(kept)), noised(*given))[1])
    monkeypatch.setattr(trainer.Trainer, "_one", lambda self: (kept.append(0), one(self))[1])
    train(config("run.steps=4", *QUIET), tmp_path / "run")
    assert kept == [3] * 4
    assert calls == [1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 9, 9, 10, 11, 12, 12]


def test_the_last_step_has_the_least_rate_however_many_batches_make_one(config: Configs, tmp_path: Path) -> None:
    train(config(*QUIET, "optim.least=0.1"), tmp_path / "run")
    rates = told(tmp_path / "run", "train/learning_rate")
    assert rates == [Rate(5e-3, 3, 8, 5e-4)(step) for step in range(1, 9)]
    assert rates[-1] == 5e-4


def test_nothing_in_a_step_waits_for_the_device_once_a_weight_or_a_block(
    config: Configs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers read from tensors are as many for four blocks as for one; on CPU a few checks read one each."""
    reads: list[int] = []

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            reads[-1] += function is torch.ops.aten._local_scalar_dense.default
            return function(*args, **(kwargs or {}))

    real = trainer.Trainer._one

    def one(self: trainer.Trainer) -> None:
        reads.append(0)
        with Reads():
            real(self)

    adamw = torch.optim.AdamW
    monkeypatch.setattr(
        torch.optim, "AdamW", lambda *given, **how: adamw(*given, **how | {"fused": True})
    )  # as on a GPU
    monkeypatch.setattr(trainer.Trainer, "_one", one)
    for blocks in (1, 4):
        train(config("run.steps=4", *QUIET, f"model.blocks={blocks}"), tmp_path / str(blocks))
    assert reads[:4] == reads[4:]


def test_throughput_is_of_real_residues_over_all_steps_since_it_was_last_told(
    config: Configs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock by which the n-th step takes n seconds, and each look a thousand, which are no part of it."""
    clock, residues, proteins = [0.0], [], []
    real, one = Objective.noised, trainer.Trainer._one

    def noised(self: Objective, batch: Batch, step: int, number: int) -> Noised:
        residues[-1] += len(batch.tokens) - 2 * len(batch.lengths)
        proteins[-1] += len(batch.lengths)
        return real(self, batch, step, number)

    def timed(self: trainer.Trainer) -> None:
        residues.append(0)
        proteins.append(0)
        one(self)
        clock[0] += len(residues)

    monkeypatch.setattr(Objective, "noised", noised)
    monkeypatch.setattr(trainer.Trainer, "_one", timed)
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    monkeypatch.setattr(trainer.Trainer, "_evaluate", lambda self: clock.__setitem__(0, clock[0] + 1000))
    train(config("look.samples=0", "every.log=2", "every.evaluate=1"), tmp_path / "run")
    assert told(tmp_path / "run", "train/batch_time") == [1.5, 3.5, 5.5, 7.5]
    for name, counts in (("residues", residues), ("samples", proteins)):
        expected = [(a + b) / seconds for a, b, seconds in zip(counts[::2], counts[1::2], (3, 7, 11, 15), strict=True)]
        assert told(tmp_path / "run", f"train/{name}_per_second") == pytest.approx(expected)


@pytest.mark.parametrize("dtype, mixed", [("float32", "no"), ("float16", "fp16"), ("bfloat16", "bf16")])
def test_a_run_computes_in_what_its_device_was_found_to_compute(
    config: Configs, monkeypatch: pytest.MonkeyPatch, dtype: str, mixed: str
) -> None:
    """Autocast and the scaler of the loss are of one dtype, as one word says both."""
    asked: list[Any] = []

    def chosen(device: torch.device, precision: str) -> Precision:
        asked.append((device.type, precision))
        return Precision(getattr(torch, dtype), dtype == "float16", "as the test says")

    monkeypatch.setattr(trainer.precision, "chosen", chosen)
    monkeypatch.setattr(trainer, "Accelerator", lambda **given: given)
    assert trainer._accelerator(config())["mixed_precision"] == mixed  # type: ignore[index]
    assert asked == [("cpu", "auto")]


def test_narrow_precision_ends_with_the_run(config: Configs, eight: str, tmp_path: Path) -> None:
    """Proteins of one length lie as rows, which is a forward of its own."""
    with torch.autocast("cpu", enabled=False):
        train(config(*QUIET, eight, "run.steps=4", "run.precision=bfloat16"), tmp_path / "run")
        assert not torch.is_autocast_enabled("cpu")

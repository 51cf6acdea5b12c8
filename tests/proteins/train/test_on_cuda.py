"""On a GPU: a recorded pass costs what an ordinary one does, a step never waits, a run goes on as if never stopped."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from proteins.families import prepared, protein
from proteins.train.runs import told
from torch import Tensor
from waiting import no_waiting

from headway_apps.proteins.alphabet import ESM
from headway_apps.proteins.config import Config
from headway_apps.proteins.data.packing import Batch, pack
from headway_apps.proteins.diffusion.curriculum import Steady
from headway_apps.proteins.diffusion.graphs import Absorbing
from headway_apps.proteins.diffusion.schedules import LogLinear
from headway_apps.proteins.model.config import DiTConfig
from headway_apps.proteins.model.dit import DiT
from headway_apps.proteins.train.objective import Objective
from headway_apps.proteins.train.replay import Replay
from headway_apps.proteins.train.trainer import Trainer, TrainingError, train
from headway_apps.training.checkpoints import Checkpoints

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
Configs = Callable[..., Config]
GPU = ("run.device=cuda", "run.precision=bfloat16", "model.width=128", "model.heads=2", "batch.tokens=4096",
       "look.samples=0", "every.evaluate=100")  # fmt: skip

bfloat16 = partial(torch.autocast, "cuda", torch.bfloat16)


def network(dropout: float = 0.0) -> DiT:
    config = DiTConfig(width=128, blocks=2, heads=2, cond=16, embedded=33, scored=33, mask=32, dropout=dropout)
    torch.manual_seed(0)
    model = DiT(config)
    for each in model.parameters():
        torch.nn.init.normal_(each, std=0.1)
    return model.cuda()


def batch_of(lengths: list[int], seed: int) -> Batch:
    rng = np.random.default_rng(seed)
    made = [np.frombuffer(protein(rng, length - 2).encode(), dtype=np.uint8) for length in lengths]
    return pack(made, range(len(made)), ESM)


BATCHES = [batch_of(lengths, seed) for seed, lengths in enumerate(([100, 60, 200], [30] * 15, [4] * 110, [200] * 2))]
OBJECTIVE = Objective(Absorbing(33, mask=32, ids=ESM.residues), LogLinear(), Steady(), "cross-entropy", seed=0)


def gradients(model: DiT) -> Tensor:
    return torch.cat([each.grad.flatten() for each in model.parameters() if each.grad is not None])


def plain(model: DiT, batch: Batch, number: int) -> tuple[Tensor, Tensor]:
    model.zero_grad()
    noised = OBJECTIVE.noised(batch.to("cuda"), 0, number)
    with bfloat16():
        scores = model(noised.tokens, noised.level, model.pack(batch.tokens, batch.lengths))
    nats = OBJECTIVE.cost(scores, noised)
    nats.backward()
    return nats.detach(), gradients(model)


def replay_of(model: DiT) -> Replay:
    return Replay(model, OBJECTIVE, bfloat16, tokens=512, longest=200, mean=40.0)


def replayed(replay: Replay, batch: Batch, number: int) -> Tensor:
    noised = OBJECTIVE.noised(batch.to("cuda"), 0, number)
    return replay.backward(noised, batch.lengths, torch.ones((), device="cuda"))


@pytest.mark.parametrize("compiled", [False, True], ids=["as it is", "compiled"])
def test_a_recorded_pass_costs_what_an_ordinary_one_costs(compiled: bool) -> None:
    """For batches of all shapes one after the other, of which one does not fit the first room."""
    model = network()
    expected = [plain(model, batch, number) for number, batch in enumerate(BATCHES)]
    if compiled:
        model.compile_parts(one_shape=True)
    replay = replay_of(model)
    for number, (batch, (nats, grads)) in enumerate(zip(BATCHES, expected, strict=True)):
        replay.gradients.zero()
        assert float(replayed(replay, batch, number)) == pytest.approx(float(nats), rel=1e-2)
        assert float((gradients(model) - grads).norm() / grads.norm()) < 2e-2
    assert len(replay._recorded) == 2


def test_gradients_of_several_batches_add_up_also_while_one_is_recorded() -> None:
    model = network()
    expected = sum(plain(model, batch, number)[1] for number, batch in enumerate(BATCHES))
    replay = replay_of(model)
    for number, batch in enumerate(BATCHES):
        replayed(replay, batch, number)
    assert float((gradients(model) - expected).norm() / torch.as_tensor(expected).norm()) < 2e-2


def test_dropout_is_another_in_each_batch_and_the_same_after_a_new_recording() -> None:
    model = network(dropout=0.5)
    found = []
    for _ in range(2):
        replay = replay_of(model)
        found.append([float(replayed(replay, BATCHES[0], 0)) for _ in range(2)])
        found[-1].append(float(replayed(replay, BATCHES[0], 1)))
    assert found[0] == found[1]
    assert found[0][0] == found[0][1] != found[0][2]


@pytest.fixture
def longer(tmp_path: Path) -> str:
    rng = np.random.default_rng(0)
    made = [protein(rng, int(length)) for length in rng.integers(20, 180, 600)]
    prepared(tmp_path / "longer", made[:580], held_out=made[580:])
    return f"data.folder={tmp_path / 'longer'}"


@pytest.mark.parametrize("replay", ["auto", "false"])
@pytest.mark.parametrize("compiled", ["true", "false"])
def test_a_step_does_not_wait_for_the_gpu(
    config: Configs, longer: str, tmp_path: Path, replay: str, compiled: str
) -> None:
    run = config(*GPU, longer, f"run.replay={replay}", f"run.compile={compiled}", "every.log=100", "run.steps=40")
    with contextlib.ExitStack() as closing:
        trainer = Trainer(run, tmp_path / "run", resume=False, told=print, closing=closing)
        for _ in range(20):
            trainer._one()
        with no_waiting():
            for _ in range(8):
                trainer._one()
        assert (trainer.replay is None) == (replay == "false")


def test_a_replayed_run_goes_on_as_if_it_had_not_stopped(config: Configs, longer: str, tmp_path: Path) -> None:
    """With the same dropout; not to the bit, as attention's backward pass adds in any order on a GPU."""
    run = config(*GPU, longer, "every.log=1")
    for name in ("whole", "parts"):
        train(run, tmp_path / name)
    Checkpoints(tmp_path / "parts" / "checkpoints").rewind(4)
    train(run, tmp_path / "parts", resume=True)
    for name in ("train/loss", "train/grad_norm"):
        assert told(tmp_path / "parts", name) == pytest.approx(told(tmp_path / "whole", name), rel=5e-3)


def test_a_replayed_run_learns_what_an_ordinary_one_does(config: Configs, longer: str, tmp_path: Path) -> None:
    for name in ("auto", "false"):
        train(config(*GPU, longer, f"run.replay={name}", "model.dropout=0", "every.log=1"), tmp_path / name)
    for name in ("train/loss", "train/grad_norm"):
        assert told(tmp_path / "auto", name) == pytest.approx(told(tmp_path / "false", name), rel=2e-2)


@pytest.mark.parametrize("asked", ["run.precision=float16", "run.precision=float32", "run.checkpointing=true"])
def test_a_replay_that_cannot_be_is_refused_if_it_is_asked_for(
    config: Configs, longer: str, tmp_path: Path, asked: str
) -> None:
    with pytest.raises(TrainingError, match=r"got run.replay=true .*leave run.replay at auto"):
        train(config(*GPU, longer, asked, "run.replay=true"), tmp_path / "run")
    assert train(config(*GPU, longer, asked), tmp_path / "run").step == 8

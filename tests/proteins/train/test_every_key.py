"""Every key of a config takes effect: with another value a run does something else, or is refused."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from proteins.families import prepared, protein
from proteins.train.runs import weights

from headway import HeadwayError
from headway_apps.proteins.config import Config, Section, parse
from headway_apps.proteins.model.dit import DiT
from headway_apps.proteins.train import trainer
from headway_apps.training import trackers
from headway_apps.training.checkpoints import Checkpoints

CONFIG = """
data: {folder: HERE/data}
model: {width: 8, blocks: 1, heads: 2, cond: 4}
run: {steps: 4, device: cpu}
batch: {tokens: 32, per_step: 2}
optim: {warmup: 2, lr: 2e-2, average: 0.9}
every: {log: 2, save: 2, evaluate: 2, samples: 2}
look: {samples: 2}
"""
PRESET = "model={preset: seed-24m, width: 8, blocks: 1, heads: 2, cond: 4}"
NOISE = {name: f"noise={{{said}}}" for name, said in {
    "geometric": "schedule: geometric", "cosine": "schedule: cosine, sigma_max: 9", "uniform": "graph: uniform,"
    " loss: score-entropy", "by score": "loss: score-entropy",
}.items()}  # fmt: skip

CASES: dict[str, tuple[list[str], list[str], str]] = {
    "data.folder": ([], ["data.folder=HERE/other"], "model"),
    "data.alphabet": ([], ["data.alphabet=seed"], "model"),
    "model.preset": ([], [PRESET], "model"),
    "model.width": ([], ["model.width=16"], "model"),
    "model.blocks": ([], ["model.blocks=2"], "model"),
    "model.heads": ([], ["model.heads=4"], "model"),
    "model.cond": ([], ["model.cond=8"], "model"),
    "model.mlp_ratio": ([], ["model.mlp_ratio=2"], "model"),
    "model.dropout": ([], ["model.dropout=0.5"], "model"),
    "model.scale_by_sigma": ([NOISE["by score"]], ["model.scale_by_sigma=false"], "model"),
    "model.head_bias": ([], ["model.head_bias=false"], "model"),
    "model.gelu": ([], ["model.gelu=erf"], "model"),
    "model.silu_after_time": ([], ["model.silu_after_time=false"], "model"),
    "model.final": ([], ["model.final=scale"], "model"),
    "run.steps": ([], ["run.steps=6"], "summary/final_step"),
    "run.seed": ([], ["run.seed=1"], "model"),
    "run.device": ([], ["run.device=cuda:99"], "refused"),
    "run.precision": ([], ["run.precision=float16"], "refused"),
    "run.checkpointing": ([], ["run.checkpointing=true"], "checkpointed"),
    "run.compile": ([], ["run.compile=true"], "compiled"),
    "run.replay": ([], ["run.replay=true"], "refused"),
    "run.shard": ([], ["run.shard=true"], "sharded"),
    "noise.graph": ([NOISE["by score"]], [NOISE["uniform"]], "model"),
    "noise.schedule": ([], [NOISE["geometric"]], "model"),
    "noise.eps": ([], ["noise.eps=5e-3"], "val/loss"),
    "noise.sigma_min": ([NOISE["geometric"]], ["noise.sigma_min=1e-2"], "model"),
    "noise.sigma_max": ([NOISE["cosine"]], ["noise.sigma_max=7"], "model"),
    "noise.reaches": ([], ["noise.reaches=0.9999"], "refused"),
    "noise.loss": ([], [NOISE["by score"]], "model"),
    "curriculum.kind": ([], ["curriculum.kind=less-noise"], "model"),
    "curriculum.steps": (["curriculum.kind=early-times"], ["curriculum.steps=3"], "model"),
    "curriculum.shape": (["curriculum={kind: less-noise, steps: 3}"], ["curriculum.shape=linear"], "model"),
    "batch.tokens": ([], ["batch.tokens=64"], "train/epoch"),
    "batch.per_step": ([], ["batch.per_step=4"], "train/epoch"),
    "batch.buckets": ([], ["batch.buckets=[8]"], "model"),
    "optim.lr": ([], ["optim.lr=1e-2"], "train/learning_rate"),
    "optim.betas": ([], ["optim.betas=[0.8, 0.99]"], "model"),
    "optim.weight_decay": ([], ["optim.weight_decay=0.1"], "model"),
    "optim.warmup": ([], ["optim.warmup=1"], "train/learning_rate"),
    "optim.least": ([], ["optim.least=0.5"], "train/learning_rate"),
    "optim.clip": ([], ["optim.clip=1e-6"], "model"),
    "optim.average": ([], ["optim.average=0.1"], "average"),
    "every.log": ([], ["every.log=1"], "steps of train/loss"),
    "every.save": ([], ["every.save=1"], "steps of checkpoint/step"),
    "every.evaluate": ([], ["every.evaluate=1"], "steps of val/loss"),
    "every.samples": ([], ["every.samples=1"], "steps of samples/avg_length"),
    "keep.checkpoints": (["every.save=1", "every.evaluate=4"], ["keep.checkpoints=1"], "checkpoints"),
    "keep.trackers": ([], ["keep.trackers=[trackio]"], "trackers"),
    "keep.project": ([], ["keep.project=other"], "project"),
    "keep.name": ([], ["keep.name=other"], "name"),
    "look.part": ([], ["look.part=third"], "val/loss"),
    "look.sequences": ([], ["look.sequences=3"], "val/loss"),
    "look.draws": ([], ["look.draws=2"], "val/loss"),
    "look.samples": ([], ["look.samples=5"], "samples"),
}  # fmt: skip
"""A key: how a run is to begin with, if not by CONFIG alone; what is changed of it; and what is then another."""


def keys(section: type[Section] = Config, at: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        kind = field.annotation
        inner = isinstance(kind, type) and issubclass(kind, Section)
        yield from keys(kind, f"{at}{name}.") if inner else [at + name]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    at, rng = tmp_path_factory.mktemp("keys"), np.random.default_rng(0)
    for name in ("data", "other"):
        made = [protein(rng, int(length)) for length in rng.integers(4, 13, 48)]
        prepared(at / name, made[:32], held_out=made[32:40], third=made[40:])
    return at


@pytest.fixture(scope="module")
def doings(place: Path) -> Iterator[Any]:
    """What a run with these changes does: all by name that can be seen of it but its config."""
    told: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gc.collect", lambda *_: 0)  # at its end, half the time of so small a run
        patch.setattr(DiT, "compile_parts", lambda self, one_shape: told.update(compiled=True))
        patch.setattr(
            "headway_apps.proteins.model.dit.checkpoint",
            lambda block, *given, use_reentrant: told.update(checkpointed=True) or block(*given),
        )
        real, tracking = trainer.Accelerator, trainer.Trackers

        def accelerator(**given: Any) -> Any:
            told.update(sharded=given.pop("fsdp_plugin") is not None)
            return real(**given)

        def tracked(names: list[str], folder: Path, project: str, name: str, *more: Any, **others: Any) -> Any:
            told.update(trackers=names, project=project, name=name)
            return tracking([], folder, project, name, *more, **others)

        patch.setattr(trainer, "Accelerator", accelerator)
        patch.setattr(trainer, "Trackers", tracked)

        def here(text: str) -> str:
            return text.replace("HERE", str(place))

        @functools.cache
        def done(*changes: str) -> dict[str, Any]:
            told.clear()
            run = place / "runs" / str(len(list(place.glob("runs/*")))) / "run"
            try:
                trainer.train(parse(here(CONFIG), [here(each) for each in changes]), run)
            except (HeadwayError, RuntimeError) as error:
                return {"refused": str(error)}
            return told | seen(run)

        yield done


def seen(run: Path) -> dict[str, Any]:
    lines = list(trackers.read(run / "metrics.jsonl"))
    names = {name for line in lines for name in line if "time" not in name and "second" not in name} - {"step"}
    steps = Checkpoints(run / "checkpoints").steps()
    held = weights(run, steps[-1])
    return {
        **{name: [line[name] for line in lines if name in line] for name in names},
        **{f"steps of {name}": [line["step"] for line in lines if name in line] for name in names},
        "checkpoints": steps, "model": held["model.safetensors"], "average": held.get("average.safetensors"),
        "samples": [len(each.read_text().splitlines()) for each in sorted(run.glob("samples/*.fasta"))],
    }  # fmt: skip


@pytest.mark.parametrize("key", list(keys()))
def test_another_value_makes_another_run(doings: Any, key: str) -> None:
    begun, changes, what = CASES[key]
    assert any(key.startswith(each.partition("=")[0]) for each in changes)
    was, now = doings(*begun), doings(*begun, *changes)
    assert "refused" not in was
    assert now.get(what) != was.get(what)


def test_a_run_is_the_same_twice(doings: Any) -> None:
    """Or another value would seem to take effect where chance does."""
    one, again = (doings(*changes) for changes in ([], ["run.seed=0"]))
    assert one is not again
    assert one == again
    assert {what for _, _, what in CASES.values()} <= one.keys() | {"refused", "checkpointed", "compiled"}

"""Small runs for tests: a folder of made proteins, a config of seconds, and what a run left."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from proteins.families import prepared, protein
from torch import Tensor

from headway_apps.proteins.data.packing import Batch
from headway_apps.proteins.train.objective import Objective
from headway_apps.training import trackers

CONFIG = """
data: {{folder: {data}}}
model: {{width: 16, blocks: 2, heads: 2, cond: 8}}
run: {{steps: 8, device: cpu, seed: 3}}
batch: {{tokens: 128, per_step: 4}}
optim: {{warmup: 3, lr: 5e-3, average: 0.9}}
every: {{log: 2, save: 4, evaluate: 8, samples: 8}}
look: {{samples: 0}}
"""


def folder(path: Path, seed: int = 0) -> Path:
    """60 proteins to train on, 10 held out."""
    rng = np.random.default_rng(seed)
    made = [protein(rng, int(length)) for length in rng.integers(5, 40, 70)]
    prepared(path, made[:60], held_out=made[60:])
    return path


def nats(
    objective: Objective, scores: Callable[[Tensor, Tensor], Tensor], batch: Batch, step: int = 0, number: int = 0
) -> Tensor:
    """What a batch costs a model that scores(noised (T,), sigma_bar (N,))."""
    noised = objective.noised(batch, step, number)
    return objective.cost(scores(noised.tokens, noised.level), noised)


def weights(run: Path, step: int = 8) -> dict[str, str]:
    """A hash of each file of tensors that a checkpoint has."""
    files = (run / "checkpoints" / f"step-{step:09d}").glob("*.safetensors")
    return {each.name: hashlib.sha256(each.read_bytes()).hexdigest() for each in sorted(files)}


def told(run: Path, name: str) -> list[Any]:
    """All that a run tracked under a name, in order."""
    return [line[name] for line in trackers.read(run / "metrics.jsonl") if name in line]


def command(*words: str | Path, processes: int = 1) -> subprocess.CompletedProcess[str]:
    """`headway proteins ...` as a process, or under torchrun as several, without a terminal."""
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.run(
        [*start, "-m", "headway_apps.proteins", *map(str, words)],
        capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip

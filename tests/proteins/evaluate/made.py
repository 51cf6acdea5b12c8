"""A prepared folder and a small trained model, for tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from proteins import families
from proteins.families import protein

from headway_apps.proteins.alphabet import ESM
from headway_apps.proteins.data.shards import Prepared
from headway_apps.proteins.diffusion.graphs import Absorbing, Graph, Uniform
from headway_apps.proteins.diffusion.schedules import LogLinear
from headway_apps.proteins.model.config import DiTConfig
from headway_apps.proteins.model.dit import DiT
from headway_apps.proteins.trained import Trained

GRAPHS: dict[str, Graph] = {
    "absorbing": Absorbing(33, mask=32, ids=ESM.residues),
    "uniform": Uniform(33, ids=ESM.residues),
}


PROVENANCE = {
    "sources": [{"file": "made.fasta", "bytes": 1234, "sha256": "ab" * 32}], "note": "made <for> a test",
    "rules": {"shortest": 30, "longest": 510, "ambiguous": 0.0, "duplicates": False},
    "counts": {"read": 90, "taken": 84, "rejected": {"shorter than 30": 6}, "mended": {}, "noted": {}},
    "split": {"by": "kmers", "shares": {"held_out": 0.3}, "seed": 0, "clusters": 84, "largest": 1},
    "leakage": {"measured": 24, "like": 0, "median": 0.01, "most": 0.05},
    "written": "2026-01-02T03:04:05+00:00", "versions": {"headway": "0.1.0"},
}  # fmt: skip


def prepared(folder: Path, train: int = 60, held_out: int = 24, seed: int = 0) -> Prepared:
    rng = np.random.default_rng(seed)
    some = [[protein(rng, int(length)) for length in rng.integers(30, 60, count)] for count in (train, held_out)]
    return families.prepared(folder, some[0], held_out=some[1], provenance=PROVENANCE)


def trained(graph: str = "absorbing", guesses: bool = False) -> Trained:
    """Untrained really: its scores are random, or with `guesses` those of somebody who knows nothing."""
    torch.manual_seed(0)
    mask = 32 if graph == "absorbing" else None
    config = DiTConfig(
        width=32, blocks=1, heads=2, cond=8, embedded=33, scored=33, mask=mask, scale_by_sigma=mask is not None
    )
    model = DiT(config)
    if not guesses:
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    return Trained(model.eval(), ESM, GRAPHS[graph], LogLinear(), {40: 3, 50: 4})

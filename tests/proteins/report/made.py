"""A run's folder, made by hand: what a run writes, without a run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import yaml
from proteins.evaluate.made import prepared, trained

from headway_apps.proteins.evaluate.evaluation import Samples, evaluate

CURRICULUM = {"kind": "less-noise", "steps": 400, "shape": None}


def config(data: Path, **sections: Any) -> dict[str, Any]:
    return {
        "data": {"folder": str(data), "alphabet": "esm"},
        "model": {"preset": None, "width": 32, "blocks": 1, "heads": 2, "cond": 8, "dropout": 0.1},
        "run": {"steps": 2000, "seed": 0, "device": "auto"},
        "look": {"part": "held_out", "sequences": None},
        "curriculum": {"kind": "none", "steps": None, "shape": None},
        "batch": {"tokens": 4096, "per_step": 1, "buckets": [128, 256]},
        "keep": {"trackers": ["jsonl"], "name": None},
        **sections,
    }


def metrics(steps: int = 2000, every: int = 20, rises: bool = False) -> list[dict[str, Any]]:
    found = []
    for step in range(every, steps + 1, every):
        loss = 2.88 + 0.12 * math.exp(-step / 500) + 0.01 * math.sin(step)
        loss -= 2 * (1 - step / 400) if rises and step < 400 else 0
        line = {
            "train/loss": loss, "train/learning_rate": 3e-4 * min(1, step / 200), "train/grad_norm": 0.5,
            "train/residues_per_second": 41_000 + 900 * math.cos(step),
        }  # fmt: skip
        found.append({"step": step, "seconds": step * 0.3, **line})
        if step % 200 == 0:
            held_out = 2.85 + 0.13 * math.exp(-step / 700)
            found.append({"step": step, "seconds": step * 0.3, "val/loss": held_out, "val/perplexity": 17.0})
    return found


def run(folder: Path, *, evaluated: bool = True, rises: bool = False, name: str = "a run") -> Path:
    """With all that a run can have."""
    data = prepared(folder / "data")
    made = folder / name
    (made / "samples").mkdir(parents=True)
    (made / "checkpoints" / "step-000002000").mkdir(parents=True)
    changes = {"curriculum": CURRICULUM} if rises else {}
    (made / "config.yaml").write_text(yaml.safe_dump(config(data.folder, **changes), sort_keys=False))
    write_metrics(made, metrics(rises=rises))
    (made / "samples" / "step-00002000.fasta").write_text(">seed0-1 length=12\nMKTAYIAKQRQI\n>seed0-2\nMAAW\n")
    if evaluated:
        samples = Samples(["MKTAYIAKQRQISFVKSHFSRQ", "MGSSHHHHHHSSGLVPRGSH", "MAAAAAAAAAAAAAW"], "made by hand")
        of = data["train"].fingerprint
        evaluate(trained(), data, model="a run, step 2,000", trained_on=of, samples=samples).save(
            made / "evaluation.json"
        )
    return made


def write_metrics(made: Path, lines: list[dict[str, Any]]) -> None:
    (made / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

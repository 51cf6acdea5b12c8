"""Times the protein trainer on 1, 2, 4, ... GPUs of one machine: whole runs of `headway proteins train` under torchrun.

    python benchmarks/scaling.py --data FOLDER --out benchmarks/results/scaling.jsonl [--processes 1,2,4]

Each process has a batch of its own at every step, so the work grows with their number. A rate is the median of those
that a run logs after its first 60 steps, in which it compiles and records: real residues of all processes a second.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from attention import about

from headway_apps.training import trackers

LOG, WARM = 20, 60
CONFIG = """
data: {{folder: {data}}}
model: {{preset: {preset}}}
run: {{steps: {steps}, compile: true, device: {device}}}
batch: {{tokens: {tokens}, per_step: {processes}}}
optim: {{warmup: 10}}
every: {{log: {log}, save: {steps}, evaluate: {steps}, samples: {steps}}}
look: {{sequences: 8, samples: 0}}
"""


def rate(processes: int, options: argparse.Namespace) -> float:
    """Real residues a second, of all processes."""
    with tempfile.TemporaryDirectory() as folder:
        config, run = Path(folder, "config.yaml"), Path(folder, "run")
        config.write_text(
            CONFIG.format(
                data=options.data.absolute(), preset=options.preset, steps=options.steps, tokens=options.tokens,
                processes=processes, log=LOG, device="cpu" if options.device == "cpu" else "auto",
            )
        )  # fmt: skip
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        subprocess.run([*start, "-m", "headway_apps.proteins", "train", str(config), "--out", str(run)], check=True)
        name = "train/residues_per_second"
        lines = trackers.read(run / trackers.FILE)
        return statistics.median(float(line[name]) for line in lines if name in line and line["step"] > WARM)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--processes", default="1,2,4")
    parser.add_argument("--preset", default="seed-66m")
    parser.add_argument("--tokens", type=int, default=16_384, help="in a batch of one process")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--commit", default=None, help="where the checkout is no git repository")
    options = parser.parse_args()
    if options.steps <= WARM + LOG:
        parser.error(f"got --steps {options.steps}, takes more than {WARM + LOG}: {WARM} are not counted")
    common: dict[str, Any] = about() | ({"commit": options.commit} if options.commit else {})
    alone = None
    with options.out.open("a") as file:
        for processes in map(int, options.processes.split(",")):
            found = rate(processes, options)
            alone = found / processes if alone is None else alone
            row = {
                "group": "scaling", "preset": options.preset, "processes": processes, "tokens": options.tokens,
                "steps": options.steps, "residues_per_second": round(found), "times_one": round(found / alone, 2),
            }  # fmt: skip
            file.write(json.dumps(row | common) + "\n")
            file.flush()
            print(*row.values(), flush=True)


if __name__ == "__main__":
    main()

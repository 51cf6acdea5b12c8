"""Turns benchmark rows into the table of times that `auto` chooses by: src/headway/choice/tables/<gpu>.json.

python benchmarks/make_table.py ROWS.jsonl...        # oldest first: a later row replaces an earlier one
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

from headway.backends.registry import NAMES

TABLES = Path(__file__).resolve().parent.parent / "src" / "headway" / "choice" / "tables"
SKIP = ("torch", "auto", "flex")
"""Flex is compiled for each shape, which takes seconds that its milliseconds do not show: auto does not race it."""


def main(paths: list[str]) -> None:
    read = [json.loads(line) for path in paths for line in Path(path).read_text().splitlines()]
    timed = [row for row in read if "q_len" in row and "ms_p50" in row and row["backend"] not in SKIP]
    for gpu in sorted({row["gpu"] for row in timed}):
        file = TABLES / f"{gpu.lower().replace(' ', '-')}.json"
        mine = [row for row in timed if row["gpu"] == gpu]
        source = sorted({(row["date"], row["commit"]) for row in mine})
        host = host_times([row for row in read if row["gpu"] == gpu and row["group"] == "host"])
        table = {"measured": source, "host_ms": host, "rows": list(cells(mine).values())}
        file.write_text(json.dumps(table, indent=1) + "\n")


def host_times(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Milliseconds that a call of each backend takes the host, without gradients and with them."""
    found: dict[str, dict[str, float]] = {"plain": {}, "grad": {}}
    for row in rows:
        if row["backend"] in NAMES:
            found["grad" if row["grad"] else "plain"][row["backend"]] = round(row["host_us"] / 1000, 5)
    return found


def cells(rows: list[dict[str, Any]]) -> dict[Any, dict[str, Any]]:
    """One cell per case and pass; a later row replaces an earlier one of the same backend."""
    found: dict[Any, dict[str, Any]] = {}
    for row in rows:
        case = {name: row[name] for name in ("mask", "dtype", "head_dim", "q_len", "kv_len")}
        case["sharing"] = row["heads"] // row["kv_heads"]
        case["grad"] = row["pass"] != "forward"
        case["tiles"] = row["batch"] * row["heads"] * math.ceil(row["q_len"] / 128)
        cell = found.setdefault(tuple(case.values()), {**case, "ms": {}})
        cell["ms"][row["backend"]] = row["ms_p50"]
    return found


if __name__ == "__main__":
    main(sys.argv[1:])

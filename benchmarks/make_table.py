"""Turns benchmark rows into the table of times that `auto` chooses by: src/headway/choice/tables/<gpu>.json.

python benchmarks/make_table.py benchmarks/results/attention.jsonl
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

TABLES = Path(__file__).parent.parent / "src" / "headway" / "choice" / "tables"
SKIP = ("torch", "auto", "flex")
"""Flex is compiled for each shape, which takes seconds that its milliseconds do not show: auto does not race it."""


def main(paths: list[str]) -> None:
    read = [json.loads(line) for path in paths for line in Path(path).read_text().splitlines()]
    timed = [row for row in read if "q_len" in row and "ms_p50" in row and row["backend"] not in SKIP]
    for gpu in sorted({row["gpu"] for row in timed}):
        file = TABLES / f"{gpu.lower().replace(' ', '-')}.json"
        mine = [row for row in timed if row["gpu"] == gpu]
        source = sorted({(row["date"], row["commit"]) for row in mine})
        TABLES.mkdir(exist_ok=True)
        file.write_text(json.dumps({"measured": source, "rows": list(cells(mine).values())}, indent=1) + "\n")


def cells(rows: list[dict[str, Any]]) -> dict[Any, dict[str, Any]]:
    """One cell per case and pass; a later row replaces an earlier one of the same backend."""
    found: dict[Any, dict[str, Any]] = {}
    for row in rows:
        case = {name: row[name] for name in ("mask", "dtype", "head_dim", "q_len", "kv_len")}
        case["sharing"] = row["heads"] // row["kv_heads"]
        case["grad"] = row["pass"] != "forward"
        cell = found.setdefault(tuple(case.values()), {**case, "ms": {}})
        cell["ms"][row["backend"]] = row["ms_p50"]
    return found


if __name__ == "__main__":
    main(sys.argv[1:])

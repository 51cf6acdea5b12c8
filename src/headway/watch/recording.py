"""What a watched run left: rows of numbers, small however large the model's tensors were."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from headway.errors import RequestError
from headway.watch.compare import Change, changes
from headway.watch.diversity import Spread
from headway.watch.entropy import Heads
from headway.watch.findings import Report, report
from headway.watch.ledger import Ledger
from headway.watch.rows import FIELDS, MODULE, Calls, Facts, Origin, Parameter, Row

FORMAT = 1


class Recording:
    """Filled while the block of `headway.watch` runs, and plain data afterwards.

    - `rows`: statistics of every output, operator and gradient. `heads`: attention, head by head.
    - `parameters`: which were used, and reached by gradients. `modules`: which ran. `origins`: where NaN and Inf began.
    """

    def __init__(self, bound: int) -> None:
        self.facts = Facts()
        self.ledger = Ledger(bound)
        self.rows: dict[tuple[str, str, str], Row] = {}
        self.heads: dict[str, Heads] = {}
        self.parameters: dict[str, Parameter] = {}
        self.modules: dict[str, Calls] = {}
        self.origins: list[Origin] = []
        self.inputs: dict[str, Spread] = {}
        self.outputs: dict[str, Spread] = {}

    @property
    def held_bytes(self) -> int:
        """What this recording holds; never more than its bound."""
        return self.ledger.held

    def row(self, kind: str, path: str, name: str) -> Row:
        """One row, or RequestError with the rows that there are."""
        try:
            return self.rows[kind, path, name]
        except KeyError:
            near = ", ".join([f"{k} {p!r} {n!r}" for k, p, n in self.rows if p == path or n == name][:12]) or "none"
            raise RequestError(
                f"got no row {kind!r} of {path!r} named {name!r}; takes one of `rows`, such as {near}"
            ) from None

    def of(self, kind: str) -> list[Row]:
        """All rows of a kind, in order of their first run."""
        return sorted((row for row in self.rows.values() if row.kind == kind), key=lambda row: row.order)

    def report(self) -> Report:
        """What is wrong, or worth a look: worst first, each with what to do. Printed, it is a page of plain text."""
        return report(self)

    def diff(self, other: Recording, at_least: float = 0.0) -> list[Change]:
        """What `other` has otherwise than this one, largest first, from relative changes of `at_least` on."""
        return changes(self, other, at_least)

    def figures(self, folder: str | Path) -> list[Path]:
        """Write PNGs into `folder`: activations by depth, gradient flow, entropy per head. Needs matplotlib."""
        from headway.watch.figures import draw

        return draw(self, Path(folder))

    def save_json(self, path: str | Path) -> Path:
        """Write everything; `Recording.load_json` reads it back."""
        path = Path(path)
        path.write_text(json.dumps(self.to_dict(), indent=1, allow_nan=False))
        return path

    @classmethod
    def load_json(cls, path: str | Path) -> Recording:
        """A recording that `save_json` wrote."""
        return cls.from_dict(json.loads(Path(path).read_text()))

    def save_csv(self, path: str | Path) -> Path:
        """Write `rows` and the attention heads as one table, a line each."""
        path = Path(path)
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(self.table())
        return path

    def table(self) -> Iterator[dict[str, Any]]:
        """The lines of the CSV."""
        for row in sorted(self.rows.values(), key=lambda row: (row.kind, row.order)):
            yield row.flat()
        for site, heads in self.heads.items():
            for head in range(heads.count):
                yield {
                    "kind": "attention head",
                    "path": site,
                    "name": f"head {head}",
                    "calls": heads.calls,
                    "count": heads.rows[head],
                    "entropy": heads.entropy(head),
                    "entropy_share": heads.share(head),
                    "max_logit": heads.highest(head),
                }

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, as JSON takes them."""
        return {
            "format": FORMAT,
            "bound": self.ledger.bound,
            "held": self.ledger.held,
            "refused": self.ledger.refused,
            "facts": dataclasses.asdict(self.facts),
            "rows": [_plain(dataclasses.asdict(row)) for row in self.rows.values()],
            "heads": {site: _plain(dataclasses.asdict(heads)) for site, heads in self.heads.items()},
            "parameters": {name: dataclasses.asdict(one) for name, one in self.parameters.items()},
            "modules": {path: dataclasses.asdict(calls) for path, calls in self.modules.items()},
            "origins": [dataclasses.asdict(origin) for origin in self.origins],
            "inputs": {name: spread.to_dict() for name, spread in self.inputs.items()},
            "outputs": {name: spread.to_dict() for name, spread in self.outputs.items()},
        }

    @classmethod
    def from_dict(cls, held: dict[str, Any]) -> Recording:
        if not isinstance(held, dict) or held.get("format") != FORMAT:
            raise RequestError(
                f"got no recording of format {FORMAT}; takes what Recording.save_json of this version of headway wrote"
            )
        recording = cls(held["bound"])
        recording.ledger.held, recording.ledger.refused = held["held"], held["refused"]
        recording.facts = Facts(**held["facts"])
        for row in map(Row.from_dict, held["rows"]):
            recording.rows[row.kind, row.path, row.name] = row
        recording.heads = {site: Heads.from_dict(one) for site, one in held["heads"].items()}
        recording.parameters = {
            name: Parameter(**{**one, "shape": tuple(one["shape"]), "names": tuple(one["names"])})
            for name, one in held["parameters"].items()
        }
        recording.modules = {path: Calls(**one) for path, one in held["modules"].items()}
        recording.origins = [Origin(**one) for one in held["origins"]]
        recording.inputs = {name: Spread.from_dict(one) for name, one in held["inputs"].items()}
        recording.outputs = {name: Spread.from_dict(one) for name, one in held["outputs"].items()}
        return recording

    def __repr__(self) -> str:
        ran = sum(calls.calls > 0 for calls in self.modules.values())
        return (
            f"<Recording of {self.facts.model}: {self.facts.forwards} forward, {self.facts.backwards} backward;"
            f" {ran} of {len(self.modules)} modules ran, {len(self.of(MODULE))} outputs, {len(self.heads)} attentions,"
            f" {self.held_bytes} of {self.ledger.bound} bytes>"
        )


def _plain(value: Any) -> Any:
    """JSON has no Inf; the only ones here stand for 'none seen yet'."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

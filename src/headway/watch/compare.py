"""What is otherwise in one recording than in another: before and after a change."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headway.watch.recording import Recording


@dataclasses.dataclass(frozen=True, slots=True)
class Change:
    """One number, or word, that differs. None stands for what one of the two does not have."""

    kind: str
    path: str
    name: str
    field: str
    before: Any
    after: Any

    @property
    def relative(self) -> float:
        """|after - before| over the larger of the two; 1 for what came, went, or is no number. From 0 to 2."""
        before, after = self.before, self.after
        if isinstance(before, int | float) and isinstance(after, int | float):
            size = max(abs(before), abs(after))
            return abs(after - before) / size if size else 0.0
        return 1.0

    def __str__(self) -> str:
        where = " ".join(filter(None, (self.kind, self.path, self.name)))
        return f"{where}: {self.field} {_shown(self.before)} -> {_shown(self.after)}"


def changes(before: Recording, after: Recording, at_least: float) -> list[Change]:
    one, other = dict(_entries(before)), dict(_entries(after))
    found = []
    for key in dict.fromkeys((*one, *other)):
        if key not in one or key not in other:
            # As one line, not as a line for each of its fields.
            found.append(Change(*key, "seen", key in one, key in other))
            continue
        for field in dict.fromkeys((*one[key], *other[key])):
            mine, its = one[key].get(field), other[key].get(field)
            if mine != its:
                found.append(Change(*key, field, mine, its))
    return sorted((change for change in found if change.relative >= at_least), key=_weight)


def _entries(recording: Recording) -> Iterator[tuple[tuple[str, str, str], dict[str, Any]]]:
    """What is compared, by what it is of; when a row came first is not."""
    for row in recording.table():
        key = row["kind"], row["path"], row["name"]
        yield key, {field: value for field, value in row.items() if field not in ("kind", "path", "name", "order")}
    for name, one in recording.parameters.items():
        yield ("parameter", name, ""), {"trainable": one.trainable, "used": one.used, "reached": one.reached}
    for name, spread in recording.outputs.items():
        yield ("spread of examples", "", name), {"std": spread.std, "rms": spread.rms}
    for origin in recording.origins:
        yield ("origin", origin.path, origin.op), {"what": origin.what, "phase": origin.phase}


def _weight(change: Change) -> tuple[bool, float]:
    """Operators after all else, large changes first."""
    return change.kind in ("op", "backward op"), -change.relative


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) and math.isfinite(value) else str(value)

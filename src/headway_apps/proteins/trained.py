"""Trained: a model, with all that sampling and evaluation have to know of how it was trained."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headway_apps.proteins.alphabet import ALPHABETS, Alphabet
from headway_apps.proteins.diffusion.graphs import Absorbing, Graph, Uniform
from headway_apps.proteins.diffusion.schedules import Cosine, Geometric, LogLinear, Schedule
from headway_apps.proteins.errors import WeightsError
from headway_apps.proteins.model import weights
from headway_apps.proteins.model.dit import DiT

GRAPHS: dict[str, type[Graph]] = {"absorbing": Absorbing, "uniform": Uniform}
SCHEDULES: dict[str, type[Schedule]] = {"log-linear": LogLinear, "geometric": Geometric, "cosine": Cosine}
FILE, WEIGHTS = "trained.json", "weights.safetensors"


@dataclasses.dataclass(frozen=True, eq=False)
class Trained:
    """In eval mode; what a free site may hold are the graph's ids."""

    model: DiT
    alphabet: Alphabet
    graph: Graph
    schedule: Schedule
    lengths: Mapping[int, int]
    """How many of the training sequences have so many residues."""

    def save(self, folder: Path) -> None:
        """Into a folder that is there: the weights, and a file that says the rest."""
        weights.save(self.model, folder / WEIGHTS)
        (folder / FILE).write_text(json.dumps(self.told(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Trained:
        """What `save` wrote."""
        path = folder / FILE
        if not path.is_file():
            raise WeightsError(f"got {folder}, which has no {FILE}, takes a folder of a trained model")
        try:
            told = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise WeightsError(f"got {path}, which is damaged ({error}); copy it again") from error
        return cls.of(weights.load(folder / WEIGHTS), told)

    def told(self) -> dict[str, Any]:
        """All but the weights, as plain values."""
        return {
            "alphabet": self.alphabet.name,
            "graph": _told(self.graph, GRAPHS),
            "schedule": _told(self.schedule, SCHEDULES),
            "lengths": {str(length): count for length, count in sorted(self.lengths.items())},
        }

    @classmethod
    def of(cls, model: DiT, told: Mapping[str, Any]) -> Trained:
        graph, schedule = dict(told["graph"]), dict(told["schedule"])
        graph["ids"] = tuple(graph["ids"])
        return cls(
            model.eval(),
            ALPHABETS[told["alphabet"]],
            GRAPHS[graph.pop("kind")](**graph),
            SCHEDULES[schedule.pop("kind")](**schedule),
            {int(length): count for length, count in told["lengths"].items()},
        )


def _told(value: Any, kinds: Mapping[str, type]) -> dict[str, Any]:
    kind = next(name for name, each in kinds.items() if type(value) is each)
    fields = [each.name for each in dataclasses.fields(value) if each.init]
    values = {name: getattr(value, name) for name in fields}
    return {"kind": kind, **{name: list(x) if isinstance(x, tuple) else x for name, x in values.items()}}

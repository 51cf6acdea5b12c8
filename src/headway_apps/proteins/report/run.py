"""Run: what a run's folder holds. What it lacks is named, with the reason; what is damaged raises."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from headway_apps.proteins import config as configs
from headway_apps.proteins.data import fasta
from headway_apps.proteins.data.shards import Prepared
from headway_apps.proteins.errors import DataError
from headway_apps.proteins.evaluate.evaluation import Evaluation
from headway_apps.training import trackers
from headway_apps.training.checkpoints import Checkpoints

EVALUATION = "evaluation.json"

Curve = list[tuple[int, float]]
"""Steps, and a number at each."""


@dataclasses.dataclass(frozen=True)
class Data:
    """What was trained on, as the prepared folder tells it."""

    fingerprint: str
    provenance: dict[str, Any]
    parts: dict[str, dict[str, int]]
    told_by: str


@dataclasses.dataclass(frozen=True)
class Run:
    name: str
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    checkpoints: list[int]
    evaluation: Evaluation | None
    data: Data | None
    samples: list[str]
    samples_from: str
    absent: dict[str, str]
    """What is not there, and why or what would make it."""

    @classmethod
    def open(cls, folder: Path) -> Run:
        if not folder.is_dir():
            raise DataError(f"got {folder}, which is no folder, takes that of a run")
        if not any((folder / name).exists() for name in (configs.FILE, trackers.FILE, EVALUATION, "checkpoints")):
            raise DataError(
                f"got {folder}, which is no run's folder: it has no {configs.FILE}, {trackers.FILE}, {EVALUATION} and"
                " no checkpoints"
            )
        absent: dict[str, str] = {}
        config = _config(folder, absent)
        evaluation = _evaluation(folder, absent)
        samples, origin = _samples(folder, evaluation, absent)
        return cls(
            name=folder.absolute().name,
            config=config,
            metrics=_metrics(folder, absent),
            checkpoints=_checkpoints(folder, absent),
            evaluation=evaluation,
            data=_data(config, evaluation, absent),
            samples=samples,
            samples_from=origin,
            absent=absent,
        )

    def curve(self, key: str) -> Curve:
        """Without what is no number: those steps are `lost`."""
        return [(step, value) for step, value in self._told(key) if math.isfinite(value)]

    def lost(self, key: str) -> int:
        return sum(not math.isfinite(value) for _, value in self._told(key))

    def _told(self, key: str) -> Iterator[tuple[int, float]]:
        return ((line["step"], float(line[key])) for line in self.metrics if key in line)

    @property
    def looked_at(self) -> int | None:
        """How many held-out sequences were scored as it trained, or more than there are; None for all."""
        found: int | None = (self.config.get("look") or {}).get("sequences")
        return found

    @property
    def compares(self) -> bool:
        """Whether what was scored as it trained is what the evaluation scored, and its n-grams."""
        if self.evaluation is None or "look" not in self.config or "run" not in self.config:
            return False
        ours, data, look = self.evaluation.likelihood, self.evaluation.data, self.config["look"]
        if not data["is_of_training"] or data["part"] != look["part"]:
            return False
        of = ours.of_sequences
        scored = of if self.looked_at is None else min(self.looked_at, of)
        return scored == ours.sequences and (scored == of or ours.seed == self.config["run"]["seed"])

    @property
    def curriculum(self) -> tuple[str, int | None]:
        """Its kind, and the steps it was given; 'none' where the noise was the same in all steps."""
        told = self.config.get("curriculum") or {}
        return told.get("kind", "none"), told.get("steps")


def _config(folder: Path, absent: dict[str, str]) -> dict[str, Any]:
    path = folder / configs.FILE
    if not path.is_file():
        absent["config"] = f"there is no {configs.FILE}"
        return {}
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"got {path}, which is no YAML ({' '.join(str(error).split())})") from error
    if not isinstance(found, dict):
        raise DataError(f"got {path}, which holds no sections, takes the config of a run")
    return found


def _metrics(folder: Path, absent: dict[str, str]) -> list[dict[str, Any]]:
    path = folder / trackers.FILE
    if not path.is_file():
        absent["metrics"] = f"there is no {trackers.FILE}"
        return []
    found = trackers.read(path)
    if not found:
        absent["metrics"] = f"{trackers.FILE} has no line yet"
    return found


def _checkpoints(folder: Path, absent: dict[str, str]) -> list[int]:
    steps = Checkpoints(folder / "checkpoints").steps() if (folder / "checkpoints").is_dir() else []
    if not steps:
        absent["checkpoints"] = "none was saved"
    return steps


def _evaluation(folder: Path, absent: dict[str, str]) -> Evaluation | None:
    if (folder / EVALUATION).is_file():
        return Evaluation.load(folder / EVALUATION)
    absent["evaluation"] = f"there is no {EVALUATION}; `headway proteins evaluate` writes it"
    return None


def _samples(folder: Path, evaluation: Evaluation | None, absent: dict[str, str]) -> tuple[list[str], str]:
    if evaluation is not None and evaluation.first:
        return evaluation.first, str(evaluation.samples)
    files = sorted((folder / "samples").glob("*.fasta"))
    if files:
        return [each.sequence for each in fasta.read(files[-1])], f"samples/{files[-1].name}"
    absent["samples"] = "none were drawn in training, and none were evaluated"
    return [], ""


def _data(config: dict[str, Any], evaluation: Evaluation | None, absent: dict[str, str]) -> Data | None:
    if evaluation is not None:
        told = evaluation.data
        return Data(told["fingerprint"], told["provenance"], told["parts"], "the evaluation")
    folder = (config.get("data") or {}).get("folder")
    if folder is None:
        absent["data"] = "neither a config nor an evaluation tells of it"
        return None
    try:
        prepared = Prepared(Path(folder), verify=False)
    except DataError as error:
        absent["data"] = f"its folder cannot be read here: {error}"
        return None
    parts = {
        name: {"sequences": part["sequences"], "residues": part["residues"]}
        for name, part in prepared.manifest["parts"].items()
    }
    return Data(prepared.fingerprint, prepared.provenance, parts, "its folder")

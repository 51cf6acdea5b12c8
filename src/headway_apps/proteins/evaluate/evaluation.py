"""Evaluation: all that is known of a model and of its samples, made in one go and kept as one file of JSON."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import headway
from headway import RequestError
from headway_apps.proteins.data.fasta import seems_nucleotides
from headway_apps.proteins.data.packing import BOUNDARIES
from headway_apps.proteins.data.prepare import MOST_RESIDUES, Progress
from headway_apps.proteins.data.shards import Part, Prepared
from headway_apps.proteins.errors import DataError
from headway_apps.proteins.evaluate.attention import Attention, attention_of
from headway_apps.proteins.evaluate.likelihood import chosen, likelihood
from headway_apps.proteins.evaluate.nearest import identities
from headway_apps.proteins.evaluate.ngrams import Baseline, baselines
from headway_apps.proteins.evaluate.references import references
from headway_apps.proteins.evaluate.statistics import Nearness, Statistics, statistics
from headway_apps.proteins.trained import Trained
from headway_apps.training import folders, precision

VERSION = 2
TOKENS = 16_384
SHOWN = 10
MOST = 5_000
"""Proteins of a part that samples are set beside: more would change nothing."""


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """Of the model on a part, by a bound: what it really costs is no more."""

    bound: str
    nats_per_residue: float
    perplexity: float
    standard_error: float | None
    """None for one sequence, which has none."""
    prior: float
    """Nats per residue that are the prior's, counted above."""
    sequences: int
    of_sequences: int
    residues: int
    draws: int
    seed: int


@dataclasses.dataclass(frozen=True)
class Samples:
    """Proteins that a model made, and where they come from."""

    proteins: list[str]
    origin: str


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """None stands for what was not measured; `absent` says why, by name."""

    model: str
    """Where it was loaded from."""
    parameters: int
    data: dict[str, Any]
    likelihood: Likelihood
    baselines: list[Baseline]
    attention: list[Attention]
    """As this evaluation ran, and as training would run on the same device."""
    statistics: list[Statistics]
    """The samples' row and then the references'; empty where there are no samples."""
    samples: str | None
    """Where they come from."""
    first: list[str]
    """Some of the samples."""
    absent: dict[str, str]
    machine: dict[str, str]
    written: str
    notes: list[str] = dataclasses.field(default_factory=list)
    """What may mislead."""

    def save(self, path: Path) -> None:
        told = {"version": VERSION, **dataclasses.asdict(self)}
        folders.replace(path, json.dumps(told, indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: Path) -> Evaluation:
        try:
            told = json.loads(path.read_text(encoding="utf-8"))
            if (version := told.pop("version")) != VERSION:
                raise DataError(f"got {path} of version {version}, takes {VERSION}; evaluate again")
            told["likelihood"] = Likelihood(**told["likelihood"])
            told["attention"] = [Attention(**each) for each in told["attention"]]
            told["baselines"] = [Baseline(**each) for each in told["baselines"]]
            told["statistics"] = [_statistics(each) for each in told["statistics"]]
            return cls(**told)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"got {path}, which is no evaluation, or damaged ({error}); evaluate again") from error


def _statistics(told: dict[str, Any]) -> Statistics:
    near = told["nearness"]
    kmers = {int(k): value for k, value in told["kmer_distance"].items()}
    return Statistics(**told | {"kmer_distance": kmers, "nearness": near and Nearness(**near)})


def evaluate(
    trained: Trained,
    prepared: Prepared,
    *,
    model: str,
    trained_on: str | None = None,
    part: str = "held_out",
    samples: Samples | None = None,
    tokens: int = TOKENS,
    draws: int = 1,
    sequences: int | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: Progress = lambda *_: None,
) -> Evaluation:
    """The model's bound on a part beside the baselines', and statistics of samples beside the references'.

    `trained_on` is the fingerprint of the part that the model was trained on, where that is known.
    """
    if part == "train":
        raise RequestError("got the part train, takes one that was held out: the baselines are counted on train")
    train, held_out = prepared["train"], prepared[part]
    is_of_training = None if trained_on is None else trained_on == train.fingerprint
    where = trained.model.device if device is None else torch.device(device)
    bound = likelihood(
        trained, held_out, tokens=tokens, draws=draws, sequences=sequences, seed=seed, device=where, progress=progress
    )
    progress("baselines", 0, None)
    absent: dict[str, str] = {}
    rows: list[Statistics] = []
    if samples is None:
        absent["statistics"] = "no samples were given or drawn"
    else:
        rows = compared(samples, train, held_out, seed=seed, absent=absent, progress=progress)
    if len(bound.nats) < 2:
        absent["standard_error"] = "one sequence has none"
    return Evaluation(
        model=model,
        parameters=sum(each.numel() for each in trained.model.parameters()),
        data={
            "folder": prepared.folder.name, "fingerprint": prepared.fingerprint, "part": part,
            "is_of_training": is_of_training,
            "provenance": prepared.provenance,
            "parts": {
                name: {"sequences": len(prepared[name]), "residues": prepared[name].residues} for name in prepared.parts
            },
        },
        likelihood=Likelihood(
            bound=type(trained.graph).__name__.lower(), nats_per_residue=bound.per_residue, perplexity=bound.perplexity,
            standard_error=bound.standard_error if len(bound.nats) > 1 else None, prior=bound.prior,
            sequences=len(bound.nats), of_sequences=len(held_out), residues=sum(bound.residues), draws=draws, seed=seed,
        ),
        baselines=baselines(train, held_out, scored=chosen(held_out, seed, sequences), seed=seed),
        attention=[
            attention_of(trained.model.config, _batch_of(held_out, tokens), where, dtype, gradients)
            for dtype, gradients in ((torch.float32, False), (precision.chosen(where).dtype, True))
        ],
        statistics=rows,
        samples=None if samples is None else samples.origin,
        first=[] if samples is None else samples.proteins[:SHOWN],
        absent=absent,
        machine=machine(where),
        written=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        notes=list(_notes(prepared.folder.name, is_of_training, samples, rows)),
    )  # fmt: skip


def _notes(folder: str, is_of_training: bool | None, samples: Samples | None, rows: list[Statistics]) -> Iterator[str]:
    if is_of_training is False:
        yield f"the model was trained on other data than {folder}, and may have seen what is held out there"
    if samples is not None and (many := sum(map(seems_nucleotides, samples.proteins))):
        yield f"{many:,} samples are of A, C, G, T, U and N alone: nucleotides, as it seems, and no proteins"
    if rows and rows[0].valid < 1:
        yield f"{1 - rows[0].valid:.1%} of the samples are empty, or have letters that no protein has"
    # But for `real, whole`, which shows what more proteins are worth.
    fewest = min((row.count for row in rows[:-1]), default=0)
    if rows and fewest < rows[0].count:
        yield (
            f"{rows[0].count:,} samples are more than the {fewest:,} proteins of other rows, and k-mers of fewer"
            f" proteins lie further from any others: compare {fewest:,} samples"
        )


def compared(
    samples: Samples,
    train: Part,
    held_out: Part,
    *,
    seed: int = 0,
    absent: dict[str, str],
    progress: Progress = lambda *_: None,
) -> list[Statistics]:
    """The samples' row, and those that it is to be seen beside."""
    lengths = [max(1, len(each)) for each in samples.proteins]
    found = references(some(held_out), some(train), lengths, seed)
    rows = {"samples": samples.proteins, **found.rows}
    near: dict[str, Sequence[float]] = {}
    if train.residues > MOST_RESIDUES:
        absent["nearness"] = f"{train.residues:,} training residues are more than the {MOST_RESIDUES:,} that are held"
    else:
        # Training proteins are copies, all of them.
        looked_for = {name: row for name, row in rows.items() if name != "training"}
        unique = list(dict.fromkeys(each for row in looked_for.values() for each in row if each))
        done = identities(
            unique, [each.sequence for each in train], lambda at: progress("proteins compared", at, len(unique))
        )
        all_of = dict(zip(unique, done, strict=True))
        near = {name: [all_of[each] for each in row if each] for name, row in looked_for.items()}
    return [statistics(name, row, found.compared_with, identities=near.get(name)) for name, row in rows.items()]


def some(part: Part) -> list[str]:
    """What of a part samples are set beside."""
    every = max(1, -(-len(part) // MOST))
    return [part[at].sequence for at in range(0, len(part), every)]


def _batch_of(part: Part, tokens: int) -> list[int]:
    """Lengths of a batch such as a run packs: the part's first sequences, as many as fit."""
    lengths = (part.lengths() + BOUNDARIES).tolist()
    found = [lengths[0]]
    for each in lengths[1:]:
        if sum(found) + each > tokens:
            break
        found.append(each)
    return found


def machine(device: torch.device) -> dict[str, str]:
    """Where numbers were made."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "device": f"{device} ({name})",
        "headway": headway.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
    }

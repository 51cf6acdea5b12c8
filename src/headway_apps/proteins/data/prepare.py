"""From files to a prepared folder: read, clean, split so that families stay together, and write down all of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

import headway
from headway import RequestError
from headway_apps.proteins.data import clusters, fasta
from headway_apps.proteins.data.pickled import read_pickled
from headway_apps.proteins.data.shards import Part, Prepared, Writer, appearing, write_manifest
from headway_apps.proteins.errors import DataError
from headway_apps.training import folders

PICKLES = (".pt", ".pth")
MOST_RESIDUES = 500_000_000
"""What is clustered here, or looked at for leakage; it takes some 30 bytes of memory for each."""

Progress = Callable[[str, int, "int | None"], None]
"""Told what is done, how far, and of how much where that is known."""


def prepare(
    sources: Sequence[Path],
    folder: Path,
    rules: fasta.Rules | None = None,
    *,
    shares: Mapping[str, float] | None = None,
    by: Literal["kmers", "uniref50"] = "kmers",
    likeness: clusters.Likeness | None = None,
    seed: int = 0,
    note: str = "",
    progress: Progress = lambda *_: None,
) -> Prepared:
    """Write a new folder with the parts `train` and those of `shares` (`held_out`, 5 % of residues).

    `by="kmers"` finds families by `clusters.cluster`, in memory. `by="uniref50"` trusts the clusters that the headers
    of UniRef50 name, and needs no memory for sequences. `note` is kept: where the files come from.
    """
    if by not in ("kmers", "uniref50"):
        raise RequestError(f"got families by {by}, takes kmers or uniref50")
    rules, likeness = rules or fasta.Rules(), likeness or clusters.Likeness()
    shares = {"held_out": 0.05} if shares is None else dict(shares)
    clusters.check(shares)
    counts = fasta.Counts()
    told = [_source(each) for each in sources]
    taken = _counted(fasta.clean(_read(sources), rules, counts), progress)
    with appearing(folder) as partial:
        writers = {name: Writer(partial, name) for name in ("train", *shares)}
        if by == "kmers":
            families = _by_kmers(taken, writers, shares, likeness, seed, progress)
        else:
            families = _by_uniref50(taken, writers, shares, seed)
        parts = {name: writer.finish() for name, writer in writers.items()}
        _check(parts, counts)
        write_manifest(partial, parts, {
            "sources": told, "note": note, "rules": asdict(rules), "counts": counts.told(),
            "split": {"by": by, "shares": shares, "seed": seed, **families},
            "leakage": _leakage(partial, parts, likeness),
            "written": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "versions": {"headway": headway.__version__, "pyarrow": pa.__version__},
        })  # fmt: skip
    return Prepared(folder, verify=False)


def _source(path: Path) -> dict[str, Any]:
    try:
        return {"file": path.name, "bytes": path.stat().st_size, "sha256": folders.sha256(path)}
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def _read(sources: Iterable[Path]) -> Iterator[fasta.Record]:
    for each in sources:
        yield from read_pickled(each) if each.suffix in PICKLES else fasta.read(each)


def _counted(records: Iterable[fasta.Record], progress: Progress) -> Iterator[fasta.Record]:
    for number, record in enumerate(records, 1):
        yield record
        if number % 10_000 == 0:
            progress("sequences taken", number, None)


def _by_kmers(
    taken: Iterable[fasta.Record],
    writers: Mapping[str, Writer],
    shares: Mapping[str, float],
    likeness: clusters.Likeness,
    seed: int,
    progress: Progress,
) -> dict[str, Any]:
    records = list(_few(taken))
    sequences = [each.sequence for each in records]
    found = clusters.cluster(sequences, likeness, lambda done: progress("sequences clustered", done, len(sequences)))
    for record, part in zip(records, clusters.split(found, sequences, shares, seed), strict=True):
        writers[part].add(record)
    members = np.unique(found, return_counts=True)[1]
    return {"clusters": len(members), "largest": int(members.max(initial=0)), "likeness": asdict(likeness)}


def _few(records: Iterable[fasta.Record]) -> Iterator[fasta.Record]:
    residues = 0
    for each in records:
        residues += len(each.sequence)
        if residues > MOST_RESIDUES:
            raise DataError(
                f"got more than {MOST_RESIDUES:,} residues, takes fewer to find families in memory; give fewer, or "
                "find them by uniref50 in a file of UniRef50"
            )
        yield each


def _by_uniref50(
    taken: Iterable[fasta.Record], writers: Mapping[str, Writer], shares: Mapping[str, float], seed: int
) -> dict[str, Any]:
    for each in taken:
        if each.family is None:
            raise DataError(
                f"got the header {each.name!r}, takes those of UniRef50, whose families are known; find them by kmers"
            )
        writers[clusters.split_by_family(each.family, shares, seed)].add(each)
    return {}


def _check(parts: Mapping[str, dict[str, Any]], counts: fasta.Counts) -> None:
    if not counts.taken:
        raise DataError(f"got no sequence that the rules take ({counts}); look at the file, or loosen the rules")
    if empty := [name for name, part in parts.items() if not part["sequences"]]:
        raise DataError(
            f"got no sequence for {', '.join(empty)} out of {counts.taken:,}: no family is small enough; give more "
            "sequences, or larger shares"
        )


def _leakage(folder: Path, parts: Mapping[str, dict[str, Any]], likeness: clusters.Likeness) -> dict[str, Any] | None:
    """From the files as they were written; None where it was not measured, because they are too many."""
    if sum(part["residues"] for part in parts.values()) > MOST_RESIDUES:
        return None
    sequences = {name: [each.sequence for each in Part(folder, name, part, "")] for name, part in parts.items()}
    train = sequences.pop("train")
    held_out = [each for name in sequences for each in sequences[name]]
    return asdict(clusters.leakage(train, held_out, likeness))

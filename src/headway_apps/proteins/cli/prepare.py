"""headway proteins prepare: from files of sequences to a folder that a model trains on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from headway_apps.proteins.cli.terminal import failures, told
from headway_apps.proteins.data.fasta import Rules

if TYPE_CHECKING:
    from headway_apps.proteins.data.shards import Prepared

DEFAULT = Rules()


@failures()
def command(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILES...",
            help="FASTA, packed by gzip or not; lists with a sequence a line; .pt of the first protein SEDD.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="A new folder.", show_default=False)],
    min_length: Annotated[int, typer.Option(help="Residues of the shortest sequence taken.")] = DEFAULT.shortest,
    max_length: Annotated[int, typer.Option(help="Residues of the longest; none is cut.")] = DEFAULT.longest,
    ambiguous: Annotated[float, typer.Option(help="The greatest share of B, O, U, X and Z.")] = DEFAULT.ambiguous,
    duplicates: Annotated[bool, typer.Option("--duplicates", help="Take a sequence as often as it occurs.")] = False,
    held_out: Annotated[float, typer.Option(help="The share of residues held out, in whole families.")] = 0.05,
    by: Annotated[
        Literal["kmers", "uniref50"],
        typer.Option(help="How families are found: by shared 5-mers, or by the names of UniRef50's clusters."),
    ] = "kmers",
    seed: Annotated[int, typer.Option(help="Of the split.")] = 0,
    note: Annotated[str, typer.Option(help="Kept in the folder: where the files come from.")] = "",
) -> None:
    """Clean sequences, count what is rejected and why, hold out whole families, and write it all down.

    Nothing is downloaded, and no file is written if any cannot be read to its end.
    """
    from headway_apps.proteins.data.prepare import prepare

    rules = Rules(min_length, max_length, ambiguous, duplicates)
    with told() as progress:
        prepared = prepare(
            files, out, rules, shares={"held_out": held_out}, by=by, seed=seed, note=note, progress=progress
        )
    typer.echo("\n".join(lines(prepared)))
    typer.echo(f"written: {out}")


def lines(prepared: Prepared) -> list[str]:
    """What is in a prepared folder, and what is not, for people."""
    told = prepared.provenance
    counts, split = told["counts"], told["split"]
    found = [f"{counts['read']:,} sequences read, {counts['taken']:,} taken"]
    for kind in ("rejected", "mended", "noted"):
        every = sorted(counts[kind].items(), key=lambda item: (-item[1], item[0]))
        found += [f"  {number:>10,} {kind}: {what}" for what, number in every]
    for name, part in prepared.manifest["parts"].items():
        found.append(f"{name}: {part['sequences']:,} sequences, {part['residues']:,} residues")
    if "clusters" in split:
        found.append(f"families: {split['clusters']:,}, the largest of {split['largest']:,} sequences")
    return [*found, f"leakage: {_leakage(told['leakage'])}"]


def _leakage(told: dict[str, Any] | None) -> str:
    from headway_apps.proteins.data.clusters import Leakage

    return "not measured, as there are too many residues" if told is None else str(Leakage(**told))

"""headway proteins evaluate: nats per residue beside the baselines, and samples beside real proteins."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from headway import RequestError
from headway_apps.proteins.cli.terminal import Progress, failures, told
from headway_apps.proteins.errors import DataError
from headway_apps.proteins.generate import files
from headway_apps.proteins.generate.sample import TOKENS
from headway_apps.training import precision

if TYPE_CHECKING:
    from headway_apps.proteins.evaluate.evaluation import Evaluation, Samples
    from headway_apps.proteins.evaluate.statistics import Statistics
    from headway_apps.proteins.trained import Trained


@failures()
def command(
    model: Annotated[Path, typer.Argument(help="A run's folder, or that of a trained model.", show_default=False)],
    data: Annotated[Path, typer.Option(help="A folder made by `headway proteins prepare`.", show_default=False)],
    best: Annotated[bool, typer.Option("--best", help="Of a run: the weights that scored best, not the last.")] = False,
    part: Annotated[str, typer.Option(help="A part of the data that was not trained on.")] = "held_out",
    draws: Annotated[int, typer.Option(min=1, help="Calls of the model for each sequence.")] = 1,
    sequences: Annotated[
        int | None, typer.Option(min=1, help="Score only so many, drawn by the seed.", show_default="all")
    ] = None,
    samples: Annotated[
        Path | None, typer.Option(help="FASTA of proteins that the model made.", show_default=False)
    ] = None,
    count: Annotated[
        int, typer.Option(min=0, help="Draw so many by first-hitting, of lengths as in the training data.")
    ] = 0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    tokens: Annotated[int, typer.Option(min=1, help="In one batch.")] = TOKENS,
    device: Annotated[str, typer.Option(help="auto, or a device of this machine.")] = "auto",
    out: Annotated[
        Path | None, typer.Option(help="Where to write it.", show_default="evaluation.json in the model's folder")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="In place of any file that is there.")] = False,
) -> None:
    """Score held-out proteins and compare samples with real ones; print the tables, and write them as JSON."""
    from headway_apps.proteins.cli.opened import opened
    from headway_apps.proteins.data.shards import Prepared
    from headway_apps.proteins.evaluate.evaluation import evaluate

    if samples is not None and count:
        raise RequestError("got --samples and --count, takes one of them: a file, or how many to draw")
    where = precision.device(device)
    trained, name, trained_on = opened(model, best=best)
    out = model / "evaluation.json" if out is None else out
    files.check(out, force=True)
    if not force and (kept := _samples_in(out)) and samples is None and not count:
        raise DataError(
            f"got {out}, which has statistics of samples ({kept}), and none to put in their place; give --samples or"
            " --count, another --out, or --force"
        )
    prepared = Prepared(data)
    trained.model.to(where)
    with told() as tell:
        given = _samples(trained, samples, count, seed, tokens, tell)
        found = evaluate(
            trained, prepared, model=name, trained_on=trained_on, part=part, samples=given, tokens=tokens,
            draws=draws, sequences=sequences, seed=seed, device=where, progress=tell,
        )  # fmt: skip
    found.save(out)
    show(found, Console())
    typer.echo(f"written: {out}")


def _samples_in(out: Path) -> str | None:
    """Where the samples of an evaluation that is there came from, of whatever version it is."""
    if not out.exists():
        return None
    try:
        found: str | None = json.loads(out.read_text(encoding="utf-8"))["samples"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"got {out}, which is there and is no evaluation; give another --out, or --force") from error
    return found


def _samples(trained: Trained, file: Path | None, count: int, seed: int, tokens: int, tell: Progress) -> Samples | None:
    from headway_apps.proteins.alphabet import raised
    from headway_apps.proteins.data import fasta
    from headway_apps.proteins.evaluate.evaluation import Samples
    from headway_apps.proteins.evaluate.statistics import is_valid
    from headway_apps.proteins.generate import lengths
    from headway_apps.proteins.generate.sample import generate

    if file is not None:
        proteins = [raised("".join(each.sequence.split())) for each in fasta.read(file)]
        if not proteins:
            raise DataError(f"got {file} without a sequence, takes FASTA with one or more")
        if not any(map(is_valid, proteins)):
            raise DataError(
                f"got {file}, each of whose {len(proteins):,} sequences has letters that no protein has, takes FASTA of"
                " proteins, or a list with one a line"
            )
        return Samples(proteins, file.name)
    if not count:
        return None
    made = generate(trained, lengths.draw(trained.lengths, count, seed), seed=seed, tokens=tokens, progress=tell)
    return Samples(made.proteins, f"drawn by first-hitting in {made.calls:,} calls, seed {seed}")


def show(found: Evaluation, console: Console) -> None:
    """The tables."""
    ours, part = found.likelihood, found.data["part"]
    table = Table(box=box.SIMPLE_HEAD, title=f"{part}: {ours.sequences:,} sequences, {ours.residues:,} residues")
    for head in ("", "nats per residue", "perplexity"):
        table.add_column(head, justify="right" if head else "left", overflow="fold")
    for each in found.baselines:
        table.add_row(each.name, f"{each.nats_per_residue:.4f}", f"{each.perplexity:.2f}")
    error = "" if ours.standard_error is None else f" ± {ours.standard_error:.4f}"
    table.add_row(f"{escape(found.model)} (at most)", f"{ours.nats_per_residue:.4f}{error}", f"{ours.perplexity:.2f}")
    console.print(table)
    if ours.sequences < ours.of_sequences:
        console.print(f"{ours.sequences:,} of {ours.of_sequences:,} sequences, drawn by the seed, for all rows.")
    if found.statistics:
        for beside in _tables(found.statistics, console.width):
            console.print(beside)
        console.print(f"Samples: {found.samples}. Distances are to another half of {part}.", markup=False)
    ran = found.attention[0]
    console.print(f"Attention: {ran.backend} on {ran.device}, {ran.why}.", markup=False)
    for what, why in found.absent.items():
        console.print(f"No {what.replace('_', ' ')}: {why}.", markup=False)
    for note in found.notes:
        console.print(f"Note: {note}.", markup=False)


def _tables(rows: list[Statistics], width: int) -> Iterator[Table]:
    """Each set beside the samples, as many in a table as the console is wide: rich would cut what does not fit."""
    from headway_apps.proteins.evaluate.statistics import measured

    lines = [("", *(row.name for row in rows)), *((name, *cells) for name, cells in measured(rows))]
    measures, samples, *rest = zip(*lines, strict=True)
    while rest:
        columns = [measures, samples, rest.pop(0)]
        while rest and sum(max(map(len, each)) + 3 for each in (*columns, rest[0])) < width:  # 2 of padding, 1 between
            columns.append(rest.pop(0))
        table = Table(box=box.SIMPLE_HEAD)
        for head, *_ in columns:
            table.add_column(head, justify="right" if head else "left", overflow="fold")
        for cells in list(zip(*columns, strict=True))[1:]:
            table.add_row(*cells)
        yield table

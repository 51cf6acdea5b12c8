"""headway proteins sample: new proteins from a trained model, as FASTA."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from headway import RequestError
from headway_apps.proteins.cli.terminal import failures, told
from headway_apps.proteins.diffusion.samplers import Analytic, Euler
from headway_apps.proteins.generate import files, lengths
from headway_apps.proteins.generate.sample import SAMPLERS, TOKENS, generate
from headway_apps.proteins.generate.templates import Template, read
from headway_apps.training import precision as precisions

if TYPE_CHECKING:
    from headway_apps.proteins.trained import Trained

COUNT = 100


@failures()
def command(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="A run's folder, or that of a trained model.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(metavar="FASTA", help="The file to write.", show_default=False)],
    best: Annotated[bool, typer.Option("--best", help="Of a run: the weights that scored best, not the last.")] = False,
    count: Annotated[
        int | None,
        typer.Option("--count", "-n", help=f"How many: {COUNT}, or 1 of each template, if not given.", min=1),
    ] = None,
    length: Annotated[
        str | None,
        typer.Option(
            help="Residues: 100, or drawn from 100-200, or from 80,120,300. As in the training data, if not given."
        ),
    ] = None,
    template: Annotated[
        list[str] | None,
        typer.Option(help="Residues that are given, with _ for a free one and _12 for twelve. Repeatable."),
    ] = None,
    templates: Annotated[Path | None, typer.Option(metavar="FASTA", help="A file of templates.")] = None,
    sampler: Annotated[str, typer.Option(help=f"{', '.join(SAMPLERS)}.")] = "first-hitting",
    steps: Annotated[
        int | None,
        typer.Option(
            help=f"{Euler.steps} of euler, {Analytic.steps} of analytic, if not given. The most calls of first-hitting:"
            " as many as free residues, if not given.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of lengths and residues.")] = 0,
    tokens: Annotated[int, typer.Option(help="In one call of the network. Another number draws others.")] = TOKENS,
    device: Annotated[str, typer.Option(help="auto, or a device of this machine.")] = "auto",
    precision: Annotated[str, typer.Option(help=f"{', '.join(precisions.PRECISIONS)}.")] = "auto",
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
) -> None:
    """Draw new proteins, of lengths as in the training data, or as asked, or around given residues."""
    from headway_apps.proteins.cli.opened import opened

    files.check(out, force=force)
    where = precisions.device(device)
    dtype = precisions.chosen(where, precision).dtype
    given = [Template.parse(each, name=each) for each in template or ()] + (read(templates) if templates else [])
    trained, called, _ = opened(model, best=best)
    wanted = _wanted(trained, given, length, count, seed)
    _tell_of_long(wanted, trained)
    trained.model.to(where)
    with told() as progress:
        made = generate(
            trained, wanted, sampler=sampler, steps=steps, seed=seed, tokens=tokens, dtype=dtype, progress=progress
        )
    named = sampler if steps is None else f"{sampler}-{steps}"
    names = [each.name for each in wanted]
    files.save(out, made.proteins, seed=seed, sampler=named, templates=names, force=force)
    typer.echo(
        f"written: {out}, {len(made.proteins):,} proteins of {sum(map(len, made.proteins)):,} residues by {named} in "
        f"{made.calls:,} calls of {called}, with seed {seed}, in {str(dtype).removeprefix('torch.')} on {where}"
    )


def _tell_of_long(wanted: list[Template], trained: Trained) -> None:
    longest, known = max(len(each.sites) for each in wanted), max(trained.lengths, default=None)
    if known is not None and longest > known:
        typer.echo(f"note: {longest:,} residues are more than the {known:,} of any protein it was trained on", err=True)


def _wanted(
    trained: Trained, given: list[Template], length: str | None, count: int | None, seed: int
) -> list[Template]:
    if not given:
        histogram = trained.lengths if length is None else lengths.parse(length)
        return [Template.of_length(each) for each in lengths.draw(histogram, count or COUNT, seed)]
    if length is not None:
        raise RequestError(f"got the length {length} and templates, which have lengths of their own; leave it out")
    return [each for each in given for _ in range(count or 1)]

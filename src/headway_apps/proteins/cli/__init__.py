"""`headway proteins ...`: prepare, show, train, sample, evaluate, report; a file each."""

from __future__ import annotations

import typer

from headway_apps.proteins.cli import evaluate, prepare, report, sample, show, train

app = typer.Typer(
    name="proteins",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Discrete diffusion on protein sequences: from FASTA to new proteins.",
)
app.command("prepare")(prepare.command)
app.command("show")(show.command)
app.command("train")(train.command)
app.command("sample")(sample.command)
app.command("evaluate")(evaluate.command)
app.command("report")(report.command)

"""`headway proteins train`: from a config to a run's folder. Under torchrun it is one process of several."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from headway_apps.proteins.cli.terminal import failures


def command(
    config: Annotated[Path, typer.Argument(help="a YAML file; `headway proteins show` prints what it means")],
    out: Annotated[Path, typer.Option(help="folder of the run: new, or with --resume one that was begun")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="a key and its value in place of the file's: optim.lr=1e-4")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the run's last checkpoint")] = False,
) -> None:
    """Train a model of proteins, on any device and any number of processes."""
    with failures():
        from headway_apps.proteins.config import read
        from headway_apps.proteins.train.trainer import train

        done = train(read(config, set_ or ()), out, resume=resume, told=lambda line: typer.echo(line, err=True))
        best = "" if done.best is None else f", at best {done.best:.4f} nats per residue held out"
        typer.echo(f"{done.folder}: {done.step:,} steps{best}")

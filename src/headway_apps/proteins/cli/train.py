"""`headway proteins train`: from a config to a run's folder. Under torchrun it is one process of several."""

from __future__ import annotations

import shlex
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from headway import RequestError
from headway_apps.proteins.cli.terminal import failures, say
from headway_apps.training import interrupts

if TYPE_CHECKING:
    from headway_apps.proteins.config import Config


def command(
    out: Annotated[Path, typer.Option(help="folder of the run: new, or with --resume one that was begun")],
    config: Annotated[
        Path | None,
        typer.Argument(help="a YAML file; `headway proteins show` prints what it means. With --resume the run's own"),
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="a key and its value in place of the file's: optim.lr=1e-4")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the run's last checkpoint")] = False,
) -> None:
    """Train a model of proteins, on any device and any number of processes.

    Ctrl-C or SIGTERM ends a run with a checkpoint, from which --resume goes on.
    """
    with failures(), interrupts.heard("the run ends soon, with a checkpoint") as asked:
        from headway_apps.proteins.train.trainer import train

        given = _config(config, out, set_ or [], resume)
        done = train(given, out, resume=resume, told=lambda line: say(line, err=True), asked_to_stop=asked)
        stopped, last = done.step < given.run.steps, f"{given.run.steps:,}"
        if done.rank == 0:
            best = "" if done.best is None else f", at best {done.best:.4f} nats per residue held out"
            say(f"{done.folder}: {done.step:,} steps{best}")
        if stopped and done.rank == 0:
            say(f"stopped before step {last}; headway proteins train --out {shlex.quote(str(out))} --resume goes on")
        if stopped:
            raise typer.Exit(128 + (asked() or signal.SIGTERM))  # another process may be the one that heard it


def _config(file: Path | None, run: Path, changes: list[str], resume: bool) -> Config:
    from headway_apps.proteins.config import FILE, read

    if file is None and not resume:
        raise RequestError("got no config, takes a YAML file; a run that was begun goes on with its own by --resume")
    if file is None and not (run / FILE).is_file():
        raise RequestError(f"got --resume for {run}, which is no run: it has no {FILE}; begin it with a config")
    return read(run / FILE if file is None else file, changes)

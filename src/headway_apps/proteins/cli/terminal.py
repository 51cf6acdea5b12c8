"""What the commands share: a failure is one line and exit code 1; work that takes long shows how far it is."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

import rich.progress
import torch
import typer
from rich.console import Console

from headway import HeadwayError

Progress: TypeAlias = "Callable[[str, int, int | None], None]"
"""Told what is done, how far, and of how much where that is known. No room is imported for it: some need extras."""
SECONDS = 10.0
"""From one line to the next where stderr is no terminal."""


@contextmanager
def failures() -> Iterator[None]:
    """What can go wrong without a mistake of ours, told on stderr in one line; the rest keeps its traceback.

    It decorates a command, or surrounds a part of one.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in ("headway", "headway_apps"):
            raise
        told = f"got no package {error.name}, which this command takes; pip install '.[proteins]' in Headway's folder"
        raise _exit(told) from error
    except HeadwayError as error:
        raise _exit(str(error)) from error
    except torch.OutOfMemoryError as error:
        raise _exit(f"{str(error).partition('. ')[0]}; give fewer tokens in a batch, or a smaller model") from error
    except OSError as error:
        named = f"cannot read or write {error.filename}: " if error.filename else ""
        raise _exit(f"{named}{error.strerror or error}") from error


def _exit(told: str) -> typer.Exit:
    typer.echo(f"error: {' '.join(told.split())}", err=True)
    return typer.Exit(1)


def say(line: str, err: bool = False) -> None:
    """To a stream whose reader may have ended, as `tee` does by the same Ctrl-C: what is done outlives it."""
    try:
        typer.echo(line, err=err)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), (sys.stderr if err else sys.stdout).fileno())


@contextmanager
def told() -> Iterator[Progress]:
    """Bars on stderr, with the time that is left; a line every ten seconds where it is no terminal, nothing before."""
    if not sys.stderr.isatty():
        yield _lines(time.monotonic)
        return
    columns = (
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeRemainingColumn(),
    )
    with rich.progress.Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, rich.progress.TaskID] = {}

        def tell(what: str, done: int, total: int | None) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield tell


def _lines(clock: Callable[[], float]) -> Progress:
    last = clock()

    def tell(what: str, done: int, total: int | None) -> None:
        nonlocal last
        if clock() - last >= SECONDS:
            last = clock()
            typer.echo(f"{what}: {done:,}" + ("" if total is None else f" of {total:,}"), err=True)

    return tell

"""headway doctor: this machine, which backends really run on it, and which settings others left on.

From Python, `examine()` gives the same as data, and `settings()` the settings of the very process that calls it.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from headway.cli.examine import BackendReport, DefectReport, DeviceReport, Report, examine
from headway.cli.progress import told
from headway.cli.settings import Setting, settings
from headway.errors import UnknownNameError

__all__ = ["Report", "command", "examine", "settings"]

STATES = {"runs": "[green]runs[/green]", "broken": "[red]broken[/red]", "refused": "[yellow]refused[/yellow]"}


def command(
    backend: Annotated[
        list[str] | None,
        typer.Option(
            "--backend", "-b", help="Look at this backend only, and exit with 1 if it does not run. Repeatable."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    acquit: Annotated[
        bool,
        typer.Option("--acquit", help="Look for each quarantined defect here; one not found is quarantined no more."),
    ] = False,
    after: Annotated[
        list[str] | None, typer.Option("--after", help="Import this module first, to see which settings it leaves on.")
    ] = None,
) -> None:
    """Show this machine, run every backend once, and list settings that change attention.

    Exits with 1 if a backend asked for by name, here or by HEADWAY_BACKEND, runs on no device.
    """
    for module in after or ():
        _import(module)
    try:
        with told("running each backend once, in a process of its own", lines=True):
            report = examine(tuple(backend or ()), acquit=acquit)
        if as_json:
            typer.echo(json.dumps(report.json(), indent=2))
        else:
            show(report, Console())
    except UnknownNameError as error:
        raise typer.BadParameter(str(error)) from error
    if report.failed:
        raise typer.Exit(1)


def _import(module: str) -> None:
    sys.path.insert(0, str(Path.cwd()))  # as `python -m` would look
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what it prints is not the report
            importlib.import_module(module)
    except ImportError as error:
        raise typer.BadParameter(f"cannot import {module}: {error}") from error


# -- as tables --------------------------------------------------------------------------------------------------------


def show(report: Report, console: Console) -> None:
    """Print a report."""
    console.print(
        f"[bold]Headway {report.headway}[/bold] on Python {report.python}, {report.platform}", highlight=False
    )
    for device in report.devices:
        console.print()
        console.print(_title(device), highlight=False)
        console.print(_backends(device.backends))
        if device.quarantine:
            console.print(_quarantine(device.quarantine))
    console.print()
    changed = [setting for setting in report.settings if not setting.is_usual]
    if changed:
        console.print(_settings(changed))
    else:
        console.print("Settings of this process that change attention: all as torch starts with them.")
    for name in report.failed:
        console.print(f"[red]{name} was asked for by name and does not run here.[/red]")


def _title(device: DeviceReport) -> str:
    capability = "" if device.capability is None else f", cuda {device.capability[0]}.{device.capability[1]}"
    software = [f"{of} {version}" for of, version in device.versions.items() if version]
    software += [tool for tool, name in (("triton", "triton"), ("a C++ compiler", "c++")) if name in device.features]
    return escape(f"{device.device}  {device.name}{capability}  ({', '.join(software)})")


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, show_edge=False, expand=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _backends(backends: Iterable[BackendReport]) -> Table:
    """Backends of one state for one reason share a row."""
    rows: dict[tuple[str, str], list[str]] = {}
    for backend in sorted(backends, key=lambda one: list(STATES).index(one.state)):
        why = backend.why + (f"; {backend.remedy}" if backend.remedy else "")
        rows.setdefault((backend.state, why), []).append(_named(backend))
    table = _table("backend", "", "why")
    table.columns[0].max_width = 26
    for (state, why), names in rows.items():
        table.add_row(escape(", ".join(names)), STATES[state], escape(why))
    return table


def _named(backend: BackendReport) -> str:
    return f"{backend.name} ({backend.package} {backend.version})" if backend.version else backend.name


def _quarantine(defects: Iterable[DefectReport]) -> Table:
    table = _table("quarantine", "", "defect")
    table.columns[0].max_width = 26
    for defect in defects:
        state = "[green]acquitted[/green]" if defect.acquitted else "[yellow]held[/yellow]"
        said = f"; looked for just now: {defect.probe}" if defect.probe else ""
        table.add_row(escape(defect.name), state, escape(f"{defect.defect} ({defect.thread}){said}"))
    return table


def _settings(changed: Iterable[Setting]) -> Table:
    table = _table("setting of this process", "value", "effect")
    table.columns[0].max_width = 30
    for setting in changed:
        table.add_row(*(escape(text) for text in (setting.name, setting.value, setting.effect)))
    return table

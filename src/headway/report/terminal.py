"""A report as tables that fit the terminal, in colour or without."""

from __future__ import annotations

import string
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from headway.report.report import Level, Report, Row, level
from headway.report.times import in_ms
from headway.swap.census import Census

WIDE = 110
"""Columns from which all is shown; narrower, the worse of two errors is, no 'asked' that only says auto, and the
kind stands below the site."""

COLOURS = {"faster": "green", "slower": "red", "no gain": "yellow", "unclear": "yellow"}


def show(report: Report, console: Console) -> None:
    """Print census, proof, times and verdict."""
    console.print(f"[bold]{escape(report.title)}[/bold]  {escape(_head(report.census))}", highlight=False)
    _show_rows(report.rows, console)
    _notes(report.census.notes, console)
    console.print()
    _show_proof(report, console)
    for one in () if report.times is None else report.times.passes:
        colour = COLOURS[one.verdict]
        console.print(
            f"{one.name}: [{colour}]{one.claim}[/{colour}]  {in_ms(one.before)} before, {in_ms(one.now)} now",
            highlight=False,
        )
    if report.times is not None:
        console.print(f"  {report.times.how}", highlight=False, style="dim")
        _notes(report.times.notes, console)
    colour = "green" if report.proven else "red"
    console.print(f"[bold {colour}]{escape(report.verdict)}[/bold {colour}]", highlight=False)


def show_census(census: Census, console: Console) -> None:
    """Print a census that was only planned: nothing was changed, nothing is proven."""
    console.print(f"[bold]{escape(_head(census))}[/bold]", highlight=False)
    table = _table("site", "kind", "asked", "a swap would")
    for ticket in census.tickets:
        what = "[green]swap it[/green]" if ticket.swapped else f"leave it, because {escape(ticket.because)}"
        table.add_row(escape(_named(ticket.name, ticket.aliases)), escape(ticket.kind), escape(ticket.asked), what)
    if census.tickets:
        console.print(table)
    _notes(census.notes, console)


def _head(census: Census) -> str:
    return str(census).partition("\n")[0]


def _named(name: str, aliases: Sequence[str]) -> str:
    return " = ".join((name or "(the model itself)", *aliases))


def _notes(notes: Iterable[str], console: Console) -> None:
    for note in notes:
        console.print(f"note: {note}", highlight=False, markup=False)


def _show_rows(rows: Sequence[Row], console: Console) -> None:
    swapped = [row for row in rows if row.ticket.swapped]
    others = [row for row in rows if not row.ticket.swapped]
    if swapped:
        _show_swapped(swapped, console)
    if others:
        table = _table("left alone", "kind", "because")
        for row in others:
            style = "red" if row.state == "failed" else ""
            site = escape(_named(row.ticket.name, row.ticket.aliases))
            table.add_row(site, escape(row.ticket.kind), escape(row.ticket.because), style=style)
        console.print(table)


def _show_swapped(rows: Sequence[Row], console: Console) -> None:
    """Reasons are long and few, so the table has a letter for each, and they stand below it."""
    letters: dict[str, str] = {}
    for reason in (why for row in rows for why in row.why):
        number = len(letters)
        letters.setdefault(reason, string.ascii_lowercase[number] if number < 26 else str(number))
    wide = console.width >= WIDE
    asked = wide or any(row.ticket.asked != "auto" for row in rows)
    table = _table(*("site", "kind") if wide else ("site",))
    errors = ("forward\nnow/before", "gradients\nnow/before") if wide else ("error\nnow/before",)
    for column in (*(("asked",) if asked else ()), "chosen", "why", "runs", *errors):
        table.add_column(column, no_wrap=True, justify="right" if column == "runs" else "left")
    for row in rows:
        site, kind = escape(_named(row.ticket.name, row.ticket.aliases)), escape(row.ticket.kind)
        table.add_row(
            *((site, kind) if wide else (f"{site}\n{kind}",)),
            *((escape(row.ticket.asked),) if asked else ()),
            escape("\n".join(row.chosen) or "not run yet"),
            "".join(letters[why] for why in row.why),
            "\n".join(map(str, row.chosen.values())),
            *(_short(found) for found in ((row.forward, row.gradients) if wide else (row.worst,))),
        )
    console.print(table)
    for reason, letter in letters.items():
        console.print(f"  {letter}  {reason}", highlight=False, markup=False)
    if not all(count for row in rows for count in row.chosen.values()):
        console.print("  0 runs: chosen for a kind of call that only the proof made", highlight=False)


def _short(found: Level | None) -> str:
    """One digit each, which is what an error has."""
    return "" if found is None else "/".join("0" if x == 0 else f"{x:.0e}" for x in (found.now, found.before))


def _show_proof(report: Report, console: Console) -> None:
    certificate = report.certificate
    if certificate is None:
        console.print("proof: none, because no example was given", highlight=False)
    if certificate is None or not certificate.proofs:
        return
    good = sum(not proof.failure for proof in certificate.proofs)
    console.print(
        f"proof: {good} of {len(certificate.proofs)} sites err no more than before, against float64", highlight=False
    )
    if certificate.whole is not None and not certificate.whole.failure:
        errors = certificate.whole.errors
        forward = level([e for e in errors if e.what.startswith("forward")])
        gradients = level([e for e in errors if not e.what.startswith("forward")])
        said = [f"{what} {found}" for what, found in (("forward", forward), ("gradients", gradients)) if found]
        console.print(f"  the whole model, now / before: {', '.join(said) or 'nothing to compare'}", highlight=False)
    ran = [card for card in certificate.deck if card.backend]
    right = sum(not card.failure for card in ran)
    refused = len(certificate.deck) - len(ran)
    console.print(
        f"  edge deck: {right} of {len(ran)} calls right{f', {refused} refused' if refused else ''}", highlight=False
    )
    for failure in report.failures:
        console.print(f"  [red]{escape(failure)}[/red]", highlight=False)


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, show_edge=False, expand=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table

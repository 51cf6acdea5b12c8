"""One HTML page of a report: no network, no other file, light and dark, readable on a phone.

Drawn as inline SVG rather than by plotly: the page stays at some 100 kB where plotly's script alone is over 3 MB, and
bars, a grid and masks need no more. Everything that a model could name is escaped, and should that ever fail, the
page's own policy lets no script run but ours, which it knows by its hash.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator
from functools import cache
from html import escape
from importlib.resources import files

from headway import __version__
from headway.choice.choose import Decision
from headway.limits.limit import Refusal
from headway.report.drawings import Scale, error_bars, mask_picture, small_pair, time_bars
from headway.report.report import Level, Report, Row, digits, level
from headway.report.times import in_ms
from headway.swap.deck import Card, Shape
from headway.swap.proof import Certificate

KEY = (
    '<p class="key quiet"><i class="was"></i>before<i class="now"></i>now'
    '<i class="limit"></i>what now may err at most</p>'
)

ABOUT_CENSUS = (
    "Every place where the model computes attention. Errors are the worst element's, as a share of the largest:"
    " now / before, against float64."
)
ABOUT_MASKS = "As the example made them: queries downwards, keys to the right, filled where a query may look."
ABOUT_DECK = (
    "Calls that break kernels, with the heads and sizes that this model uses: which backend took them, and its worst"
    " error now / before."
)


def page(report: Report) -> str:
    """The whole page."""
    script = _asset("page.js")
    known = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{known}'"
    title = escape(f"Headway: {report.title}")
    parts = [
        "<!doctype html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<link rel="icon" href="data:,">',
        f"<title>{title}</title>",
        f"<style>\n{_asset('page.css')}</style>",
        "</head>",
        "<body>",
        *_header(report),
        *_census(report),
        *_whole(report),
        *_times(report),
        *_masks(report),
        *_deck(report.certificate),
        *_facts(report),
        f"<script>{script}</script>",
        "</body>",
        "</html>",
    ]
    return "\n".join(parts) + "\n"


@cache
def _asset(name: str) -> str:
    return files("headway.report").joinpath(name).read_text("utf-8")


# -- the top ----------------------------------------------------------------------------------------------------------


def _header(report: Report) -> Iterator[str]:
    yield f"<header><h1>{escape(report.title)}</h1>"
    yield f'<p class="quiet">attention of <code>{escape(report.census.model)}</code>, swapped and judged by Headway</p>'
    yield "</header>"
    word, _, rest = report.verdict.partition(":")
    yield f'<div class="verdict{"" if report.proven else " bad"}" id="verdict">'
    yield f"<strong>{escape(word.capitalize())}</strong>{escape(': ' + rest.strip() if rest else '')}."
    if report.failures:
        yield "<ul>" + "".join(f"<li>{escape(failure)}</li>" for failure in report.failures) + "</ul>"
    yield "</div>"
    yield '<div class="tiles">'
    for label, number, more in _tiles(report):
        yield f'<div class="tile">{escape(label)}<b>{escape(number)}</b><span class="quiet">{escape(more)}</span></div>'
    yield "</div>"


def _tiles(report: Report) -> Iterator[tuple[str, str, str]]:
    census, certificate = report.census, report.certificate
    left = len(census.tickets) - len(census.swapped)
    yield "Sites swapped", f"{len(census.swapped)} of {len(census.tickets)}", f"{left} left alone"
    if certificate is not None and certificate.whole is not None:
        whole = Row(census.tickets[0], certificate.whole)
        for what, found in (("Forward error", whole.forward), ("Gradient error", whole.gradients)):
            if found is not None:
                yield what, digits(found.now), f"{digits(found.before)} before, of the whole model"
    if certificate is not None and certificate.deck:
        ran = [card for card in certificate.deck if card.backend]
        refused = len(certificate.deck) - len(ran)
        right = sum(not card.failure for card in ran)
        yield "Edge deck", f"{right} of {len(ran)}", "calls right" + (f", {refused} refused" if refused else "")
    for one in () if report.times is None else report.times.passes:
        yield one.name.capitalize(), f"{one.gain:.2f}x", f"{one.verdict}: {in_ms(one.before)} to {in_ms(one.now)}"


# -- the census -------------------------------------------------------------------------------------------------------

COLUMNS = (
    ("site", ""),
    ("state", ""),
    ("kind", ""),
    ("asked", ""),
    ("chosen", ""),
    ("runs", " data-numeric"),
    ("forward", " data-numeric"),
    ("gradients", " data-numeric"),
    ("errors", " data-numeric"),
)


def _census(report: Report) -> Iterator[str]:
    rows = report.rows
    yield "<section><h2>Census</h2>"
    yield f'<p class="quiet">{ABOUT_CENSUS}</p>'
    yield from (f'<p class="quiet">Note: {escape(note)}</p>' for note in report.census.notes)
    if not rows:
        yield "<p>No attention was found.</p></section>"
        return
    yield '<div class="tools" id="tools" hidden><input type="search" id="filter" aria-label="Filter sites"'
    yield ' placeholder="Filter: site, kind, backend, reason">'
    yield '<span class="quiet" id="count" role="status"></span></div>'
    yield '<div class="scroll"><table id="census"><thead><tr>'
    yield from (f'<th scope="col"{mark}><button type="button">{name}</button></th>' for name, mark in COLUMNS)
    yield "</tr></thead>"
    found = [one for row in rows for one in (row.forward, row.gradients) if one is not None]
    scale = Scale(error for one in found for error in (one.before, one.now))
    for row in rows:
        yield from _site(row, scale)
    yield f"</table></div>{KEY if found else ''}</section>"


def _site(row: Row, scale: Scale) -> Iterator[str]:
    ticket, chosen = row.ticket, row.chosen
    words = (row.site, *ticket.aliases, row.state, ticket.kind, ticket.asked, *chosen, *row.why)
    yield f'<tbody data-find="{escape(" ".join(words).lower())}"><tr>'
    aliases = "".join(f'<br><span class="quiet">= {escape(alias)}</span>' for alias in ticket.aliases)
    yield _cell("site", f'<span class="mono">{_breakable(row.site)}</span>{aliases}', row.site)
    state = row.state.replace(" ", "-")
    yield _cell("state", f'<span class="pill {state}">{row.state}</span>', row.state)
    yield _cell("kind", _breakable(ticket.kind), ticket.kind)
    yield _cell("asked", escape(ticket.asked), ticket.asked)
    yield _cell("chosen", "<br>".join(map(escape, chosen)), " ".join(chosen), True)
    yield _cell("runs", "<br>".join(map(str, chosen.values())), str(sum(chosen.values())) if chosen else "", True)
    yield _level_cell("forward", row.forward)
    yield _level_cell("gradients", row.gradients)
    worst = row.worst
    bars = "" if worst is None else small_pair(worst.before, worst.now, scale, row.state != "failed")
    yield _cell("errors", bars, "" if worst is None else repr(worst.now))
    summary = escape("; ".join(row.why) or "details")
    yield f'</tr><tr class="more"><td colspan="{len(COLUMNS)}"><details><summary>{summary}</summary>'
    yield '<div class="inside">'
    yield from _inside(row)
    yield "</div></details></td></tr></tbody>"


def _cell(label: str, html: str, value: str, number: bool = False) -> str:
    kind = ' class="number"' if number else ""
    return f'<td{kind} data-label="{label}" data-value="{escape(value)}">{html}</td>'


def _breakable(name: str) -> str:
    """A long name may go on in the next line after a dot or an underscore."""
    return escape(name).replace(".", ".<wbr>").replace("_", "_<wbr>")


def _level_cell(name: str, found: Level | None) -> str:
    if found is None:
        return _cell(name, "", "", True)
    html = f'<span>{digits(found.now)} <span class="quiet">/ {digits(found.before)}</span></span>'
    return _cell(name, html, repr(found.now), True)


def _inside(row: Row) -> Iterator[str]:
    if row.proof is not None:
        judge = f"Judged by {row.proof.judge}"
        yield f"<h3>Errors</h3><p class='quiet'>{escape(judge)}, on this site's own inputs.</p>"
        yield f"<p class='bad-ink'>{escape(row.proof.wrong)}</p>" if row.proof.wrong else ""
        yield error_bars(row.proof.errors)
    first = next(iter(row.ticket.decisions.values()), None)
    for decision in row.ticket.decisions.values():
        yield from _decision(decision, unfold=decision is first)
    if row.proof is None and not row.ticket.decisions:
        yield f"<p>{escape('; '.join(row.why))}</p>"


def _decision(decision: Decision, unfold: bool) -> Iterator[str]:
    chosen = "no backend" if decision.chosen is None else decision.chosen.name
    yield f"<h3>{escape(chosen)}</h3><p>{escape(decision.why)}</p>"
    yield f'<p class="quiet">asked: {escape(str(decision.request))}</p>'
    others = [name for name in decision.accepted if name != chosen]
    if others:
        yield f'<p class="quiet">would take it too: {escape(", ".join(others))}</p>'
    if decision.refusals:
        heads = "".join(f"<th>{head}</th>" for head in ("refused by", "got", "takes", "remedy"))
        found = _refusals(decision)
        words = f"{len(decision.refusals)} backends refuse it, for {len(found)} reasons"
        yield f"<details{' open' if unfold else ''}><summary>{words}</summary>"
        yield f'<table class="refusals"><thead><tr>{heads}</tr></thead><tbody>'
        for refusal, names in found.items():
            texts = (", ".join(names), refusal.got, refusal.takes, refusal.remedy)
            cells = zip(("by", "got", "takes", "remedy"), texts, strict=True)
            yield "<tr>" + "".join(f'<td data-label="{label}">{escape(text)}</td>' for label, text in cells) + "</tr>"
        yield "</tbody></table></details>"


def _refusals(decision: Decision) -> dict[Refusal, list[str]]:
    """Each distinct refusal with all whom it stops; what this very call could change comes first."""
    found: dict[Refusal, list[str]] = {}
    for name, refusals in decision.refusals:
        for refusal in refusals:
            found.setdefault(refusal, []).append(name)
    return dict(sorted(found.items(), key=lambda pair: pair[0].machine_wide))


# -- the rest ---------------------------------------------------------------------------------------------------------


def _whole(report: Report) -> Iterator[str]:
    whole = None if report.certificate is None else report.certificate.whole
    if whole is None:
        return
    yield '<section id="whole"><h2>The whole model</h2>'
    yield f'<p class="quiet">From end to end, judged by {escape(whole.judge)}; errors as above.</p>'
    yield f'<p class="bad-ink">{escape(whole.wrong)}</p>' if whole.wrong else ""
    yield error_bars(whole.errors)
    yield f"{KEY}</section>"


def _times(report: Report) -> Iterator[str]:
    if report.times is None:
        return
    yield '<section id="times"><h2>Times</h2>'
    how = report.times.how[:1].upper() + report.times.how[1:]
    if report.times.passes:
        yield time_bars(report.times.passes)
        how += "; the line spans four fifths of them"
    yield f'<p class="quiet">{escape(how)}.</p>'
    yield from (f'<p class="quiet">Note: {escape(note)}.</p>' for note in report.times.notes)
    yield "</section>"


def _masks(report: Report) -> Iterator[str]:
    if not report.pictures:
        return
    yield '<section id="masks"><h2>Masks</h2>'
    yield f'<p class="quiet">{ABOUT_MASKS}</p><div class="masks">'
    for picture in report.pictures:
        sites = picture.sites[0] or "the model itself"
        sites += f" and {len(picture.sites) - 1} more" if len(picture.sites) > 1 else ""
        size = f"{picture.q_len} × {picture.kv_len}, batch entry {picture.entry}"
        yield f"<figure>{mask_picture(picture)}<figcaption><b>{escape(picture.words)}</b> {size}<br>"
        yield f'<code>{escape(picture.mask)}</code><br><span class="quiet">{escape(sites)}</span></figcaption></figure>'
    yield "</div></section>"


def _deck(certificate: Certificate | None) -> Iterator[str]:
    if certificate is None or not certificate.deck:
        return
    shapes = list(dict.fromkeys(card.shape for card in certificate.deck))
    cards = {(card.case, card.shape): card for card in certificate.deck}
    yield '<section id="deck"><h2>Edge deck</h2>'
    yield f'<p class="quiet">{ABOUT_DECK}</p>'
    yield '<div class="scroll"><table><thead><tr><th></th>'
    yield from (f'<th scope="col">{escape(_shape(shape))}</th>' for shape in shapes)
    yield "</tr></thead><tbody>"
    for case in dict.fromkeys(card.case for card in certificate.deck):
        cells = "".join(_card(cards.get((case, shape))) for shape in shapes)
        yield f'<tr><th scope="row">{escape(case)}</th>{cells}</tr>'
    yield "</tbody></table></div></section>"


def _shape(shape: Shape) -> str:
    heads = f"{shape.heads}" if shape.heads == shape.kv_heads else f"{shape.heads}:{shape.kv_heads}"
    size = f"{shape.head_dim}" if shape.head_dim == shape.value_dim else f"{shape.head_dim}/{shape.value_dim}"
    return f"{heads} heads of {size}, {shape.dtype}" + ("" if shape.asked == "auto" else f", {shape.asked}")


def _card(card: Card | None) -> str:
    if card is None:
        return "<td></td>"
    if not card.backend:
        return '<td class="quiet">refused by all</td>'
    if card.failure:
        return f'<td class="wrong">✗ {escape(card.backend)}: {escape(card.failure)}</td>'
    found = level(list(card.errors))
    said = "" if found is None else f' <span class="quiet">{found}</span>'
    return f'<td class="good">✓ {escape(card.backend)}{said}</td>'


def _facts(report: Report) -> Iterator[str]:
    facts = {"headway": __version__} if report.certificate is None else dict(_said(report.certificate))
    facts |= {"made by": report.command} if report.command else {}
    yield '<section id="facts"><h2>Where this was made</h2><table class="facts"><tbody>'
    yield from (f'<tr><th scope="row">{escape(name)}</th><td>{escape(text)}</td></tr>' for name, text in facts.items())
    yield "</tbody></table>"
    yield '<p class="quiet">A saved certificate is checked on another machine by'
    yield "<code>headway verify certificate.json</code>.</p></section>"


def _said(certificate: Certificate) -> Iterator[tuple[str, str]]:
    facts = certificate.facts
    for name, value in facts.items():
        if name == "versions":
            yield from ((of, str(version)) for of, version in value.items())
        elif name == "capability":
            yield from [] if value is None else [("capability", ".".join(map(str, value)))]
        elif name == "parameters":
            yield name, f"{value:,}"
        else:
            yield name, str(value)

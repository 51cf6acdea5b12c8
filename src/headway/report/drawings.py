"""The page's drawings: bars of errors on a log scale, bars of times, and masks, each an inline SVG.

No text stands inside an SVG: it would shrink with it on a phone. Labels and numbers are HTML beside it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

from headway.report.pictures import Picture
from headway.report.report import digits, share
from headway.report.times import Pass, in_ms
from headway.swap.judge import ROUNDINGS_WORST, TIMES_WORST, Errors

DECADES = (-18, 0)
"""Errors are shares of the largest number: from below float64's rounding to all of it."""


class Scale:
    """A log scale that spans some errors, in whole decades.

    >>> scale = Scale([2e-7, 3e-5])
    >>> (scale.low, scale.high), round(scale.at(1e-6))
    ((-7, -4), 33)
    """

    def __init__(self, errors: Iterable[float]) -> None:
        logs = [math.log10(e) for e in errors if e > 0 and math.isfinite(e)]
        low, high = (math.floor(min(logs)), math.ceil(max(logs))) if logs else (-7, -6)
        self.low = min(max(low, DECADES[0]), DECADES[1] - 1)
        self.high = max(min(high, DECADES[1] + 3), self.low + 1)

    def at(self, error: float) -> float:
        """Per cent of the width; 0 is at the left end, what is no number at the right end."""
        if error <= 0:
            return 0.0
        if not math.isfinite(error):
            return 100.0
        return min(max((math.log10(error) - self.low) / (self.high - self.low) * 100, 1.0), 100.0)

    def ticks(self) -> list[int]:
        step = max(1, math.ceil((self.high - self.low) / 6))
        return list(range(self.low, self.high + 1, step))


def error_bars(errors: Sequence[Errors], at_most: int = 14) -> str:
    """A pair of bars for each error, before above now, with a tick where now would be too much."""
    if not errors:
        return "<p>Nothing to compare.</p>"
    shown = sorted(errors, key=lambda e: (not e.what.startswith("forward"), e.passed, -share(e.worst_now, e)))[:at_most]
    scale = Scale(x for e in shown for x in (share(e.worst_before, e), share(e.worst_now, e), _allowed(e)))
    lines = ['<div class="bars">', *(_bar_row(e, scale) for e in shown), _axis(scale), "</div>"]
    if len(errors) > len(shown):
        lines.append(f'<p class="quiet">The worst {len(shown)} of {len(errors)}; the JSON has all.</p>')
    return "\n".join(lines)


def _allowed(e: Errors) -> float:
    """As `Errors.passed` has it for the worst element."""
    return share(TIMES_WORST * e.worst_before + ROUNDINGS_WORST * e.eps * e.largest, e)


def _bar_row(e: Errors, scale: Scale) -> str:
    was, now = share(e.worst_before, e), share(e.worst_now, e)
    note = f", judged on {e.judged:.1%} of its numbers" if e.judged < 1 else ""
    title = escape(f"{e}; {'passed' if e.passed else 'failed'}{note}")
    return (
        f'<div class="bar-row{"" if e.passed else " bad"}" title="{title}">'
        f'<span class="bar-label">{escape(e.what)}{escape(note)}</span>{_pair(was, now, scale, _allowed(e), e.passed)}'
        f'<span class="bar-number">{digits(now)} <span class="quiet">/ {digits(was)}</span></span></div>'
    )


def _pair(was: float, now: float, scale: Scale, allowed: float | None = None, passed: bool = True) -> str:
    grid = "".join(
        f'<line x1="{x:.2f}" x2="{x:.2f}" y1="0" y2="16" class="grid"/>'
        for x in (scale.at(10.0**tick) if tick > scale.low else 0.0 for tick in scale.ticks())
    )
    limit = ""
    if allowed is not None:
        x = scale.at(allowed)
        limit = f'<line x1="{x:.2f}" x2="{x:.2f}" y1="0" y2="16" class="limit"/>'
    return (
        '<svg class="bar" viewBox="0 0 100 16" preserveAspectRatio="none" aria-hidden="true">'
        f'{grid}<rect class="was" y="2" height="5" width="{scale.at(was):.2f}"/>'
        f'<rect class="{"now" if passed else "wrong"}" y="9" height="5" width="{scale.at(now):.2f}"/>{limit}</svg>'
    )


def _axis(scale: Scale) -> str:
    ticks = "".join(
        f'<span style="left:{(tick - scale.low) / (scale.high - scale.low) * 100:.2f}%">1e{tick}</span>'
        for tick in scale.ticks()
    )
    return (
        f'<div class="bar-row"><span class="bar-label"></span><div class="axis" aria-hidden="true">{ticks}</div></div>'
    )


def small_pair(was: float, now: float, scale: Scale, passed: bool) -> str:
    """The same two bars for a table's cell, all sites on one scale."""
    return _pair(was, now, scale, passed=passed)


def time_bars(passes: Sequence[Pass]) -> str:
    """Before and now for each pass, on one scale from 0, with the span of four fifths of the rounds."""
    longest = max((max(*one.before_ms, *one.now_ms) for one in passes), default=1.0) or 1.0
    lines = []
    for one in passes:
        lines.append(f'<p class="claim {one.verdict.replace(" ", "-")}"><b>{escape(one.name)}</b> {one.claim}</p>')
        lines.append('<div class="bars">')
        for side, middle, rounds in (("before", one.before, one.before_ms), ("now", one.now, one.now_ms)):
            ordered = sorted(rounds)
            low, high = (ordered[round(part * (len(ordered) - 1))] / longest * 100 for part in (0.1, 0.9))
            lines.append(
                f'<div class="bar-row"><span class="bar-label">{side}</span>'
                '<svg class="bar" viewBox="0 0 100 16" preserveAspectRatio="none" aria-hidden="true">'
                f'<rect class="{"was" if side == "before" else "now"}" y="4" height="8"'
                f' width="{middle / longest * 100:.2f}"/>'
                f'<line class="span" x1="{low:.2f}" x2="{high:.2f}" y1="8" y2="8"/></svg>'
                f'<span class="bar-number">{in_ms(middle)}</span></div>'
            )
        lines.append("</div>")
    return "\n".join(lines)


def mask_picture(picture: Picture) -> str:
    """Queries downwards, keys to the right; what may be attended to is filled."""
    height, width = len(picture.rows), max(map(len, picture.rows), default=0)
    path = "".join(
        f"M{start} {y}h{end - start}v1h-{end - start}z"
        for y, row in enumerate(picture.rows)
        for start, end in _runs(row)
    )
    label = escape(f"{picture.words}: {picture.q_len} queries by {picture.kv_len} keys")
    return (
        f'<svg class="mask" viewBox="0 0 {max(width, 1)} {max(height, 1)}" role="img" aria-label="{label}"'
        f' shape-rendering="crispEdges"><path d="{path}"/></svg>'
    )


def _runs(row: Sequence[bool]) -> list[tuple[int, int]]:
    """Where the yeses start and end.

    >>> _runs((True, True, False, True))
    [(0, 2), (3, 4)]
    """
    edges = [i for i in range(len(row) + 1) if (i > 0 and row[i - 1]) != (i < len(row) and row[i])]
    return list(zip(edges[::2], edges[1::2], strict=True))

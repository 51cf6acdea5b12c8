"""A run's figures as PNG, each drawn for a light page and for a dark one. Nothing is drawn that was not measured."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Iterator
from typing import Any

from headway_apps.proteins.evaluate.ngrams import Baseline
from headway_apps.proteins.evaluate.statistics import KMERS, Statistics
from headway_apps.proteins.report.run import Curve, Run

WIDE, HIGH, DPI = 7.2, 3.4, 130


@dataclasses.dataclass(frozen=True)
class Ink:
    """Colours of one page."""

    ground: str
    ink: str
    quiet: str
    line: str
    series: tuple[str, ...]


LIGHT = Ink(
    "#ffffff",
    "#1b2330",
    "#5c6778",
    "#e6e9ee",
    ("#1f6feb", "#c2410c", "#5c6778", "#1a7f37", "#a371f7", "#b08800", "#0e7c86"),
)
DARK = Ink(
    "#10141a",
    "#e4e9f0",
    "#96a2b4",
    "#262e3a",
    ("#5aa2ff", "#ff9d5c", "#96a2b4", "#5fd07a", "#c7a6ff", "#e3b341", "#4fc3cf"),
)


@dataclasses.dataclass(frozen=True)
class Figure:
    name: str
    title: str
    caption: str
    draw: Callable[[Any, Ink], None]
    """On matplotlib's axes."""

    def png(self, ink: Ink) -> bytes:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure as Sheet

        sheet = Sheet(figsize=(WIDE, HIGH), dpi=DPI, facecolor=ink.ground, layout="constrained")
        FigureCanvasAgg(sheet)
        axes = sheet.add_subplot(facecolor=ink.ground)
        self.draw(axes, ink)
        _dress(axes, ink)
        made = io.BytesIO()
        sheet.savefig(made, format="png", metadata={"Software": None})
        return made.getvalue()


def figures(run: Run) -> Iterator[Figure]:
    """Those for which the run has numbers."""
    if loss := run.curve("train/loss"):
        yield Figure("loss", "Training loss", _loss_caption(run), lambda axes, ink: _loss(axes, ink, loss, run))
    if held_out := run.curve("val/loss"):
        some = "what was held out" if run.looked_at is None else f"up to {run.looked_at:,} sequences held out"
        caption = f"Nats per residue, at most, of {some}: lower is better."
        counted = run.evaluation.baselines if run.evaluation is not None and run.compares else []
        if counted:
            caption += " Dashed: what counting in the training data gives."
        elif run.evaluation is not None:
            caption += " The evaluation scored other sequences, so its n-grams are not beside it."
        yield Figure("held-out", "Held out", caption, lambda axes, ink: _held_out(axes, ink, held_out, counted))
    if rate := run.curve("train/learning_rate"):
        yield Figure("rate", "Learning rate", "", lambda axes, ink: _plain(axes, ink, rate, "learning rate"))
    if speed := run.curve("train/residues_per_second"):
        caption = "Residues trained on in a second, from one log to the next."
        yield Figure("speed", "Speed", caption, lambda axes, ink: _plain(axes, ink, speed, "residues per second"))
    if run.evaluation is not None and (rows := run.evaluation.statistics):
        caption = (
            "Jensen-Shannon distance to another half of the held-out proteins: 0 is the same. A few proteins are at a"
            " distance for being few, as real ones show."
        )
        yield Figure("kmers", "Distance of k-mers", caption, lambda axes, ink: _kmers(axes, ink, rows))
        caption = "Share of each of the twenty among the samples' residues, and among real held-out ones."
        yield Figure("residues", "Residues", caption, lambda axes, ink: _residues(axes, ink, rows))


def _loss_caption(run: Run) -> str:
    lost = run.lost("train/loss")
    said = "Nats per residue of each log, and their running mean where they are many."
    if ended := _curriculum_end(run):
        said += f" Shaded: the curriculum, until step {ended:,}."
    return said + (f" {lost} logs were no number, and are not drawn." if lost else "")


def _curriculum_end(run: Run) -> int | None:
    kind, steps = run.curriculum
    return None if kind == "none" else steps


def _loss(axes: Any, ink: Ink, loss: Curve, run: Run) -> None:
    steps, values = zip(*loss, strict=True)
    many = max(1, len(values) // 25)
    running = [sum(values[max(0, at - many) : at]) / min(at, many) for at in range(1, len(values) + 1)]
    axes.plot(steps, values, color=ink.series[0], alpha=0.35, linewidth=1, marker="." if len(values) == 1 else "")
    axes.plot(steps, running, color=ink.series[0], linewidth=1.8)
    if ended := _curriculum_end(run):
        axes.axvspan(0, min(ended, max(steps)), color=ink.series[1], alpha=0.1, linewidth=0)
    axes.set_ylabel("nats per residue")
    axes.set_xlabel("step")


def _held_out(axes: Any, ink: Ink, curve: Curve, counted: list[Baseline]) -> None:
    axes.plot(*zip(*curve, strict=True), color=ink.series[0], linewidth=1.8, marker="o", markersize=3.5)
    for each in counted:
        axes.axhline(each.nats_per_residue, color=ink.series[2], linewidth=1, linestyle="--")
        if each.name.startswith(("uniform", "1-", "4-")):  # those between lie too near to be named
            axes.annotate(
                each.name,
                (1, each.nats_per_residue),
                xycoords=axes.get_yaxis_transform(),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                color=ink.quiet,
            )
    axes.set_ylabel("nats per residue")
    axes.set_xlabel("step")


def _plain(axes: Any, ink: Ink, curve: Curve, name: str) -> None:
    marker = "." if len(curve) == 1 else ""
    axes.plot(*zip(*curve, strict=True), color=ink.series[0], linewidth=1.6, marker=marker)
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", scilimits=(-2, 6))
    axes.set_ylabel(name)
    axes.set_xlabel("step")


def _kmers(axes: Any, ink: Ink, rows: list[Statistics]) -> None:
    wide = 0.8 / len(rows)
    for at, row in enumerate(rows):
        places = [place + (at - (len(rows) - 1) / 2) * wide for place in range(len(KMERS))]
        heights = [row.kmer_distance[k] for k in KMERS]
        axes.bar(places, heights, wide * 0.92, color=ink.series[at], label=row.name)
    axes.set_xticks(range(len(KMERS)), [f"{k}-mers" for k in KMERS])
    axes.set_ylabel("distance")
    axes.legend(frameon=False, labelcolor=ink.ink, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=4)


def _residues(axes: Any, ink: Ink, rows: list[Statistics]) -> None:
    ours, real = rows[0], rows[-1]
    letters = sorted(real.frequencies, key=lambda each: -real.frequencies[each])
    for at, row in enumerate((ours, real)):
        places = [place + (at - 0.5) * 0.4 for place in range(len(letters))]
        shares = [100 * row.frequencies[each] for each in letters]
        axes.bar(places, shares, 0.38, color=ink.series[2 * at], label=row.name)
    axes.set_xticks(range(len(letters)), letters)
    axes.set_ylabel("% of residues")
    axes.legend(frameon=False, labelcolor=ink.ink, fontsize=8)


def _dress(axes: Any, ink: Ink) -> None:
    axes.grid(axis="y", color=ink.line, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=ink.quiet, labelsize=8)
    for each in (axes.xaxis.label, axes.yaxis.label):
        each.set(color=ink.quiet, fontsize=9)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(ink.line)
    for offset in (axes.xaxis.get_offset_text(), axes.yaxis.get_offset_text()):
        offset.set(color=ink.quiet, fontsize=8)

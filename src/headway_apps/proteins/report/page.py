"""The HTML: no network, no other file, no script; light and dark, wide and narrow. All that is told is escaped."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Iterable, Iterator
from functools import cache
from html import escape
from importlib.resources import files
from typing import Any

from headway import __version__
from headway_apps.proteins.data.clusters import Leakage
from headway_apps.proteins.evaluate.attention import Attention
from headway_apps.proteins.evaluate.evaluation import Likelihood
from headway_apps.proteins.evaluate.ngrams import Baseline
from headway_apps.proteins.evaluate.statistics import measured
from headway_apps.proteins.report.figures import Figure
from headway_apps.proteins.report.run import Run

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
SHOWN = 10

CURRICULA = {
    "less-noise": "A tenth of the noise at first, and all of it from step {steps} on",
    "early-times": "Times of little noise more often at first, and all alike from step {steps} on",
}
ABOUT_CURRICULUM = (
    "Until then the task becomes harder at each step, so the training loss can rise while the model gets better, and it"
    " is no bound of anything. The held-out curve is always under full noise: go by that."
)
ABOUT_BOUND = (
    "Nats per residue of all residues together; what the model really pays is at most this. n-grams are mixed from"
    " counts of the training sequences, with weights fitted on a slice of those; they are told which residue is the"
    " first, as the model is."
)
ABOUT_STATISTICS = (
    "The samples beside random proteins, training ones and real ones held out, these two also with each protein's"
    " residues shuffled; all cut to the lengths of the samples but for the last column. Distances are"
    " Jensen-Shannon distances of k-mers (0 to 1) and the residues that lengths have to be moved, to another half of"
    " the held-out proteins. Low complexity: residues in some window of 12 whose entropy is 2.2 bits or less. Identity:"
    " the share of a protein's letters that a stretch of its nearest training sequence gives without an edit; a copy"
    " has 0.9 or more."
)


@dataclasses.dataclass(frozen=True)
class Drawn:
    figure: Figure
    light: bytes
    dark: bytes


def page(run: Run, drawn: Iterable[Drawn]) -> str:
    """The whole page."""
    pictures = {each.figure.name: each for each in drawn}
    title = escape(f"Headway: {run.name}")
    parts = [
        "<!doctype html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<link rel="icon" href="data:,">',
        f"<title>{title}</title>",
        f"<style>\n{_style()}</style>",
        "</head>",
        "<body>",
        *_header(run),
        *_held_out(run, pictures),
        *_samples(run, pictures),
        *_training(run, pictures),
        *_data(run),
        *_attention(run),
        *_config(run),
        *_machine(run),
        "</body>",
        "</html>",
    ]
    return "\n".join(parts) + "\n"


@cache
def _style() -> str:
    return files("headway_apps.proteins.report").joinpath("page.css").read_text("utf-8")


# -- the top ----------------------------------------------------------------------------------------------------------


def _header(run: Run) -> Iterator[str]:
    yield f"<header><h1>{escape(run.name)}</h1>"
    yield '<p class="quiet">a discrete-diffusion model of proteins, trained and judged by Headway</p></header>'
    if run.evaluation is not None:
        better, said = verdict(run.evaluation.likelihood, run.evaluation.baselines)
        yield f'<p class="verdict {better}">{escape(said)}</p>'
    yield '<div class="tiles">'
    for label, number, more in _tiles(run):
        yield f'<div class="tile">{escape(label)}<b>{escape(number)}</b><span class="quiet">{escape(more)}</span></div>'
    yield "</div>"
    yield from (f'<p class="absent">No {escape(what)}: {escape(why)}.</p>' for what, why in run.absent.items())


def verdict(ours: Likelihood, baselines: list[Baseline]) -> tuple[str, str]:
    """Whether more was learned than counting gives; by how much it must be clear, two standard errors say."""
    best = min(baselines, key=lambda each: each.nats_per_residue)
    below = best.nats_per_residue - ours.nats_per_residue
    numbers = f"perplexity {ours.perplexity:.2f} at most, against {best.perplexity:.2f} of the {best.name}"
    if below <= 0:
        return "bad", f"No better than counting: {numbers}."
    if ours.standard_error is None or below < 2 * ours.standard_error:
        return "warm", f"Not clearly better than counting, by less than two standard errors: {numbers}."
    return "good", f"Better than counting: {numbers}."


def _tiles(run: Run) -> Iterator[tuple[str, str, str]]:
    found = run.evaluation
    if found is not None:
        more = f"{found.likelihood.nats_per_residue:.4f} nats per residue"
        yield "Held-out perplexity", f"{found.likelihood.perplexity:.2f}", f"at most; {more}"
        yield "Parameters", f"{found.parameters:,}", found.model
    if run.metrics:
        steps = run.config.get("run", {}).get("steps")
        seconds = float(run.metrics[-1]["seconds"])
        yield (
            "Steps",
            f"{run.metrics[-1]['step']:,}",
            ("" if steps is None else f"of {steps:,}, ") + f"in {_time(seconds)}",
        )
    if speed := run.curve("train/residues_per_second"):
        middle = sorted(value for _, value in speed)[len(speed) // 2]
        yield "Residues per second", f"{middle:,.0f}", "the median of all logs"
    if held_out := run.curve("val/loss"):
        step, least = min(held_out, key=lambda each: each[1])
        of = "" if run.looked_at is None else f" of up to {run.looked_at:,} sequences"
        yield "Best in training", f"{least:.4f}", f"nats per residue held out{of}, at step {step:,}"


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


# -- how good ---------------------------------------------------------------------------------------------------------


def _held_out(run: Run, pictures: dict[str, Drawn]) -> Iterator[str]:
    found = run.evaluation
    if found is None:
        return
    ours = found.likelihood
    yield f'<section id="held-out"><h2>Held out</h2><p class="quiet">{escape(ABOUT_BOUND)}</p>'
    rows = [(each.name, f"{each.nats_per_residue:.4f}", f"{each.perplexity:.2f}") for each in found.baselines]
    error = "" if ours.standard_error is None else f" ± {ours.standard_error:.4f}"
    rows.append((f"{found.model}, at most", f"{ours.nats_per_residue:.4f}{error}", f"{ours.perplexity:.2f}"))
    yield from _table(("", "nats per residue", "perplexity"), rows, last=True)
    kind = "the number of masked sites drawn evenly" if ours.bound == "absorbing" else "noise drawn over its range"
    said = (
        f"{ours.sequences:,} of {ours.of_sequences:,} sequences of {found.data['part']}, {ours.residues:,} residues;"
        f" {kind}, {ours.draws} times a sequence, with seed {ours.seed}."
    )
    if ours.prior:
        said += f" Of it {ours.prior:.4f} are the prior's."
    if ours.sequences < ours.of_sequences:
        said += " The n-grams are scored on the same ones."
    yield f'<p class="quiet">{escape(said)}</p></section>'


def _samples(run: Run, pictures: dict[str, Drawn]) -> Iterator[str]:
    found = run.evaluation
    if found is None and not run.samples:
        return
    yield '<section id="samples"><h2>Samples</h2>'
    if found is not None and found.statistics:
        yield f'<p class="quiet">{escape(ABOUT_STATISTICS)}</p>'
        rows = [(name, *cells) for name, cells in measured(found.statistics)]
        yield from _table(("", *(row.name for row in found.statistics)), rows)
    for what, why in ({} if found is None else found.absent).items():
        yield f'<p class="absent">No {escape(what.replace("_", " "))}: {escape(why)}.</p>'
    for note in [] if found is None else found.notes:
        yield f'<p class="absent">Note: {escape(note)}.</p>'
    yield from _pictures(pictures, "kmers", "residues")
    if run.samples:
        yield f'<h3>The first of them</h3><p class="quiet">{escape(run.samples_from)}</p><ol class="proteins">'
        yield from (f"<li>{escape(each)}</li>" for each in run.samples[:SHOWN])
        yield "</ol>"
    yield "</section>"


# -- how it came ------------------------------------------------------------------------------------------------------


def _training(run: Run, pictures: dict[str, Drawn]) -> Iterator[str]:
    yield '<section id="training"><h2>Training</h2>'
    kind, steps = run.curriculum
    if kind != "none":
        told = CURRICULA.get(kind, "By {kind}, of which this page knows nothing, until step {steps}")
        said = told.format(kind=kind, steps="its end" if steps is None else f"{steps:,}")
        yield f'<p class="curriculum"><b>The task changed.</b> {escape(f"{said}. {ABOUT_CURRICULUM}")}</p>'
    if not run.metrics:
        yield '<p class="absent">No curves: no numbers were kept.</p>'
    yield from _pictures(pictures, "held-out", "loss", "rate", "speed")
    if run.checkpoints:
        steps_kept = ", ".join(f"{each:,}" for each in run.checkpoints)
        yield f'<p class="quiet">Checkpoints kept, by step: {escape(steps_kept)}.</p>'
    yield "</section>"


def _data(run: Run) -> Iterator[str]:
    if run.data is None:
        return
    told = run.data.provenance
    yield f'<section id="data"><h2>Data</h2><p class="quiet">As told by {escape(run.data.told_by)}.</p>'
    rows = [(name, f"{part['sequences']:,}", f"{part['residues']:,}") for name, part in run.data.parts.items()]
    yield from _table(("part", "sequences", "residues"), rows)
    yield from _facts(_provenance(told) | {"fingerprint": run.data.fingerprint})
    yield "</section>"


def _provenance(told: dict[str, Any]) -> dict[str, str]:
    """All that the folder keeps of where it comes from, in words."""
    counts, split, leakage = told.get("counts"), told.get("split"), told.get("leakage")
    found = {
        f"from {each['file']}": f"{each['bytes']:,} bytes, sha256 {each['sha256']}" for each in told.get("sources", ())
    }
    if told.get("note"):
        found["note"] = told["note"]
    if rules := told.get("rules"):
        found["taken"] = _words(rules)
    if counts:
        found["records"] = f"{counts['read']:,} read, {counts['taken']:,} taken"
        for kind in ("rejected", "mended", "noted"):
            every = sorted(counts[kind].items(), key=lambda each: -each[1])
            found[kind] = "; ".join(f"{number:,} {why}" for why, number in every) or "none"
    if split:
        found["split"] = _words(split)
    if "leakage" in told:
        found["leakage"] = (
            "not measured, as there are too many residues" if leakage is None else str(Leakage(**leakage))
        )
    if told.get("written"):
        found["prepared"] = told["written"]
    return found


def _words(told: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} ({_words(value)})" if isinstance(value, dict) else f"{name} {value}" for name, value in told.items()
    )


def _attention(run: Run) -> Iterator[str]:
    if run.evaluation is None:
        return
    yield '<section id="attention"><h2>Attention</h2>'
    yield '<p class="quiet">Of a packed batch of proteins, on the machine of the evaluation.</p>'
    for each in run.evaluation.attention:
        what = "as in training, with gradients" if each.gradients else "as evaluated, without gradients"
        yield f"<h3>{escape(each.backend)}</h3>"
        yield f"<p>{escape(_sentence(each))}</p><p class='quiet'>{escape(f'{what}, {each.dtype} on {each.device}')}</p>"
        yield f"<details><summary>the whole decision</summary><pre>{escape(each.whole)}</pre></details>"
    yield "</section>"


def _sentence(of: Attention) -> str:
    return f"{of.why[:1].upper()}{of.why[1:]}. Proteins lie {of.layout}." if of.why else f"Proteins lie {of.layout}."


def _config(run: Run) -> Iterator[str]:
    if not run.config:
        return
    yield '<section id="config"><h2>Config</h2><p class="quiet">All keys, also those left to their defaults.</p>'
    yield '<div class="columns">'
    for section, told in run.config.items():
        yield f'<div class="column"><h3>{escape(str(section))}</h3>'
        yield from _facts(
            {str(key): _plain(value) for key, value in told.items()} if isinstance(told, dict) else {"": _plain(told)}
        )
        yield "</div>"
    yield "</div></section>"


def _plain(value: Any) -> str:
    if value is None:
        return "–"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _machine(run: Run) -> Iterator[str]:
    facts: dict[str, str] = (
        {} if run.evaluation is None else {**run.evaluation.machine, "evaluated": run.evaluation.written}
    )
    yield '<section id="machine"><h2>Where this was made</h2>'
    yield from _facts({**facts, "page by": f"headway {__version__}"})
    yield "</section>"


# -- pieces -----------------------------------------------------------------------------------------------------------


def _table(heads: Iterable[str], rows: Iterable[Iterable[str]], last: bool = False) -> Iterator[str]:
    """The first cell of a row names it; `last` sets the last row off."""
    yield f'<div class="scroll"><table{" class=last" if last else ""}><thead><tr>'
    yield "".join(f'<th scope="col">{escape(each)}</th>' for each in heads)
    yield "</tr></thead><tbody>"
    for first, *cells in rows:
        yield f'<tr><th scope="row">{escape(first)}</th>{"".join(f"<td>{escape(each)}</td>" for each in cells)}</tr>'
    yield "</tbody></table></div>"


def _facts(told: dict[str, str]) -> Iterator[str]:
    yield '<table class="facts"><tbody>'
    yield from (f'<tr><th scope="row">{escape(name)}</th><td>{escape(text)}</td></tr>' for name, text in told.items())
    yield "</tbody></table>"


def _pictures(pictures: dict[str, Drawn], *names: str) -> Iterator[str]:
    yield '<div class="figures">'
    for each in (pictures[name] for name in names if name in pictures):
        figure = each.figure
        said = escape(figure.title)
        yield f"<figure><picture><source media='(prefers-color-scheme: dark)' srcset='{_inline(each.dark)}'>"
        yield f"<img alt='{said}' src='{_inline(each.light)}'></picture>"
        yield f"<figcaption><b>{said}.</b> {escape(figure.caption)}</figcaption></figure>"
    yield "</div>"


def _inline(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"

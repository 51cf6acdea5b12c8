"""What a trained run came to: a page of docs with its figures, and rows of results. Draws by several samplers.

    headway proteins train examples/proteins/small.yaml --out RUN --set data.folder=DATA
    python benchmarks/trained.py RUN DATA --page docs/trained.md --rows benchmarks/results/trained.jsonl
    python benchmarks/trained.py - DATA --rows benchmarks/results/trained.jsonl    # only what needs no model

The weights are those that scored best on the held-out part while they were trained. Samplers draw proteins of the same
lengths; a distance is that of Jensen and Shannon between k-mers of samples and of one half of the held-out part.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from attention import about

from headway_apps.proteins.cli.opened import opened
from headway_apps.proteins.data.shards import Prepared
from headway_apps.proteins.evaluate.evaluation import Evaluation, Samples, evaluate, some
from headway_apps.proteins.evaluate.ngrams import baselines
from headway_apps.proteins.evaluate.references import References, references
from headway_apps.proteins.evaluate.statistics import KMERS, Statistics, statistics
from headway_apps.proteins.generate.lengths import draw
from headway_apps.proteins.generate.sample import generate
from headway_apps.proteins.report.figures import LIGHT, figures
from headway_apps.proteins.report.run import Run
from headway_apps.proteins.trained import Trained
from headway_apps.training import precision

SAMPLERS: tuple[tuple[str, int | None], ...] = (("euler", 1000), ("first-hitting", None), ("first-hitting", 100))
DRAWS = 40
SHOWN = ("held-out", "kmers")
"""Figures of a report that are shown."""


def drawn(trained: Trained, lengths: list[int], compared_with: list[str]) -> tuple[list[dict[str, Any]], Samples]:
    """A row for each sampler, and what the last one drew."""
    dtype, count = precision.chosen(trained.model.device).dtype, len(lengths)
    found = []
    for sampler, steps in SAMPLERS:
        begun = time.perf_counter()
        # One batch, so that its calls are those of one protein of each length.
        made = generate(trained, lengths, sampler=sampler, steps=steps, tokens=sum(lengths) + 2 * count, dtype=dtype)
        seconds = time.perf_counter() - begun
        called = sampler if steps is None else f"{sampler} in {steps:,} steps"
        row = {"sampler": called, "calls": made.calls, "seconds": round(seconds, 2), "proteins": count}
        found.append(row | {"distance": distances(statistics(called, made.proteins, compared_with))})
        print(json.dumps(found[-1]), flush=True)
    return found, Samples(made.proteins, f"{called}, {made.calls:,} calls")


def distances(of: Statistics) -> dict[str, float]:
    return {str(k): round(of.kmer_distance[k], 4) for k in KMERS}


def beside(found: References) -> list[dict[str, Any]]:
    """Rows of proteins that no model made."""
    return [
        {"reference": name, "proteins": len(row), "distance": distances(statistics(name, row, found.compared_with))}
        for name, row in found.rows.items()
    ]


def spread(held_out: list[str], train: list[str], lengths: list[int], compared_with: list[str]) -> list[dict[str, Any]]:
    """Training proteins drawn anew: the mean distance, and by how much rows of as many differ, a standard deviation."""
    draws = [references(held_out, train, lengths, seed).rows for seed in range(1, DRAWS + 1)]
    rows = []
    for name in ("training", "training, shuffled"):
        found = [distances(statistics(name, each[name], compared_with)) for each in draws]
        row = {"reference": f"{name}, {DRAWS} draws", "proteins": len(draws[0][name])}
        for word, of in (("distance", fmean), ("deviation", stdev)):
            row[word] = {k: round(of([each[k] for each in found]), 4) for k in found[0]}
        rows.append(row)
    return rows


def training(run: Run) -> dict[str, Any]:
    """What it took."""
    lines = [line for line in run.metrics if "train/batch_time" in line]
    steps = [0, *(line["step"] for line in lines)]
    spans = [after - before for before, after in pairwise(steps)]
    seconds = sum(line["train/batch_time"] * span for line, span in zip(lines, spans, strict=True))
    return {"steps": steps[-1], "epochs": round(lines[-1]["train/epoch"], 1), "seconds": round(seconds)}


def page(
    rows: list[dict[str, Any]],
    noise: list[dict[str, Any]],
    held: Evaluation,
    took: dict[str, Any],
    machine: str,
    figures_: list[str],
) -> str:
    ours, counts = held.likelihood, held.data["provenance"]["counts"]
    error = "" if ours.standard_error is None else f" ± {ours.standard_error:.4f}"
    baselines = [f"| {each.name} | {each.nats_per_residue:.4f} | {each.perplexity:.2f} |" for each in held.baselines]
    varies = " and ".join(
        ", ".join(f"{row['distance'][str(k)]:.3f} ± {row['deviation'][str(k)]:.3f}" for k in KMERS) for row in noise
    )
    samplers = [
        f"| {row.get('sampler', row.get('reference'))} | {row.get('calls', '')} | "
        + " | ".join(f"{row['distance'][str(k)]:.3f}" for k in KMERS) + " |"
        for row in rows
    ]  # fmt: skip
    return "\n".join(
        [
            "# A model of proteins, trained",
            "",
            "Made by `benchmarks/trained.py` of a run of `examples/proteins/small.yaml` on mmseqs2-examples: of its",
            f"{counts['read']:,} sequences {counts['taken']:,} are of lengths and letters that are taken, and not",
            "there twice.",
            "",
            f"- {held.parameters:,} weights; {took['steps']:,} steps, {took['epochs']} epochs of"
            f" {held.data['parts']['train']['sequences']:,} proteins,",
            f"  {took['seconds']} seconds on {machine}.",
            f"- Held out, in whole families: {ours.of_sequences:,} proteins, of which {ours.sequences:,} are scored,"
            f" {ours.residues:,} residues.",
            "- ±: one standard error, from protein to protein.",
            "",
            "| | nats per residue | perplexity |",
            "|---|---|---|",
            *baselines,
            f"| **the model, at most** | **{ours.nats_per_residue:.4f}**{error} | **{ours.perplexity:.2f}** |",
            "",
            f"![Held-out nats per residue over training]({figures_[0]})",
            "",
            f"Its proteins beside others of the same lengths, {rows[0]['proteins']:,} in each row: the Jensen-Shannon",
            "distance of their k-mers to those of one half of the held-out proteins. `real` are of the other half, cut",
            f"to those lengths, and `real, whole` all {rows[-1]['proteins']:,} of it, uncut; `real, shuffled` are the",
            "former, each with its residues in a random order.",
            "`training` are proteins that it was trained on: a model that drew exactly what it was trained on would",
            "stand there, as families held out have another composition. `training, shuffled` is where a model would",
            "stand that learned that composition alone. `real, shuffled` have the composition of what is held out,",
            "which no model of others is told.",
            f"Over {DRAWS} draws of training proteins, as they are and shuffled: {varies} (one standard deviation).",
            "",
            "| | calls of the network | " + " | ".join(f"{k}-mers" for k in KMERS) + " |",
            "|---|---|" + "---|" * len(KMERS),
            *samplers,
            "",
            f"![Distances of k-mers]({figures_[1]})",
            "",
        ]
    )


def write(path: Path, rows: list[dict[str, Any]], common: dict[str, Any]) -> None:
    with path.open("a") as file:
        for row in rows:
            file.write(json.dumps({"group": "trained", **row} | common) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="or - for the rows that need no model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--page", type=Path)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--commit", default=None, help="where the checkout is no git repository")
    options = parser.parse_args()
    needs_no_model = str(options.run) == "-"
    if options.page is None and not needs_no_model:
        parser.error("--page is needed for a run")
    data, machine = Prepared(options.data), about()
    common = machine | ({"commit": options.commit} if options.commit else {})
    # As a model of the training data draws them.
    lengths = draw(Counter(data["train"].lengths().tolist()), options.count, seed=0)
    held_out, train = some(data["held_out"]), some(data["train"])
    reference = references(held_out, train, lengths)
    others, noise = beside(reference), spread(held_out, train, lengths, reference.compared_with)
    counted = [dataclasses.asdict(each) for each in baselines(data["train"], data["held_out"], seed=0)]
    write(options.rows, [{"reference": row.pop("name"), **row} for row in counted] + others + noise, common)
    if needs_no_model:
        return
    trained, name, trained_on = opened(options.run, best=True)
    trained.model.to(precision.device(options.device))
    found, samples = drawn(trained, lengths, reference.compared_with)
    held = evaluate(trained, data, model=name, trained_on=trained_on, samples=samples)
    held.save(options.run / "evaluation.json")
    run = Run.open(options.run)
    took = training(run)
    told = {"likelihood": dataclasses.asdict(held.likelihood), **took, "parameters": held.parameters}
    write(options.rows, [{"model": name, **row} for row in (told, *found)], common)
    names = []
    for figure in figures(run):
        if figure.name in SHOWN:
            names.append(f"{options.page.stem}-{figure.name}.png")
            (options.page.parent / names[-1]).write_bytes(figure.png(LIGHT))
    options.page.write_text(page(found + others, noise, held, took, machine["gpu"] or "CPU", names), encoding="utf-8")
    print(options.page.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()

"""A recording as pictures: activations by depth, gradient flow, entropy per head."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from headway.errors import HeadwayError
from headway.watch.rows import MODULE, MODULE_GRADIENT, PARAMETER_GRADIENT, Row

if TYPE_CHECKING:
    from headway.watch.recording import Recording

_MOST_NAMES = 48
"""Names along an axis; of more each n-th is written."""


def draw(recording: Recording, folder: Path) -> list[Path]:
    """Write those figures for which there is something to show, and return their paths."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise HeadwayError("figures need matplotlib: pip install matplotlib") from error
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, paint in (("activations", _activations), ("gradients", _gradients), ("entropy", _entropy)):
        # A figure of its own: pyplot would choose a backend for the whole process.
        figure = Figure(layout="constrained")
        if paint(recording, figure):
            path = folder / f"{name}.png"
            figure.savefig(path, dpi=120, format="png")
            written.append(path)
    return written


def _activations(recording: Recording, figure: Any) -> bool:
    rows = [row for row in recording.of(MODULE) if row.values.count]
    if not rows:
        return False
    figure.set_size_inches(_width(len(rows)), 8.0)
    upper, lower = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    at = range(len(rows))
    bounds = [(one.least, one.most) if one.finite else (0.0, 0.0) for one in (row.values for row in rows)]
    mean = [row.values.mean for row in rows]
    std = [row.values.std for row in rows]
    upper.fill_between(
        at, [low for low, _ in bounds], [high for _, high in bounds], step="mid", color="tab:blue", alpha=0.12,
        label="smallest to largest",
    )  # fmt: skip
    upper.errorbar(at, mean, yerr=std, fmt=".", color="tab:blue", capsize=2, label="mean ± std")
    upper.set_yscale("symlog", linthresh=1.0)
    upper.axhline(0, color="grey", linewidth=0.5)
    upper.set(
        title=f"{recording.facts.model}: outputs of modules, in order of running",
        ylabel="activation (linear within ±1)",
    )
    upper.legend(loc="upper left", fontsize="small")
    lower.bar(at, [row.values.zero_share for row in rows], color="tab:grey", label="zeros")
    bad = [index for index, row in enumerate(rows) if row.values.nans or row.values.infs]
    if bad:
        lower.plot(bad, [1.05] * len(bad), "rx", label="NaN or Inf", clip_on=False)
    lower.set(ylim=(0, 1.1), ylabel="share of zeros")
    lower.legend(loc="upper left", fontsize="small")
    _name(lower, [_title(row) for row in rows])
    return True


def _gradients(recording: Recording, figure: Any) -> bool:
    parameters = [row for row in recording.of(PARAMETER_GRADIENT) if row.values.count]
    outputs = [row for row in recording.of(MODULE_GRADIENT) if row.values.count]
    if not parameters and not outputs:
        return False
    figure.set_size_inches(_width(max(len(parameters), len(outputs))), 11.0)
    upper, lower = figure.subplots(2)
    order = {name: at for at, name in enumerate(recording.parameters)}
    parameters.sort(key=lambda row: order.get(row.path, len(order)))
    ran = {(row.path, row.name): row.order for row in recording.of(MODULE)}
    outputs.sort(key=lambda row: ran.get((row.path, row.name), len(ran)))
    for axes, rows, title in (
        (upper, parameters, "gradients of parameters"),
        (lower, outputs, "gradients of modules' outputs, in order of running"),
    ):
        at = range(len(rows))
        size = [row.values.rms for row in rows]
        some = [value for value in size if value > 0]
        floor = min(some, default=1.0) / 10
        axes.bar(at, [max(value, floor) for value in size], bottom=0, color="tab:orange")
        axes.plot([n for n in at if size[n] == 0], [floor] * (len(rows) - len(some)), "kx", label="exactly 0")
        bad = [n for n in at if rows[n].values.nans or rows[n].values.infs]
        axes.plot(bad, [max(some, default=1.0)] * len(bad), "rx", label="NaN or Inf")
        axes.set_yscale("log")
        axes.set_ylim(bottom=floor / 2)
        axes.set(title=f"{recording.facts.model}: {title}", ylabel="root mean square")
        if len(some) < len(rows) or bad:
            axes.legend(fontsize="small")
        _name(axes, [row.path if axes is upper else _title(row) for row in rows])
    return True


def _entropy(recording: Recording, figure: Any) -> bool:
    if not recording.heads:
        return False
    import numpy as np

    sites = list(recording.heads)
    widest = max(heads.count for heads in recording.heads.values())
    share = np.full((len(sites), widest), np.nan)
    logit = np.full((len(sites), widest), np.nan)
    for y, heads in enumerate(recording.heads.values()):
        for x in range(heads.count):
            share[y, x] = np.nan if (one := heads.share(x)) is None else one
            logit[y, x] = np.nan if (one := heads.highest(x)) is None else one
    figure.set_size_inches(min(20, 7 + 0.5 * widest), min(24, 2.2 + 0.3 * len(sites)))
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, values, title, limits, colours in (
        (left, share, "entropy, share of what it could be", (0, 1), "viridis"),
        (right, logit, "largest logit", (None, None), "magma"),
    ):
        image = axes.imshow(np.ma.masked_invalid(values), aspect="auto", vmin=limits[0], vmax=limits[1], cmap=colours)
        axes.set(title=title, xlabel="head", xticks=range(0, widest, max(1, widest // 16)))
        figure.colorbar(image, ax=axes)
    step = -(-len(sites) // _MOST_NAMES)
    left.set_yticks(range(0, len(sites), step), [site or "(model)" for site in sites[::step]], fontsize=8)
    return True


def _title(row: Row) -> str:
    return f"{row.path or '(model)'} {row.name}".strip()


def _width(count: int) -> float:
    return min(20.0, max(7.0, 2.0 + 0.28 * count))


def _name(axes: Any, names: list[str]) -> None:
    step = max(1, -(-len(names) // _MOST_NAMES))
    short = [name if len(name) <= 44 else f"…{name[-43:]}" for name in names[::step]]
    axes.set_xticks(range(0, len(names), step), short, rotation=90, fontsize=7)
    axes.set_xlim(-0.6, max(len(names) - 0.4, 0.6))

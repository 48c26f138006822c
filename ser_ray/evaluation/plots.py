"""Plots for papers and for the report, drawn by matplotlib without a display: confusion, curves, calibration.

Each is a `Figure` with a transparent background: `to_png` puts it on white, `to_svg` gives it the colours of the page
around it, light or dark. The plots of a search's trials are in `ser_ray.evaluation.trial_plots`.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any, Final

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from ser_ray.evaluation.calibration import Reliability

INK: Final = "#1c1e21"
ACCENT: Final = "#2f6fbb"
MUTED: Final = "#8a939d"
GROUND: Final = "#fdfefe"
FILL: Final = "#1f5fae"
SERIES: Final = (ACCENT, "#c2612c", "#2f8f63", "#8d63b8", "#b5508a", "#7d7a2c")
"""Colours that distinguish lines; of medium lightness, so readable on white and on black."""
MARKS: Final = ("o", "s", "^", "D", "v", "P", "X")
STYLE: Final[dict[Any, Any]] = {
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "text.parse_math": False,  # a name with two dollar signs is not a formula
    "svg.fonttype": "none",
}

Epoch = Mapping[str, Any]
"""A line of history.jsonl: epoch, train_loss, dev_uar and so on."""


def plot_confusion(confusion: np.ndarray, labels: Sequence[str], title: str) -> Figure:
    """Rows are true emotions: the share of each row as colour, from 0 to 1 in every plot, and the counts as text.

    Args:
        confusion: (K, K) int counts.
        labels: K names.
        title: what was evaluated.
    """
    occurs = confusion.sum(axis=1)
    share = confusion / np.maximum(occurs, 1)[:, None]
    size = len(labels)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(1.6 + 0.62 * size, 1.2 + 0.5 * size), layout="constrained")
        axes = figure.add_subplot()
        for row, column in np.ndindex(size, size):
            corner = (column - 0.47, row - 0.46)
            # Opacity instead of a colour map, so that an empty cell fits any background.
            axes.add_patch(Rectangle(corner, 0.94, 0.92, color=FILL, alpha=0.06 + 0.94 * share[row, column], lw=0))
            ink = "white" if share[row, column] > 0.7 else INK
            text: dict[str, Any] = {"color": ink, "ha": "center", "va": "center"}
            if confusion[row, column] == 0:
                axes.text(column, row, "0", **text)
            else:
                axes.text(column, row - 0.1, str(confusion[row, column]), **text)
                axes.text(column, row + 0.24, f"{share[row, column]:.0%}", fontsize=8, **text)
        axes.set(xlim=(-0.5, size - 0.5), ylim=(size - 0.5, -0.5), xlabel="predicted", ylabel="true", title=title)
        axes.set_xticks(range(size), labels, rotation=40 if size > 4 else 0, ha="right" if size > 4 else "center")
        axes.set_yticks(range(size), [f"{label} ({n})" for label, n in zip(labels, occurs, strict=True)])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    return figure


def plot_learning_curves(histories: Mapping[str, Sequence[Epoch]], winner: str | None, metric: str) -> Figure:
    """The dev metric of all trials, epoch by epoch, the winner in colour; beside it the winner's losses."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10.2, 3.3), layout="constrained")
        left, right = figure.subplots(1, 2)
        for trial, epochs in histories.items():
            if trial != winner:
                _line(left, epochs, metric, color=MUTED, alpha=0.7, linewidth=1, markersize=2)
        won = histories.get(winner, ()) if winner is not None else ()
        _line(left, won, metric, color=ACCENT, linewidth=2, markersize=4)
        left.set(title=f"{plain(metric)} of all trials" + (f", {winner} in blue" if won else ""), xlabel="epoch")
        _line(right, won, "train_loss", color=MUTED, label="train")
        _line(right, won, "dev_loss", color=ACCENT, label="dev (cross-entropy)")
        right.set(title=f"loss of {winner}" if won else "loss", xlabel="epoch")
        if right.lines:
            right.legend(frameon=False)
        for axes in (left, right):
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.grid(axis="y", color=MUTED, alpha=0.25)
    return figure


def plot_reliability(found: Reliability, title: str) -> Figure:
    """Accuracy against confidence by bin, with the diagonal of perfect calibration; below, the utterances per bin."""
    bins = len(found.n)
    centres, width = (np.arange(bins) + 0.5) / bins, 0.92 / bins
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.6, 4.4), layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3.2, 1))
        upper.plot([0, 1], [0, 1], color=MUTED, linestyle="--", linewidth=1)
        upper.bar(centres, np.nan_to_num(found.accuracy), width, color=ACCENT, alpha=0.35)
        upper.plot(found.confidence, found.accuracy, "o", color=ACCENT, markersize=4)
        upper.set(ylim=(0, 1.02), ylabel="accuracy", title=title)
        lower.bar(centres, found.n, width, color=MUTED, alpha=0.6)
        lower.set(xlim=(0, 1), xlabel="probability of the predicted emotion", ylabel="utterances")
    return figure


def plot_abstention(rows: Sequence[Mapping[str, float]], title: str) -> Figure:
    """Accuracy and UAR of the surest answers against their share; rows as of `calibration.abstention`."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.6, 4.4), layout="constrained")
        axes = figure.add_subplot()
        for name, colour, mark in zip(("accuracy", "uar"), SERIES, MARKS, strict=False):
            points = [row[name] for row in rows]
            axes.plot(
                [row["share"] for row in rows], points, color=colour, marker=mark, markersize=4, label=plain(name)
            )
        axes.set(xlim=(0, 1.02), xlabel="share of the utterances that is answered, the surest first", title=title)
        axes.grid(axis="y", color=MUTED, alpha=0.25)
        axes.legend(frameon=False)
    return figure


def plot_winners(histories: Mapping[str, Sequence[Epoch]], metric: str) -> Figure:
    """The dev metric of the winners of several searches, epoch by epoch; distinguished by colour, marker and dash."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10.2, 3.3), layout="constrained")
        axes = figure.add_subplot()
        for number, (name, epochs) in enumerate(histories.items()):
            mark, dash = MARKS[number % len(MARKS)], ("-", "--", ":")[number // len(SERIES) % 3]
            colour = SERIES[number % len(SERIES)]
            _line(axes, epochs, metric, color=colour, label=name, marker=mark, linestyle=dash, markersize=5)
        axes.set(title=f"{plain(metric)} of the winners", xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y", color=MUTED, alpha=0.25)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False)
    return figure


def plot_enrolment(curves: Mapping[str, Sequence[Mapping[str, Any]]], metric: str) -> Figure:
    """The metric of each split by how many recordings of a speaker are known, with intervals; rows as of
    `ser_ray.evaluation.enrolment.curve`."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 3.3), layout="constrained")
        axes = figure.add_subplot()
        for number, (split, rows) in enumerate(curves.items()):
            places = np.arange(len(rows)) + 0.06 * number  # beside each other: intervals would hide one another
            values = [row[metric] for row in rows]
            low, high = np.array([row["ci95"][metric] for row in rows]).T
            errors = np.maximum([values - low, high - values], 0)
            style: dict[str, Any] = {"color": SERIES[number], "marker": MARKS[number], "markersize": 5}
            axes.errorbar(places, values, errors, label=split, elinewidth=1, capsize=2, **style)
            axes.set_xticks(range(len(rows)), [str(row["recordings"]) for row in rows])
        axes.set(title=f"{plain(metric)}, 95 % intervals", xlabel="unlabelled recordings of the speaker that were used")
        axes.grid(axis="y", color=MUTED, alpha=0.25)
        figure.legend(loc="outside lower center", ncols=len(curves), frameon=False)
    return figure


def plot_intervals(rows: Mapping[str, tuple[float, Sequence[float] | None]], title: str) -> Figure:
    """Metrics with their intervals, one line each, the first on top."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10.2, 0.9 + 0.34 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        for row, (value, limits) in enumerate(rows.values()):
            if limits:
                axes.plot(limits, [row, row], color=ACCENT, linewidth=1.6, alpha=0.6)
            axes.plot([value], [row], "o", color=ACCENT, markersize=5)
        axes.set(title=title, ylim=(len(rows) - 0.5, -0.5))
        axes.set_yticks(range(len(rows)), list(rows))
        axes.grid(axis="x", color=MUTED, alpha=0.25)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
    return figure


def plain(metric: str) -> str:
    """A metric's name as an axis label.

    >>> plain("dev_macro_f1"), plain("seconds_per_epoch")
    ('dev macro F1', 'seconds per epoch')
    """
    words = metric.replace("_", " ").replace("uar", "UAR").replace("f1", "F1")
    return words.replace("memory mb", "memory [MB]")


def to_png(figure: Figure) -> bytes:
    """PNG on white, 200 dots per inch."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=200, facecolor="white")
    return buffer.getvalue()


def to_svg(figure: Figure, name: str) -> str:
    """An ``<svg>`` element for an HTML page, without a background, in the page's ``color`` and ``--accent``.

    ``name`` must be unique among the plots of a page: it makes their inner ids unique, and screen readers read it.
    """
    buffer = io.StringIO()
    with mpl.rc_context(STYLE | {"svg.hashsalt": name, "svg.id": name.replace(" ", "-")}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    element = buffer.getvalue()
    element = element[element.index("<svg") :].replace(INK, "currentColor")
    for name_of, colour in (("accent", ACCENT), ("ground", GROUND), ("soft", MUTED)):
        element = element.replace(colour, f"var(--{name_of}, {colour})")
    return element.replace("<svg", f'<svg role="img" aria-label="{name}"', 1)


def _line(axes: Axes, epochs: Sequence[Epoch], key: str, **style: Any) -> None:
    """Draw the epochs that have a value; some may lack one."""
    points = [(epoch["epoch"], epoch[key]) for epoch in epochs if epoch.get(key) is not None]
    if points:
        axes.plot(*zip(*points, strict=True), **{"marker": "o", "markersize": 3, **style})

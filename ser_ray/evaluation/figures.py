"""Figures for papers and for the report: confusion matrices and learning curves, drawn by matplotlib without a display.

Each is a `Figure` on a transparent ground: `to_png` puts it on white, `to_svg` lets it take the colours of the page
around it, light or dark.
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

_INK: Final = "#1c1e21"
_ACCENT: Final = "#2f6fbb"
_MUTED: Final = "#9aa3ad"
_FILL: Final = "#1f5fae"
_STYLE: Final[dict[Any, Any]] = {
    "font.size": 9.5,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "text.parse_math": False,  # a name with two dollar signs is a name, no formula
    "svg.fonttype": "none",
}

Epoch = Mapping[str, Any]
"""A line of history.jsonl: epoch, train_loss, dev_uar and so on."""


def confusion_figure(confusion: np.ndarray, labels: Sequence[str], title: str) -> Figure:
    """Rows are true emotions: the share of each row as colour, from 0 to 1 in every figure, and the counts as text.

    Args:
        confusion: (K, K) int counts.
        labels: K names.
        title: what was evaluated.
    """
    occurs = confusion.sum(axis=1)
    share = confusion / np.maximum(occurs, 1)[:, None]
    size = len(labels)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(1.6 + 0.62 * size, 1.2 + 0.5 * size), layout="constrained")
        axes = figure.add_subplot()
        for row, column in np.ndindex(size, size):
            corner = (column - 0.47, row - 0.46)
            # Opacity instead of a colour map, so that an empty cell is the ground, whatever that is.
            axes.add_patch(Rectangle(corner, 0.94, 0.92, color=_FILL, alpha=0.06 + 0.94 * share[row, column], lw=0))
            ink = "white" if share[row, column] > 0.7 else _INK
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


def learning_curves_figure(histories: Mapping[str, Sequence[Epoch]], winner: str | None, metric: str) -> Figure:
    """The dev metric of all trials, epoch by epoch, the winner in colour; beside it the winner's losses."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(10.2, 3.3), layout="constrained")
        left, right = figure.subplots(1, 2)
        for trial, epochs in histories.items():
            if trial != winner:
                _line(left, epochs, metric, color=_MUTED, alpha=0.7, linewidth=1, markersize=2)
        won = histories.get(winner, ()) if winner is not None else ()
        _line(left, won, metric, color=_ACCENT, linewidth=2, markersize=4)
        name = metric.replace("_", " ").replace("uar", "UAR").replace("f1", "F1")
        left.set(title=f"{name} of all trials" + (f", {winner} in blue" if won else ""), xlabel="epoch")
        _line(right, won, "train_loss", color=_MUTED, label="train")
        _line(right, won, "dev_loss", color=_ACCENT, label="dev")
        right.set(title=f"loss of {winner}" if won else "loss", xlabel="epoch")
        if right.lines:
            right.legend(frameon=False)
        for axes in (left, right):
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.grid(axis="y", color=_MUTED, alpha=0.25)
    return figure


def to_png(figure: Figure) -> bytes:
    """On white, 200 dots an inch."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=200, facecolor="white")
    return buffer.getvalue()


def to_svg(figure: Figure, name: str) -> str:
    """An ``<svg>`` element for an HTML page, without a ground, in the page's ``color`` and ``--accent``.

    ``name`` must differ between the figures of a page: it makes their inner ids differ, and it is what is read aloud.
    """
    buffer = io.StringIO()
    with mpl.rc_context(_STYLE | {"svg.hashsalt": name, "svg.id": name.replace(" ", "-")}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    element = buffer.getvalue()
    element = (
        element[element.index("<svg") :].replace(_INK, "currentColor").replace(_ACCENT, f"var(--accent, {_ACCENT})")
    )
    return element.replace("<svg", f'<svg role="img" aria-label="{name}"', 1)


def _line(axes: Axes, epochs: Sequence[Epoch], key: str, **style: Any) -> None:
    """Draw what there is: an epoch may lack a value."""
    points = [(epoch["epoch"], epoch[key]) for epoch in epochs if epoch.get(key) is not None]
    if points:
        axes.plot(*zip(*points, strict=True), marker="o", **{"markersize": 3, **style})

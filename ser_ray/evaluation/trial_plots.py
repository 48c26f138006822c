"""Plots of a search's trials: parallel coordinates of the searched values, and the metric against costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, NullFormatter, StrMethodFormatter

from ser_ray.config import Distribution
from ser_ray.evaluation.plots import ACCENT, GROUND, INK, MUTED, STYLE, plain
from ser_ray.evaluation.results import as_number

ABSENT: Final = -0.14
"""Where a trial crosses an axis whose key it does not have: below the axis."""

Row = Mapping[str, str]
"""A row of trials.csv."""


@dataclass(frozen=True)
class Axis:
    """One vertical axis: where each of N trials crosses it (0 at the bottom to 1, or `ABSENT`), and its ticks."""

    name: str
    positions: tuple[float, ...]
    ticks: tuple[tuple[float, str], ...]


def axis(name: str, cells: Sequence[str], distribution: Distribution | None = None) -> Axis:
    """Scale the cells of one column of trials.csv.

    Choices are spaced evenly, in their order or, if all are numbers, by size. The axis of a range covers the searched
    range, in the logarithm if it is searched so; that of a column that is not searched covers the column's values.

    >>> axis("lr", ["1e-5", "1e-4", ""], Distribution(loguniform=(1e-5, 1e-3))).positions
    (0.0, 0.5, -0.14)
    >>> axis("rank", ["16", "4", "8"], Distribution(choice=(16, 8, 4))).positions
    (1.0, 0.0, 0.5)
    """
    if distribution is not None and distribution.choice is not None:
        return _categories(name, cells, [str(choice) for choice in distribution.choice])
    numbers = [as_number(cell) for cell in cells]
    ends = (distribution.uniform or distribution.loguniform or distribution.randint) if distribution else None
    known = [*(number for number in numbers if number is not None), *(ends or ())]
    if not known:
        return Axis(name, (ABSENT,) * len(cells), ((ABSENT, "none"),))
    log = distribution is not None and distribution.loguniform is not None and min(known) > 0
    low, high = min(known), max(known)

    def place(number: float) -> float:
        if low == high:
            return 0.5
        share = math.log(number / low) / math.log(high / low) if log else (number - low) / (high - low)
        return round(share, 6)

    positions = tuple(ABSENT if number is None else place(number) for number in numbers)
    return Axis(name, positions, tuple((place(tick), f"{tick:.3g}") for tick in _ticks(low, high, log)))


def plot_parallel(rows: Sequence[Row], search: Mapping[str, Distribution], metric: str, winner: str | None) -> Figure:
    """One line per trial through the searched keys to the metric; better trials are more opaque, the winner is thick.

    Args:
        rows: trials that all have a number under ``metric``.
        search: what was searched; keys that no trial has are left out.
        metric: column of the last axis.
        winner: trial_id.
    """
    keys = [key for key in search if any(row.get(key) for row in rows)]
    axes_of = [axis(key, [row.get(key, "") for row in rows], search[key]) for key in keys]
    axes_of.append(axis(plain(metric), [row[metric] for row in rows]))
    strength = axes_of[-1].positions
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10.2, 3.6), layout="constrained")
        axes = figure.add_subplot()
        for i in sorted(range(len(rows)), key=lambda i: strength[i]):
            won = rows[i]["trial_id"] == winner
            style: dict[str, Any] = {"linewidth": 2.6 if won else 1.2, "zorder": 3 if won else 2}
            heights = [one.positions[i] for one in axes_of]
            axes.plot(range(len(axes_of)), heights, color=ACCENT, alpha=1 if won else 0.3 + 0.6 * strength[i], **style)
        for place, one in enumerate(axes_of):
            _draw_axis(axes, place, one)
        axes.set(xlim=(-0.35, len(axes_of) - 0.6), ylim=(ABSENT - 0.06, 1.06))
        axes.set_xticks(range(len(axes_of)), [_broken(one.name) for one in axes_of])
        axes.xaxis.tick_top()
        axes.tick_params(length=0, labelleft=False)
        axes.spines[:].set_visible(False)
    return figure


def pareto_front(metric_N: np.ndarray, costs_NC: np.ndarray) -> np.ndarray:
    """(N,) bool: whether no other trial is at least as good in the metric and in every cost, and better in one.

    >>> pareto_front(np.array([0.7, 0.6, 0.5]), np.array([[3.0], [1.0], [2.0]])).tolist()
    [True, True, False]
    """
    points = np.column_stack([-metric_N, costs_NC])
    no_worse = (points[:, None] <= points[None]).all(axis=2)
    better = (points[:, None] < points[None]).any(axis=2)
    return np.asarray(~(no_worse & better).any(axis=0))


def plot_cost(rows: Sequence[Row], costs: Sequence[str], front: Sequence[str], metric: str) -> Figure:
    """The metric against each cost; trials on the Pareto front of the metric and all costs of ``front`` are filled.

    Args:
        rows: trials that all have numbers under ``metric``, ``costs`` and ``front``.
        costs: columns, one panel each.
        front: columns to minimise; if there is only one, its panel shows the front as a line.
        metric: the column to maximise.
    """
    gained = _column(rows, metric)
    on_front = pareto_front(gained, np.column_stack([_column(rows, cost) for cost in front]))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10.2, 3.1), layout="constrained")
        panels = figure.subplots(1, len(costs), sharey=True, squeeze=False)[0]
        for panel, cost in zip(panels, costs, strict=True):
            spent = _column(rows, cost)
            if list(front) == [cost]:
                along = np.flatnonzero(on_front)[np.argsort(spent[on_front])]
                panel.step(spent[along], gained[along], where="post", color=ACCENT, alpha=0.5, linewidth=1.2)
            panel.plot(spent[~on_front], gained[~on_front], "o", color=MUTED, fillstyle="none", markersize=5)
            panel.plot(spent[on_front], gained[on_front], "o", color=ACCENT, markersize=5.5)
            if spent.min() > 0 and spent.max() > 20 * spent.min():
                panel.set_xscale("log")
                panel.xaxis.set_minor_formatter(NullFormatter())
            else:
                panel.xaxis.set_major_locator(MaxNLocator(4))
            counts = cost == "trainable_parameters"
            panel.xaxis.set_major_formatter(EngFormatter(sep="") if counts else StrMethodFormatter("{x:g}"))
            panel.set_xlabel(plain(cost))
            panel.grid(color=MUTED, alpha=0.25)
        panels[0].set_ylabel(plain(metric))
    return figure


# -- below: how it is done


def _column(rows: Sequence[Row], key: str) -> np.ndarray:
    return np.array([float(row[key]) for row in rows])


def _categories(name: str, cells: Sequence[str], choices: list[str]) -> Axis:
    names = list(dict.fromkeys([*choices, *filter(None, cells)]))
    if all(as_number(choice) is not None for choice in names):
        names.sort(key=float)
    place = {choice: (i / (len(names) - 1) if len(names) > 1 else 0.5) for i, choice in enumerate(names)}
    positions = tuple(place[cell] if cell else ABSENT for cell in cells)
    return Axis(name, positions, tuple((place[choice], _short(choice)) for choice in names))


def _ticks(low: float, high: float, log: bool) -> list[float]:
    """Both ends, and the round numbers between them that are not close to an end."""
    if low == high:
        return [low]
    if log:
        between = [10.0**power for power in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)]
        return [low, *(tick for tick in between if low * 1.4 < tick < high / 1.4), high]
    margin = 0.12 * (high - low)
    between = np.asarray(MaxNLocator(4).tick_values(low, high)).tolist()
    return [low, *(tick for tick in between if low + margin < tick < high - margin), high]


def _draw_axis(axes: Axes, place: int, one: Axis) -> None:
    axes.plot([place, place], [0, 1], color=INK, linewidth=0.9, zorder=4)
    # On a patch of the background colour, so that no line crosses the text.
    behind = {"facecolor": GROUND, "alpha": 0.8, "linewidth": 0, "pad": 0.8}
    text: dict[str, Any] = {"ha": "right", "va": "center", "fontsize": 8, "zorder": 5, "bbox": behind}
    for height, label in one.ticks:
        axes.plot([place - 0.02, place], [height, height], color=INK, linewidth=0.9, zorder=4)
        axes.text(place - 0.04, height, label, **text)
    if ABSENT in one.positions and (ABSENT, "none") not in one.ticks:
        axes.text(place - 0.04, ABSENT, "absent", **text)


def _short(choice: str) -> str:
    """The last part of a hub id or a directory, which distinguishes backbones; at most 20 characters."""
    last = choice.rsplit("/", 1)[-1]
    return last if len(last) <= 20 else f"{last[:19]}…"


def _broken(name: str) -> str:
    """A dotted key over two lines, so that neighbouring labels do not touch."""
    return name.replace(".", ".\n")

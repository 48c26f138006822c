"""Parallel coordinates' scaling, the front of cost and gain, and that figures draw what they are given."""

import math

import numpy as np
import pytest

from ser_ray.config import Distribution
from ser_ray.evaluation.plots import to_svg
from ser_ray.evaluation.trial_plots import ABSENT, axis, pareto_front, plot_cost, plot_parallel


def test_a_range_reaches_from_end_to_end_of_what_is_searched():
    found = axis("dropout", ["0.1", "0.4", ""], Distribution(uniform=(0.0, 0.5)))
    assert found.positions == (0.2, 0.8, ABSENT)
    assert (found.ticks[0], found.ticks[-1]) == ((0.0, "0"), (1.0, "0.5"))
    assert [height for height, _ in found.ticks] == sorted(height for height, _ in found.ticks)


def test_a_logarithmic_range_is_even_in_its_logarithm():
    found = axis("lr", ["0.0003", "3e-5"], Distribution(loguniform=(1e-5, 1e-3)))
    assert found.positions == pytest.approx([math.log10(30) / 2, math.log10(3) / 2], abs=1e-6)
    assert [label for _, label in found.ticks] == ["1e-05", "0.0001", "0.001"]


def test_a_value_outside_of_the_range_widens_it():
    assert axis("layers", ["2", "12"], Distribution(randint=(4, 8))).positions == (0.0, 1.0)


def test_choices_are_spread_evenly():
    of_words = axis("backbone", ["b/wavlm", "a/whisper", ""], Distribution(choice=("a/whisper", "b/wavlm", "hubert")))
    assert of_words.positions == (0.5, 0.0, ABSENT)
    assert of_words.ticks == ((0.0, "whisper"), (0.5, "wavlm"), (1.0, "hubert"))
    of_numbers = axis("rank", ["4", "32"], Distribution(choice=(32, 4, 8)))
    assert of_numbers.positions == (0.0, 1.0)  # by size, though listed otherwise
    of_lists = axis("targets", ["['q', 'v']", "['q']"], Distribution(choice=(["q"], ["q", "v"])))
    assert of_lists.positions == (1.0, 0.0)
    assert axis("mixed", ["new", "True"], Distribution(choice=(True,))).positions == (1.0, 0.0)


@pytest.mark.parametrize(
    ("cells", "positions"), [(["0.5", "0.5"], (0.5, 0.5)), (["", ""], (ABSENT, ABSENT)), (["0.7", ""], (0.5, ABSENT))]
)
def test_an_axis_without_extent_is_no_error(cells, positions):
    assert axis("dev UAR", cells).positions == positions


def test_the_front_equals_a_loop():
    rng = np.random.default_rng(0)
    metric, costs = rng.integers(0, 6, 40) / 10, rng.integers(0, 5, (40, 2)).astype(float)
    front = pareto_front(metric, costs)
    for i in range(40):
        beaten = any(
            metric[j] >= metric[i] and all(costs[j] <= costs[i]) and (metric[j] > metric[i] or any(costs[j] < costs[i]))
            for j in range(40)
        )
        assert front[i] == (not beaten)
    assert 0 < front.sum() < 40


def test_a_line_for_every_trial_and_the_winner_thick():
    search = {"lr": Distribution(loguniform=(1e-5, 1e-3)), "rank": Distribution(choice=(4, 8), when={"m": ("lora",)})}
    rows = [{"trial_id": str(i), "lr": "1e-4", "rank": "4" if i % 2 else "", "dev_uar": f"0.{i + 1}"} for i in range(6)]
    figure = plot_parallel(rows, search, "dev_uar", winner="5")
    (axes,) = figure.axes
    lines = [line for line in axes.lines if len(line.get_xdata()) == 3]
    assert len(lines) == 6
    (thick,) = [line for line in lines if line.get_linewidth() > 2]
    assert list(thick.get_ydata()) == [0.5, 0.0, 1.0]
    assert "absent" in to_svg(figure, "parallel")


def test_cost_shows_every_cost_and_one_front():
    rows = [{"dev_uar": f"0.{5 + i}", "seconds_per_epoch": str(10 + i), "memory": str(10**i)} for i in range(3)]
    figure = plot_cost(rows, ["seconds_per_epoch", "memory"], ["seconds_per_epoch"], "dev_uar")
    assert [panel.get_xlabel() for panel in figure.axes] == ["seconds per epoch", "memory"]
    assert [len(panel.lines) for panel in figure.axes] == [3, 2]

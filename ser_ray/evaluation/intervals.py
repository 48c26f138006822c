"""95 % intervals of metrics, and a test of differences, by a bootstrap over speakers.

Utterances of one speaker are correlated, so resampling utterances would give intervals that are too narrow: the
question is how the model performs on other speakers. Whole speakers are therefore drawn with replacement (the cluster
bootstrap: Field and Welsh 2007, "Bootstrapping clustered data").

Percentile intervals are too narrow for the few speakers that corpora have: the draws' standard deviation is too small
by a factor of sqrt((S - 1) / S), and S speakers estimate it only roughly (Hesterberg 2015, "What teachers should know
about the bootstrap", section 4). An interval here is therefore the metric +- Student's t, with S - 1 degrees of
freedom, times the draws' standard deviation divided by that factor. It is computed on the logit scale, where the spread
of a metric near 1 is symmetric and no limit leaves the metric's range. In simulations with 10 to 90 speakers the
intervals cover the true value 94 % of the time; with four speakers 95 to 96 %, at twice the width of percentile
intervals, which cover it 78 % (results/benchmarks/coverage.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from scipy.special import expit, logit, stdtr, stdtrit

from ser_ray.evaluation.metrics import HEADLINE, confusion, headline
from ser_ray.schema import is_known

LOWEST: Final = {"kappa": -1.0}
"""The lowest possible value of a metric, where that is not 0."""
ROUNDING: Final = 1e-9
"""A standard error below this counts as 0: rounding makes some 1e-16, one utterance in a million makes 1e-6."""

BLOCK: Final = 2**21
"""Units times draws that are held at once: 32 MB. 45,000 recordings whose speakers are not known are as many units."""


@dataclass(frozen=True)
class Gap:
    """A metric of one model minus that of another, its 95 % interval, and the two-sided p-value of no difference.

    If the gap is the same for every speaker, there is no spread to test it with: the interval and p are NaN.
    """

    difference: float
    low: float
    high: float
    p: float


def bootstrap_ci95(
    labels: np.ndarray,
    predicted: np.ndarray,
    speakers: Sequence[str],
    num_labels: int,
    draws: int = 2000,
    seed: int = 0,
) -> tuple[dict[str, tuple[float, float]], str]:
    """The 95 % interval of each headline metric, and the unit that was drawn.

    Args:
        labels: (N,) int, true labels.
        predicted: (N,) int, predicted labels.
        speakers: N names.
        num_labels: K, the number of declared emotions.
        draws: the number of bootstrap replicates; with 2000 the second digit of the limits is stable.
        seed: of the draws; equal seeds give equal intervals.

    Returns:
        Metric -> (low, high), and ``speakers``; ``recordings`` if not all speakers are known; or ``utterances`` if
        there is only one speaker, who says nothing about others. If all speakers have the same metrics, as without any
        error, there is no spread, and the limits nearly coincide.

    Raises:
        ValueError: the lengths differ, there are no utterances, or a label is outside 0..K-1.

    >>> labels, predicted = np.arange(60) % 3, np.arange(60) % 3
    >>> predicted[:30:2] = 0  # errors of the first three of six speakers
    >>> limits, unit = bootstrap_ci95(labels, predicted, [f"s{n // 10}" for n in range(60)], num_labels=3)
    >>> [round(limit, 2) for limit in limits["accuracy"]], unit
    ([0.46, 0.97], 'speakers')
    """
    if not len(labels) == len(predicted) == len(speakers) or not len(labels):
        raise ValueError(
            f"expected labels, predicted and speakers of one length above 0, not {len(labels)}, {len(predicted)} and "
            f"{len(speakers)}"
        )
    values = headline(confusion(labels, predicted, num_labels))
    if (units := len(set(speakers))) > 1:
        drawn = _over_speakers(labels, predicted, speakers, num_labels, draws, seed)
        unit = "speakers" if all(map(is_known, speakers)) else "recordings"
    else:
        # N units of one utterance each.
        units, unit = len(labels), "utterances"
        drawn = _over_utterances(labels, predicted, num_labels, draws, seed)
    half_error = 0.5 / len(labels)
    return {name: _limits(name, float(values[name]), drawn[name], units, half_error) for name in values}, unit


def ci95_of_sums(
    summands_NC: np.ndarray,
    speakers: Sequence[str],
    statistic: Callable[[np.ndarray], np.ndarray],
    draws: int = 2000,
    seed: int = 0,
) -> tuple[float, tuple[float, float], str]:
    """A share that is computed from sums over utterances, such as the ECE; its 95 % interval, and the unit drawn.

    ``statistic``: sums (..., C) -> shares (...). Speakers, draws and units are those of `bootstrap_ci95`.

    >>> in_set = np.array([[1.0, 1], [1, 1], [0, 1], [1, 1]])
    >>> share, (low, high), unit = ci95_of_sums(in_set, ["a", "a", "b", "b"], lambda sums: sums[..., 0] / sums[..., 1])
    >>> share, low < 0.75 < high, unit
    (0.75, True, 'speakers')
    """
    names, speaker = np.unique(np.asarray(speakers), return_inverse=True)
    unit = "speakers" if all(map(is_known, speakers)) else "recordings"
    if len(names) == 1:  # who says nothing about others
        names, speaker, unit = np.arange(len(speakers)), np.arange(len(speakers)), "utterances"
    by_unit = np.zeros((len(names), summands_NC.shape[1]))
    np.add.at(by_unit, speaker, summands_NC)
    value, drawn = float(statistic(by_unit.sum(axis=0))), statistic(_drawn_sums(by_unit, draws, seed))
    return value, _limits("", value, drawn, len(names), 0.5 / len(speakers)), unit


def paired_gap(
    labels: np.ndarray,
    one: np.ndarray,
    other: np.ndarray,
    speakers: Sequence[str],
    num_labels: int,
    draws: int = 2000,
    seed: int = 0,
) -> dict[str, Gap]:
    """Every headline metric of ``one`` minus that of ``other`` on the same N utterances, with a significance test.

    Paired: both models are scored on the same draws of speakers, so a speaker who is hard for both does not widen the
    interval. The p-value comes from the same t, so it is below 0.05 if the interval excludes 0. (A permutation test
    that swaps the two models at random for each speaker kept the level hardly better, and can never reach p < 0.05 with
    five speakers.) The arguments are those of `bootstrap_ci95`.

    Raises ValueError if the lengths differ, or there are fewer than two speakers.

    >>> labels, one, other = np.arange(60) % 3, np.arange(60) % 3, np.arange(60) % 3
    >>> other[:30:2] = 0
    >>> gap = paired_gap(labels, one, other, [f"s{n // 10}" for n in range(60)], num_labels=3)["accuracy"]
    >>> round(gap.difference, 3), round(gap.low, 2), round(gap.high, 2), round(gap.p, 2)
    (0.167, -0.02, 0.36, 0.07)
    """
    units = len(set(speakers))
    if not len(labels) == len(one) == len(other) == len(speakers) or units < 2:
        raise ValueError(
            f"expected labels, two predictions and speakers of one length, and at least 2 speakers, not {len(labels)}, "
            f"{len(one)}, {len(other)}, {len(speakers)} of {units} speakers"
        )
    values = [headline(confusion(labels, predicted, num_labels)) for predicted in (one, other)]
    # The same seed gives the same draws.
    drawn = [_over_speakers(labels, predicted, speakers, num_labels, draws, seed) for predicted in (one, other)]
    return {
        name: _gap(name, float(values[0][name] - values[1][name]), drawn[0][name] - drawn[1][name], units)
        for name in HEADLINE
    }


# -- below: how it is done


def _limits(name: str, value: float, drawn: np.ndarray, units: int, half_error: float) -> tuple[float, float]:
    """The interval on the logit scale. The logit without any error is infinite: it is clipped to half an error."""
    lowest = LOWEST.get(name, 0.0)

    def scaled(metric: float | np.ndarray) -> np.ndarray:
        share = (metric - lowest) / (1 - lowest)
        return np.asarray(logit(np.clip(share, half_error, 1 - half_error)))

    middle, half = scaled(value), stdtrit(max(units - 1, 1), 0.975) * _standard_error(scaled(drawn), units)
    low, high = lowest + (1 - lowest) * expit(np.array([middle - half, middle + half]))
    # A metric without any error is outside the clipped scale.
    return float(min(low, value)), float(max(high, value))


def _gap(name: str, difference: float, drawn: np.ndarray, units: int) -> Gap:
    """On the linear scale, on which the gap of two metrics is symmetric."""
    error, most = _standard_error(drawn, units), 1 - LOWEST.get(name, 0.0)
    half = stdtrit(units - 1, 0.975) * error
    if error < ROUNDING:
        return Gap(difference, np.nan, np.nan, np.nan)
    p = 2 * float(stdtr(units - 1, -abs(difference) / error))
    return Gap(difference, float(max(difference - half, -most)), float(min(difference + half, most)), p)


def _standard_error(drawn: np.ndarray, units: int) -> float:
    """The standard error of a metric from its bootstrap draws; infinite for a single unit."""
    return float(drawn.std() * np.sqrt(units / (units - 1))) if units > 1 else np.inf


def _over_speakers(
    labels: np.ndarray, predicted: np.ndarray, speakers: Sequence[str], num_labels: int, draws: int, seed: int
) -> dict[str, np.ndarray]:
    """Headline metrics (draws,) of samples of whole speakers; the draws depend only on the speakers and the seed."""
    names, speaker = np.unique(np.asarray(speakers), return_inverse=True)
    cells = (speaker * num_labels + np.asarray(labels)) * num_labels + np.asarray(predicted)
    by_speaker = np.bincount(cells, minlength=len(names) * num_labels**2).reshape(len(names), -1).astype(np.float64)
    return dict(headline(_drawn_sums(by_speaker, draws, seed).reshape(draws, num_labels, num_labels)))


def _drawn_sums(by_unit: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """(draws, C): sums of samples of whole units out of ``by_unit`` (U, C)."""
    units = len(by_unit)
    sums = np.empty((draws, by_unit.shape[1]))
    rng, shares, block = np.random.default_rng(seed), np.full(units, 1 / units), max(1, BLOCK // units)
    for start in range(0, draws, block):
        times_drawn = rng.multinomial(units, shares, size=min(block, draws - start))
        # In floats, because integers have no fast matrix product; exact for counts, which are far below 2^53.
        sums[start : start + block] = times_drawn.astype(np.float64) @ by_unit
    return sums


def _over_utterances(
    labels: np.ndarray, predicted: np.ndarray, num_labels: int, draws: int, seed: int
) -> dict[str, np.ndarray]:
    """The same for single utterances: drawing N with replacement draws N cells of the confusion matrix, each with its
    frequency."""
    shares = confusion(labels, predicted, num_labels).reshape(-1) / len(labels)
    flat = np.random.default_rng(seed).multinomial(len(labels), shares, size=draws)
    return dict(headline(flat.reshape(draws, num_labels, num_labels).astype(np.float64)))

"""Sets in place of single answers: of the emotions that are named, one is the true one in 90 % of the cases.

A set holds every emotion whose probability is at least a threshold, and the most probable one in any case. This is
split conformal prediction with the score 1 - p of the true emotion (Sadinle, Lei and Wasserman 2019, arXiv 1609.00451:
the smallest sets on average; Angelopoulos and Bates 2021, arXiv 2107.07511, section 1). The adaptive score of Romano
et al. 2020 (arXiv 2006.02544) makes the sets of hard utterances larger, but its sets exceed the coverage unless they
are randomised, and an answer should be the same each time.

The threshold is fitted to dev, whose speakers are not those of test. The guarantee is for utterances that could as well
have been among those of dev. Those of an unheard speaker are alike to each other, so the coverage of one speaker may
be far from 90 %, and that of test is near it only with many speakers: it is measured, and given by speaker.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from ser_ray.evaluation.intervals import ci95_of_sums
from ser_ray.evaluation.predictions import Predictions

COVERAGE: Final = 0.9
"""How often a set is to hold the true emotion. The usual value: at 95 % and eight emotions most sets have several."""
TOLERANCE: Final = 0.03
"""A coverage further from `COVERAGE` is said to be off, with the reason."""


def least_probability(predictions: Predictions, coverage: float = COVERAGE) -> float:
    """The threshold: the k-th lowest probability of a true emotion, k = n + 1 - ceil((n + 1) coverage).

    With fewer than 9 utterances (for 90 %) it is 0, and every set holds all emotions.

    >>> nine = np.linspace(0.1, 0.9, 9)
    >>> said = Predictions(("a", "b"), tuple("tuvwxyz12"), ("c",) * 9, ("s",) * 9, np.zeros(9, int),
    ...     np.stack([nine, 1 - nine], axis=1))
    >>> least_probability(said), least_probability(said.at(range(8)))
    (0.1, 0.0)
    """
    n = len(predictions)
    true = np.sort(predictions.probabilities[np.arange(n), predictions.labels])
    k = n + 1 - math.ceil((n + 1) * coverage - 1e-9)  # a product such as 63.00000000000001 is 63
    return float(true[k - 1]) if k > 0 else 0.0


def in_set(probabilities_NK: np.ndarray, least: np.ndarray | float) -> np.ndarray:
    """(N, K) bool: which emotions are in the sets; ``least``: one threshold, or (N,)."""
    held = probabilities_NK >= np.broadcast_to(least, len(probabilities_NK))[:, None]
    held[np.arange(len(held)), probabilities_NK.argmax(axis=1)] = True
    return held


def coverage_of(predictions: Predictions, least: np.ndarray) -> dict[str, Any]:
    """How often the sets hold the true emotion: coverage, its interval over speakers, ``size`` (emotions in a set, on
    average), ``single`` (share of sets with one), and by speaker and by emotion n, coverage and size. ``least``: (N,)
    thresholds."""
    held = in_set(predictions.probabilities, least)
    covered, sizes = held[np.arange(len(held)), predictions.labels], held.sum(axis=1)
    summands = np.stack([covered, np.ones(len(held))], axis=1)
    share, limits, unit = ci95_of_sums(summands, predictions.speakers, lambda sums: sums[..., 0] / sums[..., 1])
    emotions = [predictions.emotions[label] for label in predictions.labels]
    return {
        "coverage": share,
        "ci95": list(limits),
        "ci95_unit": unit,
        "size": float(sizes.mean()),
        "single": float((sizes == 1).mean()),
        "per_speaker": _by_group(predictions.named_speakers, covered, sizes),
        "per_emotion": _by_group(emotions, covered, sizes),
    }


def gap_reason(dev: dict[str, Any], test: dict[str, Any]) -> str:
    """Why the coverage on test is off, as a sentence; empty if it is not. Arguments: of `coverage_of`."""
    if abs(test["coverage"] - COVERAGE) <= TOLERANCE:
        return ""
    return (
        f"This is not within {100 * (COVERAGE - TOLERANCE):.0f} to {100 * (COVERAGE + TOLERANCE):.0f} %: speakers "
        f"differ, and the threshold is that of {len(dev['per_speaker'])} dev speakers (coverage {_range(dev)}) for "
        f"{len(test['per_speaker'])} unheard ones ({_range(test)})."
    )


# -- below: how it is done


def _by_group(groups: Sequence[str], covered: np.ndarray, sizes: np.ndarray) -> dict[str, dict[str, float]]:
    names = np.asarray(groups)
    return {
        group: {"n": int(own.sum()), "coverage": float(covered[own].mean()), "size": float(sizes[own].mean())}
        for group in sorted(set(groups))
        for own in [names == group]
    }


def _range(measured: dict[str, Any]) -> str:
    shares = [100 * one["coverage"] for one in measured["per_speaker"].values()]
    return f"{min(shares):.0f} to {max(shares):.0f} % by speaker"

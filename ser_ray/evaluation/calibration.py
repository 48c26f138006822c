"""Calibration of a model's confidence: how often it is right when its confidence is, for example, 80 %.

A model is calibrated by one number, its temperature: every logit is divided by it. It is fitted to the dev predictions
of the chosen model, over all of its folds and seeds, by minimum negative log-likelihood (Guo et al. 2017, arXiv
1706.04599, section 4.2). The most probable emotion stays the same, and so do accuracy and UAR.

On test it is measured without what it was fitted to: where folds are averaged, a speaker of test is one of dev in
another run, so each run is tested with the calibration by the dev utterances that it does not test.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp

from ser_ray.evaluation import sets
from ser_ray.evaluation.intervals import ci95_of_sums
from ser_ray.evaluation.metrics import bin_of, confusion, ece, headline
from ser_ray.evaluation.predictions import Predictions, pooled

FILE: Final = "calibration.json"
"""In a checkpoint: a `Calibration`. In a folder ``evaluation``: what `record_of` gives."""
LIMITS: Final = (0.1, 10.0)
"""Of a temperature: without a mistake on dev the likelihood rises as it falls to 0, and one mistake on test would then
be infinitely surprising."""
ECE_BINS: Final = 15
SHARES: Final = tuple(n / 20 for n in range(1, 21))
"""Of the answers that are given, for `abstention`."""


@dataclass(frozen=True)
class Calibration:
    """What a checkpoint's answers are calibrated by."""

    temperature: float = 1.0
    """Every logit is divided by it."""
    least_probability: float | None = None
    """At this temperature, of an emotion in a set (`ser_ray.evaluation.sets`); None if it was not fitted."""

    def __post_init__(self) -> None:
        assert 0 < self.temperature < np.inf, self.temperature

    def as_json(self) -> dict[str, Any]:
        """The content of a checkpoint's file."""
        return asdict(self) | {"coverage": sets.COVERAGE}


def fitted(dev: Predictions) -> Calibration:
    """The calibration by these predictions, which are as the model's logits are."""
    temperature = fit_temperature(dev)
    return Calibration(temperature, sets.least_probability(dev.at_temperature(temperature)))


def fit_temperature(predictions: Predictions) -> float:
    """The temperature with the lowest negative log-likelihood.

    >>> said = Predictions(("a", "b"), tuple("wxyz"), ("c",) * 4, ("s",) * 4, np.array([0] * 3 + [1]),
    ...     np.array([[0.9, 0.1]] * 4))
    >>> round(fit_temperature(said), 3)  # right in 3 of 4 cases: 0.75 = 1 / (1 + 9 ** (-1 / 2))
    2.0
    """
    assert len(predictions), "dev and test are apart in every run, so some of dev is left"
    logits_NK = np.log(np.maximum(predictions.probabilities, np.finfo(np.float64).tiny))
    rows = np.arange(len(predictions))

    def loss(logarithm: float) -> float:
        scaled = logits_NK / np.exp(logarithm)
        return float((logsumexp(scaled, axis=1) - scaled[rows, predictions.labels]).mean())

    # The loss is convex in the reciprocal of the temperature: it has one minimum.
    found = minimize_scalar(loss, bounds=np.log(LIMITS), method="bounded", options={"xatol": 1e-7})
    return float(np.exp(found.x))


def record_of(calibration: Calibration, dev: Sequence[Predictions], test: Sequence[Predictions]) -> dict[str, Any]:
    """What a calibration does, as plain JSON types: temperature, threshold, and for dev and test `_measured`.

    ``dev`` and ``test``: one entry for each run, as the model's logits are.
    """
    everything = pooled(dev)
    own = [fitted(_without(everything, part)) for part in test]
    return {
        **calibration.as_json(),
        "fitted_on": {"utterances": len(everything), "speakers": len(set(everything.speakers)), "runs": len(dev)},
        "dev": _measured(dev, [calibration] * len(dev)),
        "test": _measured(test, own),
    }


def sentences(record: Mapping[str, Any]) -> list[str]:
    """What a calibration does on test, in sentences; ``record``: of `record_of`, or nothing."""
    if not record:
        return []
    by, error, held = record["fitted_on"], record["test"]["ece"], record["test"]["sets"]
    (before, after), unit = (_with_limits(error[name]) for name in ("before", "after")), error["after"]["ci95_unit"]
    low, high = (100 * limit for limit in held["ci95"])
    asked, found, size = record["coverage"], held["coverage"], held["size"]
    return [
        f"Temperature {record['temperature']:.2f}, fitted to {by['utterances']} dev predictions for {by['speakers']} "
        f"speakers: the expected calibration error on test is {after} with it, {before} without (95 % over {unit}).",
        f"Sets (--sets) that are to hold the true emotion in {100 * asked:.0f} % of the cases do so in "
        f"{100 * found:.1f} % [{low:.1f}, {high:.1f}] on test, with {size:.1f} emotions on average. "
        f"{sets.gap_reason(record['dev']['sets'], held)}".rstrip(),
    ]


@dataclass(frozen=True)
class Reliability:
    """A reliability diagram as arrays (bins,); bin i holds confidences in (i / bins, (i + 1) / bins].

    ``accuracy`` and ``confidence`` are means over a bin, NaN if it is empty.
    """

    n: np.ndarray
    accuracy: np.ndarray
    confidence: np.ndarray
    ece: float


def reliability(predictions: Predictions, bins: int = 10) -> Reliability:
    """Bin utterances by the probability of their predicted label (Guo et al. 2017, arXiv 1706.04599, figure 1).

    Args:
        predictions: of N utterances, at least one.
        bins: the number of bins; papers usually draw ten.

    >>> said = Predictions(("a", "b"), ("u", "v"), ("c", "c"), ("s", "s"), np.array([0, 1]), np.array([[0.8, 0.2]] * 2))
    >>> diagram = reliability(said)
    >>> int(diagram.n[7]), float(diagram.accuracy[7]), round(diagram.ece, 3)
    (2, 0.5, 0.3)
    """
    confidence = predictions.probabilities.max(axis=1)
    correct = predictions.predicted == predictions.labels
    which = bin_of(confidence, bins)
    n = np.bincount(which, minlength=bins)
    total = np.where(n, n, np.nan)
    return Reliability(
        n=n,
        accuracy=np.bincount(which, weights=correct, minlength=bins) / total,
        confidence=np.bincount(which, weights=confidence, minlength=bins) / total,
        ece=ece(predictions.labels, predictions.probabilities, bins),
    )


def abstention(predictions: Predictions) -> list[dict[str, float]]:
    """The metrics where a model answers only when it is sure: a row for each of `SHARES`, with the share of utterances
    that are answered, the least confidence among them, and their accuracy and UAR. (UAR is over the emotions among
    them.) This is the risk-coverage curve of El-Yaniv and Wiener 2010 (JMLR 11), with what is right in place of what is
    wrong."""
    confidence = predictions.probabilities.max(axis=1)
    surest = np.argsort(-confidence, kind="stable")
    rows = []
    for share in SHARES:
        answered = surest[: int(np.ceil(share * len(surest) - 1e-9))]
        matrix = confusion(predictions.labels[answered], predictions.predicted[answered], len(predictions.emotions))
        metrics = headline(matrix)
        rows.append(
            {"share": share, "confidence": float(confidence[answered[-1]]), "n": len(answered)}
            | {name: float(metrics[name]) for name in ("accuracy", "uar")}
        )
    return rows


# -- below: how it is done


def _without(predictions: Predictions, others: Predictions) -> Predictions:
    """The predictions for utterances that are not among those of ``others``."""
    excluded = set(others.utterance_ids)
    return predictions.at([row for row, one in enumerate(predictions.utterance_ids) if one not in excluded])


def _measured(parts: Sequence[Predictions], by: Sequence[Calibration]) -> dict[str, Any]:
    """Of the predictions of all runs together: n, the negative log-likelihood and the ECE before and after, each with
    its interval, and what `sets.coverage_of` gives."""
    before = pooled(parts)
    after = pooled([part.at_temperature(c.temperature) for part, c in zip(parts, by, strict=True)])
    limits = np.concatenate([np.full(len(part), c.least_probability) for part, c in zip(parts, by, strict=True)])
    return {
        "n": len(before),
        "nll": {"before": _nll(before), "after": _nll(after)},
        "ece": {"before": _ece(before), "after": _ece(after)},
        "sets": sets.coverage_of(after, limits),
    }


def _with_limits(error: Mapping[str, Any]) -> str:
    return f"{error['value']:.3f} [{error['ci95'][0]:.3f}, {error['ci95'][1]:.3f}]"


def _nll(predictions: Predictions) -> float:
    true = predictions.probabilities[np.arange(len(predictions)), predictions.labels]
    return float(-np.log(np.maximum(true, np.finfo(np.float64).tiny)).mean())


def _ece(predictions: Predictions) -> dict[str, Any]:
    """`metrics.ece` with its interval over speakers."""
    confidence = predictions.probabilities.max(axis=1)
    gaps = (predictions.predicted == predictions.labels) - confidence
    summands = np.zeros((len(predictions), ECE_BINS + 1))
    summands[np.arange(len(predictions)), bin_of(confidence, ECE_BINS)] = gaps
    summands[:, -1] = 1
    value, limits, unit = ci95_of_sums(
        summands, predictions.speakers, lambda sums: np.abs(sums[..., :-1]).sum(-1) / sums[..., -1]
    )
    return {"value": value, "ci95": list(limits), "ci95_unit": unit}

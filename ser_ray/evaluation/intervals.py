"""How far a figure may be trusted: 95 % intervals from a bootstrap over speakers.

Utterances of one speaker resemble each other, so resampling utterances would claim more certainty than there is: what
the field wants to know is how the model does on other speakers. Whole speakers are therefore drawn with replacement
(the cluster bootstrap: Field and Welsh 2007, "Bootstrapping clustered data"; percentile limits: Efron and Tibshirani
1993, chapter 13). With few speakers (below about ten) the intervals are too narrow; read them as a lower bound.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ser_ray.evaluation.metrics import confusion, headline


def bootstrap_ci95(
    labels: np.ndarray,
    predicted: np.ndarray,
    speakers: Sequence[str],
    num_labels: int,
    draws: int = 2000,
    seed: int = 0,
) -> tuple[dict[str, tuple[float, float]], str]:
    """The 2.5th and 97.5th percentile of each headline figure over bootstrap draws, and the unit that was drawn.

    Args:
        labels: (N,) int, true labels.
        predicted: (N,) int, predicted labels.
        speakers: N names.
        num_labels: K, the number of declared emotions.
        draws: the number of bootstrap replicates; 2000 settle the second digit of the limits.
        seed: of the draws; equal seeds give equal intervals.

    Returns:
        Figure -> (low, high), and ``speakers``; or ``utterances``, where there is one speaker only, of whom
        nothing can be said about others.

    Raises:
        ValueError: the lengths differ, there are no utterances, or a label lies outside of 0..K-1.

    >>> labels, predicted = np.array([0, 1, 0, 1]), np.array([0, 1, 0, 0])
    >>> limits, unit = bootstrap_ci95(labels, predicted, ["a", "a", "b", "b"], num_labels=2)
    >>> limits["accuracy"], unit
    ((0.5, 1.0), 'speakers')
    """
    if not len(labels) == len(predicted) == len(speakers) or not len(labels):
        raise ValueError(
            f"expected labels, predicted and speakers of one length above 0, not {len(labels)}, {len(predicted)} and "
            f"{len(speakers)}"
        )
    if len(set(speakers)) > 1:
        figures, unit = _over_speakers(labels, predicted, speakers, num_labels, draws, seed), "speakers"
    else:
        # Drawing N utterances with replacement draws N cells of the confusion matrix, each as often as it occurs.
        counts = confusion(labels, predicted, num_labels).reshape(-1)
        flat = np.random.default_rng(seed).multinomial(len(labels), counts / len(labels), size=draws)
        figures, unit = headline(flat.reshape(draws, num_labels, num_labels).astype(np.float64)), "utterances"
    limits = {name: np.percentile(values, (2.5, 97.5)) for name, values in figures.items()}
    return {name: (float(low), float(high)) for name, (low, high) in limits.items()}, unit


def bootstrap_gap95(
    labels: np.ndarray,
    one: np.ndarray,
    other: np.ndarray,
    speakers: Sequence[str],
    num_labels: int,
    draws: int = 2000,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """The 95 % interval of every headline figure of ``one`` less that of ``other``, both of the same N utterances.

    Paired: a draw of speakers counts for both, so that a speaker who is hard for both does not widen the interval.
    A gap whose interval leaves out 0 is more than the choice of speakers explains.

    Raises ValueError where the lengths differ, or there are fewer than two speakers.

    >>> labels, right, wrong = np.array([0, 1, 0, 1]), np.array([0, 1, 0, 1]), np.array([0, 0, 0, 0])
    >>> bootstrap_gap95(labels, right, wrong, ["a", "a", "b", "b"], num_labels=2)["accuracy"]
    (0.5, 0.5)
    """
    if not len(labels) == len(one) == len(other) == len(speakers) or len(set(speakers)) < 2:
        raise ValueError(
            f"expected labels, two predictions and speakers of one length, and at least 2 speakers, not {len(labels)}, "
            f"{len(one)}, {len(other)}, {len(speakers)} of {len(set(speakers))} speakers"
        )
    # One seed, the same draws.
    of_one, of_other = (_over_speakers(labels, p, speakers, num_labels, draws, seed) for p in (one, other))
    limits = {name: np.percentile(of_one[name] - of_other[name], (2.5, 97.5)) for name in of_one}
    return {name: (float(low), float(high)) for name, (low, high) in limits.items()}


def _over_speakers(
    labels: np.ndarray, predicted: np.ndarray, speakers: Sequence[str], num_labels: int, draws: int, seed: int
) -> dict[str, np.ndarray]:
    """Headline figures (draws,) of samples of whole speakers; the draws depend on the speakers and the seed alone."""
    names, speaker = np.unique(np.asarray(speakers), return_inverse=True)
    by_speaker = _confusion_by_speaker(labels, predicted, speaker, len(names), num_labels)
    times_drawn = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=draws)
    # In floats, because integers have no fast matrix product; exact, as counts are far below 2^53.
    flat = times_drawn.astype(np.float64) @ by_speaker.reshape(len(names), -1).astype(np.float64)
    return dict(headline(flat.reshape(draws, num_labels, num_labels)))


def _confusion_by_speaker(
    labels: np.ndarray, predicted: np.ndarray, speaker: np.ndarray, num_speakers: int, num_labels: int
) -> np.ndarray:
    """(S, K, K): the confusion matrix of each speaker."""
    return np.stack([confusion(labels[speaker == s], predicted[speaker == s], num_labels) for s in range(num_speakers)])

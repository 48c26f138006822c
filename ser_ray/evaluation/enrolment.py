"""What recordings of a speaker without labels are worth: metrics by how many of them are known (`config.Enrolment`).

In a draw every speaker's recordings are put in a random order. An utterance is answered with the first ``k`` of its
speaker's, without itself: so all utterances are scored at every ``k``, none is among those that it is answered with,
and more recordings are the same and further ones. Of a speaker with fewer, all others are used. The order
depends on the seed, the draw and the utterances' ids alone. Speakers who are not known have no recordings.

A metric is the mean over the draws. Its interval is that of all draws together, over speakers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from ser_ray import config
from ser_ray.evaluation.intervals import bootstrap_ci95
from ser_ray.evaluation.metrics import HEADLINE, confusion, headline
from ser_ray.evaluation.predictions import Predictions, pooled
from ser_ray.schema import is_known

FILE: Final = "enrolment.json"


@dataclass(frozen=True)
class Enrolled:
    """The predictions of one model with ``recordings`` of each speaker known, one entry a draw."""

    recordings: int | str
    """A number, or `config.OTHERS`."""
    draws: tuple[Predictions, ...]
    used: float
    """How many recordings an utterance was answered with in fact, on average."""


def answered_with(
    utterance_ids: Sequence[str],
    speakers: Sequence[str],
    emotions: Sequence[str],
    settings: config.Enrolment,
    recordings: int | str,
    draw: int,
) -> list[np.ndarray]:
    """For every utterance the rows of those that it is answered with; ``emotions`` are used for ``which`` alone."""
    usable: dict[str, list[int]] = {}
    for row, (speaker, emotion) in enumerate(zip(speakers, emotions, strict=True)):
        if is_known(speaker) and (settings.which == "any" or emotion in settings.which):
            usable.setdefault(speaker, []).append(row)
    for own in usable.values():
        own.sort(key=lambda row: _key(settings.seed, draw, utterance_ids[row]))
    limit = len(utterance_ids) if recordings == config.OTHERS else int(recordings)
    chosen = []
    for row, speaker in enumerate(speakers):
        first = usable.get(speaker, ())[: limit + 1]  # one more, in case it is among them itself
        chosen.append(np.array([other for other in first if other != row][:limit], dtype=np.int64))
    return chosen


def draws_of(settings: config.Enrolment, recordings: int | str) -> range:
    """The numbers of the draws: one where nothing is drawn."""
    return range(1 if recordings in (0, config.OTHERS) else settings.draws)


def curve(runs: Sequence[Sequence[Enrolled]]) -> list[dict[str, Any]]:
    """A row for each number of recordings, over all runs (folds and seeds) of a model, as plain JSON types: recordings,
    said, used, draws, n, the headline metrics, ``ci95`` and ``ci95_unit``."""
    return [_row(points) for points in zip(*runs, strict=True)]


def said(recordings: int | str) -> str:
    """What every metric of a model that knows recordings is accompanied by.

    >>> said(8)
    'used 8 unlabelled recordings of the speaker'
    """
    which = "all other" if recordings == config.OTHERS else str(recordings) if recordings else "no"
    return f"used {which} unlabelled recording{'s' * (recordings != 1)} of the speaker"


def sentence(rows: Sequence[Mapping[str, Any]], metric: str, title: str) -> str:
    """The curve in a line: the metric at each number of recordings; ``title`` names it, and the split."""
    points = ", ".join(f"{row['recordings']}: {row[metric]:.3f}" for row in rows)
    return f"{title} by how many unlabelled recordings of the speaker were used: {points}"


# -- below: how it is done


def _key(seed: int, draw: int, utterance_id: str) -> bytes:
    return hashlib.blake2b(f"{seed}/{draw}/{utterance_id}".encode(), digest_size=16).digest()


def _row(points: Sequence[Enrolled]) -> dict[str, Any]:
    """One number of recordings; ``points``: of every run."""
    recordings = points[0].recordings
    draws = [pooled(parts) for parts in zip(*(point.draws for point in points), strict=True)]
    num_emotions = len(draws[0].emotions)
    each = [headline(confusion(draw.labels, draw.predicted, num_emotions)) for draw in draws]
    every = pooled(draws)
    # Of a single speaker utterances are resampled, each with all of its draws: these are no further utterances.
    alone = len(set(every.speakers)) == 1
    units = every.utterance_ids if alone else every.speakers
    limits, unit = bootstrap_ci95(every.labels, every.predicted, units, num_emotions)
    sizes = [len(point.draws[0]) for point in points]
    return {
        "recordings": recordings,
        "said": said(recordings),
        "used": float(np.average([point.used for point in points], weights=sizes)),
        "draws": len(draws),
        "n": len(draws[0]),
        **{name: float(np.mean([metrics[name] for metrics in each])) for name in HEADLINE},
        "ci95": {name: list(interval) for name, interval in limits.items()},
        "ci95_unit": "utterances" if alone else unit,
    }

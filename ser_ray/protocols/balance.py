"""Assign speakers to groups that are balanced in emotions, genders, corpora and size; folds are made of these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

Rows = Sequence[Mapping[str, str | None]]

SCALE: Final = 2**50
"""Shares are computed in integers, so that ties are the same on every machine, whatever its floating point."""


def balanced_groups(rows: Rows, groups: int, seed: int) -> dict[str, int]:
    """Speaker -> group. The groups are as equal as possible in utterances, emotions, genders, corpora and speakers.

    Greedy, speakers with more utterances first: each goes to the group that has least of the speaker's traits, which is
    the choice that adds least to the sum of squared shares. A rare emotion weighs as much as a common one. The seed
    breaks ties.
    ``rows`` have speaker, corpus, emotion and gender; their order does not matter.

    >>> rows = [{"speaker": s, "corpus": "a", "emotion": "sad", "gender": g} for s, g in zip("1234", "mmff")]
    >>> groups = balanced_groups(rows, 2, seed=0)
    >>> sorted(groups[s] for s in "12"), sorted(groups[s] for s in "34")
    ([0, 1], [0, 1])
    """
    speakers = sorted({str(row["speaker"]) for row in rows})
    traits = sorted({(key, str(row[key])) for row in rows for key in ("corpus", "emotion", "gender")})
    number_of = {speaker: number for number, speaker in enumerate(speakers)}
    column_of = {trait: column for column, trait in enumerate(traits)}
    counts = np.zeros((len(speakers), len(traits)), np.int64)
    for row in rows:
        for key in ("corpus", "emotion", "gender"):
            counts[number_of[str(row["speaker"])], column_of[key, str(row[key])]] += 1
    utterances = np.bincount([number_of[str(row["speaker"])] for row in rows], minlength=len(speakers))
    counts = np.column_stack([counts, utterances, np.ones_like(utterances)])
    weights = SCALE // counts.sum(axis=0) ** 2
    shuffled = np.random.default_rng(seed).permutation(len(speakers))
    loads, group_of = np.zeros((groups, counts.shape[1]), np.int64), {}
    for number in shuffled[np.argsort(-utterances[shuffled], kind="stable")]:
        group = int(np.argmin(loads @ (counts[number] * weights)))
        loads[group] += counts[number]
        group_of[speakers[number]] = group
    return group_of

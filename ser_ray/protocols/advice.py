"""What to set so that the next audit finds less: what to exclude, and which folds have all emotions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final

import pyarrow as pa

from ser_ray.config import Protocol, SearchSpace
from ser_ray.protocols.finals import trained_folds
from ser_ray.protocols.findings import counted
from ser_ray.protocols.folds import count_folds
from ser_ray.schema import SPLITS, Fold, UserError

CANDIDATES: Final = 10
"""Values of each key that are looked at: a fold takes a second for a million utterances."""
SHOWN: Final = 3
"""Values of each key that are named."""
SEARCHED: Final[Mapping[str, tuple[str, ...]]] = {
    "speaker_kfold": ("fold", "folds", "seed"),
    "leave_one_speaker_out": ("fold", "folds", "seed"),
    "given_folds": ("fold",),
    "leave_one_corpus_out": ("folds", "seed"),
    "cross_corpus": ("folds", "seed"),
}
"""Scheme -> the keys of the protocol that change its folds. An official split is as it is, and a random one has every
emotion in every split that has enough of it."""


def to_exclude(audit: Mapping[str, Any]) -> Iterator[str]:
    """How to leave out what the audit would (`leakage.audit`), if there is any."""
    if found := audit["to_exclude"]:
        kinds = ", ".join(sorted({one["by"] for one in found}))
        yield (
            f"experiment.exclude=[{kinds}] leaves out {counted(found)}; or edit audit.csv, whose column exclude names "
            "them, and set experiment.exclude to its path"
        )


def other_folds(space: SearchSpace, index: pa.Table, folds: Mapping[str, Fold]) -> Iterator[str]:
    """Which fold, number of folds or seed has every emotion in train, dev and test, if a fold of ``folds`` has not.

    ``index``: as `leakage.audit` has it. A few values of each key are tried, one key at a time.
    """
    protocol = space.experiment.protocol
    ids, emotions = index["utterance_id"].to_pylist(), index["emotion"].to_pylist()
    emotion_of = dict(zip(ids, emotions, strict=True))
    if not (absent := sorted(_absent(folds.values(), emotion_of))):
        return
    if rare := _too_few_speakers(index, absent, protocol):
        yield f"{', '.join(rare)}: fewer than {len(SPLITS)} speakers have it, so no fold has it in train, dev and test"
        return

    def is_complete(values: dict[str, int]) -> bool:
        try:
            changed = Protocol.model_validate(protocol.model_dump() | values)
            experiment = space.experiment.model_copy(update={"protocol": changed})
            others = trained_folds(space.model_copy(update={"experiment": experiment}), index)
        except (UserError, ValueError):  # no such fold, or too few speakers for it
            return False
        return not _absent(others.values(), emotion_of)

    found = [f"{key}={' or '.join(map(str, values))}" for key, values in _complete(space, index, is_complete)]
    if found:
        keys = ", or ".join(f"experiment.protocol.{one}" for one in found)
        yield f"{', '.join(absent)}: in train, dev and test with {keys}"
    elif SEARCHED.get(protocol.scheme):
        tried = " and ".join(SEARCHED[protocol.scheme])
        yield f"{', '.join(absent)}: in no fold of those that were tried ({tried}) in train, dev and test"


# -- below: how it is done


def _absent(folds: Iterable[Fold], emotion_of: Mapping[str, str]) -> set[str]:
    """The emotions that some split of some fold lacks, but not all of it: folds of two corpora may leave some out."""
    absent: set[str] = set()
    for fold in folds:
        present = defaultdict(set)
        for utterance_id, split in fold.splits.items():
            present[split].add(emotion_of[utterance_id])
        everywhere = set().union(*present.values())
        absent |= {emotion for split in SPLITS for emotion in everywhere - present[split]}
    return absent


def _too_few_speakers(index: pa.Table, emotions: Iterable[str], protocol: Protocol) -> list[str]:
    """Those of the emotions that have too few speakers for three splits that share none."""
    speakers = defaultdict(set)
    for speaker, emotion in zip(index["speaker"].to_pylist(), index["emotion"].to_pylist(), strict=True):
        speakers[emotion].add(speaker)
    return (
        [emotion for emotion in emotions if len(speakers[emotion]) < len(SPLITS)]
        if SEARCHED.get(protocol.scheme)
        else []
    )


def _complete(
    space: SearchSpace, index: pa.Table, is_complete: Callable[[dict[str, int]], bool]
) -> Iterator[tuple[str, list[int]]]:
    """Keys of the protocol with the values that give complete folds, lowest first; a few of each."""
    protocol = space.experiment.protocol
    values: dict[str, Iterable[int]] = {
        "fold": range(min(CANDIDATES, count_folds(index, protocol))) if space.tune.final_folds is None else (),
        "folds": range(len(SPLITS), len(SPLITS) + CANDIDATES),
        "seed": range(CANDIDATES),
    }
    for key in SEARCHED.get(protocol.scheme, ()):
        own = getattr(protocol, key)
        found: list[int] = []
        for value in values[key]:
            if len(found) < SHOWN and value != own and is_complete({key: value}):
                found.append(value)
        if found:
            yield key, found

"""Assign utterances to train, dev and test: an index over utterance ids, made from the columns of prepared speech.

By default no speaker is in two splits: a network recognises the speakers that it was trained on, which inflates every
metric (IEMOCAP: 79.6 % with shared speakers, 73.0 % without, arXiv 2111.02735; RAVDESS: results/benchmarks/leakage.md).
The random split exists to measure this leakage gap, and is stamped leaky. A fold depends on the set of rows and the
seed, not on the order of the rows or the machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ser_ray.config import Protocol
from ser_ray.protocols.balance import Rows, balanced_groups
from ser_ray.protocols.given import read_folds
from ser_ray.schema import SPLITS, Fold, UserError, first_few, is_known, shortened

EMOBOX_RAVDESS: Final = (
    ("01", "11", "20", "21"),
    ("04", "10", "12", "14"),
    ("08", "09", "19", "23"),
    ("03", "05", "07", "24"),
    ("02", "15", "16", "18"),
    ("06", "13", "17", "22"),
)
"""Test actors of the six folds of EmoBox (arXiv 2406.07162): the mean over the folds is comparable with its table."""


BY_SPEAKER: Final = ("speaker_kfold", "given_folds", "leave_one_speaker_out")
"""Schemes that keep the speakers of test out of train by their names. Where a speaker is not known they cannot, and the
fold is stamped leaky. The other schemes have a test set that does not depend on who speaks."""

UNLABELLED: Final = "unlabelled"
"""The column that says whether an utterance is of `config.Distil.unlabelled`."""


def labelled(index: pa.Table, emotions: Sequence[str], merge: Mapping[str, str], label: str = "intended") -> pa.Table:
    """The utterances that an experiment uses: emotions merged, others dropped, and an int64 column ``label``.

    With ``label`` "perceived" the column ``perceived`` replaces the emotion where it is known, and utterances with a
    tie among listeners (`schema.TIE`) are left out. `unheard` counts those that keep the intended emotion.

    Raises UserError if no utterance is left. An absent emotion is no error here: `leakage.audit` reports it.

    >>> index = pa.table({"utterance_id": ["a", "b", "c"], "emotion": ["calm", "sad", "fear"]})
    >>> labelled(index, ["neutral", "sad"], {"calm": "neutral"}).to_pydict()
    {'utterance_id': ['a', 'b'], 'emotion': ['neutral', 'sad'], 'label': [0, 1]}
    """
    label_of = {emotion: label for label, emotion in enumerate(emotions)}
    chosen = merged(index, merge, label)
    labels = pa.array([label_of.get(emotion) for emotion in chosen.to_pylist()], pa.int64())
    if labels.null_count == len(labels):
        raise UserError(
            f"experiment.emotions: no utterance is {' or '.join(emotions)}; the corpora have "
            f"{_names(chosen.to_pylist())}: name some of these there, or say in experiment.labels what they mean"
        )
    table = index.set_column(index.column_names.index("emotion"), "emotion", chosen)
    return table.append_column("label", labels).filter(labels.is_valid())


def merged(index: pa.Table, merge: Mapping[str, str], label: str = "intended") -> pa.Array:
    """The emotion of every utterance after merging; that which listeners perceived with ``label`` "perceived"."""
    chosen = pc.coalesce(index["perceived"], index["emotion"]) if label == "perceived" else index["emotion"]
    return pa.array([merge.get(emotion, emotion) for emotion in chosen.to_pylist()], pa.string())


def counted_emotions(index: pa.Table, emotions: Sequence[str], fold: Fold) -> tuple[str, ...]:
    """The emotions that metrics are computed over: all of the experiment's or, if the fold leaves out those that train
    and test do not share, only the shared ones. ``index`` holds the utterances of the fold."""
    present = set(index["emotion"].to_pylist())
    return tuple(emotion for emotion in emotions if emotion in present or not fold.common_emotions)


def unheard(index: pa.Table) -> dict[str, int]:
    """Corpus -> number of its utterances without listener ratings, for corpora that have such utterances."""
    unknown = index.filter(pc.is_null(index["perceived"]))["corpus"].to_pylist()
    return {corpus: unknown.count(corpus) for corpus in sorted(set(unknown))}


def make_fold(index: pa.Table, protocol: Protocol) -> Fold:
    """Assign the utterances of a labelled index to train, dev or test; ``cross_corpus`` leaves some out.

    ``index`` needs the columns utterance_id, corpus, speaker, emotion and gender, and split for ``official``. Where it
    has a bool column unlabelled, such utterances are train, and the others are split as if those were not there.

    Raises UserError, saying what to change, if the data do not fit the protocol.
    """
    columns = ["utterance_id", "corpus", "speaker", "emotion", "gender"]
    columns += ["split"] if protocol.scheme == "official" else []
    unlabelled: list[str] = []
    if UNLABELLED in index.column_names:
        unlabelled = index.filter(index[UNLABELLED])["utterance_id"].to_pylist()
        index = index.filter(pc.invert(index[UNLABELLED]))
    rows = sorted(index.select(columns).to_pylist(), key=_id)
    splits = {
        "speaker_kfold": _speaker_kfold,
        "given_folds": _given_folds,
        "leave_one_speaker_out": _leave_one_speaker_out,
        "leave_one_corpus_out": _leave_one_corpus_out,
        "cross_corpus": _cross_corpus,
        "official": _official,
        "random": _random,
    }[protocol.scheme](rows, protocol)
    if protocol.scheme != "cross_corpus":
        assert splits.keys() == {row["utterance_id"] for row in rows}, "a fold covers every utterance"
    speakers = {split: {r["speaker"] for r in rows if splits.get(_id(r)) == split} for split in SPLITS}
    for split in SPLITS:
        if not speakers[split]:
            raise UserError(
                f"protocol: {protocol.scheme} leaves nothing for {split}: {len(splits)} utterances "
                f"of {len(set().union(*speakers.values()))} speakers; add data, or change the scheme"
            )
    unknown = sum(not is_known(row["speaker"]) for row in rows)
    leaky = protocol.scheme == "random" or (unknown > 0 and protocol.scheme in BY_SPEAKER)
    description = f"{_scheme_words(protocol, speakers['test'])}: {_groups_words(speakers)}"
    if unknown:
        stamp = "LEAKY: " if leaky and protocol.scheme != "random" else ""
        description += f"; {stamp}the speaker of {unknown} of {len(rows)} utterances is not known"
        description += ", they are split by recording" if protocol.scheme not in ("random", "official") else ""
    if unlabelled:
        description += f"; {len(unlabelled)} utterances without labels in train"
    splits |= dict.fromkeys(unlabelled, "train")
    return Fold(splits, leaky, description, protocol.scheme == "cross_corpus")


def count_folds(index: pa.Table, protocol: Protocol) -> int:
    """How many values `Protocol.fold` can have for these data."""
    if protocol.scheme in ("speaker_kfold", "random"):
        return protocol.folds
    if protocol.scheme == "leave_one_speaker_out":
        return len(index["speaker"].unique())
    return len(_given(protocol)) if protocol.scheme == "given_folds" else 1


# -- the schemes: sorted rows -> the split of each utterance_id


def _speaker_kfold(rows: Rows, protocol: Protocol) -> dict[str, str]:
    speakers = _enough_speakers(rows)
    if protocol.folds < 3:
        raise UserError("protocol.folds is 2: test and dev take one fold each and train has none; set 3 or more")
    if len(speakers) < protocol.folds:
        raise UserError(
            f"protocol: {_names(speakers)}: {len(speakers)} speakers do not fill {protocol.folds} speaker-disjoint "
            f"folds; set protocol.folds to {len(speakers)} or less, or protocol.scheme to random (stamped LEAKY)"
        )
    return _by_speaker(rows, balanced_groups(rows, protocol.folds, protocol.seed), protocol.folds, protocol)


def _given_folds(rows: Rows, protocol: Protocol) -> dict[str, str]:
    given = _given(protocol)
    listed = [speaker for speakers in given for speaker in speakers]
    present = {row["speaker"] for row in rows}
    if len(given) < 3:
        raise UserError(f"protocol.given has {len(given)} folds; test, dev and train need at least 3")
    if protocol.fold >= len(given):
        raise UserError(f"protocol.fold is {protocol.fold}, but protocol.given has folds 0 to {len(given) - 1}")
    if twice := {speaker for speaker in listed if listed.count(speaker) > 1}:
        raise UserError(f"protocol.given: {_names(twice)} occurs more than once; a speaker is in one fold")
    if unknown := set(listed) - present:
        raise UserError(f"protocol.given: {_names(unknown)} not in the data; its speakers are {_names(present)}")
    if left := present - set(listed):
        raise UserError(f"protocol.given: {_names(left)} in no fold; list every speaker, or leave the corpus out")
    fold_of = {speaker: fold for fold, speakers in enumerate(given) for speaker in speakers}
    return _by_speaker(rows, fold_of, len(given), protocol)


def _given(protocol: Protocol) -> tuple[tuple[str, ...], ...]:
    given = protocol.given
    if given == "emobox":
        return tuple(tuple(f"ravdess/{actor}" for actor in actors) for actors in EMOBOX_RAVDESS)
    if isinstance(given, str):
        if not given.endswith(".csv"):
            raise UserError(f"protocol.given: {given!r} is not known; write emobox, lists of speakers, or a .csv file")
        return read_folds(given)
    assert given is not None, "Protocol checks this"
    return given


def _leave_one_speaker_out(rows: Rows, protocol: Protocol) -> dict[str, str]:
    if unknown := sum(not is_known(str(row["speaker"])) for row in rows):
        raise UserError(
            f"protocol: leave_one_speaker_out needs every speaker, but {unknown} of {len(rows)} utterances are of "
            "speakers who are not known; use official, or speaker_kfold, which splits these by recording (LEAKY)"
        )
    speakers = _enough_speakers(rows)
    if protocol.fold >= len(speakers):
        raise UserError(f"protocol.fold is {protocol.fold}, but the data have speakers 0 to {len(speakers) - 1}")
    held_out = speakers[protocol.fold]
    return _with_dev(rows, protocol, {_id(row) for row in rows if row["speaker"] == held_out})


def _leave_one_corpus_out(rows: Rows, protocol: Protocol) -> dict[str, str]:
    corpora = sorted({str(row["corpus"]) for row in rows})
    if protocol.held_out not in corpora or len(corpora) < 2:
        raise UserError(
            f"protocol.held_out is {protocol.held_out!r}, the data have {', '.join(corpora)}: "
            "name one of them, and at least one other to train on"
        )
    return _with_dev(rows, protocol, {_id(row) for row in rows if row["corpus"] == protocol.held_out})


def _cross_corpus(rows: Rows, protocol: Protocol) -> dict[str, str]:
    train_on, corpora = set(protocol.train_on or ()), {str(row["corpus"]) for row in rows}
    if missing := {*train_on, str(protocol.held_out)} - corpora:
        raise UserError(f"protocol: {_names(missing)} not in the data, which have {', '.join(sorted(corpora))}")
    sides = [row for row in rows if row["corpus"] in train_on], [r for r in rows if r["corpus"] == protocol.held_out]
    common = {row["emotion"] for row in sides[0]} & {row["emotion"] for row in sides[1]}
    if not common:
        raise UserError(f"protocol: {_names(train_on)} and {protocol.held_out} have no emotion in common")
    kept = [row for side in sides for row in side if row["emotion"] in common]
    return _with_dev(kept, protocol, {_id(row) for row in sides[1]})


def _official(rows: Rows, protocol: Protocol) -> dict[str, str]:
    if lacking := [row for row in rows if row["split"] not in SPLITS]:
        raise UserError(
            f"protocol: official needs a split of every utterance; {_names(row['corpus'] for row in lacking)} gives "
            f"none for {len(lacking)} (such as {_id(lacking[0])}); fill the column split, or choose another scheme"
        )
    splits = {_id(row): str(row["split"]) for row in rows}
    with_dev = {row["corpus"] for row in rows if row["split"] == "dev"}
    rest = [row for row in rows if row["split"] == "train" and row["corpus"] not in with_dev]
    return splits | _with_dev(rest, protocol, set())


def _random(rows: Rows, protocol: Protocol) -> dict[str, str]:
    if protocol.folds < 3:
        raise UserError("protocol.folds is 2: test and dev take one fold each and train has none; set 3 or more")
    rng = np.random.default_rng(protocol.seed)
    order = sorted(rng.permutation(len(rows)).tolist(), key=lambda i: str(rows[i]["emotion"]))  # random within emotions
    folds = {_id(rows[i]): position % protocol.folds for position, i in enumerate(order)}
    return {key: _split(fold, protocol.folds, protocol) for key, fold in folds.items()}


# -- shared by the schemes


def _enough_speakers(rows: Rows) -> list[str]:
    """All speakers, sorted. Raises UserError if they are too few for disjoint train, dev and test."""
    speakers = sorted({str(row["speaker"]) for row in rows})
    if len(speakers) < 3:
        raise UserError(
            f"protocol: the only speakers are {_names(speakers)}: train, dev and test cannot be speaker-disjoint with "
            "fewer than 3; add a corpus, or set protocol.scheme to random (stamped LEAKY)"
        )
    return speakers


def _with_dev(rows: Rows, protocol: Protocol, test: set[str]) -> dict[str, str]:
    """A split with the utterances ``test``. In each corpus, dev is one of `Protocol.folds` balanced groups of the other
    speakers."""
    others = [row for row in rows if _id(row) not in test]
    dev: set[str] = set()
    for corpus in {row["corpus"] for row in others}:
        own = [row for row in others if row["corpus"] == corpus]
        groups = min(protocol.folds, len({row["speaker"] for row in own}))
        if groups > 1:
            wanted = (protocol.dev_after - 1) % groups
            group_of = balanced_groups(own, groups, protocol.seed)
            dev |= {speaker for speaker, group in group_of.items() if group == wanted}
    return {_id(row): "test" if _id(row) in test else "dev" if row["speaker"] in dev else "train" for row in rows}


def _by_speaker(rows: Rows, fold_of: Mapping[str, int], folds: int, protocol: Protocol) -> dict[str, str]:
    return {_id(row): _split(fold_of[str(row["speaker"])], folds, protocol) for row in rows}


def _split(fold: int, folds: int, protocol: Protocol) -> str:
    """Test is `Protocol.fold`; dev is `Protocol.dev_after` folds later, cyclically, and never the test fold."""
    dev = (protocol.fold + 1 + (protocol.dev_after - 1) % (folds - 1)) % folds
    return "test" if fold == protocol.fold else "dev" if fold == dev else "train"


def _scheme_words(protocol: Protocol, tested: Iterable[str | None]) -> str:
    words = {
        "given_folds": f"given_folds{f' ({protocol.given})' if isinstance(protocol.given, str) else ''}, "
        f"fold {protocol.fold}",
        "leave_one_speaker_out": f"leave_one_speaker_out, {_names(tested)} held out, seed {protocol.seed}",
        "leave_one_corpus_out": f"leave_one_corpus_out, {protocol.held_out} held out, seed {protocol.seed}",
        "cross_corpus": f"cross_corpus, {', '.join(protocol.train_on or ())} to {protocol.held_out}, "
        f"seed {protocol.seed}",
        "official": "official split",
    }
    leaky = ", LEAKY: speakers are shared" if protocol.scheme == "random" else ""
    kfold = f"{protocol.scheme}, fold {protocol.fold} of {protocol.folds}, seed {protocol.seed}{leaky}"
    return words.get(protocol.scheme, kfold)


def _groups_words(speakers: Mapping[str, set[str]]) -> str:
    """How many speakers the splits have, and how many recordings without a known one."""
    known = {split: sum(map(is_known, names)) for split, names in speakers.items()}
    unknown = {split: len(names) - known[split] for split, names in speakers.items()}
    parts = [("speakers", known), ("recordings of speakers who are not known", unknown)]
    return ", ".join(
        f"{what} {' / '.join(f'{n} {split}' for split, n in counts.items())}"
        for what, counts in parts
        if any(counts.values())
    )


def _names(names: Iterable[str | None]) -> str:
    """The first few names, sorted, and how many more."""
    return first_few(sorted({shortened(str(name), 60) for name in names}), 5)


def _id(row: Mapping[str, str | None]) -> str:
    return str(row["utterance_id"])

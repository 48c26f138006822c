"""Who is trained on and who is tested on: an index over utterance ids, made from the columns of prepared speech.

By default no speaker is on two sides: a network that has heard a speaker recognises the speaker, and every figure
rises (RAVDESS, wav2vec2-base: 79.5 % with shared speakers, 66.7 % without; arXiv 2111.02735). The random split exists
to measure that difference, and is stamped leaky. Every fold depends on the set of rows and the seed, not on the order
of the rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
import pyarrow as pa

from ser_ray.config import Protocol
from ser_ray.schema import SPLITS, Fold, UserError

EMOBOX_RAVDESS: Final = (
    ("01", "11", "20", "21"),
    ("04", "10", "12", "14"),
    ("08", "09", "19", "23"),
    ("03", "05", "07", "24"),
    ("02", "15", "16", "18"),
    ("06", "13", "17", "22"),
)
"""Test actors of the six folds of EmoBox (arXiv 2406.07162): the mean over the folds is comparable with its table."""


def labelled(index: pa.Table, emotions: Sequence[str], merge: Mapping[str, str]) -> pa.Table:
    """The utterances that an experiment uses: emotions merged, others dropped, and an int64 column ``label``.

    Raises UserError where nothing is left. An emotion that is absent is a finding of `leakage.audit`.

    >>> index = pa.table({"utterance_id": ["a", "b", "c"], "emotion": ["calm", "sad", "fear"]})
    >>> labelled(index, ["neutral", "sad"], {"calm": "neutral"}).to_pydict()
    {'utterance_id': ['a', 'b'], 'emotion': ['neutral', 'sad'], 'label': [0, 1]}
    """
    label_of = {emotion: label for label, emotion in enumerate(emotions)}
    merged = [merge.get(emotion, emotion) for emotion in index["emotion"].to_pylist()]
    labels = pa.array([label_of.get(emotion) for emotion in merged], pa.int64())
    if labels.null_count == len(labels):
        raise UserError(
            f"experiment.emotions: no utterance is {' or '.join(emotions)}; the corpora have {_names(merged)}"
        )
    table = index.set_column(index.column_names.index("emotion"), "emotion", pa.array(merged))
    return table.append_column("label", labels).filter(labels.is_valid())


def make_fold(index: pa.Table, protocol: Protocol) -> Fold:
    """Assign every utterance of a labelled index to train, dev or test.

    ``index`` needs the columns utterance_id, corpus, speaker, emotion and gender.

    Raises UserError, saying what to change, where the data do not admit the protocol.
    """
    rows = sorted(index.select(["utterance_id", "corpus", "speaker", "emotion", "gender"]).to_pylist(), key=_id)
    splits = {
        "speaker_kfold": _speaker_kfold,
        "given_folds": _given_folds,
        "leave_one_corpus_out": _leave_one_corpus_out,
        "random": _random,
    }[protocol.scheme](rows, protocol)
    assert splits.keys() == {row["utterance_id"] for row in rows}, "a fold covers every utterance"
    speakers = {split: {r["speaker"] for r in rows if splits[r["utterance_id"]] == split} for split in SPLITS}
    for split in SPLITS:
        if not speakers[split]:
            raise UserError(
                f"protocol: {protocol.scheme} leaves nothing for {split}: {len(rows)} utterances "
                f"of {len({r['speaker'] for r in rows})} speakers; add data, or change the scheme"
            )
    counts = " / ".join(f"{len(speakers[split])} {split}" for split in SPLITS)
    return Fold(splits, leaky=protocol.scheme == "random", description=f"{_scheme_words(protocol)}: speakers {counts}")


# -- the schemes: sorted rows -> the split of each utterance_id

Rows = Sequence[Mapping[str, str | None]]


def _speaker_kfold(rows: Rows, protocol: Protocol) -> dict[str, str]:
    speakers = {row["speaker"] for row in rows}
    if protocol.folds < 3:
        raise UserError("protocol.folds is 2: test and dev take one fold each and train has none; set 3 or more")
    if len(speakers) < protocol.folds:
        change = f"set protocol.folds to {len(speakers)} or less" if len(speakers) >= 3 else "add a corpus"
        raise UserError(
            f"protocol: {_names(speakers)}: {len(speakers)} speakers do not fill {protocol.folds} speaker-disjoint "
            f"folds; {change}, or set protocol.scheme to random (stamped LEAKY)"
        )
    return _by_speaker(rows, _balanced(rows, protocol.folds, protocol.seed), protocol.folds, protocol.fold)


def _given_folds(rows: Rows, protocol: Protocol) -> dict[str, str]:
    given = protocol.given
    if isinstance(given, str):
        if given != "emobox":
            raise UserError(f"protocol.given: {given!r} is not known; write emobox, or lists of speakers")
        given = tuple(tuple(f"ravdess/{actor}" for actor in actors) for actors in EMOBOX_RAVDESS)
    assert given is not None, "Protocol checks this"
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
    return _by_speaker(rows, fold_of, len(given), protocol.fold)


def _leave_one_corpus_out(rows: Rows, protocol: Protocol) -> dict[str, str]:
    corpora = sorted({str(row["corpus"]) for row in rows})
    if protocol.held_out not in corpora or len(corpora) < 2:
        raise UserError(
            f"protocol.held_out is {protocol.held_out!r}, the data have {', '.join(corpora)}: "
            "name one of them, and at least one other to train on"
        )
    dev: set[str] = set()
    for corpus in corpora:
        own = [row for row in rows if row["corpus"] == corpus]
        folds = min(protocol.folds, len({row["speaker"] for row in own}))
        if corpus != protocol.held_out and folds > 1:
            dev |= {speaker for speaker, fold in _balanced(own, folds, protocol.seed).items() if fold == 0}
    return {
        str(row["utterance_id"]): "test"
        if row["corpus"] == protocol.held_out
        else "dev"
        if row["speaker"] in dev
        else "train"
        for row in rows
    }


def _random(rows: Rows, protocol: Protocol) -> dict[str, str]:
    if protocol.folds < 3:
        raise UserError("protocol.folds is 2: test and dev take one fold each and train has none; set 3 or more")
    rng = np.random.default_rng(protocol.seed)
    order = sorted(rng.permutation(len(rows)).tolist(), key=lambda i: str(rows[i]["emotion"]))  # random within emotions
    folds = {str(rows[i]["utterance_id"]): position % protocol.folds for position, i in enumerate(order)}
    return {key: _split(fold, protocol.folds, protocol.fold) for key, fold in folds.items()}


# -- what they share


def _balanced(rows: Rows, folds: int, seed: int) -> dict[str, int]:
    """Speakers to folds, equal as far as whole speakers allow in utterances, emotions, genders, corpora and speakers.

    Greedy, larger speakers first: each goes to the fold that has least of what the speaker brings, which is the choice
    that adds least to the sum of squared loads. The seed breaks ties.
    """
    speakers = sorted({str(row["speaker"]) for row in rows})
    traits = sorted({(key, str(row[key])) for row in rows for key in ("corpus", "emotion", "gender")})
    number_of = {speaker: number for number, speaker in enumerate(speakers)}
    column_of = {trait: column for column, trait in enumerate(traits)}
    counts = np.zeros((len(speakers), len(traits)))
    for row in rows:
        for key in ("corpus", "emotion", "gender"):
            counts[number_of[str(row["speaker"])], column_of[key, str(row[key])]] += 1
    utterances = counts.sum(axis=1)
    loads_of = np.column_stack([counts, utterances, np.ones(len(speakers))])
    loads_of /= loads_of.sum(axis=0)  # a rare emotion weighs as much as a common one
    shuffled = np.random.default_rng(seed).permutation(len(speakers))
    loads, fold_of = np.zeros((folds, loads_of.shape[1])), {}
    for number in shuffled[np.argsort(-utterances[shuffled], kind="stable")]:
        fold = int(np.argmin((loads @ loads_of[number]).round(12)))
        loads[fold] += loads_of[number]
        fold_of[speakers[number]] = fold
    return fold_of


def _by_speaker(rows: Rows, fold_of: Mapping[str, int], folds: int, test: int) -> dict[str, str]:
    return {str(row["utterance_id"]): _split(fold_of[str(row["speaker"])], folds, test) for row in rows}


def _split(fold: int, folds: int, test: int) -> str:
    """Test is the fold asked for, dev the next one, cyclically."""
    return "test" if fold == test else "dev" if fold == (test + 1) % folds else "train"


def _scheme_words(protocol: Protocol) -> str:
    if protocol.scheme == "leave_one_corpus_out":
        return f"leave_one_corpus_out, {protocol.held_out} held out, seed {protocol.seed}"
    if protocol.scheme == "given_folds":
        return f"given_folds{' (emobox)' if protocol.given == 'emobox' else ''}, fold {protocol.fold}"
    leaky = ", LEAKY: speakers are shared" if protocol.scheme == "random" else ""
    return f"{protocol.scheme}, fold {protocol.fold} of {protocol.folds}, seed {protocol.seed}{leaky}"


def _names(names: Sequence[str] | set[str | None] | set[str]) -> str:
    """The first few names, sorted, and how many more."""
    names = sorted({str(name) for name in names})
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _id(row: Mapping[str, str | None]) -> str:
    return str(row["utterance_id"])

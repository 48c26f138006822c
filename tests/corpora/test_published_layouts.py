"""``hf:``, ``audformat:`` and ``emobox:`` on folders that lie as datasets 4.8, audformat 1.4 and EmoBox write them.

None of these is needed to test: files were written by them once, and are made here by pyarrow and as text, alike.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from ser_ray.corpora import audformat, emobox, inside, table
from ser_ray.schema import UserError, Utterance, is_known

EMOTIONS = ("angry", "happy", "sad")
FEATURES = {
    "label": {"names": list(EMOTIONS), "_type": "ClassLabel"},
    "speaker_id": {"dtype": "string", "_type": "Value"},
    "audio": {"sampling_rate": 16000, "_type": "Audio"},
}
AUDIO = pa.struct({"bytes": pa.binary(), "path": pa.string()})


@pytest.fixture
def names(tmp_path) -> list[str]:
    """The recordings of four speakers, ``wav/s0_angry.wav`` and so on."""
    (tmp_path / "wav").mkdir()
    for number, name in enumerate(found := [f"wav/s{s}_{e}.wav" for s in range(4) for e in EMOTIONS]):
        noise = np.random.default_rng(number).uniform(-0.5, 0.5, 1600)
        soundfile.write(tmp_path / name, noise, 16_000)
    return found


def speaker_of(name: str) -> str:
    return Path(name).stem.split("_")[0]


def emotion_of(name: str) -> str:
    return Path(name).stem.split("_")[1]


def agree(utterances: Sequence[Utterance], names: Sequence[str]) -> None:
    """Every recording is there once, with its own emotion and speaker."""
    assert len(utterances) == len(names)
    found = {(Path(u.path).stem, u.speaker.rpartition("/")[2], u.emotion) for u in utterances}
    assert found == {(Path(name).stem, speaker_of(name), emotion_of(name)) for name in names}


# -- Hugging Face's datasets


def as_datasets(folder: Path, names: Sequence[str], embedded: bool = True) -> pa.Table:
    """A table of datasets with a ClassLabel and an Audio. `save_to_disk` and `push_to_hub` embed the recordings, and
    keep the last part of their paths; `to_parquet` does not, and keeps the whole."""
    audio = [
        {"bytes": (folder / name).read_bytes(), "path": Path(name).name} if embedded
        else {"bytes": None, "path": str(folder / name)}
        for name in names
    ]  # fmt: skip
    columns = {
        "label": pa.array([EMOTIONS.index(emotion_of(name)) for name in names], pa.int64()),
        "speaker_id": pa.array([speaker_of(name) for name in names], pa.string()),
        "audio": pa.array(audio, AUDIO),
    }
    return pa.table(columns).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": FEATURES}})})


def save_to_disk(table: pa.Table, folder: Path, shards: int) -> None:
    """As datasets does: files of a stream, then their names in state.json; what was there before is left."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [f"data-{number:05d}-of-{shards:05d}.arrow" for number in range(shards)]
    ends = [len(table) * number // shards for number in range(shards + 1)]
    for number, file in enumerate(files):
        with pa.ipc.new_stream(str(folder / file), table.schema) as writer:
            writer.write_table(table.slice(ends[number], ends[number + 1] - ends[number]))
    state = {"_data_files": [{"filename": file} for file in files], "_fingerprint": "6f6cbbe02680555d"}
    state |= {"_format_columns": None, "_format_kwargs": {}, "_format_type": None, "_output_all_columns": False}
    (folder / "state.json").write_text(json.dumps(state | {"_split": None}, indent=2))
    (folder / "dataset_info.json").write_text(json.dumps({"citation": "", "features": FEATURES}, indent=2))


def unpacked(path: Path, tmp_path: Path) -> list[Utterance]:
    (unpacked := tmp_path / "unpacked").mkdir()
    utterances, rejected = table.read("t", inside.unpack(path, unpacked), {})
    assert rejected == []
    return utterances


def test_a_dataset_that_is_saved_again_has_no_rows_of_before(tmp_path, names):
    save_to_disk(as_datasets(tmp_path, names), tmp_path / "saved", shards=3)
    save_to_disk(as_datasets(tmp_path, names[:6]), tmp_path / "saved", shards=2)
    assert len(list((tmp_path / "saved").glob("*.arrow"))) == 5
    agree(unpacked(tmp_path / "saved", tmp_path), names[:6])


def test_a_state_that_names_no_files_is_said(tmp_path, names):
    save_to_disk(as_datasets(tmp_path, names), tmp_path / "saved", shards=1)
    for content in ("{", "[]", '{"_data_files": [{}]}', "null"):
        (tmp_path / "saved" / "state.json").write_text(content)
        with pytest.raises(UserError, match=r"state.json: does not name the files of a saved dataset"):
            inside.files_of(tmp_path / "saved")


def test_a_dictionary_of_splits_in_shards(tmp_path, names):
    folder = tmp_path / "saved"
    parts = {"train": names[:6], "validation": names[6:9], "test": names[9:]}
    for split, part in parts.items():
        save_to_disk(as_datasets(tmp_path, part), folder / split, shards=2 if split == "train" else 1)
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": list(parts)}))
    utterances = unpacked(folder, tmp_path)
    agree(utterances, names)
    assert Counter(u.split for u in utterances) == {"train": 6, "dev": 3, "test": 3}


@pytest.mark.parametrize("embedded", [True, False])
def test_parquet_of_a_dataset_with_and_without_the_recordings(tmp_path, names, embedded):
    (tmp_path / "saved" / "data").mkdir(parents=True)
    for split, part in (("train", names[:9]), ("test", names[9:])):
        target = tmp_path / "saved" / "data" / f"{split}-00000-of-00001.parquet"
        pq.write_table(as_datasets(tmp_path, part, embedded), target)
    utterances = unpacked(tmp_path / "saved", tmp_path)
    agree(utterances, names)
    assert Counter(u.split for u in utterances) == {"train": 9, "test": 3}
    for utterance in utterances:
        file = tmp_path / "unpacked" / utterance.path
        assert file.read_bytes() == (tmp_path / "wav" / file.name).read_bytes()
        assert file.is_symlink() != embedded


def test_paths_in_place_of_recordings_and_one_that_is_missing(tmp_path, names):
    """Relative to the table, and two files of one name."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "s0_angry.wav").write_bytes((tmp_path / names[1]).read_bytes())
    paths = [*names, "other/s0_angry.wav", "wav/missing.wav", "wav", "nul\0.wav"]
    columns = {"audio": paths, "Emotion": ["sad"] * len(paths)}
    pq.write_table(pa.table(columns), tmp_path / "all.parquet")
    (folder := tmp_path / "unpacked").mkdir()
    for _ in range(2):  # as after an interruption, before the table was written
        utterances, rejected = table.read("t", inside.unpack(tmp_path / "all.parquet", folder), {})
        assert len(utterances) == len(names) + 1
        assert {u.utterance_id for u in utterances} > {"t/s0_angry", "t/s0_angry-13"}
        assert (folder / "s0_angry-13.wav").read_bytes() == (tmp_path / names[1]).read_bytes()
        assert [one.path for one in rejected] == paths[-3:]
        assert {one.reason.partition(": ")[2] for one in rejected} == {"no such file"}
        (folder / inside.TABLE).unlink()


# -- audformat

HEADER = """\
name: emodb
source: https://x
usage: research
languages: [deu]
media:
  microphone: {type: audio, format: wav, channels: 1, sampling_rate: 16000}
raters:
  gold: {type: human}
schemes:
  confidence: {dtype: float, minimum: 0, maximum: 1}
  duration: {dtype: time}
  emotion:
    description: x
    dtype: str
    labels:
      anger: {description: angry}
      happiness: {description: happy}
      sadness: {description: sad}
"""
SPEAKERS = """\
  speaker:
    dtype: str
    labels:
      s0: {gender: female, age: 30, language: deu}
      s1: {gender: male, age: 31, language: deu}
      s2: {gender: female, age: 32, language: deu}
      s3: {gender: male, age: 33, language: deu}
  transcription:
    dtype: str
    labels: {a01: Der Lappen}
splits:
  held: {type: test}
  train: {type: train}
tables:
  emotion:
    type: filewise
    columns:
      emotion: {scheme_id: emotion, rater_id: gold}
      emotion.confidence: {scheme_id: confidence, rater_id: gold}
  emotion.categories.test.gold_standard:
    type: filewise
    split_id: held
    columns:
      emotion: {scheme_id: emotion, rater_id: gold}
  emotion.categories.train.gold_standard:
    type: filewise
    split_id: train
    columns:
      emotion: {scheme_id: emotion, rater_id: gold}
  files:
    type: filewise
    columns:
      duration: {scheme_id: duration}
      speaker: {scheme_id: speaker}
      transcription: {scheme_id: transcription}
"""
MISC_SPEAKERS = """\
  sex:
    dtype: str
    labels: [male, female]
  speaker: {dtype: str, labels: speaker}
tables:
  segments:
    type: segmented
    columns:
      emotion: {scheme_id: emotion}
      speaker: {scheme_id: speaker}
misc_tables:
  speaker:
    levels: {speaker: str}
    columns:
      sex: {}
"""
WORDS = {"angry": "anger", "happy": "happiness", "sad": "sadness"}
SEXES = ("female", "male", "female", "male")


def database(tmp_path: Path, header: str, tables: dict[str, pa.Table], kind: str) -> None:
    """The tables as audformat saves them: in Parquet with categories and times, or in CSV with pandas' times."""
    (tmp_path / "db.yaml").write_text(HEADER + header)
    for name, content in tables.items():
        if kind == "parquet":
            pq.write_table(content, tmp_path / f"db.{name}.parquet")
            continue
        lines = [",".join(content.column_names), *(",".join(map(as_csv, row.values())) for row in content.to_pylist())]
        (tmp_path / f"db.{name}.csv").write_text("\n".join(lines) + "\n")


def as_csv(value: object) -> str:
    if hasattr(value, "total_seconds"):
        return f"0 days 00:00:{value.total_seconds():09.6f}"
    return "" if value is None else str(value)


def categories(values: Sequence[str]) -> pa.Array:
    return pa.array(values, pa.string()).dictionary_encode()


def seconds(values: Sequence[float | None]) -> pa.Array:
    return pa.array([None if value is None else int(value * 1e9) for value in values], pa.duration("ns"))


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_database_of_files_with_speakers_in_the_labels_of_a_scheme(tmp_path, names, kind):
    words = categories([WORDS[emotion_of(name)] for name in names])
    of_test = [speaker_of(name) == "s3" for name in names]
    whole = pa.table({"file": names, "emotion": words})
    files = {"file": names, "duration": seconds([0.1] * len(names)), "speaker": [*map(speaker_of, names)]}
    tables = {
        "emotion": whole.append_column("emotion.confidence", pa.array([0.9] * len(names))),
        "emotion.categories.test.gold_standard": whole.filter(pa.array(of_test)),
        "emotion.categories.train.gold_standard": whole.filter(pa.array([not one for one in of_test])),
        "files": pa.table(files | {"transcription": ["a01"] * len(names)}),
    }
    database(tmp_path, SPEAKERS, tables, kind)
    utterances, rejected = audformat.read("t", tmp_path, {})
    agree(utterances, names)
    assert rejected == []
    for utterance in utterances:
        speaker = int(utterance.speaker[-1])
        assert utterance.split == ("test" if speaker == 3 else "train")
        assert (utterance.gender, utterance.language, utterance.text_id) == (SEXES[speaker], "deu", "a01")
        assert (utterance.start, utterance.end) == (None, None)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_database_of_segments_with_speakers_in_a_misc_table(tmp_path, names, kind):
    """Two segments of a file, by different speakers; or one that is all of it."""
    place = [(name, *times) for name in names[:6] for times in ((0.0, 0.05), (0.05, None))]
    place += [(name, 0.0, None) for name in names[6:]]
    files, starts, ends = zip(*place, strict=True)
    speakers = [f"s{number % 4}" for number in range(len(place))]
    segments = {"file": files, "start": seconds(starts), "end": seconds(ends)}
    segments |= {"emotion": categories([WORDS[emotion_of(file)] for file in files]), "speaker": categories(speakers)}
    known = {"speaker": [f"s{number}" for number in range(4)], "sex": categories(SEXES)}
    database(tmp_path, MISC_SPEAKERS, {"segments": pa.table(segments), "speaker": pa.table(known)}, kind)
    utterances, rejected = audformat.read("t", tmp_path, {})
    assert rejected == []
    expected = {
        (file, None if (start, end) == (0.0, None) else start, end, f"t/{speaker}", SEXES[int(speaker[1])])
        for (file, start, end), speaker in zip(place, speakers, strict=True)
    }
    assert {(u.path, u.start, u.end, u.speaker, u.gender) for u in utterances} == expected


def test_a_rater_who_left_a_recording_out_is_no_rejected_row(tmp_path, names):
    columns = "".join(f"      emotion.{r}: {{scheme_id: emotion, rater_id: {r}}}\n" for r in "abc")
    header = f"tables:\n  ratings:\n    type: filewise\n    columns:\n{columns}"
    votes = [WORDS[emotion_of(name)] for name in names]
    some = [None if number % 3 else vote for number, vote in enumerate(votes)]
    ratings = {"file": names, "emotion.a": votes, "emotion.b": some, "emotion.c": [None, *votes[1:]]}
    ratings["emotion.a"] = [*votes[:-1], None]
    ratings["emotion.c"][-1] = None
    database(tmp_path, header, {"ratings": pa.table(ratings)}, "parquet")
    utterances, rejected = audformat.read("t", tmp_path, {})
    assert {u.path: u.emotion for u in utterances} == {name: emotion_of(name) for name in names[:-1]}
    assert {u.agreement for u in utterances} == {1.0}
    assert [(one.path, one.reason) for one in rejected] == [
        (names[-1], f"db.ratings, line {len(names) + 1}: no emotion")
    ]


# -- EmoBox


def entry(name: str) -> str:
    """A line of EmoBox's."""
    key = f"emodb-{Path(name).stem}"
    numbers = {"type": "raw", "sample_rate": 16000, "num_frame": 1600.0, "task": "category", "length": 0.1}
    found = {"key": key, "dataset": "emodb", "wav": f"downloads/{name}"} | numbers
    return json.dumps(found | {"emo": WORDS[emotion_of(name)], "channel": 1}) + "\n"


def older_entry(name: str) -> str:
    """A line of the files that EmoBox keeps beside them."""
    found = {"key": f"emodb-{Path(name).stem}", "dataset": "emodb", "audio": f"downloads/{name}", "type": "raw"}
    return json.dumps(found | {"task": "category", "label": WORDS[emotion_of(name)]}) + "\n"


def test_a_fold_of_emobox_beside_older_files_and_parts_of_its_test_set(tmp_path, names):
    """As in data/emodb, where ``emodb_test_fold1.jsonl`` has other keys, and data/mer2023, whose test set is there in
    parts once more."""
    fold = tmp_path / "EmoBox" / "data" / "emodb" / "fold_1"
    fold.mkdir(parents=True)
    (tmp_path / "EmoBox" / "downloads").symlink_to(tmp_path)
    for split, part in (("train", names[:6]), ("valid", names[6:9]), ("test", names[9:])):
        (fold / f"emodb_{split}_fold_1.jsonl").write_text("".join(map(entry, part)))
        (fold / f"emodb_{split}_fold_1.json").write_text("{}")
        (fold / f"emodb_{split}_fold1.jsonl").write_text("".join(map(older_entry, part)))
    for number in (1, 2, 3):
        (fold / f"emodb_test{number}_fold_1.jsonl").write_text("".join(map(entry, names[9:])))
    (fold.parent / "label_map.json").write_text(
        '{\n    "anger": "Angry",\n    "happiness": "Happy",\n "sadness": "Sad"}'
    )
    for place in (fold, fold.parent):
        utterances, rejected = emobox.read("t", place, {})
        assert rejected == []
        assert {(u.path, u.emotion) for u in utterances} == {(f"downloads/{n}", emotion_of(n)) for n in names}
        assert Counter(u.split for u in utterances) == {"train": 6, "dev": 3, "test": 3}
        assert not any(is_known(u.speaker) for u in utterances)

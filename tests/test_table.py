"""From a folder of recordings to a table, an audit and a search: what people bring, as they bring it."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from ser_ray import config
from ser_ray.__main__ import main
from ser_ray.speech import shards

EMOTIONS = ("angry", "happy", "sad")
SPEAKERS = 6

Name = Callable[[str, str, int], str]
"""Speaker, emotion, take -> the path of a recording."""


def noise(path: Path, seed: int) -> None:
    rng, t = np.random.default_rng(seed), np.arange(8_000) / 16_000
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, (0.2 * rng.standard_normal(8_000) * (1 + np.sin(9 * t))).clip(-0.9, 0.9), 16_000)


def write_corpus(folder: Path, name: Name, emotions: Sequence[str] = EMOTIONS) -> list[tuple[str, str, str]]:
    """36 recordings with such names; returns path, speaker, emotion of each."""
    rows = []
    for speaker in range(SPEAKERS):
        for emotion in emotions:
            for take in range(6 // len(emotions)):
                path = name(f"s{speaker}", emotion, take)
                noise(folder / path, len(rows))
                rows.append((path, f"s{speaker}", emotion))
    return rows


@pytest.fixture
def rows(tmp_path) -> list[tuple[str, str, str]]:
    """The corpus, and `SPACE` beside it, which reads ``rows.csv``."""
    found = write_corpus(tmp_path, lambda speaker, emotion, take: f"wav/{speaker}_{emotion}_{take}.wav")
    (tmp_path / "space.yaml").write_text(
        f"""experiment:
  name: t
  corpora: {{t: {tmp_path}/rows.csv}}
  protocol: {{folds: 3}}
resources: {{workers: 0}}
storage: {{results: {tmp_path}/results, cache: {tmp_path}/cache}}
"""
    )
    return found


def write_rows(path: Path, rows: Sequence[Sequence[str]], header: str = "path,speaker,emotion") -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header.split(","), *rows])


@pytest.fixture
def audit(tmp_path, capsys) -> Callable[..., tuple[int, str]]:
    """`ser-ray audit` of the space, with overrides: the exit code, and all that was printed."""

    def run(*overrides: str) -> tuple[int, str]:
        code = main(["audit", str(tmp_path / "space.yaml"), *overrides])
        said = capsys.readouterr()
        return code, said.out + said.err

    return run


def audited(tmp_path: Path) -> Mapping[str, object]:
    content: Mapping[str, object] = json.loads((tmp_path / "results" / "t" / "audit.json").read_text())
    return content


def test_absent_emotions_of_the_default_are_left_out_with_a_line(rows, tmp_path, audit):
    write_rows(tmp_path / "rows.csv", rows)
    code, said = audit()
    assert code == 0
    assert "left out, as no utterance is one: disgust, fear, neutral, surprised" in said
    assert list(audited(tmp_path)["splits"]["train"]["emotions"]) == list(EMOTIONS)
    code, said = audit("experiment.emotions=[angry, happy, sad, disgust]")
    assert code == 2
    assert "emotion absent from train: disgust cannot be learned" in said


def test_words_of_no_class_are_summed_with_the_line_to_paste(rows, tmp_path, audit):
    strange = {"angry": "Wut", "happy": "joy", "sad": "SAD"}
    write_rows(tmp_path / "rows.csv", [(path, speaker, strange[emotion]) for path, speaker, emotion in rows])
    code, said = audit()
    assert code == 0
    line = next(line for line in said.splitlines() if "of no class" in line)
    assert "t: 12 of 36 utterances are of no class of experiment.emotions: wut 12" in line
    pasted = line.partition("what it means: ")[2].replace("EMOTION", "angry")
    code, said = audit(f"experiment={{{pasted}, name: t, corpora: {{t: {tmp_path}/rows.csv}}, protocol: {{folds: 3}}}}")
    assert (code, "of no class" in said) == (0, False)
    assert audited(tmp_path)["splits"]["train"]["emotions"]["angry"] > 0


def test_any_word_may_be_a_class(rows, tmp_path, audit):
    strange = {"angry": "Contempt", "happy": "0", "sad": "Low Arousal"}
    write_rows(tmp_path / "rows.csv", [(path, speaker, strange[emotion]) for path, speaker, emotion in rows])
    code, said = audit()
    assert code == 2
    assert "the corpora have 0, contempt, low arousal: name some of these" in said
    assert audit("experiment.emotions=[contempt, low arousal, 0]")[0] == 0
    assert list(audited(tmp_path)["splits"]["train"]["emotions"]) == ["contempt", "low arousal", "0"]
    assert audit("experiment.labels={t: {0: happy, low arousal: no}}", "experiment.emotions=[no, happy]")[0] == 0
    assert list(audited(tmp_path)["splits"]["train"]["emotions"]) == ["no", "happy"]


def test_a_row_for_every_rater_is_a_vote(rows, tmp_path, audit):
    other = {"angry": "happy", "happy": "sad", "sad": "angry"}
    votes = [(path, speaker, word) for path, speaker, e in rows for word in (other[e], e, e)]
    write_rows(tmp_path / "rows.csv", votes)
    code, said = audit()
    assert code == 0
    assert "t: raters gave different emotions to 36 of 36 recordings: the emotion with the most votes is used" in said
    (shard,) = shards.read_tables((tmp_path / "cache" / "shards").glob("t-*"))
    found = {row["path"]: (row["emotion"], row["perceived"], row["agreement"]) for row in shard.to_pylist()}
    assert found == {path: (emotion, emotion, pytest.approx(2 / 3)) for path, _, emotion in rows}


def test_speakers_who_are_not_known_split_by_recording_and_say_so(rows, tmp_path, audit):
    splits = {0: "train", 1: "train", 2: "train", 3: "train", 4: "dev", 5: "test"}
    nobody = ("", "Unknown")
    found = [
        (path, nobody[number % 2] if number % 3 else speaker, emotion, splits[int(speaker[1])])
        for number, (path, speaker, emotion) in enumerate(rows)
    ]
    write_rows(tmp_path / "rows.csv", found, "path,speaker,emotion,split")
    code, said = audit("experiment.protocol={scheme: official}")
    assert (code, "LEAKY" in said) == (0, False)
    assert "36 utterances, 6 speakers (not known for 24 utterances)" in said
    assert "the speaker of 24 of 36 utterances is not known" in said
    code, said = audit()
    assert code == 0
    assert "LEAKY: the speaker of 24 of 36 utterances is not known, they are split by recording" in said
    assert "audit leak: test may share speakers with train, not all are known" in said
    code, said = audit("experiment.protocol={scheme: leave_one_speaker_out}")
    assert code == 2
    assert "leave_one_speaker_out needs every speaker" in said


CLASSES = {"info": {"features": {"label": {"names": list(EMOTIONS), "_type": "ClassLabel"}}}}


def inside(folder: Path, rows: Sequence[tuple[str, str, str]], numbers: bool = False) -> pa.Table:
    audio = [{"bytes": (folder / path).read_bytes(), "path": path.replace("wav/", "")} for path, _, _ in rows]
    emotions = [emotion for _, _, emotion in rows]
    columns = {"audio": audio, "speaker": [speaker for _, speaker, _ in rows]}
    if not numbers:
        return pa.table(columns | {"emotion": emotions})
    table = pa.table(columns | {"label": [EMOTIONS.index(emotion) for emotion in emotions]})
    return table.replace_schema_metadata({"huggingface": json.dumps(CLASSES)})


def test_parquet_with_the_recordings_inside(rows, tmp_path, audit):
    write_rows(tmp_path / "rows.csv", rows)
    assert audit()[0] == 0
    expected = audited(tmp_path)["splits"]
    pq.write_table(inside(tmp_path, rows), tmp_path / "t.parquet", row_group_size=7)
    code, said = audit(f"experiment.corpora={{t: {tmp_path}/t.parquet}}")
    assert (code, "36 utterances, 6 speakers" in said) == (0, True)
    assert audited(tmp_path)["splits"] == expected
    ids = {row["utterance_id"] for d in (tmp_path / "cache" / "shards").iterdir() for t in shards.read_tables([d])
           for row in t.to_pylist()}  # fmt: skip
    assert {"t/s0_angry_0", "t/wav/s0_angry_0"} <= ids


def test_bytes_alone_with_names_that_are_no_files(rows, tmp_path, audit):
    """Names twice, none, hidden, or leading elsewhere: every recording has a file of its own, inside of the cache."""
    names = ["a.wav", "b/a.wav", "", "../../x.wav", ".hidden", "/etc/y.wav", *(f"{n}.wav" for n in range(30))]
    columns = {"speaker": [speaker for _, speaker, _ in rows], "emotion": [emotion for _, _, emotion in rows]}
    audio = [(tmp_path / path).read_bytes() for path, _, _ in rows]
    pq.write_table(pa.table({"path": names, "audio": audio, **columns}), tmp_path / "t.parquet")
    code, said = audit(f"experiment.corpora={{t: {tmp_path}/t.parquet}}")
    assert (code, "36 utterances, 6 speakers" in said) == (0, True)
    (unpacked,) = (tmp_path / "cache" / "corpora").iterdir()
    assert {"a.wav", "a-2.wav", "3.wav", "x.wav", "5.wav", "y.wav"} <= {path.name for path in unpacked.iterdir()}
    assert len(list(unpacked.rglob("*"))) == 37


@pytest.mark.parametrize("kind", ["stream", "file", "parquet"])
def test_a_saved_folder_of_datasets(rows, tmp_path, audit, kind):
    """The split is in the names; the emotion is a number with its name in the metadata; speakers are there or not."""
    split_of = {"s4": "validation", "s5": "test"}
    for split in ("train", "validation", "test"):
        table = inside(tmp_path, [row for row in rows if split_of.get(row[1], "train") == split], numbers=True)
        if kind == "parquet":
            (tmp_path / "saved" / "data").mkdir(parents=True, exist_ok=True)
            pq.write_table(table, tmp_path / "saved" / "data" / f"{split}-00000-of-00001.parquet")
            continue
        target = tmp_path / "saved" / split / "data-00000-of-00001.arrow"
        target.parent.mkdir(parents=True)
        opened = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
        with opened(str(target), table.schema) as writer:
            writer.write_table(table)
    place = f"experiment.corpora={{t: 'hf:{tmp_path}/saved'}}"
    code, said = audit(place, "experiment.protocol={scheme: official}")
    assert (code, "LEAKY" in said) == (0, False)
    assert audited(tmp_path)["splits"]["test"]["emotions"] == dict.fromkeys(EMOTIONS, 2)
    assert audited(tmp_path)["splits"]["dev"]["speakers"] == 1


def test_emobox_with_its_folds_and_its_labels(rows, tmp_path, audit):
    folder = tmp_path / "EmoBox" / "data" / "mine"
    code_of = {"angry": "ang", "happy": "j", "sad": "sad"}
    entries = [
        {"key": path, "dataset": "mine", "wav": path, "emo": code_of[emotion], "length": 0.5, "channel": 1}
        for path, _, emotion in rows
    ]
    test = [number for number, row in enumerate(rows) if row[1] == "s5"]
    for name, chosen in (("train", set(range(len(rows))) - set(test)), ("test", set(test))):
        for fold in (1, 2):
            target = folder / f"fold_{fold}" / f"mine_{name}_fold_{fold}.jsonl"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text("\n".join(json.dumps(entries[number]) for number in sorted(chosen)))
    (folder / "mine.jsonl").write_text("\n".join(map(json.dumps, entries)))
    (folder / "label_map.json").write_text('{"ang": "anger", "j": "joy", "sad": "sad"}')
    official = "experiment.protocol={scheme: official}"
    code, said = audit(f"experiment.corpora={{t: 'emobox:{folder}/fold_2'}}", official)
    assert (code, "LEAKY" in said) == (0, False)
    assert audited(tmp_path)["splits"]["test"]["emotions"] == dict.fromkeys(EMOTIONS, 2)
    code, said = audit(f"experiment.corpora={{t: 'emobox:{folder}'}}")
    assert (code, "LEAKY" in said) == (0, True)
    code, said = audit(f"experiment.corpora={{t: 'emobox:{tmp_path}/wav'}}")
    assert code == 2
    assert "no wav.jsonl and no fold in it" in said


AUDFORMAT = """\
name: mine
source: here
usage: research
splits: {train: {type: train}, held: {type: test}}
schemes: {emotion: {dtype: str}, speaker: {dtype: str}, sex: {dtype: str}}
tables:
  files: {type: filewise, columns: {speaker: {scheme_id: speaker}, sex: {scheme_id: sex}}}
  emotion: {type: filewise, columns: {emotion: {scheme_id: emotion, rater_id: gold}, emotion.confidence: {}}}
  emotion.train: {type: filewise, split_id: train, columns: {emotion: {scheme_id: emotion}}}
  emotion.test: {type: filewise, split_id: held, columns: {emotion: {scheme_id: emotion}}}
  votes: {type: segmented, columns: {r1: {scheme_id: other, rater_id: r1}}}
"""


def test_a_database_in_audformat(rows, tmp_path, audit):
    folder = tmp_path
    (folder / "db.yaml").write_text(AUDFORMAT)
    write_rows(folder / "db.files.csv", [(path, speaker, "male") for path, speaker, _ in rows], "file,speaker,sex")
    labelled = [(path, {"happy": "happiness"}.get(e, e), "0.9") for path, _, e in rows]
    write_rows(folder / "db.emotion.csv", labelled, "file,emotion,emotion.confidence")
    for name, test in (("train", False), ("test", True)):
        own = [
            (row[0], row[1]) for row, (_, speaker, _) in zip(labelled, rows, strict=True) if (speaker == "s5") == test
        ]
        write_rows(folder / f"db.emotion.{name}.csv", own, "file,emotion")
    code, said = audit(f"experiment.corpora={{t: 'audformat:{folder}'}}", "experiment.protocol={scheme: official}")
    assert (code, "LEAKY" in said) == (0, False)
    assert "36 utterances, 6 speakers, " in said
    assert audited(tmp_path)["splits"]["test"]["emotions"] == dict.fromkeys(EMOTIONS, 2)
    (folder / "db.files.csv").unlink()
    code, said = audit(f"experiment.corpora={{t: 'audformat:{folder}'}}")
    assert code == 2
    assert "the table files is in no file" in said


def test_segments_and_raters_in_audformat(rows, tmp_path, audit):
    columns = ", ".join(f"emotion.{r}: {{scheme_id: emotion, rater_id: {r}}}" for r in "abc")
    (tmp_path / "db.yaml").write_text(f"name: m\ntables: {{votes: {{type: segmented, columns: {{{columns}}}}}}}\n")
    found = [(path, "0 days 00:00:00.010000", "NaT", "sad", e, e) for path, _, e in rows]
    write_rows(tmp_path / "db.votes.csv", found, "file,start,end,emotion.a,emotion.b,emotion.c")
    code, said = audit(f"experiment.corpora={{t: 'audformat:{tmp_path}'}}")
    assert code == 0
    assert "raters gave different emotions to 24 of 36 recordings" in said
    assert "0 speakers (not known for 36 utterances)" in said


@pytest.fixture
def table(capsys) -> Callable[..., tuple[list[dict[str, str]], str]]:
    """`ser-ray table`: the rows that it writes, and what it says."""

    def run(*arguments: str) -> tuple[list[dict[str, str]], str]:
        code = main(["table", *arguments])
        said = capsys.readouterr()
        assert code == 0, said.err
        return list(csv.DictReader(io.StringIO(said.out))), said.err

    return run


NUMBERS = {"angry": "0", "happy": "1", "sad": "2"}


@pytest.mark.parametrize(
    ("name", "pattern", "words", "says"),
    [
        # nEMO: a folder a speaker, the emotion in the name
        (lambda s, e, n: f"{s}x/{e}_{n}.wav", None, {"angry": "anger"}, "anger 12 (counts as angry)"),
        # URDU: a folder an emotion, the speaker in the name
        (lambda s, e, n: f"{e}/SM{s[1]}_F{n}_A{s[1]}{n}.wav", None, {"angry": "Angry"}, "Angry 12 (counts as angry)"),
        # BAVED: numbers in the name
        (
            lambda s, e, n: f"{e}/{s[1]}-M-20-{n}-{e}-7.wav",
            "{speaker}-{gender}-{}-{text}-{emotion}-*.wav",
            NUMBERS,
            "0 12, 1 12, 2 12",
        ),
    ],
)
def test_a_folder_becomes_a_table_and_is_trained_on(tmp_path, monkeypatch, table, audit, name, pattern, words, says):
    monkeypatch.chdir(tmp_path)
    rows = write_corpus(tmp_path / "recordings", lambda s, e, n: name(s, words.get(e, e), n))
    found, said = table("recordings", *(["--pattern", pattern] if pattern else []))
    assert [row["path"] for row in found] == sorted(f"recordings/{path}" for path, _, _ in rows)
    assert says in said
    assert "6 of them" in said
    write_rows(tmp_path / "mine.csv", [list(row.values()) for row in found], ",".join(found[0]))
    (tmp_path / "space.yaml").write_text(
        "experiment: {name: t, corpora: {t: mine.csv}, protocol: {folds: 3}}\nresources: {workers: 0}\n"
        "storage: {results: results, cache: cache}\n"
    )
    labels = ["experiment.labels={t: {0: angry, 1: happy, 2: sad}}"] if words is NUMBERS else []
    code, said = audit(*labels)
    assert (code, "no leak found" in said) == (0, True)
    assert "36 utterances, 6 speakers" in said


def test_what_a_table_cannot_know_it_says(tmp_path, table, capsys):
    for number in range(6):
        noise(tmp_path / "calls" / f"{number}.wav", number)
    found, said = table(str(tmp_path / "calls"))
    assert {(row["speaker"], row["emotion"]) for row in found} == {("unknown", "")}
    assert "emotion: not known" in said
    assert "speaker: not known; splits are then by recording, and stamped LEAKY" in said
    for arguments, words in (
        (["--pattern", "{speaker}_{emotion}.wav"], "fits none of 6 recordings, such as 0.wav"),
        (["--pattern", "{speaker}_*.wav"], "it has no {emotion}"),
        (["--pattern", "{emotion"], "a brace is not closed"),
    ):
        assert main(["table", str(tmp_path / "calls"), *arguments]) == 2
        assert words in capsys.readouterr().err
    (tmp_path / "none").mkdir()
    assert main(["table", str(tmp_path / "none")]) == 2
    assert "no recordings in it" in capsys.readouterr().err


def test_a_model_has_the_emotions_that_the_data_have(rows, tmp_path, capsys):
    write_rows(tmp_path / "rows.csv", rows)
    command = ["train", str(tmp_path / "space.yaml"), "experiment.backbone=embedded/tiny-whisper"]
    command += ["experiment.adapter.method=frozen", "experiment.epochs=1", "storage.prefix_gb=0"]
    assert main(command) == 0
    assert "left out, as no utterance is one: disgust, fear, neutral, surprised" in capsys.readouterr().out
    home = tmp_path / "results" / "t"
    (checkpoint,) = {path.parent for path in home.rglob("labels.json")}
    assert list(json.loads((checkpoint / "labels.json").read_text()).values()) == list(EMOTIONS)
    assert config.load_experiment(checkpoint / "experiment.yaml").emotions == EMOTIONS
    assert config.load(home / "search.yaml").experiment.emotions == EMOTIONS
    assert main(command) == 0, "the same command continues"
    assert main([*command, "experiment.emotions=[angry, sad]"]) == 2
    assert "experiment.emotions: ['angry', 'happy', 'sad'] -> ['angry', 'sad']" in capsys.readouterr().err


def test_trials_have_the_emotions_that_the_data_have(tmp_path):
    path = tmp_path / "space.yaml"
    path.write_text("experiment: {name: t, corpora: {synthetic: }, backbone: b, merge: {calm: neutral}}\n")
    space = config.load(path)
    over = space.over(("angry", "sad"))
    assert over.trial({}).emotions == ("angry", "sad")
    assert over.trial({}).merge == {}
    path.write_text(config.dump(over))
    assert config.load(path) == over

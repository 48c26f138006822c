"""CREMA-D's own tables, and corpora that a table describes."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ser_ray import corpora
from ser_ray.config.words import MEANINGS, WORDS, plain
from ser_ray.corpora import inside
from ser_ray.corpora.rows import NO_VALUE, NOT_KNOWN
from ser_ray.corpora.table import read
from ser_ray.schema import EMOTIONS, TIE, UserError, is_known

CLIPS = ("1001_IEO_FEA_LO", "1001_IEO_FEA_MD", "1002_DFA_ANG_XX")


@pytest.fixture
def crema(tmp_path) -> Path:
    for clip in CLIPS:
        (tmp_path / "AudioWAV").mkdir(exist_ok=True)
        (tmp_path / "AudioWAV" / f"{clip}.wav").touch()
    return tmp_path


def write(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def heard(directory: Path) -> list[tuple]:
    utterances, _ = corpora.read("crema_d", directory)
    return [(u.gender, u.perceived, u.agreement) for u in utterances]


def test_crema_d_without_tables_says_nothing_of_listeners(crema):
    assert heard(crema) == [(None, None, None)] * 3


@pytest.mark.parametrize("place", ["processedResults", "data/InfoAndStats/processedResults"])
@pytest.mark.parametrize("directory", ["", "AudioWAV"])
def test_crema_d_reads_the_votes_by_voice(crema, place, directory):
    write(crema / "VideoDemographics.csv", '"ActorID","Age","Sex"', '1001,51,"Male"', '1002,21,"Female"')
    summary = crema / place / "summaryTable.csv"
    write(
        summary,
        '"","FileName","VoiceVote","VoiceLevel","FaceVote"',
        f'"1","{CLIPS[0]}","N","73","F"',
        f'"2","{CLIPS[1]}","F","65.8","N"',
        f'"3","{CLIPS[2]}","A:D","37.2:58.6","A"',
    )
    root = crema / directory if place == "processedResults" or not directory else crema
    assert heard(root) == [("male", "neutral", None), ("male", "fear", None), ("female", TIE, None)]
    write(
        crema / place / "tabulatedVotes.csv",
        '"","A","fileName","numResponses","agreement","emoVote"',
        f'"100001",0,"{CLIPS[0]}",10,0.4,"N"',
        f'"200001",0,"{CLIPS[0]}",10,0.9,"F"',
        f'"300001",0,"{CLIPS[0]}",10,0.8,"F"',
    )
    assert heard(root)[:2] == [("male", "neutral", 0.4), ("male", "fear", None)]


def test_crema_ds_ties_by_the_votes_themselves_are_ties(crema):
    write(
        crema / "processedResults/tabulatedVotes.csv",
        '"","A","fileName","numResponses","agreement","emoVote"',
        f'"100001",5,"{CLIPS[0]}",10,0.5,"A:F"',
        f'"100002",8,"{CLIPS[1]}",10,0.8,"A"',
    )
    assert heard(crema) == [(None, TIE, 0.5), (None, "angry", 0.8), (None, None, None)]


def test_crema_d_finds_the_votes_on_the_misspelt_recording(crema):
    (crema / "AudioWAV" / "1040_ITH_SAD_X.wav").touch()
    write(crema / "processedResults/summaryTable.csv", '"","FileName","VoiceVote"', '"3234","1040_ITH_SAD_XX","N"')
    assert heard(crema)[-1] == (None, "neutral", None)


@pytest.mark.parametrize(
    ("name", "lines", "words"),
    [
        (
            "summaryTable.csv",
            ['"FileName","VoiceVote"', '"x","A"', '"x","N"'],
            "line 3: x occurs earlier with another value",
        ),
        ("VideoDemographics.csv", ["ActorID,Sex", "1001,Male", "1001,Female"], "line 3: 1001 occurs earlier"),
        (
            "tabulatedVotes.csv",
            ['"","fileName","emoVote","agreement"', '"100001","x","A","0.5"', '"100002","x","A","0.6"'],
            "line 3: x occurs earlier",
        ),
        ("summaryTable.csv", ["version https://git-lfs.github.com/spec/v1"], "line 1: no column 'FileName'"),
        ("summaryTable.csv", ['"FileName","VoiceVote"', '"1001_IEO_FEA_LO","X"'], "line 2: vote 'X'"),
        ("summaryTable.csv", ['"FileName","VoiceVote"', '"1001_IEO_FEA_LO"'], "line 2: cut short"),
        (
            "tabulatedVotes.csv",
            ['"","fileName","emoVote","agreement"', '"100001","x","A","2"'],
            "line 2: agreement '2'",
        ),
        ("VideoDemographics.csv", ["ActorID,Sex", "1001,M"], "line 2: Sex 'M'"),
    ],
)
def test_a_damaged_table_of_crema_d_is_named(crema, name, lines, words):
    write(crema / name, *lines)
    with pytest.raises(UserError, match=words):
        corpora.read("crema_d", crema)


# -- any table


PARTS = "path,speaker,emotion,start,end"


def table(directory: Path, *rows: str, header: str = "path,speaker,emotion") -> Path:
    path = directory / "mine.csv"
    write(path, header, *rows)
    for name in ("a.wav", "b.wav", "sub/c.flac"):
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).touch()
    return path


def test_a_table_is_a_corpus(tmp_path):
    path = table(
        tmp_path,
        "a.wav,01,ang,train,,,",
        "b.wav,NA,sad,Validation,hello,,",
        "sub/c.flac,no,sad,,,0.5,2",
        "sub/c.flac,no,ang,test,,2,",
        header="path,speaker,emotion,split,text,start,end",
    )
    utterances, rejected = corpora.read("mine", path, {"ang": "angry"})
    assert rejected == []
    assert [(u.utterance_id, u.speaker, u.emotion, u.split, u.text_id, u.start, u.end) for u in utterances] == [
        ("mine/a", "mine/01", "angry", "train", None, None, None),
        ("mine/b", "mine/NA", "sad", "dev", "hello", None, None),
        ("mine/sub/c#0.5-2", "mine/no", "sad", None, None, 0.5, 2.0),
        ("mine/sub/c#2-", "mine/no", "angry", "test", None, 2.0, None),
    ]


def test_rows_that_cannot_be_used_are_reported(tmp_path):
    path = table(
        tmp_path,
        "a.wav,1,sad,",
        "a.wav,1,sad,",
        "b.wav,,,",
        "b.wav,1,NaN,",
        "nowhere.wav,1,sad,",
        "b.wav,1,sad,later",
        header="path,speaker,emotion,split",
    )
    utterances, rejected = read("mine", path, {})
    assert len(utterances) == 1
    reasons = sorted(r.reason for r in rejected)
    words = (
        "line 3: the same",
        "line 4: no emotion",
        "line 5: no emotion",
        "line 6: no such file",
        "line 7: split",
    )
    for reason, word in zip(reasons, words, strict=True):
        assert reason.startswith(word)


@pytest.mark.parametrize(
    ("start", "end", "words"),
    [
        ("2", "1", "before it begins"),
        ("-1", "", "not a time"),
        ("soon", "", "not a time"),
        ("", "-1 days +23:00:00", "not a time"),
    ],
)
def test_a_part_that_is_none_is_reported(tmp_path, start, end, words):
    path = table(tmp_path, "b.wav,1,sad,,", f"a.wav,1,sad,{start},{end}", header=PARTS)
    _, (rejected,) = read("mine", path, {})
    assert words in rejected.reason


@pytest.mark.parametrize(
    ("rows", "header", "labels", "words"),
    [
        (["a.wav,1"], "path,speaker", {}, "no column 'emotion'"),
        (["x.wav,1,sad"], "path,speaker,emotion", {}, r"no row can be used, such as x.wav: line 2: no such file"),
        ([], "path,speaker,emotion", {}, "no row can be used"),
        (["a.wav;1;sad"], "path;speaker;emotion", {}, "seem to be separated by semicolons: 'path;speaker;emotion'"),
        (["a.wav,sad"], "path,emotion", {}, "no column 'speaker'.* where no speaker is known, write unknown"),
        (["a.wav,1,sad,hello, you"], "path,speaker,emotion,text", {}, "line 2: more fields than columns"),
        (["a.wav,1,sad,sad"], "path,speaker,emotion,emotion", {}, "'emotion' occurs more than once"),
    ],
)
def test_a_table_that_is_none_is_one_line(tmp_path, rows, header, labels, words):
    with pytest.raises(UserError, match=words) as error:
        read("mine", table(tmp_path, *rows, header=header), labels)
    assert "\n" not in str(error.value)


def test_words_for_emotions_are_understood(tmp_path):
    """Every form of the table; others are emotions of their own, near as they may be."""
    words = {"Anger": "angry", "ANG": "angry", "joy": "happy", "Pleasant_Surprise": "surprised", "FEARFUL": "fear"}
    words |= {"excited": "excited", "Contempt": "contempt", "annoyed": "annoyed", "A": "a", "normal": "normal"}
    words |= {"wut": "angry", "0": "neutral", "1.0": "happy", "bored": "sad"}
    labels = {"Wut": "angry", "0": "neutral", "1": "happy", "bored": "sad"}
    path = table(tmp_path, *(f"a.wav,1,{word},{n},{n + 1}" for n, word in enumerate(words)), header=PARTS)
    utterances, rejected = read("mine", path, labels)
    assert rejected == []
    emotions = {u.start: u.emotion for u in utterances}
    assert [emotions[n] for n in range(len(words))] == list(words.values())


def test_every_word_of_the_table_is_one_emotion():
    assert not MEANINGS.keys() & WORDS.keys()
    assert sum(map(len, WORDS.values())) == len(MEANINGS)
    assert set(EMOTIONS) <= WORDS.keys()
    assert all(plain(word) == word for word in (*MEANINGS, *WORDS))


VOTES = "path,speaker,emotion,rater"


def test_rows_of_several_raters_are_votes(tmp_path):
    path = table(
        tmp_path,
        "a.wav,1,happy,r1",
        "a.wav,1,Anger,r2",
        "a.wav,1,angry,r3",
        "b.wav,1,sad,r1",
        "b.wav,1,calm,r2",
        "sub/c.flac,2,sad,r1",
        header=VOTES,
    )
    utterances, (divided,) = read("mine", path, {})
    assert [(u.utterance_id, u.emotion, u.perceived, u.agreement) for u in utterances] == [
        ("mine/a", "angry", "angry", pytest.approx(2 / 3)),
        ("mine/sub/c", "sad", "sad", 1.0),
    ]
    assert divided.path == "b.wav"
    assert divided.reason.startswith("line 5, line 6: the raters are divided")
    assert "sad 1, calm 1" in divided.reason


def test_three_rows_of_a_recording_are_votes_without_a_column_of_raters(tmp_path):
    rows = ("a.wav,1,happy", "a.wav,1,sad", "b.wav,2,sad", "a.wav,1,sad", "b.wav,,sad")
    utterances, rejected = read("mine", table(tmp_path, *rows), {})
    assert [(u.emotion, u.agreement) for u in utterances] == [("sad", pytest.approx(2 / 3)), ("sad", 1.0)]
    assert rejected == []


@pytest.mark.parametrize(
    ("rows", "header", "words"),
    [
        (["a.wav,1,sad", "a.wav,1,happy"], "path,speaker,emotion", "'sad' and 'happy': keep one; or, if they are vote"),
        (["a.wav,1,sad", "a.wav,2,sad"], "path,speaker,emotion", "different speakers, 'mine/1' and 'mine/2'"),
        (["a.wav,1,sad,r1", "a.wav,2,sad,r2"], VOTES, "different speakers"),
        (["a.wav,1,sad,r1", "a.wav,1,happy,r1"], VOTES, "different emotions by rater 'r1', 'sad' and 'happy'"),
        (["a.wav,1,sad,dev", "a.wav,1,sad,test"], "path,speaker,emotion,split", "different splits, 'dev' and 'test'"),
    ],
)
def test_rows_that_contradict_each_other_are_an_error_that_names_both(tmp_path, rows, header, words):
    with pytest.raises(UserError, match=f"line 2 and line 3 contradict each other: they give a.wav .*{words}"):
        read("mine", table(tmp_path, *rows, header=header), {})


def test_the_suffix_stays_where_it_tells_recordings_apart(tmp_path):
    names = ("a.wav", "a.flac", "b.wav", "rec.1", "rec.2", "c.wav", "c.wav.wav")
    for name in names:
        (tmp_path / name).touch()
    utterances, rejected = read("mine", table(tmp_path, *(f"{name},1,sad" for name in names)), {})
    assert rejected == []
    assert {u.path: u.utterance_id for u in utterances} == {
        "a.wav": "mine/a.wav",
        "a.flac": "mine/a.flac",
        "b.wav": "mine/b",
        "rec.1": "mine/rec.1",
        "rec.2": "mine/rec.2",
        "c.wav": "mine/c",
        "c.wav.wav": "mine/c.wav.wav",
    }


OPTIONAL = "path,speaker,emotion,split,gender,start,end"


@pytest.mark.parametrize("nothing", ["", "nan", "NaN", "NaT", "<NA>", "None", "null", "NA"])
def test_what_is_missing_is_not_given(tmp_path, nothing):
    row = f"a.wav,1,sad,{nothing},{nothing},{nothing},{nothing}"
    ((found,), rejected) = read("mine", table(tmp_path, row, header=OPTIONAL), {})
    assert (rejected, found.utterance_id) == ([], "mine/a")
    assert (found.split, found.gender, found.start, found.end) == (None, None, None, None)


@pytest.mark.parametrize("end", ["0 days 00:00:01.500000", "0:00:01.5", "1.5"])
def test_a_length_of_time_is_seconds(tmp_path, end):
    ((found,), _) = read("mine", table(tmp_path, f"a.wav,1,sad,,,NaT,{end}", header=OPTIONAL), {})
    assert (found.start, found.end) == (None, 1.5)


def test_a_parquet_file_of_pandas_has_its_missing_values_and_times(tmp_path):
    table(tmp_path)
    columns = {
        "path": pa.array(["a.wav", "b.wav"]),
        "speaker": pa.array([1.0, math.nan]),
        "emotion": pa.array(["sad", "joy"]).dictionary_encode(),
        "gender": pa.array([math.nan, math.nan]),
        "start": pa.array([1_500_000_001, None], pa.duration("ns")),
        "end": pa.array([2.5, math.nan]),
    }
    pq.write_table(pa.table(columns), tmp_path / "mine.Parquet")
    utterances, rejected = corpora.read("mine", tmp_path / "mine.Parquet")
    assert rejected == []
    assert [(u.speaker, u.emotion, u.gender, u.start, u.end) for u in utterances] == [
        ("mine/1.0", "sad", None, 1.5, 2.5),
        ("mine/unknown#b.wav", "happy", None, None, None),
    ]


@pytest.mark.parametrize("nobody", ["", "unknown", "Unknown", "nan", "N/A", "<NA>"])
def test_a_speaker_who_is_not_known_is_one_of_the_recording(tmp_path, nobody):
    rows = [f"a.wav,{nobody},sad,1,2", f"a.wav,{nobody},sad,2,3", f"b.wav,{nobody},sad,,", "sub/c.flac,NA,sad,,"]
    utterances, rejected = read("mine", table(tmp_path, *rows, header=PARTS), {})
    assert rejected == []
    speakers = [u.speaker for u in utterances]
    assert speakers == ["mine/unknown#a.wav", "mine/unknown#a.wav", "mine/unknown#b.wav", "mine/NA"]
    assert [is_known(speaker) for speaker in speakers] == [False, False, False, True]


def test_a_table_with_tabs(tmp_path):
    path = table(tmp_path, "a.wav\t1\tsad", header="path\tspeaker\temotion").rename(tmp_path / "mine.tsv")
    assert [u.emotion for u in corpora.read("mine", path)[0]] == ["sad"]
    (tmp_path / "mine.tsv").write_text("path,speaker,emotion\na.wav,1,sad\n")
    with pytest.raises(UserError, match="separated by commas"):
        read("mine", path, {})


def test_what_is_no_table_is_said(tmp_path):
    for name, content in (("x.parquet", b"PAR1 nothing"), ("x.csv", b"path,speaker,emotion\n\xff\xfe,1,sad\n")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match="not readable as"):
            read("mine", tmp_path / name, {})
    with pytest.raises(UserError, match=r"nowhere\.csv: no such table; set experiment\.corpora\.mine "):
        corpora.read("mine", tmp_path / "nowhere.csv")
    with pytest.raises(UserError, match=r"experiment\.labels\.tess: only for tables"):
        corpora.read("tess", tmp_path, {"ps": "surprised"})
    with pytest.raises(UserError, match="a table needs a name of its own"):
        corpora.read("tess", table(tmp_path, "a.wav,1,sad"))


def test_parts_of_a_long_recording_that_are_close_are_two(tmp_path):
    path = table(tmp_path, "a.wav,1,sad,12345.61,12347.01", "a.wav,1,sad,12345.64,12347.04,", header=PARTS)
    utterances, rejected = read("mine", path, {})
    assert rejected == []
    assert [u.utterance_id for u in utterances] == ["mine/a#12345.61-12347.01", "mine/a#12345.64-12347.04"]


def test_an_impossible_name_is_a_file_that_is_not_there(tmp_path):
    _, (rejected,) = read("mine", table(tmp_path, "a.wav,1,sad", f"{'a' * 300}.wav,1,sad"), {})
    assert rejected.reason == "line 3: no such file"


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_damaged_parquet_file_is_read_or_refused(tmp_path, changes):
    path = table(tmp_path).with_suffix(".parquet")
    pq.write_table(pa.table({"path": ["a.wav"], "speaker": ["1"], "emotion": ["sad"], "audio": [b"1"]}), path)
    content = bytearray(path.read_bytes())
    for position, value in changes:
        content[position % len(content)] = value
    path.write_bytes(content)
    try:
        utterances, _ = read("mine", path, {})
    except UserError as error:
        assert str(path) in str(error)  # noqa: PT017
    else:
        assert len(utterances) == 1


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(
        st.tuples(
            st.text(st.characters(codec="utf-8", exclude_characters="\0\r\n"), min_size=1, max_size=8).filter(
                lambda text: text.strip() == text and text not in NO_VALUE and text.lower() not in NOT_KNOWN
            ),
            st.sampled_from(EMOTIONS),
        ),
        min_size=1,
        max_size=3,
    )
)
def test_csv_and_parquet_say_the_same(tmp_path, rows):
    names = ("a.wav", "b.wav", "sub/c.flac")
    table(tmp_path)
    columns = {
        "path": list(names[: len(rows)]),
        "speaker": [speaker for speaker, _ in rows],
        "emotion": [emotion for _, emotion in rows],
    }
    with (tmp_path / "mine.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    pq.write_table(pa.table(columns), tmp_path / "mine.parquet")
    from_csv, from_parquet = (read("mine", tmp_path / f"mine.{kind}", {}) for kind in ("csv", "parquet"))
    assert from_csv == from_parquet
    assert {u.speaker for u in from_csv[0]} == {f"mine/{speaker}" for speaker, _ in rows}


@pytest.mark.parametrize(
    "column",
    [
        pa.array([2**31 - 1], pa.int32()).cast(pa.date32()),  # in the year 5 881 580
        pa.array([2**62], pa.int64()).cast(pa.timestamp("us")),
        pa.array([b"\xff\xfe"]),
    ],
)
def test_a_value_of_parquet_that_is_no_text_is_one_line(tmp_path, column):
    (tmp_path / "a.wav").touch()
    pq.write_table(pa.table({"path": ["a.wav"], "speaker": ["s"], "emotion": column}), tmp_path / "mine.parquet")
    with pytest.raises(UserError, match=r"mine\.parquet: not readable as parquet") as caught:
        read("mine", tmp_path / "mine.parquet", {})
    assert "\n" not in str(caught.value)
    pq.write_table(pa.table({"path": column, "audio": [b"RIFF"], "emotion": ["sad"]}), tmp_path / "other.parquet")
    assert not inside.holds_recordings(tmp_path / "other.parquet")


def test_a_huge_cell_is_not_quoted_whole(tmp_path):
    """A quote that is not closed makes one cell of a whole table."""
    huge = "x" * 100_000
    (tmp_path / "a.wav").touch()
    for rows in (
        [f"{huge},s,sad"],
        [f"a.wav,s,{huge}", "a.wav,s,sad"],
        [f"a.wav,{huge},sad", "a.wav,s,sad"],
        [f"a.wav,s,e{n}" for n in range(1000)],
    ):
        with pytest.raises(UserError) as caught:
            read("mine", table(tmp_path, *rows), {})
        assert len(str(caught.value)) < 400 + len(str(tmp_path))
    with pytest.raises(UserError) as caught:
        read("mine", table(tmp_path, "a.wav", header=huge), {})
    assert len(str(caught.value)) < 400 + len(str(tmp_path))


def test_names_of_classes_are_for_numbers(tmp_path):
    """A file may claim that its column has numbers of classes, and hold words."""
    features = {"info": {"features": {"emotion": {"_type": "ClassLabel", "names": ["angry", "sad"]}}}}
    for column, found in ((["sad"], "sad"), ([1], "sad")):
        made = pa.table({"audio": [b"RIFF"], "speaker": ["s"], "emotion": column})
        made = made.replace_schema_metadata({b"huggingface": json.dumps(features).encode()})
        path = tmp_path / str(column[0]) / "mine.parquet"
        path.parent.mkdir()
        pq.write_table(made, path)
        rows = pq.read_table(inside.unpack(path, path.parent / "out")).to_pylist()
        assert [row["emotion"] for row in rows] == [found]


def test_a_word_of_spaces_is_no_emotion(tmp_path):
    for name in ("a.wav", "b.wav", "c.wav"):
        (tmp_path / name).touch()
    columns = {"path": ["a.wav", "b.wav", "c.wav"], "speaker": ["s"] * 3, "emotion": [" ", "_", "sad"]}
    pq.write_table(pa.table(columns), tmp_path / "mine.parquet")
    utterances, rejected = read("mine", tmp_path / "mine.parquet", {})
    assert [utterance.path for utterance in utterances] == ["c.wav"]
    assert [one.reason for one in rejected] == ["row 1: no emotion", "row 2: no emotion"]

"""CREMA-D's own tables, and corpora that a table describes."""

from __future__ import annotations

import csv
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ser_ray import corpora
from ser_ray.corpora.table import read
from ser_ray.schema import EMOTIONS, TIE, UserError

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
        "b.wav,,sad,",
        "b.wav,1,blue,",
        "nowhere.wav,1,sad,",
        "b.wav,1,sad,later",
        header="path,speaker,emotion,split",
    )
    utterances, rejected = read("mine", path, {})
    assert len(utterances) == 1
    reasons = [r.reason for r in rejected]
    words = (
        "line 3: the same",
        "line 4: no speaker",
        "line 5: emotion 'blue'",
        "line 6: no such file",
        "line 7: split",
    )
    for reason, word in zip(reasons, words, strict=True):
        assert reason.startswith(word)


@pytest.mark.parametrize(
    ("start", "end", "words"), [("2", "1", "before it begins"), ("-1", "", "not a time"), ("nan", "", "not a time")]
)
def test_a_part_that_is_none_is_reported(tmp_path, start, end, words):
    path = table(tmp_path, "b.wav,1,sad,,", f"a.wav,1,sad,{start},{end}", header=PARTS)
    _, (rejected,) = read("mine", path, {})
    assert words in rejected.reason


@pytest.mark.parametrize(
    ("rows", "header", "labels", "words"),
    [
        (["a.wav,1"], "path,speaker", {}, "no column 'emotion'"),
        (["a.wav,1,blue"], "path,speaker,emotion", {}, r"no row can be used, such as a.wav"),
        ([], "path,speaker,emotion", {}, "no row can be used"),
        (["a.wav,1,x"], "path,speaker,emotion", {"x": "blue"}, "'blue' is not an emotion"),
        (["a.wav,1,sad,hello, you"], "path,speaker,emotion,text", {}, "line 2: more fields than columns"),
        (["a.wav,1,sad,sad"], "path,speaker,emotion,emotion", {}, "'emotion' occurs more than once"),
    ],
)
def test_a_table_that_is_none_is_one_line(tmp_path, rows, header, labels, words):
    with pytest.raises(UserError, match=words) as error:
        read("mine", table(tmp_path, *rows, header=header), labels)
    assert "\n" not in str(error.value)


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
                lambda text: text.strip() == text
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

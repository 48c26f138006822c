"""What an experiment leaves out: what repeats, what contradicts itself, what a file names; and nothing else."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from ser_ray.protocols.exclusion import flawed, read_list, recordings, without
from ser_ray.schema import UserError
from ser_ray.speech.matching import SameRecording

ROWS = [
    {"utterance_id": i, "speaker": i[0], "emotion": emotion, "audio_sha256": sha, "label": 0}
    for i, emotion, sha in (
        ("a1", "sad", "x"),
        ("a2", "sad", "x"),
        ("a3", "sad", "y"),
        ("b1", "sad", "z"),
        ("b2", "happy", "z"),
        ("b3", "happy", "w"),
        ("c1", "happy", "v"),
    )
]
PAIRS = [SameRecording("a2", "a3", 0.01), SameRecording("b3", "elsewhere", 0.0)]


def left(exclude: list[str], known: tuple[str, ...] = ()) -> tuple[list[str], dict[str, tuple[str, str]]]:
    ids = [row["utterance_id"] for row in ROWS]
    kept, out = without(pa.Table.from_pylist(ROWS), exclude, [*ids, *known], lambda: PAIRS)
    return kept["utterance_id"].to_pylist(), {
        row["utterance_id"]: (row["by"], row["reason"]) for row in out.to_pylist()
    }


def write(path: Path, *lines: str) -> str:
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_versions_of_versions_are_one_recording():
    groups = [[row["utterance_id"] for row in group] for group in recordings(ROWS, PAIRS)]
    assert groups == [["a1", "a2", "a3"], ["b1", "b2"]]


def test_what_repeats_and_what_contradicts_itself():
    assert left(["duplicates", "mislabelled"]) == (
        ["a1", "b3", "c1"],
        {
            "a2": ("duplicates", "the recording is that of a1"),
            "a3": ("duplicates", "the recording is that of a1"),
            "b1": ("mislabelled", "one recording is happy and sad"),
            "b2": ("mislabelled", "one recording is happy and sad"),
        },
    )
    assert left(["duplicates"])[0] == ["a1", "b1", "b3", "c1"]
    assert left(["mislabelled"])[0] == ["a1", "a2", "a3", "b3", "c1"]


def test_after_both_nothing_is_left_to_exclude():
    kept = [row for row in ROWS if row["utterance_id"] not in flawed(ROWS, PAIRS)]
    assert flawed(kept, PAIRS) == {}


def test_a_file_names_utterances_with_a_reason(tmp_path):
    path = write(tmp_path / "bad.csv", "reason,utterance_id", "laughter,c1", ",a1", "not used here,d9", "again,c1")
    assert left([path], known=("d9",)) == (
        ["a2", "a3", "b1", "b2", "b3"],
        {"a1": ("bad.csv", ""), "c1": ("bad.csv", "laughter")},
    )
    assert left([path, "duplicates"], known=("d9",))[0] == ["b1", "b3"]


def test_rows_that_do_not_say_yes_are_kept(tmp_path):
    path = write(tmp_path / "audit.csv", "utterance_id,exclude", "a1,yes", "a2,", "a3,No", ",", "c1, YES ")
    assert list(read_list(path)) == ["a1", "c1"]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (
            ["utterance_id", "a1", "zz", "yy"],
            r"line 3: 'zz' \(and 1 more\) is no utterance of the experiment's corpora",
        ),
        (["id", "a1"], "line 1: no column utterance_id"),
        (["utterance_id,reason", "a1,x", ",x"], "line 3: no utterance_id"),
        (["utterance_id,exclude", "a1,perhaps"], "line 2: exclude is 'perhaps'; write yes, or leave it empty"),
        (["utterance_id", '"a1'], "not readable as CSV in UTF-8"),
        (["utterance_id", *(row["utterance_id"] for row in ROWS)], "leaves out every utterance"),
    ],
)
def test_a_file_that_does_not_fit_is_an_error_in_one_line(tmp_path, lines, said):
    with pytest.raises(UserError, match=said) as error:
        left([write(tmp_path / "bad.csv", *lines)])
    assert "experiment.exclude" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_missing_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"experiment.exclude: .*nowhere.csv: no such file"):
        left([str(tmp_path / "nowhere.csv")])


def test_a_huge_cell_is_not_quoted_whole(tmp_path):
    for header, cells in (
        ("utterance_id", "x" * 5000),
        ("utterance_id", "\x01" * 5000),
        ("utterance_id,exclude", f"a1,{'x' * 5000}"),
    ):
        with pytest.raises(UserError) as caught:
            left([write(tmp_path / "list.csv", header, cells)])
        assert len(str(caught.value)) < 300 + len(str(tmp_path))

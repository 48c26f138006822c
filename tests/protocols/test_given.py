"""Folds from a CSV file: what is written is read, and what cannot be meant is refused with its line."""

from __future__ import annotations

import pytest

from ser_ray.protocols.given import read_folds
from ser_ray.schema import UserError


def test_folds_are_read_by_number_whatever_their_order(tmp_path):
    path = tmp_path / "folds.csv"
    path.write_text(
        '\ufefffold,note,speaker\n2,x,a/03\n0,,a/01\n\n1,"two\nlines",a/02\n 0 ,, a/04 \n', encoding="utf-8"
    )
    assert read_folds(path) == (("a/01", "a/04"), ("a/02",), ("a/03",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("speaker\na/01\n", "folds.csv, line 1: no column fold"),
        ("", "line 1: no column fold and speaker"),
        ("speaker,fold\na/01,0\na/02,one\n", "folds.csv, line 3: fold 'one' is not a number"),
        ("speaker,fold\na/01,-1\n", "line 2: fold '-1'"),
        ("speaker,fold\na/01\n", "line 2: fold ''"),
        ("speaker,fold\na/01," + "9" * 9999 + "\n", "line 2: fold '999"),
        ("speaker,fold\n,0\n", "line 2: no speaker"),
        ("speaker,fold\na/01,0\na/01,1\n", "line 3: a/01 is in line 2 already"),
        ("speaker,fold\na/01,0\na/02,2\n", "no speaker is in fold 1"),
        ('speaker,fold\n"a/01,0\n', "not readable as CSV"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_its_line(tmp_path, content, message):
    path = tmp_path / "folds.csv"
    path.write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        read_folds(path)
    assert str(path) in str(caught.value)


def test_other_encodings_and_missing_files_are_refused(tmp_path):
    path = tmp_path / "folds.csv"
    path.write_bytes("speaker,fold\nJürgen,0\n".encode("latin-1"))
    with pytest.raises(UserError, match="not readable as CSV in UTF-8"):
        read_folds(path)
    with pytest.raises(UserError, match="no such file"):
        read_folds(tmp_path / "none.csv")


def test_a_file_of_a_header_has_no_folds(tmp_path):
    path = tmp_path / "folds.csv"
    path.write_text("speaker,fold\n")
    assert read_folds(path) == ()


def test_a_huge_cell_is_not_quoted_whole(tmp_path):
    path = tmp_path / "folds.csv"
    for rows in (f"a,{'x' * 5000}\n", f"{'x' * 5000},0\n{'x' * 5000},1\n"):
        path.write_text(f"speaker,fold\n{rows}")
        with pytest.raises(UserError) as caught:
            read_folds(path)
        assert len(str(caught.value)) < 300 + len(str(tmp_path))

"""``ser-ray predict`` with what people bring: names that are bytes, folders of anything, outputs that are no files."""

from __future__ import annotations

import csv
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from backbone_fixtures import experiment

import ser_ray
from ser_ray.__main__ import main
from ser_ray.models import checkpoint
from ser_ray.models.classifier import build
from ser_ray.speech import formats

RATE = 16_000
NAMES = (
    "P07 [neutral].wav",
    "two\nlines.wav",
    "😀 语音.wav",
    "-dash.wav",
    "x" * 251 + ".wav",
    "[/].wav",
    "a b,c;'\".wav",
)


@pytest.fixture(scope="module")
def best(backbones_dir, tmp_path_factory) -> str:
    directory = tmp_path_factory.mktemp("checkpoint") / "best"
    checkpoint.save(build(experiment(backbones_dir / "whisper", ("angry", "sad"))), directory, {"epoch": 0})
    return str(directory)


def write(path: Path, seconds: float = 1.0) -> Path:
    """Speech, or what passes for it, under any name."""
    noise = 0.2 * np.random.default_rng(0).standard_normal(int(seconds * RATE))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        soundfile.write(file, noise.clip(-0.9, 0.9), RATE, format="WAV")
    return path


def answers(capsys) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_names_are_bytes(best, tmp_path, capsys):
    for name in NAMES:
        write(tmp_path / name)
    write(Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.wav")))
    assert main(["predict", best, str(tmp_path), "--format", "jsonl"]) == 0
    found = answers(capsys)
    assert {answer["path"] for answer in found} == {str(tmp_path / name) for name in (*NAMES, r"caf\xe9.wav")}
    assert all(answer["emotion"] for answer in found)
    assert main(["predict", best, str(tmp_path), "--format", "csv", "--output", str(tmp_path / "o.csv")]) == 0
    with (tmp_path / "o.csv").open(newline="") as file:
        assert {row["path"] for row in csv.DictReader(file)} == {answer["path"] for answer in found}
    capsys.readouterr()
    assert main(["predict", best, str(tmp_path)]) == 0
    table = capsys.readouterr().out
    assert len(table.splitlines()) == 1 + len(found)
    for name in (*NAMES[2:], NAMES[0], r"two\nlines.wav", r"caf\xe9.wav"):
        assert name in table


def test_a_name_that_begins_with_a_dash_is_no_option(best, tmp_path, monkeypatch, capsys):
    write(tmp_path / "-dash.wav")
    monkeypatch.chdir(tmp_path)
    assert main(["predict", best, "-dash.wav", "--format", "jsonl"]) == 0
    assert [answer["path"] for answer in answers(capsys)] == ["-dash.wav"]
    assert main(["predict", best, "-dash.wav", "--formt", "jsonl"]) == 2


def test_nothing_bad_costs_the_others_their_answers(best, tmp_path, capsys):
    good = write(tmp_path / "good.wav")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.wav").write_text("no audio")
    os.mkfifo(tmp_path / "empty" / "text.txt")
    given = [tmp_path / "missing.wav", tmp_path / "empty", tmp_path / "text.wav", Path("/dev/null"), "y" * 300, good]
    assert main(["predict", best, *map(str, given), "--format", "jsonl"]) == 1
    captured = capsys.readouterr()
    found = [json.loads(line) for line in captured.out.splitlines()]
    assert [answer["path"] for answer in found] == [str(path) for path in given]
    assert [bool(answer["emotion"]) for answer in found] == [False] * 5 + [True]
    for words in (
        "no such file",
        "a folder without recordings",
        "cannot be decoded",
        "not a file",
        "File name too long",
    ):
        assert words in captured.err
    assert main(["predict", best, str(tmp_path / "missing.wav"), str(tmp_path / "empty")]) == 2
    said = capsys.readouterr().err
    assert "missing.wav: no such file or folder; " in said
    assert "empty: no audio in this folder" in said


@pytest.mark.parametrize("is_there", [False, True])
def test_other_formats_are_not_passed_over(best, tmp_path, monkeypatch, capsys, is_there):
    if is_there:
        pytest.importorskip("av")
    monkeypatch.setattr(formats, "has_pyav", lambda: is_there)
    write(tmp_path / "in" / "a.wav")
    (tmp_path / "in" / "b.m4a").write_bytes(b"\0\0\0\x20ftypM4A ")
    (tmp_path / "in" / "c.webm").write_bytes(b"\x1aE\xdf\xa3")
    write(tmp_path / "in" / "._d.wav")
    assert main(["predict", best, str(tmp_path / "in"), "--format", "jsonl"]) == 1
    captured = capsys.readouterr()
    names = [Path(json.loads(line)["path"]).name for line in captured.out.splitlines()]
    assert names == ["a.wav", "b.m4a", "c.webm"]
    assert ("2 recordings, such as" in captured.err) is not is_there
    assert ("need PyAV: pip install 'ser-ray[formats]'" in captured.err) is not is_there


def test_links_are_followed(best, tmp_path, capsys):
    write(tmp_path / "shared" / "a.wav")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link").symlink_to(tmp_path / "shared")
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "dangling.wav").symlink_to(tmp_path / "nothing")
    assert main(["predict", best, str(tmp_path / "in"), "--format", "jsonl"]) == 1
    found = answers(capsys)
    assert [Path(answer["path"]).relative_to(tmp_path / "in").as_posix() for answer in found] == [
        "dangling.wav",
        "link/a.wav",
    ]
    assert found[0]["reason"] == "no such file"


def test_a_long_recording_is_answered(best, tmp_path, capsys):
    write(tmp_path / "call.wav", 75)
    assert main(["predict", best, str(tmp_path / "call.wav"), "--format", "csv"]) == 0
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert [(row["start"], row["end"]) for row in rows] == [
        ("0.0", "25.0"),
        ("25.0", "50.0"),
        ("50.0", "75.0"),
        ("", ""),
    ]
    assert main(["predict", best, str(tmp_path / "call.wav")]) == 0
    assert "25.0 s" in capsys.readouterr().out


def test_output_goes_through_links_and_spares_devices(best, tmp_path, capsys):
    recording = write(tmp_path / "a.wav")
    (tmp_path / "real.csv").write_text("old")
    (tmp_path / "link.csv").symlink_to("real.csv")
    assert main(["predict", best, str(recording), "--format", "csv", "--output", str(tmp_path / "link.csv")]) == 0
    assert (tmp_path / "link.csv").is_symlink()
    assert (tmp_path / "real.csv").read_text().startswith("path,")
    before = recording.read_bytes()
    for output in ("/dev/null", str(tmp_path), str(recording)):
        assert main(["predict", best, str(recording), "--output", output]) == 2
        assert "--output" in capsys.readouterr().err
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)
    assert recording.read_bytes() == before


def test_standard_input_is_a_recording(best, tmp_path):
    content = bytearray(write(tmp_path / "a.wav").read_bytes())
    content[4:8] = content[40:44] = b"\xff\xff\xff\xff"
    command = [sys.executable, "-m", "ser_ray.predict", best, "-", "--format", "jsonl"]
    done = subprocess.run(command, input=bytes(content), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    (answer,) = map(json.loads, done.stdout.splitlines())
    assert answer["path"] == "-"
    assert answer["emotion"] in ("angry", "sad")


def test_a_pipe_in_a_folder_is_not_waited_for(best, tmp_path, capsys):
    """Nobody writes into it: reading would not end."""
    write(tmp_path / "a.wav")
    os.mkfifo(tmp_path / "b.wav")
    assert main(["predict", best, str(tmp_path), "--format", "jsonl"]) == 0
    assert [Path(answer["path"]).name for answer in answers(capsys)] == ["a.wav"]


def test_a_set_is_added_to_every_answer(best, tmp_path, capsys):
    """In every format the emotions from the threshold on, the most probable first; what cannot be used has none."""
    calibrated = shutil.copytree(best, tmp_path / "best")
    write(tmp_path / "in" / "a.wav")
    write(tmp_path / "in" / "b.wav", 0.8)
    (tmp_path / "in" / "bad.wav").write_bytes(b"RIFF")
    given = [str(calibrated), str(tmp_path / "in")]
    for least, number in ((0.0, 2), (0.6, 1)):
        (calibrated / "calibration.json").write_text(json.dumps({"temperature": 5.0, "least_probability": least}))
        assert main(["predict", *given, "--sets", "--format", "jsonl"]) == 1
        *found, bad = answers(capsys)
        assert bad["set"] == []
        for answer in found:
            by_rank = sorted(answer["probabilities"], key=answer["probabilities"].get, reverse=True)
            assert max(answer["probabilities"].values()) < 0.6, "so that the second threshold leaves out all but one"
            assert answer["set"] == by_rank[:number]
        assert main(["predict", *given, "--sets", "--format", "csv"]) == 1
        rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
        assert [row["set"] for row in rows] == ["|".join(answer["set"]) for answer in (*found, bad)]
        assert main(["predict", *given, "--sets"]) == 1
        table = capsys.readouterr().out
        assert table.splitlines()[0].split()[:3] == ["file", "emotion", "set"]
        assert " or ".join(found[0]["set"]) in table
        by_api = list(ser_ray.load(calibrated, device="cpu").predict(tmp_path / "in", sets=True))
        assert [row["set"] for row in by_api] == [answer["set"] or None for answer in (*found, bad)]
    assert main(["predict", *given, "--format", "jsonl"]) == 1
    assert all("set" not in answer for answer in answers(capsys))


def test_a_checkpoint_without_a_threshold_has_no_sets(best, tmp_path, capsys):
    write(tmp_path / "a.wav")
    assert main(["predict", best, str(tmp_path / "a.wav"), "--sets"]) == 2
    said = capsys.readouterr().err
    assert "no threshold for sets" in said
    assert len(said.splitlines()) == 1

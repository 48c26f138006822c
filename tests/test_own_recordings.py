"""What people bring, from the folder to the table: stand-ins for nEMO, BAVED and URDU, and docs/from-a-folder.md by its
own commands."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from standin_corpora import Truth, baved_like, nemo_like, urdu_like

from ser_ray.__main__ import main

REPOSITORY = Path(__file__).resolve().parent.parent
PAGE = REPOSITORY / "docs" / "from-a-folder.md"
BAVED_PATTERN = "{1}/{speaker}-{gender}-{4}-{text}-{emotion}-{7}.*"
"""What `ser-ray table` offers, with the fields in place of their numbers."""

PRINTED = PAGE.read_text(encoding="utf-8")
"""What the page quotes is what these tests see."""

Rows = list[dict[str, str]]


@pytest.fixture
def table(tmp_path, monkeypatch, capsys) -> Callable[..., tuple[Rows, list[str]]]:
    """`ser-ray table recordings`: the rows that it writes, and the lines that it says."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[Rows, list[str]]:
        assert main(["table", "recordings", *arguments]) == 0
        said = capsys.readouterr()
        (tmp_path / "mine.csv").write_text(said.out)
        return list(csv.DictReader(io.StringIO(said.out))), said.err.splitlines()

    return run


def truths(rows: Rows) -> list[Truth]:
    return [Truth(row["path"].removeprefix("recordings/"), row["speaker"], row["emotion"]) for row in rows]


def audited(tmp_path: Path, capsys: pytest.CaptureFixture[str], **experiment: object) -> tuple[dict, str]:
    """`ser-ray new mine` with more keys of experiment, and `ser-ray audit` of it: audit.json, and what it says."""
    assert main(["new", "mine"]) == 0
    space = capsys.readouterr().out
    keys = "".join(f"\n  {key}: {json.dumps(value)}" for key, value in experiment.items())
    (tmp_path / "mine.yaml").write_text(space.replace("\nexperiment:", f"\nexperiment:{keys}"))
    assert main(["audit", "mine.yaml", "resources.workers=0", f"storage.cache={tmp_path}/cache"]) == 0
    return json.loads((tmp_path / "results" / "mine" / "audit.json").read_text()), capsys.readouterr().out


def quoted(line: str) -> bool:
    """Whether the page has a line, but for where it was run, spaces at its end, and tables of numbers."""
    return re.split(r" /\w", line)[0].rstrip() in PRINTED or line.startswith("  ")


def test_a_folder_a_speaker(tmp_path, table, capsys):
    """nEMO's layout. One speaker is called BOR, which is boredom's code elsewhere."""
    truth = nemo_like(tmp_path / "recordings")
    rows, said = table()
    assert truths(rows) == truth
    assert said[:3] == [
        "108 recordings",
        "emotion, from part 1 of the name: anger 18 (counts as angry), fear 18, happiness 18 (counts as happy), "
        "neutral 18, sadness 18 (counts as sad), surprise 18 (counts as surprised)",
        "speaker, from the folder: 6 of them: AKA 18, BOR 18, EWA 18, JAN 18, OLA 18, PIO 18",
    ]
    assert "\n".join(said) in PRINTED
    audit, out = audited(tmp_path, capsys)
    assert [line for line in out.splitlines() if not quoted(line)] == []
    assert audit["splits"]["test"]["emotions"] == dict.fromkeys(
        ("angry", "fear", "happy", "neutral", "sad", "surprised"), 6
    )
    assert "left out, as no utterance is one: disgust" in out
    assert "audit: no leak found" in out


def test_numbers_as_labels(tmp_path, table, capsys):
    """BAVED's layout. Nothing tells the word (the folder) from the speaker, so nothing is guessed; with the pattern
    that is offered, all is known."""
    truth = baved_like(tmp_path / "recordings")
    rows, said = table()
    assert {(row["speaker"], row["emotion"]) for row in rows} == {("unknown", "")}
    assert said[1:3] == [
        "emotion: not known: no folder and no part of the names has words for emotions",
        "speaker: not known; splits are then by recording, and stamped LEAKY",
    ]
    assert said[4] == "  {1}: 7 different: 0, 1, 2, 3, 4, 5, 6"
    assert sorted(said[5].removeprefix("  {2}: 6 different: ").split(", ")) == ["12", "3", "31", "46", "53", "56"]
    assert "\n".join(said) in PRINTED
    offered = re.search(r"--pattern '([^']+)'", said[-1])
    named = {"{2}": "{speaker}", "{3}": "{gender}", "{5}": "{text}", "{6}": "{emotion}"}
    assert re.sub(r"\{\d\}", lambda found: named.get(found[0], found[0]), offered[1]) == BAVED_PATTERN
    rows, said = table("--pattern", BAVED_PATTERN)
    assert truths(rows) == truth
    assert said[1:4] == [
        "emotion, from {emotion} of the pattern: 0 42, 1 42, 2 42",
        "not among the emotions of the default: 0, 1, 2. To train on them write emotions: [0, 1, 2] in the section "
        "experiment of the search space",
        "speaker, from {speaker} of the pattern: 6 of them: 12 21, 3 21, 31 21, 46 21, 53 21, 56 21",
    ]
    assert "\n".join(said[1:4]) in PRINTED
    for experiment, levels in (
        ({"emotions": [0, 1, 2]}, "012"),
        ({"emotions": ["low", "normal", "high"], "labels": {"mine": {"0": "low", "1": "normal", "2": "high"}}},
         ("low", "normal", "high")),
    ):  # fmt: skip
        audit, out = audited(tmp_path, capsys, **experiment)
        assert audit["splits"]["test"]["emotions"] == dict.fromkeys(levels, 14)
        assert "of no class" not in out


def test_a_folder_an_emotion(tmp_path, table, capsys):
    """URDU's layout: most speakers have one emotion, and the audit says so."""
    truth = urdu_like(tmp_path / "recordings")
    rows, said = table()
    assert truths(rows) == truth
    assert said[1] == (
        "emotion, from the folder: Angry 24 (counts as angry), Happy 24 (counts as happy), Neutral 24 (counts as "
        "neutral), Sad 24 (counts as sad)"
    )
    assert said[2].startswith("speaker, from part 1 of the name: 14 of them: SF10 3, SF12 3, SF14 3, SF2 12, ")
    assert "\n".join(said[:3]) in PRINTED
    audit, out = audited(tmp_path, capsys)
    assert sum(part["speakers"] for part in audit["splits"].values()) == 14
    confounded = next(line for line in out.splitlines() if "are confounded in mine: 8 of 14 speakers" in line)
    assert quoted(confounded)


@pytest.mark.parametrize(
    ("name", "speaker"),
    [
        ("{s}/{e}_s{t:02}_1.wav", "unknown"),  # a folder, or what looks more like a speaker but is in all folders
        ("{place}/spk{s}_{e}_{t}.wav", "spk{s}"),  # each of them in one folder
        ("0{s}/{e}_{t}.wav", "0{s}"),  # numbers beside words for emotions
        ("{split}/spk{s}_{e}_{t}.wav", "spk{s}"),  # folders of splits are no speakers
    ],
)
def test_a_speaker_is_guessed_where_one_place_can_be(tmp_path, table, name, speaker):
    expected = {}
    for s in range(1, 5):
        for e in ("angry", "sad"):
            for t in range(2):
                where = {"s": s, "e": e, "t": t, "place": ("hall", "yard")[s % 2], "split": ("train", "test")[t]}
                path = tmp_path / "recordings" / name.format(**where)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
                expected[f"recordings/{name.format(**where)}"] = speaker.format(**where)
    rows, said = table()
    assert {row["path"]: row["speaker"] for row in rows} == expected
    assert any(line.startswith("speaker: not known") for line in said) == (speaker == "unknown")


def test_a_pattern_without_a_speaker_says_so(tmp_path, table):
    baved_like(tmp_path / "recordings")
    _, said = table("--pattern", "*-{emotion}-{}.wav")
    assert said[-1] == "add {speaker} to the pattern, or fill the column"


@pytest.mark.ray
@pytest.mark.slow
def test_the_page_in_its_five_commands(tmp_path):
    """As they stand there, in an empty directory; but for a smaller search."""
    nemo_like(tmp_path / "recordings")
    block = re.search(r"```bash\n(ser-ray table.*?)```", PRINTED, re.S)[1]
    commands = [line.partition("  #")[0] for line in block.splitlines()]
    assert len(commands) == 5
    small = " experiment.backbone=embedded/tiny-whisper tune.trials=2 tune.finalists=1 experiment.epochs=1"
    script = "\n".join(line + (small if line.startswith("ser-ray tune") else "") for line in commands)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(REPOSITORY), "HOME": str(tmp_path / "home")}
    done = subprocess.run(
        ["bash", "-e", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1500,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "results" / "mine" / "report.html").is_file()
    assert json.loads((tmp_path / "results" / "mine" / "evaluation" / "test.json").read_text())["uar"] > 0
    assert "recordings/AKA/anger_12_1.wav" in done.stdout.partition("report.html")[2], "the answer of the fifth"


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("nothing_is_trained")
def test_a_whole_search_without_what_the_audit_names(tmp_path, table, capsys):
    """A recording that speaker AKA has too is copied to every other speaker: the split leaks until it is excluded, by
    kind and by audit.csv; then it is counted, and in no prediction."""
    nemo_like(tmp_path / "recordings")
    for speaker in ("BOR", "EWA", "JAN", "OLA", "PIO"):
        shutil.copy(tmp_path / "recordings/AKA/anger_12_1.wav", tmp_path / "recordings" / speaker / "anger_90_4.wav")
    table()
    audit, _ = audited(tmp_path, capsys)
    assert audit["leaky"]
    bad = {f"mine/recordings/{speaker}/anger_90_4" for speaker in ("BOR", "EWA", "JAN", "OLA", "PIO")}
    listed = tmp_path / "listed.csv"
    shutil.copy(tmp_path / "results" / "mine" / "audit.csv", listed)
    for name, exclude, by in (("kinds", "[duplicates, mislabelled]", "duplicates"), ("file", listed, "listed.csv")):
        small = ["experiment.backbone=embedded/tiny-whisper", "tune.trials=1", "experiment.epochs=1"]
        asked = [f"experiment.name={name}", f"experiment.exclude={exclude}", f"storage.cache={tmp_path}/cache"]
        assert main(["tune", "mine.yaml", *small, *asked]) == 0
        out = capsys.readouterr().out
        assert f"audit: excluded: 5 utterances (5 by {by})" in out
        assert "LEAKY" not in out
        results = tmp_path / "results" / name
        everything = pq.read_table(results / "evaluation" / "predictions.parquet")["utterance_id"].to_pylist()
        assert bad.isdisjoint(everything)
        assert any(utterance.endswith("anger_40_2") for utterance in everything)
        page = (results / "report.html").read_text(encoding="utf-8")
        assert "5 utterances are in no split" in page
        assert f"5 by {by}" in page
        stamped = [
            page,
            (results / "best" / "README.md").read_text(),
            (results / "evaluation" / "test.json").read_text(),
        ]
        assert not any("LEAKY" in text or '"leaky": true' in text for text in stamped)

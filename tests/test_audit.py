"""``ser-ray audit`` finds what was planted in a corpus, says so before training, and leaves it in the results."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
import yaml
from rich.console import Console

from ser_ray import config
from ser_ray.__main__ import main
from ser_ray.train import train

RATE = 16_000
EMOTIONS = {"05": "angry", "03": "happy", "04": "sad"}


def babble(seed: int, seconds: float = 1.5) -> np.ndarray:
    """Noise whose colour moves as speech does: no two seeds are alike."""
    rng = np.random.default_rng(seed)
    spectrum = rng.standard_normal((int(seconds * 10) + 1, 20))
    frames = np.fft.rfft(rng.standard_normal((int(seconds * RATE / 320), 640)) * np.hanning(640), axis=1)
    band = np.clip(np.arange(321) * 25 // 200, 0, 19)
    shaped = np.fft.irfft(frames * np.exp(1.2 * spectrum[np.arange(len(frames)) * 10 * 320 // RATE][:, band]), axis=1)
    waveform = np.zeros(len(frames) * 320 + 320)
    for n, frame in enumerate(shaped):
        waveform[320 * n : 320 * n + 640] += frame
    return 0.3 * waveform / np.abs(waveform).max()


def name(actor: int, emotion: str, take: int) -> str:
    return f"Actor_{actor:02d}/03-01-{emotion}-01-{take:02d}-01-{actor:02d}.wav"


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> Path:
    """12 actors, three emotions, two takes each; fold 0 of the four given ones tests actors 1 to 3."""
    directory = tmp_path_factory.mktemp("clean") / "ravdess"
    for number, (actor, emotion, take) in enumerate((a, e, t) for a in range(1, 13) for e in EMOTIONS for t in (1, 2)):
        path = directory / name(actor, emotion, take)
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, babble(number, 1.0 + 0.01 * number), RATE)
    return directory


@pytest.fixture
def corpus(clean, tmp_path) -> Path:
    return Path(shutil.copytree(clean, tmp_path / "ravdess"))


def write_space(directory: Path, corpus: Path) -> Path:
    folds = [[f"ravdess/{actor:02d}" for actor in range(first, first + 3)] for first in (1, 4, 7, 10)]
    experiment = {
        "name": "planted",
        "corpora": {"ravdess": str(corpus)},
        "emotions": list(EMOTIONS.values()),
        "protocol": {"scheme": "given_folds", "given": folds},
        "backbone": "embedded/tiny-whisper",
        "epochs": 1,
    }
    storage = {"results": str(directory / "results"), "cache": str(directory / "cache")}
    content = {"experiment": experiment, "storage": storage, "resources": {"workers": 0}}
    path = directory / "space.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def audited(space: Path, *overrides: str) -> dict:
    assert main(["audit", str(space), *overrides]) == 0
    return json.loads((space.parent / "results" / "planted" / "audit.json").read_text())


def leaks(result: dict) -> dict[str, str]:
    return {f["what"]: f["detail"] for f in result["findings"] if f["level"] == "leak"}


def test_a_clean_corpus_has_no_leak(clean, tmp_path, capsys):
    result = audited(write_space(tmp_path, clean))
    assert not result["leaky"]
    assert [f["what"] for f in result["findings"]] == ["few speakers in dev", "few speakers in test"]
    assert result["splits"]["test"]["emotions"] == dict.fromkeys(EMOTIONS.values(), 6)
    out = capsys.readouterr().out
    assert "no leak found" in out
    assert "audit note: few speakers in test: 3" in out
    assert "angry" in out


def as_flac(waveform: np.ndarray, path: Path) -> Path:
    soundfile.write(path.with_suffix(".flac"), waveform, RATE)
    path.unlink()
    return path


def as_vorbis(waveform: np.ndarray, path: Path) -> Path:
    file = io.BytesIO()
    soundfile.write(file, waveform, RATE, format="OGG", subtype="VORBIS")
    soundfile.write(path, soundfile.read(io.BytesIO(file.getvalue()))[0], RATE)
    return path


def as_cut(waveform: np.ndarray, path: Path) -> Path:
    soundfile.write(path, waveform[3000:-2500], RATE)
    return path


def as_louder_telephone(waveform: np.ndarray, path: Path) -> Path:
    soundfile.write(path, 2 * soxr.resample(waveform, RATE, 8000), 8000)
    return path


@pytest.mark.parametrize(
    ("copy", "what", "sign"),
    [
        (as_flac, "identical audio across splits", "="),
        (as_vorbis, "versions of one recording across splits", "~"),
        (as_cut, "versions of one recording across splits", "~"),
        (as_louder_telephone, "versions of one recording across splits", "~"),
    ],
)
def test_a_planted_copy_is_the_one_leak(corpus, tmp_path, capsys, copy, what, sign):
    """A take of actor 7, who is trained on, under the name of actor 2, who is tested on."""
    waveform, _ = soundfile.read(corpus / name(7, "05", 1))
    copy(waveform, corpus / name(2, "05", 1))
    result = audited(write_space(tmp_path, corpus))
    assert leaks(result) == {what: f"1: ravdess/03-01-05-01-01-01-02 {sign} ravdess/03-01-05-01-01-01-07"}
    assert result["leaky"]
    assert "LEAKY" in capsys.readouterr().out


def test_a_copy_that_only_a_final_fold_splits_is_a_leak_of_the_search(corpus, tmp_path, capsys):
    """Actors 7 and 10 are both trained on in fold 0; fold 2 tests the first and fold 3 the second."""
    shutil.copy(corpus / name(7, "05", 1), corpus / name(10, "05", 1))
    space = write_space(tmp_path, corpus)
    assert not audited(space)["leaky"]
    assert "folds that are trained" not in capsys.readouterr().out
    result = audited(space, "tune.final_folds=all")
    assert result["leaky"]
    assert list(result["folds"]) == ["fold 0", "fold 1", "fold 2", "fold 3"]
    leak = next(finding for finding in result["findings"] if finding["level"] == "leak")
    detail = "1: ravdess/03-01-05-01-01-01-07 = ravdess/03-01-05-01-01-01-10"
    assert leak["folds"] == dict.fromkeys(["fold 1", "fold 2", "fold 3"], detail)
    assert not [finding for finding in result["findings"] if "few speakers" in finding["what"]], "12 in all folds"
    out = capsys.readouterr().out
    assert f"audit leak: identical audio across splits: fold 1 / fold 2 / fold 3: {detail}" in out
    assert "audit: 4 folds that are trained: fold 0, fold 1, fold 2, fold 3" in out
    assert "LEAKY" in out


def test_one_take_under_two_emotions_of_one_speaker_is_no_leak_but_said(corpus, tmp_path):
    shutil.copy(corpus / name(7, "05", 1), corpus / name(7, "04", 2))
    result = audited(write_space(tmp_path, corpus))
    assert not result["leaky"]
    (found,) = [one for one in result["findings"] if one["what"] == "identical audio under different emotions"]
    assert (found["level"], found["detail"]) == (
        "note",
        "1: ravdess/03-01-04-01-02-01-07 = ravdess/03-01-05-01-01-01-07",
    )
    (group,) = found["groups"]
    assert [one["emotion"] for one in group["utterances"]] == ["sad", "angry"]


def test_an_emotion_that_cannot_be_learned_is_an_error_in_one_line(clean, tmp_path, capsys):
    space = write_space(tmp_path, clean)
    assert main(["audit", str(space), "experiment.emotions=[angry, happy, sad, disgust]"]) == 2
    assert "ser-ray audit: emotion absent from train: disgust cannot be learned" in capsys.readouterr().err
    written = json.loads((tmp_path / "results" / "planted" / "audit.json").read_text())
    assert written["findings"][0]["level"] == "error"


def test_the_audit_before_training_finds_the_same_and_stamps_the_results(corpus, tmp_path, capsys):
    waveform, _ = soundfile.read(corpus / name(7, "05", 1))
    as_cut(waveform, corpus / name(2, "05", 1))
    path = write_space(tmp_path, corpus)
    alone = audited(path)
    out = io.StringIO()
    results = train(config.load(path), Console(file=out, soft_wrap=True), ["train"])
    assert "audit leak: versions of one recording across splits" in out.getvalue()
    assert json.loads((results / "audit.json").read_text()) == alone
    # A search lives there now: its audit is left alone.
    (results / "audit.json").write_text("{}")
    assert main(["audit", str(path)]) == 0
    assert (results / "audit.json").read_text() == "{}"


def test_without_what_the_audit_names_there_is_no_leak_left(corpus, tmp_path, capsys):
    """By kind, and by audit.csv."""
    waveform, _ = soundfile.read(corpus / name(7, "05", 1))
    as_cut(waveform, corpus / name(2, "05", 1))
    shutil.copy(corpus / name(10, "05", 1), corpus / name(10, "04", 2))
    space = write_space(tmp_path, corpus)
    whole = audited(space)
    assert whole["leaky"]
    advised = "experiment.exclude=[duplicates, mislabelled]"
    assert (
        f"to mend it: {advised} leaves out 3 utterances (1 by duplicates, 2 by mislabelled)" in capsys.readouterr().out
    )
    table = tmp_path / "results" / "planted" / "audit.csv"
    lines = list(csv.DictReader(table.open()))
    bad = {f"ravdess/03-01-{rest}" for rest in ("05-01-01-01-07", "05-01-01-01-10", "04-01-02-01-10")}
    assert {row["utterance_id"] for row in lines if row["exclude"]} == bad
    for exclude in (advised, f"experiment.exclude={table}"):
        less = audited(space, exclude)
        assert not less["leaky"]
        assert {row["utterance_id"] for row in less["excluded"]} == bad
        assert sum(part["utterances"] for part in less["splits"].values()) == 72 - 3
        assert less["to_exclude"] == less["advice"] == []
        out = capsys.readouterr().out
        assert "excluded: 3 utterances (" in out
        assert "no leak found" in out
    # Edited by hand, the table says what it says, whatever the audit finds, and stays.
    edited = "".join(line for line in table.read_text().splitlines(True) if "05-01-01-01-07" not in line)
    table.write_text(edited)
    assert audited(space, f"experiment.exclude={table}")["leaky"]
    assert table.read_text() == edited
    assert main(["audit", str(space), "experiment.exclude=duplicated"]) == 2
    assert "did you mean duplicates?" in capsys.readouterr().err


@pytest.mark.ray
def test_a_leak_that_only_the_audio_shows_stamps_the_figures(corpus, tmp_path, ray_cluster):
    waveform, _ = soundfile.read(corpus / name(7, "05", 1))
    as_cut(waveform, corpus / name(2, "05", 1))
    path = write_space(tmp_path, corpus)
    assert main(["train", str(path)]) == 0
    results = tmp_path / "results" / "planted"
    assert main(["evaluate", str(results)]) == 0
    for split in ("dev", "test"):
        assert json.loads((results / "evaluation" / f"{split}.json").read_text())["leaky"] is True
    assert "LEAKY" in (results / "best" / "README.md").read_text()


def test_no_search_space_is_said(capsys):
    assert main(["audit"]) == 2
    assert "Missing argument 'SPACE.yaml'" in capsys.readouterr().err

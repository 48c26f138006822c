"""Prepared speech is right, the same with and without Ray, made once, and continued after an interruption."""

from __future__ import annotations

import hashlib
import io
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml
from rich.console import Console

from ser_ray import prepare as verb
from ser_ray.config import Audio, SearchSpace
from ser_ray.prepare import main, prepare
from ser_ray.schema import UserError
from ser_ray.speech import shards
from ser_ray.speech.audio import from_int16, load_waveform, to_int16

UTTERANCES = 96
"""In the tiny corpus: a shard of 64 and one of 32."""


def space(cache: Path, directory: Path | None, corpus: str = "ravdess", **audio: float) -> SearchSpace:
    return SearchSpace.model_validate(
        {
            "experiment": {
                "name": "test",
                "corpora": {corpus: directory and str(directory)},
                "backbone": "embedded/tiny-whisper",
                "audio": audio,
            },
            "storage": {"cache": str(cache)},
        }
    )


def prepare_here(cache: Path, directory: Path, **audio: float) -> Path:
    (target,) = prepare(space(cache, directory, **audio), use_ray=False)
    return target


@pytest.fixture
def corpus(tiny_corpus, tmp_path) -> Path:
    """A copy of the tiny corpus that a test may change."""
    return Path(shutil.copytree(tiny_corpus, tmp_path / "ravdess"))


def times(directory: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in directory.iterdir()}


def test_shards_hold_what_the_recordings_hold(tiny_corpus, tmp_path):
    target = prepare_here(tmp_path, tiny_corpus)
    rows = [row for table in shards.read_tables([target]) for row in table.to_pylist()]
    assert len(rows) == UTTERANCES == len(list(tiny_corpus.rglob("*.wav")))
    assert [row["utterance_id"] for row in rows] == sorted(row["utterance_id"] for row in rows)
    for row in rows[::10]:
        waveform = load_waveform(tiny_corpus / row["path"], Audio())
        np.testing.assert_array_equal(from_int16(row["audio"]), from_int16(to_int16(waveform)))
        assert row["num_samples"] == len(waveform) == row["duration"] * 16_000
        assert row["audio_sha256"] == hashlib.sha256(row["audio"]).hexdigest()
    first = rows[0]
    assert (first["utterance_id"], first["speaker"]) == ("ravdess/03-01-01-01-01-01-01", "ravdess/01")
    assert (first["path"], first["emotion"]) == ("Actor_01/03-01-01-01-01-01-01.wav", "neutral")


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_with_ray_as_without(tiny_corpus, tmp_path):
    (with_ray,) = prepare(space(tmp_path / "ray", tiny_corpus))
    without = prepare_here(tmp_path / "plain", tiny_corpus)
    assert with_ray.name == without.name
    assert shards.read_manifest(with_ray) == shards.read_manifest(without)
    assert shards.read_index([with_ray]).equals(shards.read_index([without]))
    for one, other in zip(shards.read_tables([with_ray]), shards.read_tables([without]), strict=True):
        assert one.equals(other)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_ray_continues_and_repeats_what_has_no_note(tiny_corpus, tmp_path):
    (target,) = prepare(space(tmp_path, tiny_corpus))
    whole, manifest = times(target), shards.read_manifest(target)
    for name in ("manifest.json", "shard-00001.json"):
        (target / name).unlink()
    (target / "shard-00001.parquet").write_bytes(b"half a shard")
    assert prepare(space(tmp_path, tiny_corpus)) == [target]
    changed = {name for name, time in times(target).items() if time != whole[name]}
    assert changed == {"manifest.json", "shard-00001.json", "shard-00001.parquet"}
    assert shards.read_manifest(target) == manifest
    assert sum(table.num_rows for table in shards.read_tables([target])) == UTTERANCES


def test_a_second_run_does_nothing(tiny_corpus, tmp_path, monkeypatch):
    target = prepare_here(tmp_path, tiny_corpus)
    before = times(target)
    monkeypatch.setattr(verb, "load_waveform", None)  # calling it would fail
    assert prepare_here(tmp_path, tiny_corpus) == target
    assert times(target) == before


def test_a_changed_input_is_noticed(corpus, tmp_path):
    first = prepare_here(tmp_path, corpus)
    recording = next(corpus.rglob("*.wav"))
    soundfile.write(recording, 0.5 * np.sin(np.arange(16_000)), 16_000)
    second = prepare_here(tmp_path, corpus)
    recording.unlink()
    third = prepare_here(tmp_path, corpus)
    fourth = prepare_here(tmp_path, corpus, min_seconds=0.5)
    assert len({first, second, third, fourth}) == 4
    assert [shards.read_manifest(d)["utterances"] for d in (first, second, third)] == [96, 96, 95]


def test_an_interrupted_run_is_not_whole_and_is_continued(tiny_corpus, tmp_path, monkeypatch):
    calls = []

    def interrupted(path, audio):
        calls.append(path)
        if len(calls) == 70:
            raise KeyboardInterrupt
        return load_waveform(path, audio)

    monkeypatch.setattr(verb, "load_waveform", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare_here(tmp_path, tiny_corpus)
    (half,) = (tmp_path / "shards").iterdir()
    with pytest.raises(UserError, match="not prepared"):
        shards.read_index([half])
    calls = [None] * 100
    assert prepare_here(tmp_path, tiny_corpus) == half
    assert len(calls) == 100 + 32
    assert shards.read_index([half]).num_rows == UTTERANCES
    assert {path.suffix for path in half.iterdir()} == {".parquet", ".json"}


def test_rejected_recordings_are_listed_with_reasons(corpus, tmp_path):
    silent, broken, short, dangling = sorted(corpus.rglob("*.wav"))[:4]
    soundfile.write(silent, np.zeros(16_000), 16_000)
    broken.write_bytes(b"no audio")
    soundfile.write(short, 0.5 * np.sin(np.arange(1_000)), 16_000)
    dangling.unlink()
    dangling.symlink_to(corpus / "nothing")
    printed = io.StringIO()
    (target,) = prepare(space(tmp_path, corpus), use_ray=False, console=Console(file=printed))
    manifest = shards.read_manifest(target)
    assert manifest["utterances"] == UTTERANCES - 4
    reasons = {entry["path"]: entry["reason"] for entry in manifest["rejected"]}
    assert reasons.keys() == {str(path.relative_to(corpus)) for path in (silent, broken, short, dangling)}
    assert reasons[str(silent.relative_to(corpus))] == "silent: the peak is below -60 dBFS"
    assert "ravdess: 92 utterances, 6 speakers" in printed.getvalue()
    assert "4 rejected (Actor_01/" in printed.getvalue()
    assert str(target) in printed.getvalue()


def test_nothing_usable_is_an_error_every_time(corpus, tmp_path):
    for path in corpus.rglob("*.wav"):
        soundfile.write(path, np.zeros(8_000), 16_000)
    for _ in range(2):
        with pytest.raises(UserError, match=r"holds no usable recording, such as Actor_01/.*: silent"):
            prepare_here(tmp_path, corpus)


def test_a_missing_directory_is_an_error(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        prepare_here(tmp_path, tmp_path / "nowhere")
    with pytest.raises(UserError, match="ravdess has no directory"):
        prepare(space(tmp_path, None), use_ray=False)


@pytest.mark.parametrize("rate", [48_000, 24_414, 22_050])
def test_rates_come_out_right(tmp_path, rate):
    corpus = tmp_path / "corpus"
    for actor in ("01", "02"):
        path = corpus / f"Actor_{actor}" / f"03-01-05-01-01-01-{actor}.wav"
        path.parent.mkdir(parents=True)
        soundfile.write(path, 0.5 * np.sin(2 * np.pi * 440 * np.arange(2 * rate) / rate), rate)
    (table,) = shards.read_tables([prepare_here(tmp_path, corpus)])
    for row in table.to_pylist():
        waveform = from_int16(row["audio"])
        spectrum = np.abs(np.fft.rfft(waveform * np.hanning(len(waveform)), n=2**18))
        assert spectrum.argmax() * 16_000 / 2**18 == pytest.approx(440, rel=1e-3)
        assert row["duration"] == pytest.approx(2.0, rel=1e-3)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_the_command(tiny_corpus, tmp_path, capsys):
    path = tmp_path / "space.yaml"
    path.write_text(yaml.safe_dump(space(tmp_path / "cache", tiny_corpus).model_dump(mode="json")))
    assert main([str(path), "experiment.audio.max_seconds=20"]) == 0
    (target,) = (tmp_path / "cache" / "shards").iterdir()
    assert shards.read_manifest(target)["audio"]["max_seconds"] == 20
    assert "96 utterances" in capsys.readouterr().err


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_directory_that_a_node_does_not_see_is_said(tiny_corpus, tmp_path, monkeypatch):
    found = verb.corpora.read("ravdess", tiny_corpus)
    monkeypatch.setattr(verb.corpora, "read", lambda name, directory: found)
    with pytest.raises(UserError, match="must be paths that every node sees"):
        prepare(space(tmp_path, tmp_path / "elsewhere"))


def test_the_synthetic_corpus_is_made_first(tmp_path, monkeypatch):
    make = verb.synthetic.make
    monkeypatch.setattr(
        verb.synthetic, "make", lambda *args, **options: make(*args, speakers=2, repetitions=1, **options)
    )
    first, second = (prepare(space(tmp_path, None, "synthetic"), use_ray=False) for _ in range(2))
    assert first == second
    manifest = shards.read_manifest(first[0])
    assert (manifest["utterances"], manifest["speakers"], len(manifest["emotions"])) == (14, 2, 7)

"""Prepared speech is right, the same with and without Ray, made once, and continued after an interruption."""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml
from rich.console import Console

from ser_ray import prepare as verb
from ser_ray.config import Audio, SearchSpace
from ser_ray.prepare import main, prepare
from ser_ray.protocols.folds import labelled
from ser_ray.runtime import cluster
from ser_ray.schema import UserError, Utterance
from ser_ray.speech import fingerprint, formats, shards
from ser_ray.speech.audio import Recording, from_int16, load_recording, load_waveform, to_int16
from ser_ray.speech.fingerprint import path_of, read_fingerprints

UTTERANCES = 96
"""In the tiny corpus: more than one shard."""


def space(cache: Path, directory: Path | None, corpus: str = "ravdess", **audio: object) -> SearchSpace:
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


def prepare_here(cache: Path, directory: Path, **audio: object) -> Path:
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
    rows.sort(key=lambda row: row["utterance_id"])
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
    one, other = (shards.read_index([target]).drop_columns("shard") for target in (with_ray, without))
    assert one.equals(other)
    for one, other in zip(shards.read_tables([with_ray]), shards.read_tables([without]), strict=True):
        assert one.equals(other)


@pytest.mark.ray
def test_a_cluster_that_is_full_is_waited_for_and_said(tiny_corpus, tmp_path, monkeypatch, full_cluster):
    monkeypatch.setattr(cluster, "LOOK_S", 1.0)
    said = io.StringIO()
    with ThreadPoolExecutor() as executor:
        preparing = executor.submit(prepare, space(tmp_path, tiny_corpus), console=Console(file=said, width=400))
        while "waiting for" not in said.getvalue() and not preparing.done():
            time.sleep(0.1)
        full_cluster()
        (target,) = preparing.result()
    _, first, second, *rest = said.getvalue().splitlines()
    assert first == "ravdess: decoding ..."
    assert second.startswith("  ... waiting for a CPU; 0 of ")
    assert "waiting" not in "".join(rest)
    assert shards.read_manifest(target)["utterances"] == UTTERANCES


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_ray_continues_and_repeats_what_has_no_note(tiny_corpus, tmp_path):
    (target,) = prepare(space(tmp_path, tiny_corpus))
    whole, manifest = times(target), shards.read_manifest(target)
    shard = shards.shard_paths(target)[1]
    for name in ("manifest.json", shard.with_suffix(".json").name):
        (target / name).unlink()
    shard.write_bytes(b"half a shard")
    assert prepare(space(tmp_path, tiny_corpus)) == [target]
    changed = {name for name, time in times(target).items() if time != whole[name]}
    assert changed == {"manifest.json", shard.with_suffix(".json").name, shard.name, path_of(shard).name}
    assert shards.read_manifest(target) == manifest
    assert sum(table.num_rows for table in shards.read_tables([target])) == UTTERANCES


def test_a_second_run_does_nothing(tiny_corpus, tmp_path, monkeypatch):
    target = prepare_here(tmp_path, tiny_corpus)
    before = times(target)
    monkeypatch.setattr(verb, "load_recording", None)  # calling it would fail
    assert prepare_here(tmp_path, tiny_corpus) == target
    assert times(target) == before


@pytest.mark.parametrize("damage", ["changed", "cut", "missing"])
def test_a_damaged_shard_is_made_again(tiny_corpus, tmp_path, damage):
    target = prepare_here(tmp_path, tiny_corpus)
    path = shards.shard_paths(target)[0]
    whole = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(
            whole[: len(whole) // 2] + (bytes(8) + whole[len(whole) // 2 + 8 :] if damage == "changed" else b"")
        )
    printed = io.StringIO()
    assert prepare(space(tmp_path, tiny_corpus), use_ray=False, console=Console(file=printed, width=500)) == [target]
    assert (
        f"1 of {len(shards.shard_paths(target))} shards are damaged, such as {path}; made again" in printed.getvalue()
    )
    assert path.read_bytes() == whole
    assert prepare_here(tmp_path, tiny_corpus) == target


def test_what_only_the_disk_changed_is_named_when_it_is_read(tiny_corpus, tmp_path):
    target = prepare_here(tmp_path, tiny_corpus)
    path = shards.shard_paths(target)[0]
    content, times_before = bytearray(path.read_bytes()), path.stat()
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(times_before.st_atime_ns, times_before.st_mtime_ns))
    assert shards.damaged(target) == []
    with pytest.raises(
        UserError, match=rf"{re.escape(str(path))}: damaged .*; remove it, and run the same command again"
    ):
        list(shards.read_tables([target]))
    path.unlink()
    assert prepare_here(tmp_path, tiny_corpus) == target
    assert sum(table.num_rows for table in shards.read_tables([target])) == UTTERANCES


def test_recordings_that_need_pyav_are_counted_and_read_once_it_is_there(tmp_path, monkeypatch):
    content = tmp_path / "corpus"
    content.mkdir()
    rows = ["path,speaker,emotion"]
    for number in range(4):
        suffix = ("wav", "m4a")[number % 2]
        name = f"{number} [sad].{suffix}"
        soundfile.write(content / name, 0.5 * np.sin(np.arange(16_000)), 16_000, format="WAV")
        if suffix == "m4a":
            (content / name).write_bytes(b"\0\0\0\x20ftypM4A " + bytes(100))
        rows.append(f"{name},{number},sad")
    (content / "mine.csv").write_text("\n".join(rows))
    monkeypatch.setattr(formats, "has_pyav", lambda: False)
    given = space(tmp_path / "cache", content / "mine.csv", corpus="mine")
    targets = []
    for has_pyav in (False, True):
        monkeypatch.setattr(verb, "has_pyav", lambda has_pyav=has_pyav: has_pyav)
        printed = io.StringIO()
        targets += prepare(given, use_ray=False, console=Console(file=printed, width=500))
        assert "mine: 2 recordings need PyAV to be read: pip install 'ser-ray[formats]'" in printed.getvalue()
        assert "1 [sad].m4a: MP4 is read by PyAV, which is missing" in printed.getvalue()
    assert targets[0] != targets[1], "they are decoded again"


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


@pytest.fixture
def decoded(monkeypatch) -> list[Path]:
    """The recordings that are decoded, as they are."""
    calls: list[Path] = []

    def counting(path: Path, *options: object) -> Recording:
        calls.append(path)
        return load_recording(path, *options)

    monkeypatch.setattr(verb, "load_recording", counting)
    return calls


def sizes(target: Path) -> list[int]:
    return [table.num_rows for table in shards.read_tables([target])]


def test_an_interrupted_run_is_not_whole_and_is_continued(tiny_corpus, tmp_path, monkeypatch, decoded):
    first_shard, *others = sizes(prepare_here(tmp_path / "whole", tiny_corpus))
    assert others
    decoded.clear()
    counting = verb.load_recording

    def interrupted(*options: object) -> Recording:
        if len(decoded) == first_shard + 5:
            raise KeyboardInterrupt
        return counting(*options)

    with monkeypatch.context() as patch:
        patch.setattr(verb, "load_recording", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare_here(tmp_path / "half", tiny_corpus)
    (half,) = (tmp_path / "half" / "shards").iterdir()
    with pytest.raises(UserError, match="not prepared"):
        shards.read_index([half])
    decoded.clear()
    assert prepare_here(tmp_path / "half", tiny_corpus) == half
    assert len(decoded) == UTTERANCES - first_shard
    assert shards.read_index([half]).num_rows == UTTERANCES
    assert {path.suffix for path in half.iterdir()} == {".parquet", ".json"}


def test_a_changed_file_redoes_its_chunk_and_nothing_else(corpus, tmp_path, decoded):
    first = prepare_here(tmp_path, corpus)
    decoded.clear()
    soundfile.write(corpus / "Actor_01" / "03-01-01-01-01-01-01.wav", 0.5 * np.sin(np.arange(16_000)), 16_000)
    second = prepare_here(tmp_path, corpus)
    assert len(decoded) == sizes(first)[0] < UTTERANCES
    assert shards.shard_paths(second)[0].name != shards.shard_paths(first)[0].name
    for old, new in zip(shards.shard_paths(first)[1:], shards.shard_paths(second)[1:], strict=True):
        assert old.name == new.name
        assert old.read_bytes() == new.read_bytes()
    shutil.rmtree(first)
    assert sum(sizes(second)) == UTTERANCES


@pytest.fixture
def printed(monkeypatch) -> list[Path]:
    """The shards whose fingerprints are made."""
    calls: list[Path] = []
    make = fingerprint.write_fingerprints
    for module in (verb, fingerprint):
        monkeypatch.setattr(module, "write_fingerprints", lambda shard: (calls.append(shard), make(shard))[1])
    return calls


def test_fingerprints_are_made_with_the_shards_and_follow_them(corpus, tmp_path, printed):
    first = prepare_here(tmp_path, corpus)
    assert printed == shards.shard_paths(first)
    assert len(read_fingerprints(first)) == UTTERANCES
    assert printed == shards.shard_paths(first), "read, not made"
    printed.clear()
    soundfile.write(corpus / "Actor_01" / "03-01-01-01-01-01-01.wav", 0.5 * np.sin(np.arange(16_000)), 16_000)
    second = prepare_here(tmp_path, corpus)
    assert printed == shards.shard_paths(second)[:1], "those of unchanged chunks are linked"
    assert len(read_fingerprints(second)) == UTTERANCES


def test_fingerprints_that_an_older_version_did_not_make_are_added(corpus, tmp_path, printed):
    target = prepare_here(tmp_path, corpus)
    made = read_fingerprints(target)
    printed.clear()
    paths = shards.shard_paths(target)
    path_of(paths[1]).unlink()
    out = io.StringIO()
    prepare(space(tmp_path, corpus), use_ray=False, console=Console(file=out))
    assert printed == paths[1:2]
    assert "ravdess: fingerprints ..." in out.getvalue()
    again = read_fingerprints(target)
    assert all(np.array_equal(again[i], made[i]) for i in made)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_missing_fingerprints_are_made_by_tasks_of_ray(tiny_corpus, tmp_path):
    (target,) = prepare(space(tmp_path, tiny_corpus))
    made = read_fingerprints(target)
    for shard in shards.shard_paths(target):
        path_of(shard).unlink()
    assert prepare(space(tmp_path, tiny_corpus)) == [target]
    assert all(path_of(shard).is_file() for shard in shards.shard_paths(target))
    again = read_fingerprints(target)
    assert all(np.array_equal(again[i], made[i]) for i in made)


@pytest.mark.parametrize("where", ["first", "last"])
def test_a_file_more_or_less_redoes_few_chunks(tmp_path, decoded, where):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    names = [f"{n:04d}" for n in range(1000)]
    for name in names:
        (corpus / name).write_bytes(name.encode())
    utterances = [Utterance(f"mine/{name}", "mine", "mine/1", "sad", name) for name in names]
    whole = verb._chunks(utterances, corpus, Audio())
    fewer = verb._chunks(utterances[1:] if where == "first" else utterances[:-1], corpus, Audio())
    assert 1000 / 96 <= len(whole) <= 1000 / 32
    assert len(fewer.keys() - whole.keys()) <= 2
    assert all(chunk.num_rows <= 96 for chunk in whole.values())
    order = [i for chunk in whole.values() for i in chunk["utterance_id"].to_pylist()]
    assert sorted(order) == [f"mine/{n}" for n in names]
    assert verb._chunks(utterances[::-1], corpus, Audio()).keys() == whole.keys()
    # A mix: the parts of the corpus that stand first and last in it are in every shard.
    for chunk in whole.values():
        numbers = [int(i.removeprefix("mine/")) for i in chunk["utterance_id"].to_pylist()]
        assert min(numbers) < 250
        assert max(numbers) >= 750


def test_another_fingerprint_without_another_chunk_decodes_nothing(corpus, tmp_path, decoded):
    first = prepare_here(tmp_path, corpus)
    decoded.clear()
    (corpus / "Actor_01" / "unknown-name.wav").write_bytes(b"")
    second = prepare_here(tmp_path, corpus)
    assert second != first
    assert not decoded
    assert [entry["path"] for entry in shards.read_manifest(second)["rejected"]] == ["Actor_01/unknown-name.wav"]
    one, other = (shards.read_index([target]).drop_columns("shard") for target in (first, second))
    assert one.equals(other)


def test_a_cache_without_links_is_copied_to(corpus, tmp_path, decoded, monkeypatch):
    prepare_here(tmp_path, corpus)
    decoded.clear()

    def refused(self: Path, target: Path) -> None:
        raise PermissionError("no links here")

    monkeypatch.setattr(Path, "hardlink_to", refused)
    (corpus / "Actor_01" / "unknown-name.wav").write_bytes(b"")
    assert sum(sizes(prepare_here(tmp_path, corpus))) == UTTERANCES
    assert not decoded


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
    assert "0 flagged" in printed.getvalue()
    assert str(target) in printed.getvalue()


def test_flagged_recordings_are_used_and_listed(corpus, tmp_path):
    clipped, renamed, short = sorted(corpus.rglob("*.wav"))[:3]
    soundfile.write(clipped, np.clip(3 * np.sin(np.arange(16_000)), -1, 1), 16_000)
    soundfile.write(renamed, 0.5 * np.sin(np.arange(16_000)), 16_000, format="FLAC")
    content = short.read_bytes()
    short.write_bytes(content[: len(content) // 2])
    target = prepare_here(tmp_path, corpus)
    manifest = shards.read_manifest(target)
    assert manifest["utterances"] == UTTERANCES
    assert manifest["rejected"] == []
    flagged = {entry["path"]: entry["reason"] for entry in manifest["flagged"]}
    assert flagged.keys() == {str(path.relative_to(corpus)) for path in (clipped, renamed, short)}
    assert flagged[str(renamed.relative_to(corpus))] == "named .wav, but holds FLAC"


def tone(seconds: float) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * 440 * np.arange(round(16_000 * seconds)) / 16_000)


def recordings(directory: Path, *waveforms: np.ndarray) -> Path:
    """A corpus of a few recordings under RAVDESS's names."""
    for number, waveform in enumerate(waveforms, start=1):
        path = directory / "Actor_01" / f"03-01-03-01-01-0{number}-01.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, waveform, 16_000)
    return directory


def test_a_long_recording_is_rejected_or_split_into_equal_windows(tmp_path):
    corpus = recordings(tmp_path / "corpus", tone(7), tone(2))
    whole = prepare_here(tmp_path, corpus, max_seconds=3.0)
    assert [entry["reason"][:8] for entry in shards.read_manifest(whole)["rejected"]] == ["too long"]
    split = prepare_here(tmp_path, corpus, max_seconds=3.0, too_long="split")
    rows = shards.read_index([split]).to_pylist()
    name = "ravdess/03-01-03-01-01-01-01"
    assert [row["utterance_id"] for row in rows] == [
        f"{name}#1",
        f"{name}#2",
        f"{name}#3",
        "ravdess/03-01-03-01-01-02-01",
    ]
    assert {row["num_samples"] for row in rows[:3]} <= {37_333, 37_334}
    assert sum(row["num_samples"] for row in rows[:3]) == 7 * 16_000
    assert {(row["speaker"], row["emotion"]) for row in rows} == {("ravdess/01", "happy")}
    (table,) = shards.read_tables([split])
    audio = np.concatenate([from_int16(content) for content in table["audio"].to_pylist()[:3]])
    np.testing.assert_allclose(audio, tone(7), atol=1e-4)


def test_a_silent_window_is_rejected(tmp_path):
    corpus = recordings(tmp_path / "corpus", np.concatenate([tone(2), np.zeros(2 * 16_000), tone(2)]))
    manifest = shards.read_manifest(prepare_here(tmp_path, corpus, max_seconds=2.0, too_long="split"))
    assert manifest["utterances"] == 2
    assert [entry["path"] for entry in manifest["rejected"]] == ["Actor_01/03-01-03-01-01-01-01.wav#2"]


def test_utterances_with_a_start_and_an_end_are_cut_from_their_recording(tmp_path, monkeypatch):
    corpus = recordings(tmp_path / "corpus", np.concatenate([tone(2), 0.2 * tone(1), np.zeros(16_000)]))
    path = "Actor_01/03-01-03-01-01-01-01.wav"
    parts = [(0.0, 2.0), (2.0, 3.0), (3.0, None), (9.0, 10.0)]
    found = [
        Utterance(f"mine/{number}", "mine", "mine/1", "sad", path, start=start, end=end)
        for number, (start, end) in enumerate(parts)
    ]
    monkeypatch.setattr(verb.corpora, "read", lambda name, path, labels=None: (found, []))
    (target,) = prepare(space(tmp_path, corpus, "mine"), use_ray=False)
    (table,) = shards.read_tables([target])
    first, second = (from_int16(content) for content in table["audio"].to_pylist())
    np.testing.assert_allclose(first, tone(2), atol=1e-4)
    np.testing.assert_allclose(second, 0.2 * tone(1), atol=1e-4)
    assert [tuple(entry.values()) for entry in shards.read_manifest(target)["rejected"]] == [
        (f"{path}#3-", "silent: the peak is below -60 dBFS"),
        (f"{path}#9-10", "begins at 9 s, but the recording ends at 4.00 s"),
    ]


def test_a_summary_counts_by_corpus_and_emotion(tiny_corpus, tmp_path):
    printed = io.StringIO()
    Console(file=printed, width=100).print(verb.summary(shards.read_index([prepare_here(tmp_path, tiny_corpus)])))
    rows = [line.split() for line in printed.getvalue().splitlines()]
    assert ["ravdess", "calm", "12", "6", "0.00"] in rows
    assert ["ravdess", "all", "96", "6", "0.03"] in rows


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
    assert main(path, ["experiment.audio.max_seconds=20"]) == 0
    (target,) = (tmp_path / "cache" / "shards").iterdir()
    assert shards.read_manifest(target)["audio"]["max_seconds"] == 20
    assert "96 utterances" in capsys.readouterr().err


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_directory_that_a_node_does_not_see_is_said(tiny_corpus, tmp_path, monkeypatch):
    found = verb.corpora.read("ravdess", tiny_corpus)
    monkeypatch.setattr(verb.corpora, "read", lambda name, directory, labels=None: found)
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


def test_the_ties_of_listeners_are_counted_and_left_out_of_what_they_heard(tmp_path, capsys):
    """CREMA-D's names and tables: of six clips one is a tie, one is heard otherwise, one is in no table."""
    rng = np.random.default_rng(0)
    clips = [f"10{actor:02d}_IEO_{emotion}_LO" for actor in (1, 2, 3) for emotion in ("ANG", "SAD")]
    for clip in clips:
        path = tmp_path / "crema" / "AudioWAV" / f"{clip}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, 0.1 * rng.standard_normal(16_000), 16_000)
    votes = dict(zip(clips, ("A:D", "S", "A", "S", "A"), strict=False))
    lines = ['"","FileName","VoiceVote"', *(f'"{n}","{clip}","{vote}"' for n, (clip, vote) in enumerate(votes.items()))]
    (tmp_path / "crema" / "processedResults").mkdir()
    (tmp_path / "crema" / "processedResults" / "summaryTable.csv").write_text("\n".join(lines) + "\n")
    (target,) = prepare(space(tmp_path / "cache", tmp_path / "crema", "crema_d"), use_ray=False)
    assert shards.read_manifest(target)["ties"] == 1
    assert "crema_d: listeners tied on 1 utterances; label: perceived omits them" in capsys.readouterr().err
    index = shards.read_index([target])
    heard = labelled(index, ("angry", "sad"), {}, "perceived")
    assert set(index["utterance_id"].to_pylist()) - set(heard["utterance_id"].to_pylist()) == {f"crema_d/{clips[0]}"}
    assert labelled(index, ("angry", "sad"), {}).num_rows == 6

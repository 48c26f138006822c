"""A speaker is enrolled and then known: by the command line and from Python, and what is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from backbone_fixtures import experiment

import ser_ray
from ser_ray.__main__ import main
from ser_ray.models import checkpoint, voice_file
from ser_ray.models.classifier import build
from ser_ray.schema import UserError

RATE = 16_000


def _checkpoint(backbones_dir: Path, directory: Path, seed: int = 0, **head: object) -> Path:
    described = experiment(
        backbones_dir / "whisper", ("angry", "sad"), head=head, seed=seed, audio={"max_seconds": 1.0}
    )
    model = build(described)
    if model.head.speaker is not None:
        generator = torch.Generator().manual_seed(seed)
        speech = 0.1 * torch.randn(5, model.head.embedding_width, generator=generator)
        model.head.speaker.fit(speech, ["c/a", "c/a", "c/b", "c/b", "c/b"])
        with torch.no_grad():  # so that answers are told apart
            model.head.classifier[-1].weight.mul_(20)
    checkpoint.save(model, directory, {"epoch": 0})
    return directory


@pytest.fixture(scope="module")
def best(backbones_dir, tmp_path_factory) -> Path:
    return _checkpoint(backbones_dir, tmp_path_factory.mktemp("one") / "best", speaker="standardize")


@pytest.fixture(scope="module")
def calls(tmp_path_factory) -> Path:
    """Of two speakers: recordings of half a second, and one of anna's that is cut into windows."""
    folder = tmp_path_factory.mktemp("calls")
    rng = np.random.default_rng(0)
    for speaker, count in (("anna", 4), ("ben", 3)):
        (folder / speaker).mkdir()
        for n in range(count):
            seconds = 2.7 if (speaker, n) == ("anna", 3) else rng.uniform(0.5, 0.9)
            time = np.arange(int(seconds * RATE)) / RATE
            tone = 0.3 * np.sin(2 * np.pi * rng.uniform(100, 600) * time) + 0.05 * rng.standard_normal(len(time))
            soundfile.write(folder / speaker / f"{n}.wav", tone, RATE)
    return folder


def _predicted(capsys, *arguments: object) -> list[dict]:
    assert main(["predict", *map(str, arguments), "--format", "jsonl"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_voice_is_enrolled_and_used(best, calls, tmp_path, capsys):
    """The file holds what a plain loop over the recordings gives, and changes the answers as it should."""
    voice = tmp_path / "made" / "anna.json"
    assert main(["enrol", str(best), str(calls / "anna"), "--output", str(voice), "--name", "Anna"]) == 0
    assert "6 recordings enrolled" in capsys.readouterr().err, "three, and three windows of the long one"
    content = json.loads(voice.read_text())
    assert set(content) == {"format", "name", "recordings", "date", "checkpoint", "mean", "variance"}
    assert (content["name"], content["recordings"]) == ("Anna", 6)
    model = ser_ray.load(best, device="cpu")
    short = [calls / "anna" / f"{n}.wav" for n in range(3)]
    samples, _ = soundfile.read(calls / "anna" / "3.wav")
    third = len(samples) // 3
    vectors = np.concatenate(
        [model.embed(short), model.embed([samples[n * third : (n + 1) * third] for n in range(3)], RATE)]
    )
    np.testing.assert_allclose(content["mean"], vectors.mean(0), atol=0.05)
    np.testing.assert_allclose(model.enrol(short).saved.voice.mean_BP[0], vectors[:3].astype(float).mean(0), atol=1e-5)
    plain, known = _predicted(capsys, best, short[0]), _predicted(capsys, best, short[0], "--voice", voice)
    expected = _by_hand(model, vectors[:1], content, 6)
    assert list(known[0]["probabilities"].values()) == pytest.approx(expected, abs=1e-4)
    assert plain[0]["probabilities"] != pytest.approx(known[0]["probabilities"], abs=1e-3)


def _by_hand(model: ser_ray.Model, pooled: np.ndarray, content: dict, k: int) -> list[float]:
    norm = model.classifier.head.speaker
    m, v = norm.mean_P.numpy().astype(float), norm.variance_P.numpy().astype(float)
    mean = (k * np.array(content["mean"]) + 2 * m) / (k + 2)
    square = (k * (np.array(content["variance"]) + np.array(content["mean"]) ** 2) + 2 * (v + m**2)) / (k + 2)
    relative = (pooled - mean) / np.sqrt(square - mean**2 + 1e-6)
    with torch.inference_mode():
        return model.classifier.head.classify(torch.tensor(relative).float()).softmax(-1)[0].tolist()


def test_what_is_said_beside_the_answers(best, calls, tmp_path, capsys):
    voice = tmp_path / "anna.json"
    assert main(["enrol", str(best), str(calls / "anna" / "0.wav"), "--output", str(voice)]) == 0
    capsys.readouterr()
    assert main(["predict", str(best), str(calls / "ben"), "--voice", str(voice)]) == 0
    assert "used 1 unlabelled recording of the speaker (enrolled 2" in capsys.readouterr().err


def test_the_order_and_the_number_of_recordings_at_once_change_nothing(best, calls):
    model = ser_ray.load(best, device="cpu")
    paths = [calls / "anna" / f"{n}.wav" for n in range(4)]
    first, second = model.enrol(paths), model.enrol(paths[::-1])
    np.testing.assert_allclose(first.saved.voice.mean_BP, second.saved.voice.mean_BP, atol=1e-5)
    np.testing.assert_allclose(first.saved.voice.variance_BP, second.saved.voice.variance_BP, atol=1e-5)
    alone = [model.enrol(path).saved.voice for path in paths]
    total = sum(float(one.count_B[0]) for one in alone)
    mean = sum(float(one.count_B[0]) * one.mean_BP[0] for one in alone) / total
    assert total == first.recordings
    torch.testing.assert_close(first.saved.voice.mean_BP[0], mean, atol=1e-5, rtol=1e-5)


def test_the_mean_of_one_recording_is_that_recording(best, calls):
    model, path = ser_ray.load(best, device="cpu"), calls / "ben" / "1.wav"
    assert torch.equal(model.enrol(path).saved.voice.mean_BP[0].float(), torch.from_numpy(model.embed(path)[0]))


def test_python_reads_what_it_wrote(best, calls, tmp_path):
    model = ser_ray.load(best, device="cpu")
    voice = model.enrol(calls / "anna", name="Anna")
    assert (voice.name, voice.recordings) == ("Anna", 6)
    voice.save(tmp_path / "anna.json")
    by_object, by_file = (
        model.predict(calls / "ben", voice=given).to_pandas() for given in (voice, tmp_path / "anna.json")
    )
    assert by_object.equals(by_file)
    assert not by_object.equals(model.predict(calls / "ben").to_pandas())


def test_recordings_of_a_speaker_make_the_speaker_known(best, calls, tmp_path, capsys):
    """Each is answered with the voice of all others, without any of its own windows."""
    paths = [calls / speaker / f"{n}.wav" for speaker, count in (("anna", 4), ("ben", 3)) for n in range(count)]
    table = tmp_path / "calls.tsv"
    rows = [f"{path}\t{'unknown' if path == paths[-1] else path.parent.name}\tx" for path in paths]
    table.write_text("\n".join(["path\tspeaker\tnote", *rows]) + "\n")
    model = ser_ray.load(best, device="cpu")
    found = _predicted(capsys, best, table, "--enrol", "self")
    by_path: dict[str, list[dict]] = {}
    for answer in found:
        by_path.setdefault(answer["path"], []).append(answer)
    assert [len(by_path[str(path)]) for path in paths] == [1, 1, 1, 4, 1, 1, 1]
    for path in paths:
        others = [p for p in paths[:-1] if p.parent == path.parent and p != path] if path != paths[-1] else []
        rows = list(model.predict(path, voice=model.enrol(others))) if others else list(model.predict(path))
        for row, answer in zip(rows, by_path[str(path)], strict=True):
            for emotion, probability in answer["probabilities"].items():
                assert row[f"p_{emotion}"] == pytest.approx(probability, abs=1e-4)
    speakers = [None if path == paths[-1] else path.parent.name for path in paths]
    again = model.predict(paths, speakers=speakers)
    assert [row["p_sad"] for row in again] == pytest.approx([a["probabilities"]["sad"] for a in found], abs=1e-6)


def test_an_unusable_recording_costs_nobody_an_answer(best, calls, tmp_path, capsys):
    (tmp_path / "bad.wav").write_bytes(b"RIFF")
    table = tmp_path / "t.csv"
    good = [calls / "anna" / f"{n}.wav" for n in range(2)]
    table.write_text("path,speaker\n" + "".join(f"{path},anna\n" for path in (good[0], "bad.wav", good[1], "gone.wav")))
    assert main(["predict", str(best), str(table), "--enrol", "self", "--format", "jsonl"]) == 1
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [bool(answer["emotion"]) for answer in answers] == [True, False, True, False]
    assert (
        main(["enrol", str(best), str(good[0]), str(tmp_path / "bad.wav"), "--output", str(tmp_path / "v.json")]) == 1
    )
    assert json.loads((tmp_path / "v.json").read_text())["recordings"] == 1
    assert "bad.wav" in capsys.readouterr().err
    assert main(["enrol", str(best), str(tmp_path / "bad.wav"), "--output", str(tmp_path / "w.json")]) == 2
    assert "no recording could be used" in capsys.readouterr().err
    assert not (tmp_path / "w.json").exists()


# -- another person by mistake


@pytest.fixture(scope="module")
def two_people(backbones_dir, tmp_path_factory) -> tuple[Path, Path]:
    """A checkpoint that was trained on two people who sound unlike, and ten other recordings of each."""
    folder = tmp_path_factory.mktemp("people")
    rng = np.random.default_rng(1)
    for speaker, (low, high) in {"anna": (100, 140), "ben": (1500, 2500)}.items():
        for part in ("train", "new"):
            (folder / part / speaker).mkdir(parents=True)
            for n in range(10):
                time = np.arange(int(rng.uniform(0.5, 0.9) * RATE)) / RATE
                tone = 0.3 * np.sin(2 * np.pi * rng.uniform(low, high) * time) + 0.02 * rng.standard_normal(len(time))
                soundfile.write(folder / part / speaker / f"{n}.wav", tone, RATE)
    directory = _checkpoint(backbones_dir, folder / "best", speaker="center")
    model = ser_ray.load(directory, device="cpu")
    paths = sorted((folder / "train").rglob("*.wav"))
    model.classifier.head.speaker.fit(torch.from_numpy(model.embed(paths)), [f"c/{path.parent.name}" for path in paths])
    checkpoint.save(model.classifier, folder / "fitted", {"epoch": 0})
    return folder / "fitted", folder / "new"


def test_enrol_names_a_recording_of_another_person(two_people, tmp_path, capsys):
    best, calls = two_people
    own, voice = sorted((calls / "anna").iterdir()), tmp_path / "anna.json"
    assert main(["enrol", str(best), *map(str, own), "--output", str(voice)]) == 0
    assert "another person" not in capsys.readouterr().err
    stranger = calls / "ben" / "3.wav"
    assert main(["enrol", str(best), *map(str, own), str(stranger), "--output", str(voice)]) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "another person" in line]
    assert line.startswith(f"{stranger}: distance to the others ")


@pytest.mark.parametrize("number", [1, 6])
def test_predict_doubts_a_voice_of_another_person(two_people, tmp_path, capsys, number):
    best, calls = two_people
    voice = tmp_path / "anna.json"
    known, asked = (sorted((calls / "anna").iterdir())[part] for part in (slice(0, 4), slice(4, 4 + number)))
    assert main(["enrol", str(best), *map(str, known), "--output", str(voice)]) == 0
    capsys.readouterr()
    for paths, doubted in ((asked, False), (sorted((calls / "ben").iterdir())[:number], True)):
        assert main(["predict", str(best), *map(str, paths), "--voice", str(voice)]) == 0
        assert ("distance to the voice" in capsys.readouterr().err) == doubted


# -- what is refused, in one line


def _refused(capsys, *arguments: object) -> str:
    assert main(list(map(str, arguments))) == 2
    *_, line = capsys.readouterr().err.splitlines()
    return line


def test_a_head_that_uses_no_voice_is_said(backbones_dir, calls, tmp_path, capsys):
    plain, voice, table = _checkpoint(backbones_dir, tmp_path / "plain"), tmp_path / "v.json", tmp_path / "t.csv"
    table.write_text(f"path,speaker\n{calls / 'ben' / '0.wav'},ben\n")
    voice.write_text("{}")
    for arguments in (
        ("enrol", plain, calls / "anna", "--output", tmp_path / "w.json"),
        ("predict", plain, calls / "anna", "--voice", voice),
        ("predict", plain, table, "--enrol", "self"),
    ):
        assert "does not use what is known of a speaker (head.speaker: none)" in _refused(capsys, *arguments)
    with pytest.raises(UserError, match=r"head\.speaker: none"):
        ser_ray.load(plain, device="cpu").enrol(calls / "anna")


def test_a_voice_of_another_checkpoint_is_refused(best, backbones_dir, calls, tmp_path, capsys):
    other = _checkpoint(backbones_dir, tmp_path / "other", seed=1, speaker="standardize")
    voice = tmp_path / "anna.json"
    assert main(["enrol", str(other), str(calls / "anna"), "--output", str(voice)]) == 0
    assert "a voice of another checkpoint" in _refused(capsys, "predict", best, calls / "anna", "--voice", voice)
    with pytest.raises(UserError, match="another checkpoint"):
        ser_ray.load(best, device="cpu").predict(calls / "anna", voice=ser_ray.load(other, "cpu").enrol(calls / "anna"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean": [float("nan")]}, "finite numbers"),
        ({"mean": "x"}, "finite numbers"),
        ({"variance": None}, "finite numbers"),
        ({"mean": [10**400]}, "finite numbers"),
        ({"recordings": 0}, "damaged"),
        ({"recordings": True}, "damaged"),
        ({"recordings": 10**400}, "damaged"),
        ({"variance": -1}, "a variance is below 0"),
        ({"format": 2}, "not a voice of this version"),
    ],
)
def test_a_damaged_voice_is_one_line(best, calls, tmp_path, capsys, change, message):
    model = checkpoint.load(best)
    width = model.head.embedding_width
    whole = {"format": 1, "recordings": 2, "checkpoint": voice_file.digest(model)}
    whole |= {"mean": [0.0] * width, "variance": [1.0] * width}
    for key, value in change.items():
        whole[key] = [float(value)] * width if key == "variance" and value else value
        if isinstance(value, list):
            whole[key] = value * width
    voice = tmp_path / "v.json"
    voice.write_text(json.dumps(whole))
    line = _refused(capsys, "predict", best, calls / "anna", "--voice", voice)
    assert message in line
    assert str(voice) in line


@pytest.mark.parametrize("content", ["", "[1]", "{", '"x"', "[" * 100_000])
def test_what_is_no_voice_is_one_line(best, calls, tmp_path, capsys, content):
    voice = tmp_path / "v.json"
    voice.write_text(content)
    assert str(voice) in _refused(capsys, "predict", best, calls / "anna", "--voice", voice)
    assert "no such file" in _refused(capsys, "predict", best, calls / "anna", "--voice", tmp_path / "gone.json")


def test_tables_that_do_not_fit_are_one_line(best, calls, tmp_path, capsys):
    table = tmp_path / "t.csv"
    for content, message in (
        ("path\nx.wav\n", "no column 'speaker'"),
        ("path,speaker\n", "it has no row"),
        ("path,speaker\n,anna\n", "line 2: no path"),
        ("path,speaker,start,end\nx.wav,anna,0,1\n", "start and end"),
    ):
        table.write_text(content)
        assert message in _refused(capsys, "predict", best, table, "--enrol", "self")
    assert "give one table" in _refused(capsys, "predict", best, calls / "anna", "--enrol", "self")
    both = ("predict", best, table, "--enrol", "self", "--voice", "v.json")
    assert "give one of them" in _refused(capsys, *both)
    model = ser_ray.load(best, device="cpu")
    with pytest.raises(UserError, match="1 speakers for 3 recordings"):
        model.predict(calls / "ben", speakers=["ben"])

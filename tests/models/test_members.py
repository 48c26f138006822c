"""A directory of several models: it answers as the product of what each says by itself, and damage is one line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from backbone_fixtures import experiment

import ser_ray
from ser_ray.__main__ import main
from ser_ray.models import checkpoint, ensemble
from ser_ray.models.classifier import build
from ser_ray.schema import UserError

RATE = 16_000
WEIGHTS, TEMPERATURES, TEMPERATURE = (0.75, 0.25), (0.5, 2.0), 0.8


@pytest.fixture(scope="module")
def best(backbones_dir, tmp_path_factory) -> Path:
    """An ensemble of a Whisper and a HuBERT, of which the first uses what is known of a speaker."""
    directory = tmp_path_factory.mktemp("several") / "best"
    heads = {"whisper": {"speaker": "center"}, "hubert-group": {"pooling": "mean"}}
    rows = []
    for number, (backbone, head) in enumerate(heads.items(), start=1):
        described = experiment(backbones_dir / backbone, ("angry", "sad"), head=head, audio={"max_seconds": 1.0})
        model, name = build(described), f"members/{number:02}"
        checkpoint.save(model, directory / name, {"epoch": 0})
        _calibrate(directory / name, TEMPERATURES[number - 1])
        rows.append({"directory": name, "weight": WEIGHTS[number - 1], "trial_id": f"00{number}"})
    content = {"members": rows, "temperature": TEMPERATURE, "least_probability": 0.3}
    (directory / "ensemble.json").write_text(json.dumps(content))
    return directory


def _calibrate(directory: Path, temperature: float) -> None:
    (directory / "calibration.json").write_text(json.dumps({"temperature": temperature}))


@pytest.fixture(scope="module")
def recordings(tmp_path_factory) -> list[Path]:
    """Three short ones, and one that is cut into windows."""
    folder, rng = tmp_path_factory.mktemp("recordings"), np.random.default_rng(0)
    for number, seconds in enumerate((0.5, 0.7, 0.9, 2.5)):
        time = np.arange(int(seconds * RATE)) / RATE
        tone = 0.3 * np.sin(2 * np.pi * 150 * (number + 1) * time) + 0.05 * rng.standard_normal(len(time))
        soundfile.write(folder / f"{number}.wav", tone, RATE)
    return sorted(folder.glob("*.wav"))


def by_hand(each: list[dict[str, float]], weights: tuple[float, ...], temperature: float) -> dict[str, float]:
    """The product of several answers to one recording."""
    raised = {
        emotion: np.prod([own[emotion] ** (weight / temperature) for own, weight in zip(each, weights, strict=True)])
        for emotion in each[0]
    }
    return {emotion: value / sum(raised.values()) for emotion, value in raised.items()}


def _answers(capsys, *arguments: object) -> list[dict]:
    assert main(["predict", *map(str, arguments), "--format", "jsonl"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_it_answers_with_the_product_of_its_members(best, recordings, capsys):
    each = [_answers(capsys, best / "members" / f"0{number}", *recordings) for number in (1, 2)]
    found = _answers(capsys, best, *recordings, "--sets")
    assert len(found) == 3 + 3 + 1, "three windows, and the whole"
    for answer, own in zip(found[:6], zip(*each, strict=True), strict=False):
        expected = by_hand([one["probabilities"] for one in own], WEIGHTS, TEMPERATURE)
        assert answer["probabilities"] == pytest.approx(expected, abs=1e-6)
        assert answer["set"][0] == answer["emotion"]
        assert set(answer["set"]) == {e for e, p in expected.items() if p >= 0.3} | {answer["emotion"]}
    for emotion, probability in found[-1]["probabilities"].items():
        windows = [answer["probabilities"][emotion] for answer in found[3:6]]
        assert probability == pytest.approx(np.mean(windows), abs=1e-9)


def test_python_loads_and_predicts_and_embeds(best, recordings, capsys):
    model = ser_ray.load(best, device="cpu")
    assert model.emotions == ("angry", "sad")
    rows = list(model.predict(recordings[:3]))
    found = _answers(capsys, best, *recordings[:3])
    assert [row["p_sad"] for row in rows] == pytest.approx([a["probabilities"]["sad"] for a in found], abs=1e-9)
    singles = [ser_ray.load(best / "members" / f"0{n}", device="cpu").embed(recordings[:3]) for n in (1, 2)]
    np.testing.assert_array_equal(model.embed(recordings[:3]), np.concatenate(singles, axis=1))


def test_a_speaker_is_known_to_every_member(best, recordings, tmp_path, capsys):
    voice = tmp_path / "anna.json"
    assert main(["enrol", str(best), *map(str, recordings[1:3]), "--output", str(voice)]) == 0
    content = json.loads(voice.read_text())
    assert content["recordings"] == 2
    assert [len(member["mean"]) for member in content["members"]] == [
        member.head.embedding_width for member in ensemble.load(best).members
    ]
    known = _answers(capsys, best, recordings[0], "--voice", voice)[0]["probabilities"]
    first = ser_ray.load(best / "members/01", device="cpu")
    with_voice = dict(next(iter(first.predict(recordings[0], voice=first.enrol(recordings[1:3])))))
    each = [
        {emotion: with_voice[f"p_{emotion}"] for emotion in first.emotions},
        _answers(capsys, best / "members/02", recordings[0])[0]["probabilities"],
    ]
    assert known == pytest.approx(by_hand(each, WEIGHTS, TEMPERATURE), abs=1e-6)
    others = ser_ray.load(best, device="cpu").predict(recordings[:3], speakers=["anna"] * 3)
    assert next(iter(others))["p_sad"] == pytest.approx(known["sad"], abs=1e-6)
    assert main(["predict", str(best / "members/01"), str(recordings[0]), "--voice", str(voice)]) == 2
    assert "a voice of another checkpoint" in capsys.readouterr().err


def test_where_one_model_is_needed_the_members_are_named(best):
    with pytest.raises(UserError, match="give one of them"):
        checkpoint.load(best)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"members": []}, "members has to be a list"),
        ({"members": "all"}, "members has to be a list"),
        ({"members": [{"directory": "../elsewhere", "weight": 1.0}]}, "is no member's directory"),
        ({"members": [{"directory": "members/01", "weight": -1}]}, "weight is a number"),
        ({"members": [{"directory": "members/01", "weight": True}]}, "weight is a number"),
        ({"members": [{"directory": "members/07", "weight": 1.0}]}, "members/07"),
        ({"temperature": 0}, "temperature"),
    ],
)
def test_a_file_that_does_not_fit_is_one_line(best, tmp_path, change, said):
    content = json.loads((best / "ensemble.json").read_text()) | change
    (tmp_path / "members").symlink_to(best / "members")
    (tmp_path / "ensemble.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=said) as caught:
        ensemble.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_members_of_different_emotions_are_refused(best, backbones_dir, tmp_path):
    names = ("members/01", "members/02")
    for name, emotions in zip(names, (("angry", "sad"), ("sad", "angry")), strict=True):
        checkpoint.save(build(experiment(backbones_dir / "whisper", emotions)), tmp_path / name, {})
    rows = [{"directory": name, "weight": 0.5} for name in names]
    (tmp_path / "ensemble.json").write_text(json.dumps({"members": rows, "temperature": 1.0}))
    with pytest.raises(UserError, match="its emotions or its audio settings are not those of members/01"):
        ensemble.load(tmp_path)

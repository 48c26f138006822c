"""``ser-ray export``: the directory of a stranger, what is refused, what is left after a failure, and the upload."""

from __future__ import annotations

import json
import os
import shutil
import site
import subprocess
import venv
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
import soundfile
from backbone_fixtures import experiment, noise
from hub_fixture import hub
from typer.main import get_command

from ser_ray import __main__, export
from ser_ray.__main__ import app, main
from ser_ray.evaluation.exports import read_exports
from ser_ray.exporting import FORMATS, adapter, huggingface, of
from ser_ray.exporting.recordings import Recordings
from ser_ray.models import checkpoint
from ser_ray.models.classifier import build
from ser_ray.schema import SAMPLING_RATE

STRANGER = """
import json, sys

from transformers import pipeline

try:
    import ser_ray.schema
except ImportError:
    pass
else:
    sys.exit("ser_ray is installed here")

ask = pipeline("audio-classification", model=sys.argv[1], trust_remote_code=True, device="cpu")
for path in sys.argv[2:]:
    try:
        print(json.dumps({one["label"]: one["score"] for one in ask(path)}))
    except ValueError as error:
        print(json.dumps(str(error)))
together = ask(sys.argv[2:5], batch_size=3)
print(json.dumps([{one["label"]: one["score"] for one in answer} for answer in together]))
"""


@pytest.fixture(scope="module")
def best(backbones_dir, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("search") / "best"
    adapter = {"method": "lora", "rank": 2, "alpha": 4}
    model = build(experiment(backbones_dir / "whisper", ("angry", "sad", "neutral"), adapter=adapter))
    checkpoint.save(model, directory, {"epoch": 0})
    return directory


@pytest.fixture
def few(monkeypatch) -> None:
    """Compare on two short recordings; which they are otherwise is tested in tests/exporting."""
    waveform_BT, _ = noise((0.6, 0.6))
    monkeypatch.setattr(export, "recordings_for", lambda *_: Recordings("noise", list(waveform_BT.numpy())))


def write(path: Path, seconds: float, rate: int, channels: int = 1, level: float = 0.2) -> Path:
    time = np.arange(int(seconds * rate)) / rate
    tones = [np.sin(2 * np.pi * (180 + 60 * channel) * time) for channel in range(channels)]
    random = np.random.default_rng(int(seconds * 10) + rate)
    samples_TC = level * (np.stack(tones, 1) + 0.3 * random.standard_normal((len(time), channels)))
    quiet_TC = np.zeros((rate // 4, channels))
    soundfile.write(path, np.concatenate([quiet_TC, samples_TC, quiet_TC]), rate)
    return path


def exit_code(*arguments: object) -> int:
    return main(["export", *map(str, arguments)])


def test_the_choices_are_the_formats():
    choices = get_type_hints(__main__.export)
    assert set(get_args(choices["to"])) == FORMATS.keys()
    assert {dtype for name in FORMATS for dtype in of(name).DTYPES} == set(get_args(choices["dtype"]))
    assert "export" in get_command(app).commands


@pytest.fixture(scope="module")
def stranger(tmp_path_factory) -> Path:
    """The Python of a virtual environment that has what this one has, but for this project.

    A path of a .pth file is searched, but a .pth file that lies there, as that of ``pip install -e``, is not read.
    """
    (installed,) = site.getsitepackages()
    if (Path(installed) / "ser_ray" / "__init__.py").exists():
        pytest.skip("ser_ray is installed as a copy, not by pip install -e")
    directory = tmp_path_factory.mktemp("stranger") / "venv"
    venv.create(directory, with_pip=False)
    python = directory / "bin" / "python"
    own = next(directory.glob("lib/python*/site-packages"))
    (own / "others.pth").write_text(f"{installed}\n")
    return python


@pytest.mark.slow
def test_a_stranger_gets_the_answers_of_predict(best, few, stranger, tmp_path, capsys):
    """By transformers' pipeline, in a virtual environment without ser_ray, on files as people have them."""
    target = tmp_path / "hf"
    assert exit_code(best, "--to", "hf", "--output", target) == 0
    proof = json.loads((target / "export.json").read_text())["proof"]
    assert proof["largest"] < 1e-5
    assert proof["recordings"] == 2
    files = [
        *(write(tmp_path / f"{rate}.wav", 1.3, rate) for rate in (8_000, 16_000, 44_100)),
        write(tmp_path / "stereo.wav", 2.1, 44_100, channels=2),
        write(tmp_path / "stereo.flac", 1.1, 8_000, channels=2),
        write(tmp_path / "short.wav", 0.3, 16_000),
        write(tmp_path / "thirty.wav", 30.0, 16_000),
        write(tmp_path / "long.wav", 41.0, 44_100),
        write(tmp_path / "loud.wav", 1.0, 44_100, level=1.5),
        write(tmp_path / "silent.wav", 1.0, 16_000, level=0.0),
        write(tmp_path / "instant.wav", 0.05, 16_000),
    ]
    capsys.readouterr()
    assert main(["predict", str(best), *map(str, files), "--format", "jsonl"]) == 1
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    expected = [answer for answer in said if answer.get("start") is None]
    command = [str(stranger), "-c", STRANGER, str(target), *map(str, files)]
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    own = inherited | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=own, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *found, together = map(json.loads, done.stdout.splitlines())
    for path, answer, other in zip(files, expected, found, strict=True):
        if answer["emotion"] is None:
            assert isinstance(other, str), path
            assert answer["reason"].split(":")[0] in other
        else:
            assert max(abs(answer["probabilities"][e] - other[e]) for e in answer["probabilities"]) < 1e-4, path
    for one, other in zip(together, found, strict=False):
        assert max(abs(one[e] - other[e]) for e in one) < 1e-6


@pytest.mark.slow
def test_the_adapter_alone_answers_the_same_once_peft_has_merged_it(best, few, backbones_dir):
    assert exit_code(best, "--to", "peft") == 0
    target = best.with_name("best-peft")
    assert {path.name for path in target.iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors", "README.md", "export.json")
    }
    for name in ("adapter_config.json", "README.md", "export.json"):
        assert str(backbones_dir) not in (target / name).read_text()
    assert "Model Card for Model ID" not in (target / "README.md").read_text()


def test_what_does_not_answer_the_same_is_not_written(best, few, tmp_path, capsys, monkeypatch):
    """Nor is an earlier export touched."""
    target = tmp_path / "hf"
    target.mkdir()
    (target / "export.json").write_text("{}")
    monkeypatch.setattr(huggingface, "predict", lambda *_: np.array([[0.5, 0.25, 0.25], [0.2, 0.6, 0.2]]))
    assert exit_code(best, "--to", "hf", "--output", target) == 1
    assert "not the same answers" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    assert (target / "export.json").read_text() == "{}"


def test_an_earlier_export_is_replaced_and_other_files_are_not(best, few, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(huggingface, "predict", lambda target, directory, waveforms, options: answers(best, waveforms))
    target = tmp_path / "hf"
    assert exit_code(best, "--to", "hf", "--output", target) == 0
    (target / "old").touch()
    assert exit_code(best, "--to", "hf", "--output", target) == 0
    assert not (target / "old").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    (target / "export.json").unlink()
    assert exit_code(best, "--to", "hf", "--output", target) == 2
    assert exit_code(best, "--to", "hf", "--output", target / "config.json") == 2
    assert "holds files that are no export" in capsys.readouterr().err


def test_the_report_finds_it_beside_the_checkpoint_until_that_is_another(best, few, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface, "predict", lambda target, directory, waveforms, options: answers(best, waveforms))
    results = tmp_path / "search"
    shutil.copytree(best, results / "best")
    assert exit_code(results / "best", "--to", "hf") == 0
    (found,) = read_exports(results)
    assert (found.folder, found.format, found.dtype, found.current) == ("best-hf", "hf", "fp32", True)
    assert found.largest == 0
    assert 0 <= sum(path.stat().st_size for path in (results / "best-hf").iterdir()) - found.bytes < 20_000
    (results / "best" / "calibration.json").write_text('{"temperature": 1.5}')
    assert [export.current for export in read_exports(results)] == [False]


def test_predict_says_that_an_export_is_for_other_programs(tmp_path, capsys):
    export = tmp_path / "best-hf"
    export.mkdir()
    (export / "export.json").write_text("{}")
    assert main(["predict", str(export), str(write(tmp_path / "call.wav", 0.5, 16_000))]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"{export}: an export for other programs" in line


def answers(directory: Path, waveforms: list[np.ndarray]) -> np.ndarray:
    from ser_ray.training.inference import predict

    found = predict(checkpoint.load(directory), [(waveform, SAMPLING_RATE) for waveform in waveforms])
    return np.array([list(answer.probabilities.values()) for answer in found])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--to", "hf", "--dtype", "int8"], "--dtype int8: hf is written in fp32 or fp16"),
        (["--to", "hf", "--push", "emotions"], "--push emotions: give USER/NAME"),
        (["--to", "hf", "--push", "a b/c"], "--push a b/c: "),
        (["--to", "hf", "--push", "anna/emotions"], "not logged in"),
        (["--to", "nothing"], "nothing"),
    ],
)
def test_what_cannot_be_done_is_said_before_any_work(best, arguments, said, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert exit_code(best, *arguments) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line
    assert not best.with_name("best-hf").exists()


def test_without_an_adapter_there_is_none_to_export(backbones_dir):
    model = build(experiment(backbones_dir / "whisper", adapter={"method": "frozen"}))
    with pytest.raises(ValueError, match=r"no adapter \(adapter.method: frozen\); use --to hf"):
        adapter.check(model)


def test_an_export_is_uploaded(best, few, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    monkeypatch.setattr(huggingface, "predict", lambda target, directory, waveforms, options: answers(best, waveforms))
    target, uploaded = tmp_path / "hf", tmp_path / "hub"
    with hub({}, uploaded) as (endpoint, asked):
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        assert exit_code(best, "--to", "hf", "--output", target, "--push", "anna/emotions") == 0
    assert "anna/emotions" in capsys.readouterr().out
    files = {path.name: path.read_bytes() for path in target.iterdir()}
    assert {path.name: path.read_bytes() for path in (uploaded / "anna" / "emotions").iterdir()} == files
    assert b'model="anna/emotions"' in files["README.md"]
    assert any(line == "POST /api/repos/create" for line in asked)


def test_a_hub_that_refuses_is_one_line_and_the_export_is_there(best, few, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    monkeypatch.setattr(huggingface, "predict", lambda target, directory, waveforms, options: answers(best, waveforms))
    with hub({}) as (endpoint, _):
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        assert exit_code(best, "--to", "hf", "--output", tmp_path / "hf", "--push", "anna/emotions") == 2
    assert "--push anna/emotions: " in capsys.readouterr().err
    assert (tmp_path / "hf" / "model.safetensors").is_file()

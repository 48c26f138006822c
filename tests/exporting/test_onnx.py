"""ONNX exports against torch: every shape of batch, what is known of a speaker, fewer bits, and predict on them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import soundfile
import torch
from backbone_fixtures import experiment, noise

import ser_ray
from ser_ray.__main__ import main
from ser_ray.config import Audio
from ser_ray.exporting import Options, audonnx_format, graph, onnx_format, onnx_predict, smaller
from ser_ray.exporting.merged import merged
from ser_ray.models import checkpoint
from ser_ray.models.classifier import EmotionClassifier, build
from ser_ray.models.voice import Voice
from ser_ray.models.voice_file import saved
from ser_ray.models.voice_file import write as write_voice
from ser_ray.training.inference import pieces_of

RATE = 16_000
EMOTIONS = ("angry", "happy", "sad")
SHAPES = (
    (0.3,),
    (1.0,),
    (1.234,),
    (30.0,),
    (0.5, 0.31),
    (29.99, 29.995),
    (0.3, 2.1),
    (5.0, 5.0),
    (1.2345, 1.2345, 1.2345),
    (0.4, 3.3, 1.7),
    (2.0, 0.3, 0.7, 1.1, 0.9),
    (0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95, 4.004),
)
"""Seconds of each utterance of a batch: alone and together, equal and padded, whole frames and not, up to the limit."""


def random_classifier(path: Path, **sections: Any) -> EmotionClassifier:
    """Over random weights, with a classifier whose answers differ from one another."""
    sections = {"adapter": {"method": "frozen"}} | sections
    model = build(experiment(path, **sections)).eval()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        for parameter in model.head.parameters():
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model


def feed(waveform_BT: torch.Tensor, lengths_B: torch.Tensor, *voice: torch.Tensor) -> dict[str, np.ndarray]:
    inputs = zip(("waveform", "lengths", *graph.VOICE), (waveform_BT, lengths_B, *voice), strict=False)
    return {name: tensor.numpy() for name, tensor in inputs}


def difference(model: EmotionClassifier, session: Any, *inputs: torch.Tensor) -> list[float]:
    """The largest of the probabilities, and of the embedding."""
    with torch.inference_mode():
        expected = graph.Answering(model)(*inputs)
    found = session.run(list(graph.OUTPUTS), feed(*inputs))
    return [float(np.abs(ours.numpy() - theirs).max()) for ours, theirs in zip(expected, found, strict=True)]


def opened(path: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def known(backbones_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[EmotionClassifier, Any]:
    """A classifier that uses what is known of a speaker, with all of its layers, and its graph."""
    head = {"layer_mix": "concat", "pooling": "attentive", "hidden": 8, "speaker": "standardize"}
    model = random_classifier(backbones_dir / "wavlm-layer", head=head)
    model.temperature = 1.7  # as its calibration sets it
    path = tmp_path_factory.mktemp("known") / "model.onnx"
    traced = graph.traced(model)
    onnx_format.save_traced(traced.clone(), path.parent / "int8", "int8")
    onnx_format.save_traced(traced, path.parent, "fp32")
    return model, opened(path)


@pytest.fixture(scope="module")
def best(backbones_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with low-rank updates."""
    directory = tmp_path_factory.mktemp("checkpoint") / "best"
    lora = {"method": "lora", "rank": 4}
    audio = {"max_seconds": 3.0}
    model = random_classifier(backbones_dir / "whisper", adapter=lora, audio=audio)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero before training
            parameter.data.normal_(0, 0.2, generator=torch.Generator().manual_seed(1))
    checkpoint.save(model, directory, {"epoch": 0})
    return directory


@pytest.fixture(scope="module")
def exported(best: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Its graph in every dtype, traced once."""
    folder = tmp_path_factory.mktemp("exported")
    found = {dtype: folder / dtype / "model.onnx" for dtype in onnx_format.DTYPES}
    traced = graph.traced(merged(best, Options()))
    half = traced.clone()
    smaller.save_int8(traced.clone(), found["int8"])
    smaller.to_fp16(half)
    graph.save(half, found["fp16"])
    graph.save(traced, found["fp32"])
    return found


@pytest.mark.parametrize("seconds", SHAPES)
def test_any_batch_gets_the_answers_of_torch(known: tuple[EmotionClassifier, Any], seconds: tuple[float, ...]) -> None:
    probabilities, embedding = difference(*known, *noise(seconds))
    assert probabilities < 1e-5
    assert embedding < 1e-4


def test_blocks_without_a_weight_are_left_out(backbones_dir: Path, tmp_path: Path) -> None:
    model = random_classifier(backbones_dir / "whisper", head={"layer_mix": "weighted"})
    with torch.no_grad():
        model.head.mix_L.zero_()[1] = 1.0
    onnx_format.save(copy.deepcopy(model), tmp_path / "all")
    model.stop = model.head.highest_state()
    onnx_format.save(copy.deepcopy(model), tmp_path / "some")
    sizes = [(tmp_path / name / "model.onnx").stat().st_size for name in ("some", "all")]
    assert sizes[0] < sizes[1]
    assert difference(model, opened(tmp_path / "some" / "model.onnx"), *noise((0.9, 0.4)))[0] < 1e-5


@pytest.mark.parametrize("voices", [1, 3])
def test_a_voice_is_an_input_that_may_be_left_out(known: tuple[EmotionClassifier, Any], voices: int) -> None:
    model, session = known
    width = model.head.embedding_width
    voice = (torch.arange(1.0, voices + 1), torch.rand(voices, width), torch.rand(voices, width))
    batch = noise((0.9, 0.5, 1.3))
    probabilities, embedding = difference(model, session, *batch, *voice)
    assert probabilities < 1e-5
    assert embedding < 1e-4
    (without,) = session.run(["probabilities"], feed(*batch))
    (with_voice,) = session.run(["probabilities"], feed(*batch, *voice))
    assert np.abs(without - with_voice).max() > 1e-2


def test_a_voice_is_an_input_in_int8_too(known: tuple[EmotionClassifier, Any]) -> None:
    model, session = known
    batch, width = noise((0.9, 0.5)), model.head.embedding_width
    given = feed(*batch, torch.ones(1), torch.rand(1, width), torch.rand(1, width))
    (expected,) = session.run(["probabilities"], given)
    int8 = opened(Path(session._model_path).parent / "int8" / "model.onnx")
    (found,), (without,) = (int8.run(["probabilities"], inputs) for inputs in (given, feed(*batch)))
    assert np.abs(found - expected).max() < 0.5 * np.abs(found - without).max()


def test_a_voice_may_be_left_out_in_int8_where_a_head_only_centres(backbones_dir: Path, tmp_path: Path) -> None:
    """Nothing uses the variance there, and quantising removed its default: nobody could leave it out."""
    model = random_classifier(backbones_dir / "whisper", head={"speaker": "center"})
    onnx_format.save(model, tmp_path, "int8")
    int8, batch, width = opened(tmp_path / "model.onnx"), noise((0.9, 0.5)), model.head.embedding_width
    assert [one.name for one in int8.get_inputs()] == ["waveform", "lengths"]
    assert {one.name for one in int8.get_overridable_initializers()} == set(graph.VOICE)
    voice = (torch.ones(1), torch.rand(1, width), torch.rand(1, width))
    for inputs in (batch, (*batch, *voice)):
        assert difference(model, int8, *inputs)[0] < 0.1
    assert np.ptp([int8.run(["probabilities"], feed(*i))[0] for i in (batch, (*batch, *voice))], axis=0).max() > 1e-2


HEADS = {
    "last": {"layer_mix": "last", "pooling": "mean", "hidden": 8},
    "weighted": {"layer_mix": "weighted", "pooling": "attentive"},
    "concat": {"layer_mix": "concat", "pooling": "statistics"},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "head"),
    [
        ("whisper", "last"),
        ("whisper", "weighted"),
        ("whisper", "concat"),
        ("wav2vec2-group", "weighted"),
        ("wav2vec2-layer", "last"),
        ("hubert-noproj", "concat"),
        ("wavlm-group", "weighted"),
    ],
)
def test_every_family_and_every_head(backbones_dir: Path, tmp_path: Path, variant: str, head: str) -> None:
    """Every combination: `tests/benchmarks/export.py`."""
    model = random_classifier(backbones_dir / variant, head=HEADS[head])
    onnx_format.save(model, tmp_path)
    session = opened(tmp_path / "model.onnx")
    for seconds in SHAPES:
        assert difference(model, session, *noise(seconds))[0] < 1e-4, seconds


def size(path: Path) -> int:
    """Bytes without the waves of Whisper's spectrogram, 402 of 400 samples, which stay in fp32."""
    return path.stat().st_size - 402 * 400 * 4


@pytest.mark.parametrize(("dtype", "limit", "share"), [("fp32", 1e-5, 1.0), ("fp16", 2e-2, 0.9), ("int8", 0.1, 0.95)])
def test_fewer_bits(best: Path, exported: dict[str, Path], dtype: str, limit: float, share: float) -> None:
    """Of so few weights as here most stay in fp32, and int8 is coarse: the limit of an export is not this one."""
    session = opened(exported[dtype])
    for seconds in SHAPES[::3]:
        found = difference(merged(best, Options()), session, *noise(seconds))[0]
        assert found < limit
    assert dtype == "fp32" or found > 1e-6, "nothing was rounded"
    assert size(exported[dtype]) <= share * size(exported["fp32"])
    assert {"fp16": onnx.TensorProto.FLOAT16, "int8": onnx.TensorProto.UINT8}.get(dtype, onnx.TensorProto.FLOAT) in {
        one.data_type for one in onnx.load(exported[dtype]).graph.initializer
    }


def test_a_file_says_what_it_needs_and_nothing_of_this_machine(best: Path, exported: dict[str, Path]) -> None:
    for path in exported.values():
        content = path.read_bytes()
        for place in (Path(ser_ray.__file__).parent, best.parent):
            assert str(place).encode() not in content
        assert b"site-packages" not in content
        metadata = opened(path).get_modelmeta().custom_metadata_map
        found = {key: json.loads(metadata[key]) for key in graph.described(merged(best, Options()))}
        assert found["labels"] == ["angry", "happy", "sad"]
        assert found["audio"] == {"trim_db": 40.0, "min_seconds": 0.3, "max_seconds": 3.0}
        assert onnx_predict.answer(onnx_predict.load(str(path.parent)), noise([1.0])[0][0].numpy()).keys() == {
            *EMOTIONS
        }
        assert (found["sampling_rate"], found["normalisation"], found["temperature"]) == (RATE, "log-mel", 1.0)


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Of several rates and lengths, stereo, with quiet ends, and some that cannot be used."""
    folder = tmp_path_factory.mktemp("recordings")
    speech = noise([8.0])[0][0].numpy()
    quiet = np.zeros(RATE // 2, np.float32)
    soundfile.write(folder / "long.wav", np.concatenate([quiet, speech, quiet]), RATE)
    soundfile.write(folder / "stereo.wav", np.stack([speech[:RATE], speech[:RATE] * 0.3], axis=1), 44_100)
    soundfile.write(folder / "telephone.wav", speech[: RATE // 2], 8_000)
    soundfile.write(folder / "loud.wav", speech[: 2 * RATE] * 9, RATE, subtype="FLOAT")
    soundfile.write(folder / "silent.wav", np.zeros(RATE), RATE)
    soundfile.write(folder / "short.wav", speech[: RATE // 8], RATE)
    (folder / "text.wav").write_text("no audio")
    return sorted(folder.iterdir())


def lines(arguments: list[Any], capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    main(["predict", *map(str, arguments), "--format", "jsonl"])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_predict_on_it_equals_predict_on_the_checkpoint(
    best: Path, exported: dict[str, Path], recordings: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    expected = lines([best, *recordings], capsys)
    for given in (exported["fp32"], exported["fp32"].parent):
        found = lines([given, *recordings], capsys)
        assert [{**one, "probabilities": None} for one in found] == [{**o, "probabilities": None} for o in expected]
        for one, other in zip(found, expected, strict=True):
            assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-5)
    assert sum(line["probabilities"] == {} for line in expected) == 3  # silent, short, text


def test_predict_on_it_knows_a_voice(
    known: tuple[EmotionClassifier, Any], recordings: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, session = known
    del model.temperature  # a checkpoint without calibration
    width = model.head.embedding_width
    voice = Voice(torch.tensor([4.0]), torch.rand(1, width), torch.rand(1, width))
    checkpoint.save(model, tmp_path / "best", {"epoch": 0})
    model.temperature = 1.7
    write_voice(saved(model, voice, "anna"), tmp_path / "anna.json")
    more = ["--voice", tmp_path / "anna.json"]
    found = lines([session._model_path, recordings[-2], *more], capsys)
    expected = lines([tmp_path / "best", recordings[-2], *more], capsys)
    warm = np.array(list(expected[0]["probabilities"].values())) ** (1 / 1.7)  # softmax of logits / temperature
    assert list(found[0]["probabilities"].values()) == pytest.approx(warm / warm.sum(), abs=1e-5)


def test_the_program_beside_it_prepares_audio_as_we_do(recordings: list[Path]) -> None:
    for path in recordings:
        samples = soundfile.read(path, dtype="float32")[0] if path.name != "text.wav" else np.zeros(0, np.float32)
        samples = samples if samples.ndim == 1 else samples.mean(1)
        for trim_db in (None, 20.0, 40.0):
            audio = Audio(trim_db=trim_db, max_seconds=3.0)
            expected = list(pieces_of(audio, [(samples, RATE)]))
            if expected[0].reason:
                with pytest.raises(ValueError, match=r"silent|short"):
                    list(onnx_predict.windows(samples, trim_db, audio.min_seconds, audio.max_seconds))
                continue
            found = list(onnx_predict.windows(samples, trim_db, audio.min_seconds, audio.max_seconds))
            assert len(found) == len(expected)
            for window, piece in zip(found, expected, strict=True):
                assert np.array_equal(window * 32768, piece.samples)


def test_audonnx_loads_its_own_format(backbones_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import audonnx

    model = random_classifier(backbones_dir / "hubert-noproj")
    monkeypatch.setattr(audonnx_format, "all_merged", lambda directory, options: model)
    audonnx_format.write(tmp_path, tmp_path / "export", Options())
    loaded = audonnx.load(tmp_path / "export")
    assert loaded.labels("probabilities") == ["angry", "happy", "sad"]
    for seconds in (0.4, 1.234):
        waveform_BT, lengths_B = noise([seconds])
        found = loaded(waveform_BT[0].numpy(), RATE)
        with torch.inference_mode():
            probabilities_BK, embedding_BP = graph.Answering(model)(waveform_BT, lengths_B)
        np.testing.assert_allclose(found["probabilities"], probabilities_BK, atol=1e-5)
        np.testing.assert_allclose(found["embedding"], embedding_BP, atol=1e-4)
        own = onnx_predict.answer(onnx_predict.load(str(tmp_path / "export")), waveform_BT[0].numpy())
        np.testing.assert_allclose(list(own.values()), probabilities_BK[0], atol=0.05)  # its quiet ends are cut


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda path: path.write_bytes(b"no model"), "not readable as ONNX"),
        (lambda path: None, "no such file"),
        (lambda path: write_other(path), "not a model of ser-ray export"),
    ],
)
def test_another_file_is_one_line(
    tmp_path: Path, make: Any, line: str, recordings: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "other.onnx"
    make(path)
    assert main(["predict", str(path), str(recordings[0])]) == 2
    error = capsys.readouterr().err
    assert line in error
    assert error.count("\n") == 1


def test_what_needs_the_checkpoint_is_refused(
    exported: dict[str, Path], recordings: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    voice = tmp_path / "voice.json"
    voice.write_text("{}")
    for path in exported.values():  # the checkpoint has none either
        assert main(["predict", str(path), str(recordings[0]), "--sets"]) == 2
        assert f"{path}: it has no threshold for sets" in capsys.readouterr().err
    assert main(["predict", str(exported["fp32"]), str(recordings[0]), "--backbone", "elsewhere"]) == 2
    assert "need the checkpoint" in capsys.readouterr().err
    assert main(["predict", str(exported["fp32"]), str(recordings[0]), "--voice", str(voice)]) == 2
    assert "does not use what is known of a speaker" in capsys.readouterr().err


def write_other(path: Path) -> None:
    """A sound ONNX file of something else."""
    one = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    other = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    made = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "other", [one], [other])
    onnx.save(onnx.helper.make_model(made, ir_version=9, opset_imports=[onnx.helper.make_opsetid("", 20)]), path)

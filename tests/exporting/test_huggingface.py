"""A Hugging Face directory answers as the checkpoint: every family, head and way of adapting, and every recording."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from backbone_fixtures import FOUR, VARIANTS, experiment, noise, trained

from ser_ray.exporting import ORIGINAL, QUANTISED, Options, huggingface
from ser_ray.exporting.merged import bases, merged, reference
from ser_ray.exporting.modeling_emotion import EmotionFeatureExtractor, EmotionForAudioClassification
from ser_ray.models import checkpoint
from ser_ray.models.classifier import EmotionClassifier, build
from ser_ray.models.voice import Voice
from ser_ray.models.voice_file import saved
from ser_ray.schema import SAMPLING_RATE, UserError
from ser_ray.speech.audio import Unusable, from_int16, from_samples, to_int16
from ser_ray.speech.long import split
from ser_ray.training.inference import embed, predict

SECONDS = (0.31, 1.0, 0.7, 1.0, 2.3)
LORA = {"method": "lora", "rank": 2, "alpha": 4}


def exported(directory: Path, target: Path, **options: str) -> tuple[EmotionFeatureExtractor, torch.nn.Module]:
    huggingface.write(directory, target, Options(**options))
    return EmotionFeatureExtractor.from_pretrained(target), EmotionForAudioClassification.from_pretrained(target).eval()


def recordings(seconds: tuple[float, ...] = SECONDS) -> list[np.ndarray]:
    waveform_BT, lengths_B = noise(seconds)
    return [waveform_T[:length].numpy() for waveform_T, length in zip(waveform_BT, lengths_B, strict=True)]


def ours(model: EmotionClassifier, waveforms: list[np.ndarray], voice: Voice | None = None) -> np.ndarray:
    answers = predict(model, [(waveform, SAMPLING_RATE) for waveform in waveforms], voice)
    return np.array([list(answer.probabilities.values()) for answer in answers if answer.start is None])


@torch.inference_mode()
def theirs(
    extractor: EmotionFeatureExtractor, model: torch.nn.Module, waveforms: list[np.ndarray], **more
) -> np.ndarray:
    """As one padded batch."""
    inputs = extractor(waveforms, sampling_rate=SAMPLING_RATE, return_tensors="pt")
    return model(**inputs, **more).logits.softmax(-1).numpy()


HEADS = [
    {"layer_mix": "last", "pooling": "mean"},
    {"layer_mix": "weighted", "pooling": "statistics", "hidden": 8},
    {"layer_mix": "concat", "pooling": "attentive"},
    {"layer_mix": "weighted", "pooling": "attentive"},
]


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_backbone_answers_as_predict_does(backbones_dir, tmp_path, variant):
    head = HEADS[VARIANTS.index(variant) % len(HEADS)]
    directory = trained(tmp_path / "best", backbones_dir / variant, adapter=LORA, head=head)
    waveforms = recordings()
    found_NK = theirs(*exported(directory, tmp_path / "hf"), waveforms)
    expected_NK = ours(reference(directory), waveforms)
    assert np.abs(found_NK - expected_NK).max() < 1e-5
    assert np.ptp(expected_NK, axis=0).max() > 1e-3, "recordings that all get one answer would show nothing"


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("method", ["frozen", "full"])
def test_every_head_answers_as_predict_does(backbones_dir, tmp_path, head, method):
    adapter = {"method": method}
    directory = trained(tmp_path / "best", backbones_dir / "whisper", adapter=adapter, head=head)
    waveforms = recordings((0.4, 0.9))
    found_NK = theirs(*exported(directory, tmp_path / "hf"), waveforms)
    assert np.abs(found_NK - ours(reference(directory), waveforms)).max() < 1e-5


@pytest.mark.parametrize("variant", ["rslora", "dora", "pissa"])
def test_every_variant_of_lora_is_merged(backbones_dir, tmp_path, variant):
    directory = trained(tmp_path / "best", backbones_dir / "wavlm-group", adapter=LORA | {"variant": variant})
    waveforms = recordings((0.4, 0.9))
    assert np.abs(ours(merged(directory, Options()), waveforms) - ours(reference(directory), waveforms)).max() < 1e-5


@pytest.mark.parametrize("variant", ["plain", "loftq"])
def test_nf4_is_merged_on_what_its_updates_fit(backbones_dir, tmp_path, variant):
    """LoRA over NF4: on the original weights, near the quantised model; on those that 4 bits hold, the same model."""
    adapter = LORA | {"method": "qlora", "variant": variant}
    directory = trained(tmp_path / "best", backbones_dir / "whisper", adapter=adapter)
    expected, waveforms = reference(directory), recordings((0.4, 0.9))
    found = {base: merged(directory, Options(base=base)) for base in (ORIGINAL, QUANTISED)}
    assert not {type(module).__name__ for model in found.values() for module in model.modules()} & {"Linear4bit"}
    difference = {
        base: np.abs(ours(model, waveforms) - ours(expected, waveforms)).max() for base, model in found.items()
    }
    assert difference[QUANTISED] < 1e-5
    assert difference[ORIGINAL] > 1e-5
    assert bases(expected) == ((ORIGINAL, QUANTISED) if variant == "plain" else (QUANTISED,))
    original = checkpoint.load(directory, precision="fp32", in_4_bits=False)
    assert np.abs(ours(found[ORIGINAL], waveforms) - ours(original, waveforms)).max() < 1e-5


def test_weights_in_16_bits_are_half_the_size_and_computed_with_in_32(backbones_dir, tmp_path):
    directory = trained(tmp_path / "best", backbones_dir / "wav2vec2-group", adapter={"method": "full"})
    whole, half = (exported(directory, tmp_path / dtype, dtype=dtype)[1] for dtype in ("fp32", "fp16"))
    sizes = [(tmp_path / dtype / "model.safetensors").stat().st_size for dtype in ("fp32", "fp16")]
    assert sizes[1] < 0.6 * sizes[0]
    assert {parameter.dtype for model in (whole, half) for parameter in model.parameters()} == {torch.float32}
    extractor, waveforms = EmotionFeatureExtractor.from_pretrained(tmp_path / "fp16"), recordings((0.4, 0.9))
    assert 0 < np.abs(theirs(extractor, half, waveforms) - ours(reference(directory), waveforms)).max() < 2e-2


def test_a_long_recording_is_answered_in_the_windows_of_predict(backbones_dir, tmp_path):
    """With a window that is silent, and an answer from the pooled vectors."""
    audio = {"max_seconds": 1.0}
    directory = trained(tmp_path / "best", backbones_dir / "wav2vec2-layer", adapter=LORA, audio=audio)
    long = np.concatenate([*recordings((0.9, 1.3)), np.zeros(2 * SAMPLING_RATE, np.float32), *recordings((1.7,))])
    waveforms = [*recordings((0.5,)), long]
    extractor, model = exported(directory, tmp_path / "hf")
    expected = reference(directory)
    assert np.abs(theirs(extractor, model, waveforms) - ours(expected, waveforms)).max() < 1e-5
    inputs = extractor(waveforms, sampling_rate=SAMPLING_RATE, return_tensors="pt")
    vectors_NP = embed(expected, [(waveform, SAMPLING_RATE) for waveform in waveforms])
    with torch.inference_mode():
        assert np.abs(model(**inputs).embeddings.numpy() - vectors_NP).max() < 1e-4


@pytest.mark.parametrize("speaker", ["center", "standardize"])
def test_a_voice_is_used_as_predict_uses_it(backbones_dir, tmp_path, speaker):
    directory = trained(tmp_path / "best", backbones_dir / "whisper", adapter=LORA, head={"speaker": speaker})
    extractor, model = exported(directory, tmp_path / "hf")
    expected, waveforms = reference(directory), recordings((0.4, 0.9))
    width = expected.head.embedding_width
    random = np.random.default_rng(0)
    known = Voice(
        torch.tensor([3.0]).double(),
        torch.from_numpy(random.standard_normal((1, width))),
        torch.from_numpy(random.random((1, width))),
    )
    content = {"recordings": 3, "mean": known.mean_BP[0].tolist(), "variance": known.variance_BP[0].tolist()}
    without_NK = theirs(extractor, model, waveforms)
    assert np.abs(without_NK - ours(expected, waveforms)).max() < 1e-5
    with_NK = theirs(extractor, model, waveforms, voice=content)
    assert np.abs(with_NK - ours(expected, waveforms, known)).max() < 1e-5
    assert np.abs(with_NK - without_NK).max() > 1e-3
    assert model.config.checkpoint == saved(expected, known, "").checkpoint


@pytest.mark.parametrize("trim_db", [40.0, None])
@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100])
def test_the_extractor_prepares_as_training_did(rate, trim_db):
    audio = experiment("x", audio={"trim_db": trim_db}).audio
    extractor = EmotionFeatureExtractor(trim_db=trim_db, min_seconds=audio.min_seconds)
    random = np.random.default_rng(rate)
    for number in range(8):
        quiet, loud = (1e-4 * random.standard_normal(int(s * rate)) for s in random.uniform(0.2, 1.0, 2))
        speech = random.choice([0.05, 1.5]) * random.standard_normal(int(random.uniform(0.5, 2) * rate))
        samples = np.concatenate([quiet, speech, loud]).astype(np.float32)
        if number == 7:
            samples = (samples.clip(-1, 0.99) * 32768).astype(np.int16)
        (expected,) = from_samples(samples, rate, split(audio)).windows
        assert np.array_equal(extractor.prepare(samples, rate), from_int16(to_int16(expected.copy())))


@pytest.mark.parametrize(
    "samples",
    [
        np.zeros(16_000, np.float32),
        np.full(16_000, 0.5, np.float32),
        np.full(16_000, np.nan, np.float32),
        np.zeros(0, np.float32),
        np.random.default_rng(0).standard_normal(1600).astype(np.float32),
        np.zeros((2, 16_000), np.float32),
        np.array(["a"]),
    ],
)
def test_what_predict_refuses_is_one_clear_error(samples):
    with pytest.raises(Unusable):
        from_samples(samples, SAMPLING_RATE, experiment("x").audio)
    with pytest.raises(ValueError, match=r"silent|too short|no recording of one channel"):
        EmotionFeatureExtractor().prepare(samples, SAMPLING_RATE)


def test_a_rate_has_to_be_said():
    with pytest.raises(ValueError, match="sampling_rate=16000"):
        EmotionFeatureExtractor()(np.zeros(16_000, np.float32))


def test_it_can_be_trained_further(backbones_dir, tmp_path):
    extractor, model = exported(trained(tmp_path / "best", backbones_dir / "whisper", adapter=LORA), tmp_path / "hf")
    inputs = extractor(recordings((0.4, 0.9)), sampling_rate=SAMPLING_RATE, return_tensors="pt")
    model(**inputs, labels=torch.tensor([0, 2])).loss.backward()
    assert model.encoder.conv1.weight.grad.abs().max() > 0
    assert model.head.classifier[-1].weight.grad.abs().max() > 0


def test_a_pooling_of_somebody_is_refused(backbones_dir, add):
    from ser_ray.config.choices import POOLINGS

    add(POOLINGS, "own", "from ser_ray.models.pooling.mean import MeanPooling\n\nclass Added(MeanPooling):\n    pass\n")
    with pytest.raises(UserError, match=r"head\.pooling own cannot be exported"):
        huggingface.check(build(experiment(backbones_dir / "whisper", head={"pooling": "own"})))


def test_what_is_written_names_the_emotions_and_no_path(backbones_dir, tmp_path):
    huggingface.write(trained(tmp_path / "best", backbones_dir / "whisper"), tmp_path / "hf", Options())
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["id2label"] == {str(number): emotion for number, emotion in enumerate(FOUR)}
    assert {path.name for path in (tmp_path / "hf").iterdir()} == {
        *("config.json", "model.safetensors", "preprocessor_config.json", "modeling_emotion.py")
    }
    for path in (tmp_path / "hf").glob("*.json"):
        assert str(backbones_dir) not in path.read_text()
    assert len({path.stat().st_mode for path in (tmp_path / "hf").iterdir()}) == 1

"""Voices against plain loops: what is subtracted, with nothing, one and many recordings of a speaker."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from backbone_fixtures import experiment, logits, noise_batch
from hypothesis import given, settings
from hypothesis import strategies as st

from ser_ray.models import checkpoint, voice
from ser_ray.models.classifier import build
from ser_ray.schema import unknown_speaker

WIDTH = 5
AVERAGE = torch.tensor([0.5, -1.0, 2.0, 0.0, 3.0]), torch.tensor([1.0, 0.25, 4.0, 2.0, 0.5])


def _pooled(count: int, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed)) + 1


def _head(speaker: str = "center", shrinkage: float = 2.0) -> object:
    return experiment("b", head={"speaker": speaker, "speaker_shrinkage": shrinkage}).head


def _plain(pooled_P: np.ndarray, known_kP: np.ndarray, shrinkage: int, speaker: str) -> np.ndarray:
    """With ``shrinkage`` further recordings written out: half of them a deviation above the average, half below."""
    mean, deviation = AVERAGE[0].numpy(), np.sqrt(AVERAGE[1].numpy())
    further = np.stack([mean + (deviation if n % 2 else -deviation) for n in range(shrinkage)])
    every = np.concatenate([known_kP, further]).astype(np.float64)
    centred = pooled_P - every.mean(0)
    return centred / np.sqrt(every.var(0) + 1e-6) if speaker == "standardize" else centred


@settings(max_examples=60, deadline=None)
@given(
    known=st.lists(st.integers(0, 6), min_size=1, max_size=6),
    shrinkage=st.sampled_from([2, 4, 6]),
    speaker=st.sampled_from(["center", "standardize"]),
    seed=st.integers(0, 99),
)
def test_what_is_subtracted_is_that_of_all_recordings_written_out(
    known: list[int], shrinkage: int, speaker: str, seed: int
) -> None:
    pooled_NP, asked_BP = _pooled(8, seed), _pooled(len(known), seed + 1000)
    recordings = [np.random.default_rng(seed + n).permutation(8)[:k] for n, k in enumerate(known)]
    found = voice.relative(asked_BP, AVERAGE, voice.voices_of(pooled_NP, recordings), _head(speaker, shrinkage))
    for row, rows in enumerate(recordings):
        expected = _plain(asked_BP[row].numpy(), pooled_NP.numpy()[rows], shrinkage, speaker)
        np.testing.assert_allclose(found[row], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("speaker", ["center", "standardize"])
def test_no_recording_is_the_average_speaker_exactly(speaker: str) -> None:
    asked_BP, nobody = _pooled(3), voice.voices_of(_pooled(4), [np.array([], int)] * 3)
    for shrinkage in (1e-6, 2.0, 3.0, 7.7):
        head = _head(speaker, shrinkage)
        known = voice.relative(asked_BP, AVERAGE, nobody, head)
        assert torch.equal(known, voice.relative(asked_BP, AVERAGE, None, head))
    centred = asked_BP - AVERAGE[0]
    expected = centred / (AVERAGE[1] + 1e-6).sqrt() if speaker == "standardize" else centred
    assert torch.equal(known, expected)


def test_the_mean_of_one_recording_is_that_recording() -> None:
    pooled_NP = _pooled(6)
    voices = voice.voices_of(pooled_NP, [np.array([row]) for row in range(6)])
    assert torch.equal(voices.mean_BP.float(), pooled_NP)
    assert not voices.variance_BP.any()
    itself = voice.relative(pooled_NP, AVERAGE, voices, _head(shrinkage=1e-9))
    assert torch.equal(itself, torch.zeros_like(itself))


@given(order=st.permutations(range(9)))
@settings(max_examples=30, deadline=None)
def test_the_order_of_recordings_changes_nothing(order: list[int]) -> None:
    pooled_NP = _pooled(9)
    one, other = (voice.voices_of(pooled_NP, [np.array(rows)]) for rows in (range(9), order))
    for mine, theirs in zip(one, other, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@given(
    speakers=st.lists(st.sampled_from(["c/a", "c/b", "d/a", "unknown"]), min_size=1, max_size=14),
    files=st.integers(1, 4),
    seed=st.integers(0, 99),
)
@settings(max_examples=80, deadline=None)
def test_the_voice_of_the_others_is_that_of_a_plain_loop(speakers: list[str], files: int, seed: int) -> None:
    """Several rows of one recording are never used for each other; nobody is known by the speech of unknown others."""
    names = [unknown_speaker("c", str(n)) if s == "unknown" else s for n, s in enumerate(speakers)]
    recordings = [f"{name} {n % files}" for n, name in enumerate(names)]
    pooled_NP = _pooled(len(names), seed)
    found = voice.Others(pooled_NP, names, recordings).at(range(len(names)))
    for row, (name, recording) in enumerate(zip(names, recordings, strict=True)):
        rows = [n for n in range(len(names)) if names[n] == name and recordings[n] != recording]
        assert found.count_B[row] == (0 if "unknown" in name else len(rows))
        if len(rows):
            plain = pooled_NP.numpy()[rows].astype(np.float64)
            np.testing.assert_allclose(found.mean_BP[row], plain.mean(0), atol=1e-9)
            np.testing.assert_allclose(found.variance_BP[row], plain.var(0), atol=1e-9)


@given(names=st.permutations(["c/a", "c/b", "c/e", "c/zz"]))
@settings(max_examples=24, deadline=None)
def test_the_names_of_speakers_change_nothing(names: list[str]) -> None:
    pooled_NP, who = _pooled(11), [0, 1, 2, 3, 3, 2, 1, 1, 0, 3, 3]
    first, second = ([given[n] for n in who] for given in (["c/a", "c/b", "c/e", "c/zz"], names))
    for mine, theirs in zip(
        voice.average_speaker(pooled_NP, first), voice.average_speaker(pooled_NP, second), strict=True
    ):
        assert torch.equal(mine, theirs)
    ids = [str(n) for n in range(11)]
    for mine, theirs in zip(
        *(voice.Others(pooled_NP, speakers, ids).at(range(11)) for speakers in (first, second)), strict=True
    ):
        assert torch.equal(mine, theirs)


def test_the_average_speaker_weighs_every_known_speaker_the_same() -> None:
    """Those who are not known are one speaker a corpus, however many they are."""
    pooled_NP = _pooled(7)
    speakers = ["c/a", "c/a", "c/a", "c/b", *(unknown_speaker("c", str(n)) for n in range(3))]
    mean_P, variance_P = voice.average_speaker(pooled_NP, speakers)
    groups = [pooled_NP[:3].double(), pooled_NP[3:4].double(), pooled_NP[4:].double()]
    torch.testing.assert_close(mean_P, torch.stack([g.mean(0) for g in groups]).mean(0))
    torch.testing.assert_close(variance_P, torch.stack([g.var(0, correction=0) for g in groups]).mean(0))


@pytest.mark.parametrize("mix", ["weighted", "concat"])
def test_without_recordings_it_is_a_model_that_knows_no_speakers(backbones_dir, mix: str) -> None:
    """One whose pooled vectors are centred by the same vector for everybody."""
    parts = {"layer_mix": mix, "pooling": "statistics"}
    plain, own = (
        build(experiment(backbones_dir / "whisper", head=parts | extra)) for extra in ({}, {"speaker": "center"})
    )
    mean_P = torch.randn(own.head.embedding_width)
    own.head.speaker.mean_P.copy_(mean_P)
    plain.head.center_P.copy_(mean_P)
    batch = noise_batch()
    torch.testing.assert_close(logits(own, batch), logits(plain, batch), rtol=0, atol=0)


def test_without_the_key_a_head_is_what_it_was(backbones_dir) -> None:
    """No buffer, and the logits of `embed` and `classify` alone, bit by bit."""
    model, batch = build(experiment(backbones_dir / "whisper")), noise_batch()
    assert model.head.speaker is None
    assert not [name for name in model.head.state_dict() if "speaker" in name]
    found = logits(model, batch)
    with torch.inference_mode():
        hiddens, mask_BF = model.backbone(batch.inputs, batch.lengths_B)
        assert torch.equal(model.head.classify(model.head.embed(hiddens, mask_BF)), found)


def test_the_average_speaker_is_saved_with_the_head(backbones_dir, tmp_path) -> None:
    model = build(experiment(backbones_dir / "whisper", head={"speaker": "standardize"}))
    pooled_NP = torch.randn(6, model.head.embedding_width)
    model.head.speaker.fit(pooled_NP, ["c/a", "c/b", "c/b", "c/b", "c/a", "c/a"])
    checkpoint.save(model, tmp_path / "it", {})
    loaded = checkpoint.load(tmp_path / "it")
    assert torch.equal(loaded.head.speaker.mean_P, model.head.speaker.mean_P)
    assert torch.equal(loaded.head.speaker.variance_P, model.head.speaker.variance_P)
    assert torch.equal(logits(loaded, noise_batch()), logits(model, noise_batch()))


# -- how far a recording is from a voice


def _norm(pooled_NP: torch.Tensor, speakers: list[str]) -> voice.SpeakerNorm:
    norm = voice.SpeakerNorm(_head(), pooled_NP.shape[1])
    norm.fit(pooled_NP, speakers)
    return norm


def test_the_distance_is_that_of_a_plain_loop() -> None:
    pooled_NP, who = _pooled(12), [f"c/{n % 3}" for n in range(12)]
    norm, asked_BP = _norm(pooled_NP, who), _pooled(2, 5)
    known = voice.voices_of(pooled_NP, [np.array([0, 3, 6]), np.array([1])])
    by_speaker = [pooled_NP.numpy()[n::3].astype(np.float64) for n in range(3)]
    within, between = np.mean([own.var(0) for own in by_speaker], 0), np.var([own.mean(0) for own in by_speaker], 0)
    for row, (count, mean) in enumerate(((3, pooled_NP[[0, 3, 6]].mean(0)), (1, pooled_NP[1]))):
        weights = [(b / (w + 1e-6)) ** 2 for b, w in zip(between, within, strict=True)]
        squares = [(float(asked_BP[row, p] - mean[p])) ** 2 / (within[p] + 1e-6) for p in range(WIDTH)]
        expected = np.average(squares, weights=weights) / (1 + 1 / count)
        assert norm.distance(asked_BP, known)[row].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("count", [1, 4, 20])
def test_the_distance_to_the_own_voice_is_one_on_average_however_many_recordings_it_is_of(count: int) -> None:
    """Speakers drawn from a known distribution; another person is further away."""
    rng = np.random.default_rng(0)
    centre = rng.normal(size=(40, 1, 30)) * 2
    speech = torch.tensor(centre + rng.normal(size=(40, 60, 30)), dtype=torch.float32)
    norm = _norm(speech.flatten(0, 1), [f"c/{n}" for n in range(40) for _ in range(60)])
    own, other = [], []
    for n in range(40):
        known = voice.voices_of(speech[n], [np.arange(count)] * 30)
        own.append(norm.distance(speech[n, 30:], known).mean().item())
        other.append(norm.distance(speech[(n + 1) % 40, 30:], known).mean().item())
    assert np.mean(own) == pytest.approx(1, abs=0.08)
    assert min(other) > max(own)


def test_of_a_single_speaker_no_distance_is_known() -> None:
    norm = _norm(_pooled(6), ["c/a"] * 6)
    known = voice.voices_of(_pooled(3, 9), [np.arange(3)] * 6)
    assert not norm.distance(_pooled(6, 8), known).any()

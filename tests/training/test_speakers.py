"""Training with voices: which recordings an utterance is answered with, the same however a model is trained."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from backbone_fixtures import cached, data_of, experiment, logits, tone_batches, with_sections
from hypothesis import given, settings
from hypothesis import strategies as st

from ser_ray.config import Experiment
from ser_ray.models import checkpoint, voice
from ser_ray.models.classifier import EmotionClassifier, build
from ser_ray.schema import unknown_speaker
from ser_ray.speech.stream import Batch
from ser_ray.training import loop, step
from ser_ray.training.speakers import COUNTS, Drawn, TrainVoices, pooled_vectors

TRAIN, DEV = tone_batches(24, 3, seed=1), tone_batches(12, 3, seed=2)
SPEAKERS = {f"synthetic/{n}": f"synthetic/{n % 4}" for n in range(24)}


def _alone(value: Any) -> list[Any]:
    return [value]


@pytest.fixture
def tiny(backbones_dir: Path) -> Experiment:
    return experiment(
        backbones_dir / "whisper",
        adapter={"rank": 4, "dropout": 0.1},
        optimizer={"lr": 3e-3, "head_lr": 5e-2},
        head={"speaker": "center"},
        epochs=3,
    )


def _data(train: list[Batch] = TRAIN, dev: list[Batch] = DEV) -> loop.Data:
    return replace(data_of(lambda epoch: train, dev), speakers=SPEAKERS)


def _fitted(
    described: Experiment, data: loop.Data | None = None, keep: Path | None = None, resume_from: Path | None = None
) -> tuple[EmotionClassifier, list[dict[str, Any]]]:
    model, records = build(described), []

    def on_epoch(record: loop.Record, save: loop.Save) -> None:
        records.append(dict(record))
        if keep is not None:
            save(keep / str(record["epoch"]))

    loop.fit(model, data or _data(), on_epoch, resume_from=resume_from)
    return model, records


# -- which recordings


@given(
    speakers=st.lists(st.sampled_from(["c/a", "c/b", "unknown"]), min_size=1, max_size=40),
    seed=st.integers(0, 3),
    epoch=st.integers(0, 5),
)
@settings(max_examples=100, deadline=None)
def test_an_utterance_is_answered_with_others_of_its_speaker_alone(speakers: list[str], seed: int, epoch: int) -> None:
    ids = [f"c/{n}" for n in range(len(speakers))]
    names = [unknown_speaker("c", i) if s == "unknown" else s for i, s in zip(ids, speakers, strict=True)]
    drawn = Drawn(torch.zeros(len(ids), 2), ids, names)
    for row, utterance_id in enumerate(ids):
        rows = drawn.recordings(utterance_id, seed, epoch)
        assert row not in rows
        assert len(set(rows)) == len(rows)
        assert {names[n] for n in rows} <= {names[row]}
        others = names.count(names[row]) - 1 if speakers[row] != "unknown" else 0
        assert len(rows) in {others if k is None else min(k, others) for k in COUNTS}


def test_every_number_is_drawn_as_often_as_every_other() -> None:
    ids = [f"c/{n}" for n in range(30)]
    drawn = Drawn(torch.zeros(30, 2), ids, ["c/a"] * 30)
    counts = Counter(len(drawn.recordings(i, 0, epoch)) for i in ids for epoch in range(70))
    assert set(counts) == {0, 1, 2, 4, 8, 16, 29}
    assert max(counts.values()) < 1.3 * min(counts.values())


def test_the_draw_depends_on_seed_epoch_and_utterance_alone() -> None:
    ids = [f"c/{n}" for n in range(20)]
    drawn = Drawn(torch.arange(40.0).reshape(20, 2), ids, ["c/a", "c/b"] * 10)
    renamed = Drawn(torch.arange(40.0).reshape(20, 2), ids, ["c/z", "c/e"] * 10)
    whole = drawn.voices(ids, 0, 1)
    for other in (renamed.voices(ids, 0, 1), drawn.voices(ids[::-1], 0, 1).at(range(19, -1, -1))):
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(whole, other, strict=True))
    for seed, epoch in ((0, 2), (1, 1)):
        assert not torch.equal(whole.count_B, drawn.voices(ids, seed, epoch).count_B)


# -- in training


def test_a_step_uses_the_vectors_of_the_pass_as_constants(tiny: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a plain loop: rows drawn by hand of vectors computed one utterance at a time before the epoch."""
    described = with_sections(tiny, epochs=1)
    start = build(described).eval()
    vectors = {}
    for batch in TRAIN:
        for n, (utterance_id, length) in enumerate(zip(batch.utterance_ids, batch.lengths_B.tolist(), strict=True)):
            with torch.inference_mode():
                pooled = start.pooled(batch.inputs[n : n + 1, :length], batch.lengths_B[n : n + 1])[0]
            vectors[utterance_id] = pooled.numpy().astype(np.float64)
    ids = sorted(vectors)
    drawn = Drawn(torch.tensor(np.stack([vectors[i] for i in ids])), ids, [SPEAKERS[i] for i in ids])
    seen: dict[str, tuple[float, np.ndarray]] = {}
    take = step.add_gradients

    def spied(model: Any, batch: Batch, *rest: Any) -> torch.Tensor:
        *_, known, _ = rest
        assert not known.mean_BP.requires_grad
        for n, utterance_id in enumerate(batch.utterance_ids):
            seen[utterance_id] = float(known.count_B[n]), known.mean_BP[n].numpy()
        return take(model, batch, *rest)

    monkeypatch.setattr(step, "add_gradients", spied)
    _fitted(described)
    assert sorted(seen) == ids
    assert {count for count, _ in seen.values()} >= {0, 1, 5}
    for utterance_id, (count, mean_P) in seen.items():
        rows = drawn.recordings(utterance_id, described.seed, 1)
        assert count == len(rows)
        if len(rows):
            np.testing.assert_allclose(mean_P, np.mean([vectors[ids[r]] for r in rows], axis=0), atol=1e-4)


@pytest.mark.parametrize("speaker", ["center", "standardize"])
@pytest.mark.parametrize("init", ["random", "probe"])
def test_a_checkpoint_has_the_average_speaker_of_its_own_weights(
    tiny: Experiment, tmp_path: Path, speaker: str, init: str
) -> None:
    described = with_sections(tiny, head={"speaker": speaker, "init": init}, epochs=1)
    model, _ = _fitted(described, keep=tmp_path)
    loaded = checkpoint.load(tmp_path / "1")
    ids, pooled_NP = pooled_vectors(loaded, TRAIN, _alone)
    mean_P, variance_P = voice.average_speaker(pooled_NP, [SPEAKERS[i] for i in ids])
    torch.testing.assert_close(loaded.head.speaker.mean_P, mean_P.float())
    torch.testing.assert_close(loaded.head.speaker.variance_P, variance_P.float())
    assert torch.equal(logits(loaded, DEV[0]), logits(model, DEV[0]))


@pytest.mark.parametrize("init", ["random", "probe"])
def test_a_resumed_run_takes_the_same_steps(tiny: Experiment, tmp_path: Path, init: str) -> None:
    described = with_sections(tiny, head={"speaker": "standardize", "init": init, "dropout": 0.2})
    whole, records = _fitted(described, keep=tmp_path)
    resumed, after = _fitted(described, resume_from=tmp_path / "2")
    assert [(r["train_loss"], r["dev_loss"]) for r in after] == [(r["train_loss"], r["dev_loss"]) for r in records[-1:]]
    for (name, expected), found in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(expected, found), name


def test_the_names_of_speakers_change_no_step(tiny: Experiment) -> None:
    described = with_sections(tiny, epochs=1)
    renamed = {i: f"synthetic/{'dbca'[int(s[-1])]}" for i, s in SPEAKERS.items()}
    (one, told), (other, said) = (
        _fitted(described, replace(_data(), speakers=speakers)) for speakers in (SPEAKERS, renamed)
    )
    assert told[0]["train_loss"] == said[0]["train_loss"]
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize("pooling", ["attentive", "statistics"])
def test_cached_features_give_the_steps_of_speech(tiny: Experiment, pooling: str) -> None:
    """From frames, and from moments."""
    described = with_sections(
        tiny, adapter={"method": "frozen"}, head={"speaker": "center", "pooling": pooling, "dropout": 0.0}, epochs=2
    )
    model, records = _fitted(described)
    from_cache = build(described)
    train, dev = ([cached(from_cache, batch) for batch in batches] for batches in (TRAIN, DEV))
    told: list[dict[str, Any]] = []
    loop.fit(from_cache, _data(train, dev), lambda record, save: told.append(dict(record)))
    for mine, theirs in zip(records, told, strict=True):
        assert mine["train_loss"] == pytest.approx(theirs["train_loss"], abs=5e-3)
        assert mine["dev_loss"] == pytest.approx(theirs["dev_loss"], abs=5e-3)
    torch.testing.assert_close(from_cache.head.speaker.mean_P, model.head.speaker.mean_P, atol=5e-3, rtol=5e-3)


def test_dev_is_scored_without_knowledge_of_its_speakers(tiny: Experiment) -> None:
    """Speakers of dev are in no map, and the metrics are those of the checkpoint on single utterances."""
    model, records = _fitted(with_sections(tiny, epochs=1))
    scores = torch.cat([logits(model, batch) for batch in DEV])
    labels = torch.cat([batch.labels_B for batch in DEV])
    assert records[0]["dev_loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(scores, labels)), abs=1e-5)


def test_without_the_key_train_is_not_passed_over(tiny: Experiment) -> None:
    asked: list[int] = []

    def train(epoch: int) -> list[Batch]:
        asked.append(epoch)
        return TRAIN

    for speaker, expected in (("none", [1, 2]), ("center", [0, 1, 0, 2, 0])):
        asked.clear()
        described = with_sections(tiny, head={"speaker": speaker}, epochs=2)
        _fitted(described, replace(_data(), train=train))
        assert asked == expected
    assert TrainVoices(build(with_sections(tiny, head={})), list, {}, _alone).drawn(["x"], 1) is None


@pytest.mark.parametrize("layer_mix", ["concat", "weighted"])
@pytest.mark.parametrize("speaker", ["center", "standardize"])
def test_the_probe_is_that_of_a_model_that_never_heard_of_speakers(
    tiny: Experiment, speaker: str, layer_mix: str
) -> None:
    """Where nothing is known of a speaker; and scikit-learn's, on plain features, where a speaker is known."""
    from sklearn.linear_model import LogisticRegression

    def probed(speaker: str) -> EmotionClassifier:
        kept: list[Any] = []

        def on_epoch(record: loop.Record, save: loop.Save) -> None:
            if record["epoch"] == 0:
                kept.append({name: value.clone() for name, value in model.head.state_dict().items()})

        head = {"speaker": speaker, "init": "probe", "layer_mix": layer_mix, "pooling": "statistics", "probe_c": 0.003}
        model = build(with_sections(tiny, head=head, epochs=1))
        loop.fit(model, _data(), on_epoch)
        fresh = build(model.experiment).eval()  # adapters as they were at epoch 0
        fresh.head.load_state_dict(kept[0])
        return fresh

    model, plain = probed(speaker), probed("none")
    ids, pooled_NP = pooled_vectors(model, TRAIN, _alone)
    for batch in DEV:
        torch.testing.assert_close(logits(model, batch), logits(plain, batch), atol=2e-2, rtol=2e-2)
    labels = [next(int(b.labels_B[b.utterance_ids.index(i)]) for b in TRAIN if i in b.utterance_ids) for i in ids]
    features_NP = pooled_NP.numpy().astype(np.float64)
    center_P, scale_P = features_NP.mean(0), features_NP.std(0) + 1e-5
    probe = LogisticRegression(C=0.003, class_weight="balanced", max_iter=500)
    probe.fit((features_NP - center_P) / scale_P, labels)
    if speaker == "center":  # (sum + s m) / (k + s) by hand, of three recordings
        means = [features_NP[[SPEAKERS[i] == f"synthetic/{n}" for i in ids]].mean(0) for n in range(4)]
        average_P = np.mean(means, axis=0)
        shift_P = (features_NP[1:4].sum(0) + 2 * average_P) / 5 - average_P
        expected = probe.decision_function((features_NP[:1] - shift_P - center_P) / scale_P)
        known = voice.voices_of(pooled_NP, [np.array([1, 2, 3])])
        with torch.inference_mode():
            found = model.head.classify(model.head.relative(pooled_NP[:1], known))
        np.testing.assert_allclose(found.numpy(), expected, atol=2e-3)

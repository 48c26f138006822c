"""A head that starts from a linear probe is that probe, as scikit-learn has it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from backbone_fixtures import LAYERS, data_of, experiment, logits, tone_batches
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from ser_ray.models.classifier import EmotionClassifier, build
from ser_ray.speech.stream import Batch
from ser_ray.training import loop
from ser_ray.training import probe as module
from ser_ray.training.probe import start_from_probe


def _features(model: EmotionClassifier, batches: Iterable[Batch], layer: int) -> tuple[np.ndarray, np.ndarray]:
    """One utterance at a time, in numpy."""
    rows, labels = [], []
    for batch in batches:
        for row, length in enumerate(batch.lengths_B.tolist()):
            with torch.inference_mode():
                hiddens, _ = model.backbone(batch.inputs[row : row + 1, :length], batch.lengths_B[row : row + 1])
            hidden_FD = hiddens[layer][0].numpy().astype(np.float64)
            hidden_FD = (hidden_FD - hidden_FD.mean(1, keepdims=True)) / np.sqrt(hidden_FD.var(1, keepdims=True) + 1e-5)
            pooled = [hidden_FD.mean(0)]
            if model.experiment.head.pooling != "mean":
                pooled.append(np.sqrt(hidden_FD.var(0) + 1e-6))
            rows.append(np.concatenate(pooled))
            labels.append(int(batch.labels_B[row]))
    return np.array(rows), np.array(labels)


def _probes(model: EmotionClassifier, train: list[Batch]) -> list[Pipeline]:
    """scikit-learn's own, one a layer."""
    regression = {"C": 0.01, "class_weight": "balanced", "max_iter": 500}
    return [
        make_pipeline(StandardScaler(), LogisticRegression(**regression)).fit(*_features(model, train, layer))
        for layer in range(LAYERS + 1)
    ]


def _model(
    backbones_dir: Path, pooling: str = "attentive", emotions: int = 3, mix: str = "weighted", **sections: object
) -> EmotionClassifier:
    head = {"pooling": pooling, "init": "probe", "layer_mix": mix}
    names = ("angry", "happy", "sad", "fear")[:emotions]
    return build(experiment(backbones_dir / "whisper", names, head=head, **sections)).eval()


def _alone(value: object) -> list[object]:
    return [value]


@pytest.mark.parametrize(("emotions", "heard"), [(3, 3), (2, 2), (4, 3), (3, 2)])
@pytest.mark.parametrize("pooling", ["mean", "statistics", "attentive"])
def test_the_head_starts_as_the_probe(backbones_dir: Path, pooling: str, emotions: int, heard: int) -> None:
    model = _model(backbones_dir, pooling, emotions)
    train, dev = tone_batches(30, heard, seed=1, noisiness=0.5), tone_batches(18, heard, seed=2, noisiness=0.5)
    layer = start_from_probe(model, train, dev, _alone)
    probe = _probes(model, train)[layer]
    features, _ = _features(model, dev, layer)
    decision = probe.decision_function(features)
    found = torch.cat([logits(model, batch) for batch in dev]).numpy().astype(np.float64)
    if heard == 2:  # scikit-learn tells two classes apart by one number
        np.testing.assert_allclose(found[:, 1] - found[:, 0], decision, atol=5e-3)
    else:
        np.testing.assert_allclose(found[:, :heard], decision, atol=5e-3)
    np.testing.assert_array_equal(found[:, :heard].argmax(1), probe.predict(features))
    if heard < emotions:
        assert (found[:, heard:] < found[:, :heard].min(1, keepdims=True)).all(), "never heard, never said"


@pytest.mark.parametrize("pooling", ["mean", "attentive"])
def test_a_concatenating_head_starts_as_the_probe_of_all_layers(backbones_dir: Path, pooling: str) -> None:
    model = _model(backbones_dir, pooling, mix="concat")
    train, dev = tone_batches(30, 3, seed=1, noisiness=0.5), tone_batches(18, 3, seed=2, noisiness=0.5)
    start_from_probe(model, train, dev, _alone)
    (seen, labels), (unseen, _) = (
        (np.concatenate([f for f, _ in every], axis=1), every[0][1])
        for every in ([_features(model, part, layer) for layer in range(LAYERS + 1)] for part in (train, dev))
    )
    scaler = StandardScaler().fit(seen)
    probe = LogisticRegression(C=0.01, class_weight="balanced", max_iter=500).fit(scaler.transform(seen), labels)
    found = torch.cat([logits(model, batch) for batch in dev]).numpy()
    np.testing.assert_allclose(found, probe.decision_function(scaler.transform(unseen)), atol=2e-2)


@pytest.mark.parametrize(("seed", "best"), [(1, 2), (2, 1)])
def test_the_layer_is_the_best_on_dev(backbones_dir: Path, seed: int, best: int) -> None:
    model = _model(backbones_dir)
    train, dev = (tone_batches(n, 3, seed=s, noisiness=1.0) for n, s in ((30, seed), (60, seed + 50)))
    layer = start_from_probe(model, train, dev, _alone)
    scores = []
    for index, probe in enumerate(_probes(model, train)):
        features, labels = _features(model, dev, index)
        scores.append(balanced_accuracy_score(labels, probe.predict(features)))
    assert layer == int(np.argmax(scores)) == best, scores
    assert model.head.mix_L.tolist() == [float(index == layer) for index in range(LAYERS + 1)]


def test_epoch_zero_is_the_probe(backbones_dir: Path) -> None:
    model = _model(backbones_dir, epochs=1, adapter={"method": "frozen"})
    train, dev = tone_batches(30, 3, seed=1, noisiness=3.0), tone_batches(60, 3, seed=2, noisiness=3.0)
    records: list[loop.Record] = []
    data = data_of(lambda epoch: train, dev)
    loop.fit(model, data, lambda record, save: records.append(dict(record)))
    assert [record["epoch"] for record in records] == [0, 1]
    assert records[0]["train_loss"] is None
    best = 0.0
    for layer, probe in enumerate(_probes(model.eval(), train)):  # training left the backbone as it was
        features, labels = _features(model, dev, layer)
        best = max(best, balanced_accuracy_score(labels, probe.predict(features)))
    assert records[0]["dev_uar"] == pytest.approx(best)
    assert records[0]["best_epoch"] in (0, 1)


def test_all_processes_count(backbones_dir: Path) -> None:
    """A process without batches of its own, as with few dev utterances, fits the same probe from the others'."""
    train, dev = tone_batches(30, 3, seed=1, noisiness=0.5), tone_batches(18, 3, seed=2, noisiness=0.5)
    whole, parted = _model(backbones_dir), _model(backbones_dir)
    start_from_probe(whole, train, dev, _alone)
    gathered: list[object] = []
    start_from_probe(whole, train, dev, lambda value: gathered.append(value) or [value])
    others = iter(gathered)
    start_from_probe(parted, [], [], lambda value: [value, next(others)])
    for expected, found in zip(whole.head.parameters(), parted.head.parameters(), strict=True):
        assert torch.equal(expected, found)


def test_of_a_large_corpus_the_same_part_is_used_however_it_arrives(backbones_dir, monkeypatch):
    """In any order of batches, in one process or two."""
    train, dev = tone_batches(60, 3, seed=1, noisiness=0.5), tone_batches(18, 3, seed=2, noisiness=0.5)
    model = _model(backbones_dir)
    layers, width = LAYERS + 1, model.head.center_P.numel()
    monkeypatch.setattr(module, "PROBE_BYTES", 4 * layers * width * 20)
    assert module.most_utterances(layers, width) == 20

    def gathered(own: list) -> list[list]:
        processes.append(own)
        return [own]

    _, expected_NLP, expected_N = module._features(model, train, _alone)
    assert expected_NLP.shape == (20, layers, width)
    processes: list[list] = []
    for order in (train[::-1], train[::2], train[1::2]):
        _, _, found_N = module._features(model, order, gathered)
        assert len(found_N) == 20
    _, backwards_NLP, backwards_N = module._features(model, train[::-1], _alone)
    _, two_NLP, two_N = module._features(model, [], lambda _: processes[1:])
    for found_NLP, found_N in ((backwards_NLP, backwards_N), (two_NLP, two_N)):
        np.testing.assert_allclose(found_NLP, expected_NLP, atol=1e-5)
        np.testing.assert_array_equal(found_N, expected_N)
    assert 0 <= start_from_probe(model, train, dev, _alone) < layers

"""Initialise the head from a linear probe: logistic regression on the frozen backbone's best layer, or on all layers.

Fine-tuning with a random head first distorts the features that the head needs (Kumar et al. 2022, arXiv 2202.10054);
with a few hundred utterances per emotion they may never recover.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from ser_ray.evaluation import metrics
from ser_ray.models.classifier import EmotionClassifier, Head
from ser_ray.models.precision import autocast
from ser_ray.speech.stream import Batch

if TYPE_CHECKING:  # takes a second to import, also for trials without a probe
    from sklearn.linear_model import LogisticRegression

PROBE_C = 0.01
"""Inverse regularisation C, for about a thousand standardised features and about as many utterances."""


def start_from_probe(
    model: EmotionClassifier,
    train: Iterable[Batch],
    dev: Iterable[Batch],
    gather: Callable[[Any], list[Any]],
) -> int:
    """Fit the probe on train, write it into ``model.head``, return its layer (0: the first block's input, or all).

    The layer is the one whose probe has the best UAR on dev; with ``head.layer_mix: concat`` one probe sees all layers.
    Uniform attention equals plain statistics, so all three poolings start as exactly the probe.
    """
    features_NLP, labels_N = _features(model, train, gather)
    dev_features_MLP, dev_labels_M = _features(model, dev, gather)
    if model.head.layer_mix == "concat":
        features_NLP, dev_features_MLP = (f.reshape(len(f), 1, -1) for f in (features_NLP, dev_features_MLP))
    center_LP, scale_LP = features_NLP.mean(0), features_NLP.std(0) + 1e-5
    features_NLP = (features_NLP - center_LP) / scale_LP
    dev_features_MLP = (dev_features_MLP - center_LP) / scale_LP
    probes = [_fit(features_NLP[:, layer], labels_N) for layer in range(features_NLP.shape[1])]
    guesses = [probe.predict(dev_features_MLP[:, layer]) for layer, probe in enumerate(probes)]
    num_emotions = len(model.experiment.emotions)
    scores = [metrics.uar(metrics.confusion(dev_labels_M, guess, num_emotions)) for guess in guesses]
    best = int(np.argmax(scores))
    _write(model.head, best, center_LP[best], scale_LP[best], probes[best])
    return best


@torch.inference_mode()
def _features(
    model: EmotionClassifier, batches: Iterable[Batch], gather: Callable[[Any], list[Any]]
) -> tuple[np.ndarray, np.ndarray]:
    """Pooled features of every layer (N, L, P) and labels (N,), of all processes, in order of utterance id."""
    model.eval()
    device = next(model.head.parameters()).device
    own = []
    for batch in batches:
        batch = batch.to(device)
        with autocast(model.experiment.precision, device):  # as in training: what the head will receive
            pooled = model.pooled_layers(batch.inputs, batch.lengths_B)
        own.append((batch.utterance_ids, torch.stack(pooled, dim=1).cpu().numpy(), batch.labels_B.cpu().numpy()))
    # A process may have no batch of its own: dev can have fewer batches than there are processes.
    ids, features, labels = zip(*(triple for part in gather(own) for triple in part), strict=True)
    # Sorted: the probe does not depend on how the batches were distributed and ordered.
    in_order = np.argsort([utterance_id for part in ids for utterance_id in part], kind="stable")
    return np.concatenate(features)[in_order], np.concatenate(labels)[in_order]


def _fit(standard_NP: np.ndarray, labels_N: np.ndarray) -> LogisticRegression:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=PROBE_C, class_weight="balanced", max_iter=500).fit(standard_NP, labels_N)


def _write(head: Head, layer: int, center_P: np.ndarray, scale_P: np.ndarray, probe: LogisticRegression) -> None:
    linear = head.classifier[-1]
    assert isinstance(linear, nn.Linear)
    with torch.no_grad():
        if head.layer_mix == "weighted":
            head.mix_L.zero_()[layer] = 1.0
        head.center_P.copy_(torch.from_numpy(center_P))
        head.scale_P.copy_(torch.from_numpy(scale_P))
        # An emotion that does not occur in train keeps a zero row and a bias far below the others.
        linear.weight.zero_()
        linear.bias.fill_(-10.0)
        coefficients, intercepts = probe.coef_, probe.intercept_
        if len(probe.classes_) == 2:  # scikit-learn keeps one row for two classes
            coefficients = np.vstack([-coefficients, coefficients]) / 2
            intercepts = np.concatenate([-intercepts, intercepts]) / 2
        for row, bias, label in zip(coefficients, intercepts, probe.classes_, strict=True):
            linear.weight[label] = torch.from_numpy(row)
            linear.bias[label] = float(bias)

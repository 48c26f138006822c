"""Initialise the head from a linear probe: logistic regression on the frozen backbone's best layer, or on all layers.

Fine-tuning with a random head first distorts the features that the head needs (Kumar et al. 2022, arXiv 2202.10054);
with a few hundred utterances per emotion they may never recover.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from ser_ray.config import Experiment
from ser_ray.evaluation import metrics
from ser_ray.models.classifier import EmotionClassifier
from ser_ray.models.precision import autocast
from ser_ray.models.voice import average_speaker, relative
from ser_ray.speech.stream import Batch

if TYPE_CHECKING:  # takes a second to import, also for trials without a probe
    from sklearn.linear_model import LogisticRegression

NOBODY: Final[Mapping[str, str]] = {}
PROBE_BYTES: Final = 2_000_000_000
"""Largest size of the features that a probe is fitted on. Of whisper-large (33 layers, 2 x 1280 features) 5 900
utterances fit, where 100 hours have 120 000 and would take 40 GB."""


def start_from_probe(
    model: EmotionClassifier,
    train: Iterable[Batch],
    dev: Iterable[Batch],
    gather: Callable[[Any], list[Any]],
    speakers: Mapping[str, str] = NOBODY,
) -> int:
    """Fit the probe on train, write it into ``model.head``, return its layer (0: the first block's input, or all).

    The layer is the one whose probe has the best UAR on dev; with ``head.layer_mix: concat`` one probe sees all layers.
    It sees what the head's own pooling makes of a layer, so the head starts as exactly the probe. Of a large corpus the
    probe sees a random part (`most_utterances`), the same whatever the order and the number of processes.

    It is fitted without knowledge of speakers, also with ``head.speaker``: where recordings of a speaker are known
    they then bring as much as to a probe that saw them in training, and where none are it is the better one
    (results/LOG.md, 2026-11-30). ``speakers``: utterance id -> speaker, for train; only for ``head.speaker``.
    """
    ids_N, features_NLP, labels_N = _features(model, train, gather)
    _, dev_features_MLP, dev_labels_M = _features(model, dev, gather)
    if model.experiment.head.layer_mix == "concat":
        features_NLP, dev_features_MLP = (f.reshape(len(f), 1, -1) for f in (features_NLP, dev_features_MLP))
    if model.experiment.head.speaker != "none":
        _relate(features_NLP, dev_features_MLP, ids_N.tolist(), speakers, model.experiment)
    center_LP, scale_LP = features_NLP.mean(0), features_NLP.std(0) + 1e-5
    for features in (features_NLP, dev_features_MLP):  # in place: they may be large
        features -= center_LP
        features /= scale_LP
    c = model.experiment.head.probe_c
    probes = [_fit(features_NLP[:, layer], labels_N, c) for layer in range(features_NLP.shape[1])]
    guesses = [probe.predict(dev_features_MLP[:, layer]) for layer, probe in enumerate(probes)]
    num_emotions = len(model.experiment.emotions)
    scores = [metrics.uar(metrics.confusion(dev_labels_M, guess, num_emotions)) for guess in guesses]
    best = int(np.argmax(scores))
    standardisation = torch.from_numpy(center_LP[best]), torch.from_numpy(scale_LP[best])
    model.head.start_from_probe(best, *standardisation, *_classifier(probes[best], num_emotions))
    return best


def most_utterances(layers: int, width: int) -> int:
    """How many utterances a probe is fitted on at most, with so many layers of ``width`` pooled features in fp32.

    >>> most_utterances(33, 2560)
    5918
    """
    return PROBE_BYTES // (4 * layers * width)


@torch.inference_mode()
def _features(model: EmotionClassifier, batches: Iterable[Batch], gather: Callable[[Any], list[Any]]) -> _Features:
    """Utterance ids, pooled features of every layer and labels, of all processes, in order of utterance id."""
    model.eval()
    device = next(model.head.parameters()).device
    own: list[_Features] = []
    held = 0
    for batch in batches:
        batch = batch.to(device)
        with autocast(model.experiment.precision, device):  # as in training: what the head will receive
            pooled = model.pooled_layers(batch.inputs, batch.lengths_B)
        features_BLP = torch.stack(pooled, dim=1).cpu().numpy()
        own.append((np.array(batch.utterance_ids), features_BLP, batch.labels_B.cpu().numpy()))
        held += len(batch)
        if held > 2 * (most := most_utterances(*features_BLP.shape[1:])):
            own, held = [_sampled(own)], most
    # A process may have no batch of its own: dev can have fewer batches than there are processes.
    ids_N, features_NLP, labels_N = _sampled([part for parts in gather(own) for part in parts])
    # Sorted: the probe does not depend on how the batches were distributed and ordered.
    in_order = np.argsort(ids_N, kind="stable")
    return ids_N[in_order], features_NLP[in_order], labels_N[in_order]


def _relate(
    train_NLP: np.ndarray,
    dev_MLP: np.ndarray,
    ids: Sequence[str],
    speakers: Mapping[str, str],
    experiment: Experiment,
) -> None:
    """In place: every layer in relation to the average speaker of train, as the head sees it at k = 0."""
    named = [speakers[utterance_id] for utterance_id in ids]
    for layer in range(train_NLP.shape[1]):
        train_NP, dev_MP = (torch.from_numpy(features[:, layer].copy()) for features in (train_NLP, dev_MLP))
        average = average_speaker(train_NP, named)
        train_NLP[:, layer] = relative(train_NP, average, None, experiment.head)
        dev_MLP[:, layer] = relative(dev_MP, average, None, experiment.head)


_Features = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Utterance ids (N,), features (N, L, P), labels (N,)."""


def _sampled(parts: list[_Features]) -> _Features:
    """All parts as one; of more utterances than `most_utterances`, those whose hashed ids are smallest."""
    ids_N, features_NLP, labels_N = (np.concatenate(column) for column in zip(*parts, strict=True))
    most = most_utterances(*features_NLP.shape[1:])
    if len(ids_N) <= most:
        return ids_N, features_NLP, labels_N
    hashes_N = [hashlib.blake2b(str(utterance_id).encode(), digest_size=8).digest() for utterance_id in ids_N]
    chosen_N = np.sort(np.argsort(hashes_N, kind="stable")[:most])
    return ids_N[chosen_N], features_NLP[chosen_N], labels_N[chosen_N]


def _fit(standard_NP: np.ndarray, labels_N: np.ndarray, c: float) -> LogisticRegression:
    """The probe of one layer.

    With fewer utterances than features it is fitted to the utterances' coordinates in the space that they span, where
    its solution lies: the same probe from a part of the numbers.
    """
    from sklearn.linear_model import LogisticRegression

    probe = LogisticRegression(C=c, class_weight="balanced", max_iter=500)
    if len(standard_NP) >= standard_NP.shape[1]:
        return probe.fit(standard_NP, labels_N)
    basis_PN, coordinates_NN = np.linalg.qr(standard_NP.T)
    probe.fit(coordinates_NN.T, labels_N)
    probe.coef_, probe.n_features_in_ = probe.coef_ @ basis_PN.T, standard_NP.shape[1]
    return probe


def _classifier(probe: LogisticRegression, num_emotions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The probe as a linear layer: weight_KP and bias_K.

    An emotion that does not occur in train has a row of zeros and a bias far below the others.
    """
    coefficients, intercepts = probe.coef_, probe.intercept_
    if len(probe.classes_) == 2:  # scikit-learn keeps one row for two classes
        coefficients = np.vstack([-coefficients, coefficients]) / 2
        intercepts = np.concatenate([-intercepts, intercepts]) / 2
    weight_KP, bias_K = torch.zeros(num_emotions, coefficients.shape[1]), torch.full((num_emotions,), -10.0)
    weight_KP[probe.classes_] = torch.from_numpy(coefficients).float()
    bias_K[probe.classes_] = torch.from_numpy(intercepts).float()
    return weight_KP, bias_K

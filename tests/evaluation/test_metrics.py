"""Every figure against scikit-learn, over a declared label set of which some may be absent."""

import itertools
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as oracle

from ser_ray.evaluation import metrics

UNHURRIED = settings(deadline=None)  # what an example takes says how busy the machine is


@st.composite
def judged(draw, least=1):
    """(labels, predicted, K): up to 40 utterances; few of the K labels need occur."""
    num_labels = draw(st.integers(2, 8))
    n = draw(st.integers(least, 40))
    values = st.lists(st.integers(0, num_labels - 1), min_size=n, max_size=n)
    return np.array(draw(values), dtype=np.int64), np.array(draw(values), dtype=np.int64), num_labels


@given(judged(least=0))
@UNHURRIED
def test_confusion_equals_scikit_learn(case):
    labels, predicted, num_labels = case
    ours = metrics.confusion(labels, predicted, num_labels)
    if len(labels):
        np.testing.assert_array_equal(ours, oracle.confusion_matrix(labels, predicted, labels=range(num_labels)))
    else:
        np.testing.assert_array_equal(ours, np.zeros((num_labels, num_labels)))


@given(judged())
@UNHURRIED
def test_headline_equals_scikit_learn(case):
    labels, predicted, num_labels = case
    every = range(num_labels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn warns of absent classes, which are the point here
        kappa = oracle.cohen_kappa_score(labels, predicted, labels=every)
        expected = {
            "accuracy": oracle.accuracy_score(labels, predicted),
            "uar": oracle.balanced_accuracy_score(labels, predicted),
            "macro_f1": oracle.f1_score(labels, predicted, labels=every, average="macro", zero_division=0),
            "weighted_f1": oracle.f1_score(labels, predicted, labels=every, average="weighted", zero_division=0),
            "kappa": 0.0 if np.isnan(kappa) else kappa,
        }
    ours = metrics.headline(metrics.confusion(labels, predicted, num_labels))
    assert tuple(ours) == metrics.HEADLINE
    assert {k: float(v) for k, v in ours.items()} == pytest.approx(expected, abs=1e-12)


@given(judged())
@UNHURRIED
def test_per_emotion_equals_scikit_learn(case):
    labels, predicted, num_labels = case
    ours = metrics.per_emotion(metrics.confusion(labels, predicted, num_labels))
    expected = oracle.precision_recall_fscore_support(labels, predicted, labels=range(num_labels), zero_division=0)
    for name, values in zip(("precision", "recall", "f1", "n"), expected, strict=True):
        np.testing.assert_allclose(ours[name], values, atol=1e-12, err_msg=name)


@given(st.integers(2, 6), st.integers(0, 2**32 - 1))
@settings(UNHURRIED, max_examples=30)
def test_stacked_matrices_equal_a_loop(num_labels, seed):
    rng = np.random.default_rng(seed)
    stacked = rng.poisson(0.7, size=(3, 4, num_labels, num_labels))
    stacked[..., 0, 0] += 1  # no empty matrix, yet many absent emotions
    together = metrics.headline(stacked)
    together_per_emotion = metrics.per_emotion(stacked)
    for at in np.ndindex(3, 4):
        for name, value in metrics.headline(stacked[at]).items():
            assert together[name][at] == pytest.approx(float(value), abs=1e-12), name
        for name, values in metrics.per_emotion(stacked[at]).items():
            np.testing.assert_allclose(together_per_emotion[name][at], values, err_msg=name)


@given(judged(), st.integers(1, 20), st.integers(0, 2**32 - 1))
@UNHURRIED
def test_ece_equals_a_plain_loop(case, bins, seed):
    labels, _, num_labels = case
    probabilities = np.random.default_rng(seed).dirichlet(np.full(num_labels, 0.3), size=len(labels))
    edges, expected = np.linspace(0, 1, bins + 1), 0.0
    for low, high in itertools.pairwise(edges):
        inside = [i for i, row in enumerate(probabilities) if low < max(row) <= high]
        hits = sum(probabilities[i].argmax() == labels[i] for i in inside)
        expected += abs(hits - sum(max(probabilities[i]) for i in inside)) / len(labels)
    assert metrics.ece(labels, probabilities, bins) == pytest.approx(expected, abs=1e-9)


def test_ece_of_a_certain_and_right_model_is_zero():
    assert metrics.ece(np.array([0, 1, 2]), np.eye(3)) == 0.0


@pytest.mark.parametrize("label", [0, 2])
def test_kappa_of_one_emotion_throughout_is_zero_not_nan(label):
    assert metrics.kappa(metrics.confusion(np.full(5, label), np.full(5, label), 3)) == 0.0


@pytest.mark.parametrize(
    ("labels", "predicted", "both_values"),
    [([0, 1], [0], r"\(2,\).*\(1,\)"), ([0, 3], [0, 1], r"0\.\.2.*0\.\.3"), ([0, 1], [-1, 1], r"0\.\.2.*-1\.\.1")],
)
def test_confusion_refuses_with_both_values(labels, predicted, both_values):
    with pytest.raises(ValueError, match=both_values):
        metrics.confusion(np.array(labels), np.array(predicted), num_labels=3)


@pytest.mark.parametrize("function", [*metrics.HEADLINE, "per_emotion"])
@pytest.mark.parametrize("wrong", [np.ones((2, 3)), np.ones(4), np.zeros((2, 2)), np.array([[2, -1], [0, 1]])])
def test_figures_refuse_what_is_no_confusion_matrix(function, wrong):
    with pytest.raises(ValueError, match="expected"):
        getattr(metrics, function)(wrong)


def test_ece_refuses_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"\(3,\).*\(2, 2\)"):
        metrics.ece(np.zeros(3, dtype=int), np.full((2, 2), 0.5))

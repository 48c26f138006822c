"""Chance and majority against scikit-learn's dummy classifiers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.dummy import DummyClassifier
from sklearn.metrics import balanced_accuracy_score, f1_score

from ser_ray.evaluation.baselines import chance, majority
from ser_ray.evaluation.metrics import confusion, headline

UNHURRIED = settings(deadline=None)  # what an example takes says how busy the machine is


@given(st.integers(2, 9))
@UNHURRIED
def test_chance_is_what_uniform_guesses_give(num_labels):
    labels = np.repeat(np.arange(num_labels), 40_000 // num_labels)
    guesses = np.random.default_rng(0).integers(0, num_labels, len(labels))
    simulated = headline(confusion(labels, guesses, num_labels))
    assert chance(num_labels) == pytest.approx({k: float(v) for k, v in simulated.items()}, abs=0.01)


@given(st.lists(st.integers(0, 4), min_size=1), st.lists(st.integers(0, 4), min_size=1))
@UNHURRIED
def test_majority_equals_scikit_learn(train, test):
    train_labels, test_labels = np.array(train), np.array(test)
    dummy = DummyClassifier(strategy="most_frequent").fit(np.zeros((len(train), 1)), train_labels)
    predicted = dummy.predict(np.zeros((len(test), 1)))
    ours = majority(train_labels, test_labels, num_labels=5)
    assert ours["accuracy"] == pytest.approx(np.mean(predicted == test_labels))
    assert ours["kappa"] == pytest.approx(0.0)
    assert ours["macro_f1"] == pytest.approx(
        f1_score(test_labels, predicted, labels=range(5), average="macro", zero_division=0)
    )
    if ours["accuracy"]:
        assert ours["uar"] == pytest.approx(balanced_accuracy_score(test_labels, predicted))

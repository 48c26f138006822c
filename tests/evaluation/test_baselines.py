"""Chance and majority against scikit-learn's dummy classifiers; the linear SVM against plain loops."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax
from sklearn.dummy import DummyClassifier
from sklearn.metrics import balanced_accuracy_score, f1_score
from sklearn.svm import LinearSVC

from ser_ray.evaluation.baselines import SVM_C_GRID, chance, linear_svm, majority
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


def _speech(seed=0, speakers=6, each=20, emotions=3, apart=1.0):
    """Features of two scales, of which the first few tell the emotion; every speaker has a place of their own."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(speakers * each) % emotions)
    speaker = np.repeat(np.arange(speakers), each)
    features = rng.standard_normal((len(labels), 8)) + 0.5 * rng.standard_normal((speakers, 8))[speaker]
    features[:, :emotions] += apart * np.eye(emotions)[labels]
    return features * np.array([1, 100, 0.01, 1, 1, 1000, 1, 1]) + 5, labels, [f"s{s}" for s in speaker]


def _standard(features, of):
    return (features - of.mean(axis=0)) / of.std(axis=0)


def test_linear_svm_chooses_what_a_loop_over_left_out_speakers_chooses():
    chosen = set()
    for seed in range(6):
        features, labels, speakers = _speech(seed, speakers=5, emotions=3, apart=0.7)
        tested, _, _ = _speech(seed + 100)
        speaker = np.array(speakers)

        def fit(train, C, features=features, labels=labels):
            z = _standard(features[train], features[train])
            return LinearSVC(C=C, class_weight="balanced", dual=False).fit(z, labels[train])

        scores = []
        for C in SVM_C_GRID:
            found = []
            for name in sorted(set(speakers)):
                rest, left_out = speaker != name, speaker == name
                guesses = fit(rest, C).predict(_standard(features[left_out], features[rest]))
                found.append(balanced_accuracy_score(labels[left_out], guesses))
            scores.append(np.mean(found))
        best = SVM_C_GRID[int(np.argmax(np.round(scores, 12)))]
        chosen.add(best)
        margins = fit(np.full(100, True), best).decision_function(_standard(tested, features))
        assert linear_svm(features, labels, speakers, tested, 3) == pytest.approx(softmax(margins, axis=1))
    assert len(chosen) > 1


@pytest.mark.parametrize("present", [(0, 1, 2), (1, 3), (0, 2, 4)])
@pytest.mark.parametrize("speakers", [1, 2, 6])
def test_predictions_are_probabilities_of_all_declared_emotions(present, speakers):
    features, labels, names = _speech(speakers=speakers, each=120 // speakers, emotions=len(present), apart=2.0)
    emotion = np.array(present)[labels]
    said = linear_svm(features, emotion, names, features, 5)
    assert said.shape == (120, 5)
    assert said.sum(axis=1) == pytest.approx(1)
    assert np.all((said > 0) == np.isin(np.arange(5), present))
    assert balanced_accuracy_score(emotion, said.argmax(axis=1)) > 0.8


def test_features_on_another_scale_and_a_constant_one_change_nothing():
    features, labels, speakers = _speech()
    other = np.concatenate([features * 1e3 - 7, np.full((len(features), 1), 3.0)], axis=1)
    said = [linear_svm(x, labels, speakers, x, 3) for x in (features, other)]
    assert said[0] == pytest.approx(said[1], abs=1e-3)


def test_one_emotion_and_features_that_are_no_numbers_are_refused():
    features, labels, speakers = _speech()
    with pytest.raises(ValueError, match="class"):
        linear_svm(features, np.zeros_like(labels), speakers, features, 3)
    with pytest.raises(ValueError, match="NaN"):
        linear_svm(np.where(features > 5, np.nan, features), labels, speakers, features, 3)

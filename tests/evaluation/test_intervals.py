"""The bootstrap against a plain loop over the same draws, and against what an interval must do."""

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score

from ser_ray.evaluation.intervals import bootstrap_ci95, bootstrap_gap95
from ser_ray.evaluation.metrics import HEADLINE, confusion, headline


def _judged(rng, speakers=6, each=15, num_labels=4, spread=0.3):
    """Utterances of speakers whom the model recognises unequally well."""
    names = np.repeat([f"corpus/{s:02}" for s in range(speakers)], each)
    skill = np.repeat(np.clip(0.6 + spread * rng.standard_normal(speakers), 0.05, 0.95), each)
    labels = rng.integers(0, num_labels, len(names))
    wrong = (labels + rng.integers(1, num_labels, len(names))) % num_labels
    return labels, np.where(rng.random(len(names)) < skill, labels, wrong), names.tolist()


def test_equals_a_loop_that_repeats_the_drawn_speakers():
    labels, predicted, speakers = _judged(np.random.default_rng(1))
    limits, unit = bootstrap_ci95(labels, predicted, speakers, num_labels=4, draws=200, seed=7)
    assert unit == "speakers"

    names = sorted(set(speakers))
    times_drawn = np.random.default_rng(7).multinomial(len(names), [1 / len(names)] * len(names), size=200)
    looped = {name: [] for name in (*HEADLINE, "scikit-learn's uar")}
    for times in times_drawn:
        drawn = []
        for name, many in zip(names, times, strict=True):
            drawn += [i for i, speaker in enumerate(speakers) if speaker == name] * many
        for name, value in headline(confusion(labels[drawn], predicted[drawn], 4)).items():
            looped[name].append(float(value))
        looped["scikit-learn's uar"].append(balanced_accuracy_score(labels[drawn], predicted[drawn]))
    for name in HEADLINE:
        assert limits[name] == pytest.approx(tuple(np.percentile(looped[name], (2.5, 97.5))), abs=1e-12), name
    assert limits["uar"] == pytest.approx(tuple(np.percentile(looped["scikit-learn's uar"], (2.5, 97.5))))


def test_one_speaker_falls_back_to_utterances():
    rng = np.random.default_rng(2)
    labels, predicted, _ = _judged(rng, speakers=1, each=200)
    limits, unit = bootstrap_ci95(labels, predicted, ["corpus/01"] * 200, num_labels=4)
    assert unit == "utterances"
    accuracies = [np.mean((labels == predicted)[rng.integers(0, 200, 200)]) for _ in range(4000)]
    assert limits["accuracy"] == pytest.approx(tuple(np.percentile(accuracies, (2.5, 97.5))), abs=0.015)


def test_covers_the_truth_about_as_often_as_it_says():
    """Over many draws of 24 speakers the interval holds the population's accuracy; an utterance bootstrap would not."""
    truth, covered, covered_by_utterances = 0.6, 0, 0
    for seed in range(150):
        rng = np.random.default_rng(seed)
        skill = rng.choice([0.4, 0.8], size=24)
        speakers = np.repeat(np.arange(24), 20)
        labels = rng.integers(0, 3, len(speakers))
        hit = rng.random(len(speakers)) < skill[speakers]
        predicted = np.where(hit, labels, (labels + 1) % 3)
        limits, _ = bootstrap_ci95(labels, predicted, speakers.astype(str).tolist(), 3, draws=400, seed=seed)
        covered += limits["accuracy"][0] <= truth <= limits["accuracy"][1]
        half = 1.96 * np.sqrt(hit.mean() * (1 - hit.mean()) / len(hit))
        covered_by_utterances += abs(hit.mean() - truth) <= half
    assert 0.86 <= covered / 150 <= 0.99
    assert covered_by_utterances < covered - 15


def test_equal_seeds_give_equal_intervals_and_other_seeds_others():
    case = (*_judged(np.random.default_rng(3)), 4)
    assert bootstrap_ci95(*case, seed=1) == bootstrap_ci95(*case, seed=1)
    assert bootstrap_ci95(*case, draws=50, seed=1) != bootstrap_ci95(*case, draws=50, seed=2)


@pytest.mark.parametrize(("n", "speakers"), [(0, 0), (3, 2)])
def test_refuses_lengths_that_do_not_fit(n, speakers):
    zeros = np.zeros(n, dtype=int)
    with pytest.raises(ValueError, match=f"{n}, {n} and {speakers}"):
        bootstrap_ci95(zeros, zeros, ["a"] * speakers, num_labels=2)


def test_the_gap_of_equal_predictions_is_nothing():
    rng = np.random.default_rng(0)
    labels, guesses = rng.integers(0, 3, 60), rng.integers(0, 3, 60)
    speakers = [f"s{n % 6}" for n in range(60)]
    assert set(bootstrap_gap95(labels, guesses, guesses, speakers, 3).values()) == {(0.0, 0.0)}


def test_the_gap_is_a_plain_loop_over_draws_of_speakers():
    rng = np.random.default_rng(1)
    labels, one, other = (rng.integers(0, 3, 80) for _ in range(3))
    one = np.where(rng.uniform(size=80) < 0.5, labels, one)
    speaker = rng.integers(0, 8, 80)
    limits = bootstrap_gap95(labels, one, other, [str(s) for s in speaker], 3, draws=4000)
    gaps = []
    for _ in range(4000):
        rows = np.concatenate([np.flatnonzero(speaker == s) for s in rng.integers(0, 8, 8)])
        gaps.append(np.mean(labels[rows] == one[rows]) - np.mean(labels[rows] == other[rows]))
    assert limits["accuracy"] == pytest.approx(np.percentile(gaps, (2.5, 97.5)), abs=0.015)


def test_a_gap_needs_two_speakers_and_equal_lengths():
    labels = np.array([0, 1])
    with pytest.raises(ValueError, match="at least 2 speakers"):
        bootstrap_gap95(labels, labels, labels, ["a", "a"], 2)
    with pytest.raises(ValueError, match="one length"):
        bootstrap_gap95(labels, labels[:1], labels, ["a", "b"], 2)

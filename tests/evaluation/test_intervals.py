"""The intervals against plain loops, against Student's t where that is exact, and against the truth of simulations."""

import tracemalloc

import interval_coverage
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import balanced_accuracy_score, cohen_kappa_score

from ser_ray.evaluation import intervals
from ser_ray.evaluation.intervals import bootstrap_ci95, paired_gap
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
    looped = {"uar": [], "kappa": []}
    for times in times_drawn:
        drawn = []
        for name, many in zip(names, times, strict=True):
            drawn += [i for i, speaker in enumerate(speakers) if speaker == name] * many
        looped["uar"].append(balanced_accuracy_score(labels[drawn], predicted[drawn]))
        looped["kappa"].append((cohen_kappa_score(labels[drawn], predicted[drawn]) + 1) / 2)
    uar = balanced_accuracy_score(labels, predicted)
    kappa = (cohen_kappa_score(labels, predicted) + 1) / 2
    for name, share, scale in (("uar", uar, 1), ("kappa", kappa, 2)):
        odds = [np.log(value / (1 - value)) for value in looped[name]]
        half = stats.t(5).ppf(0.975) * np.std(odds) * np.sqrt(6 / 5)
        ends = 1 / (1 + np.exp(-(np.log(share / (1 - share)) + np.array([-half, half]))))
        assert limits[name] == pytest.approx(tuple(scale * ends - (scale - 1)), abs=1e-9), name


def test_one_speaker_falls_back_to_utterances():
    rng = np.random.default_rng(2)
    labels, predicted, _ = _judged(rng, speakers=1, each=200)
    limits, unit = bootstrap_ci95(labels, predicted, ["corpus/01"] * 200, num_labels=4)
    assert unit == "utterances"
    right = int((labels == predicted).sum())
    wilson = stats.binomtest(right, 200).proportion_ci(method="wilson")
    assert limits["accuracy"] == pytest.approx((wilson.low, wilson.high), abs=0.01)


def test_one_utterance_says_nothing():
    limits, unit = bootstrap_ci95(np.array([1]), np.array([1]), ["corpus/01"], num_labels=3)
    assert unit == "utterances"
    assert limits["accuracy"] == (0.0, 1.0)
    assert limits["kappa"] == (-1.0, 1.0)


@pytest.mark.parametrize("speakers", [4, 10, 24])
def test_holds_the_truth_as_often_as_it_says_where_percentiles_do_not(speakers):
    """Wide bounds for 150 simulations each at true UARs of .6 and .9: +- 4 standard errors around 95 %."""
    held, by_percentiles, tries = 0, 0, 300
    for simulation in range(tries):
        classifier = interval_coverage.of_uar((0.6, 0.9)[simulation % 2])
        labels, (said,), names = interval_coverage.simulate(
            np.random.default_rng(simulation), [classifier], speakers, True
        )
        truth = interval_coverage.truth(classifier)["uar"]
        low, high = bootstrap_ci95(labels, said, names, 6, draws=300)[0]["uar"]
        held += low <= truth <= high
        low, high = interval_coverage.percentiles(labels, said, names, draws=300)["uar"]
        by_percentiles += low <= truth <= high
    assert 0.90 <= held / tries <= 0.995
    if speakers <= 10:
        assert by_percentiles / tries < 0.91
        assert by_percentiles < held


def test_an_interval_over_utterances_would_be_too_narrow():
    labels, predicted, speakers = _judged(np.random.default_rng(5), speakers=20, each=40)
    low, high = bootstrap_ci95(labels, predicted, speakers, 4)[0]["accuracy"]
    of_utterances = stats.binomtest(int((labels == predicted).sum()), len(labels)).proportion_ci(method="wilson")
    assert high - low > 2 * (of_utterances.high - of_utterances.low)


@given(st.integers(1, 8), st.integers(1, 12), st.floats(0, 1), st.integers(0, 2**32 - 1))
@settings(max_examples=60)
def test_limits_hold_the_figure_and_lie_in_its_range(speakers, each, right, seed):
    rng = np.random.default_rng(seed)
    names = [f"s{n}" for n in range(speakers) for _ in range(each)]
    labels = rng.integers(0, 3, len(names))
    predicted = np.where(rng.random(len(names)) < right, labels, rng.integers(0, 3, len(names)))
    limits, _ = bootstrap_ci95(labels, predicted, names, 3, draws=50)
    for name, value in headline(confusion(labels, predicted, 3)).items():
        low, high = limits[name]
        assert (-1 if name == "kappa" else 0) <= low <= value <= high <= 1, name


def test_without_an_error_the_limits_meet():
    labels = np.arange(40) % 4
    limits, _ = bootstrap_ci95(labels, labels, [f"s{n // 8}" for n in range(40)], 4)
    for name in HEADLINE:
        assert limits[name][0] > 0.97, name
        assert limits[name][1] == 1, name


def test_equal_seeds_give_equal_intervals_and_other_seeds_others():
    case = (*_judged(np.random.default_rng(3)), 4)
    assert bootstrap_ci95(*case, seed=1) == bootstrap_ci95(*case, seed=1)
    assert bootstrap_ci95(*case, draws=50, seed=1) != bootstrap_ci95(*case, draws=50, seed=2)


def test_draws_are_made_in_blocks_and_are_the_same(monkeypatch):
    """Golden: the limits of an earlier version, which held all draws at once."""
    rng = np.random.default_rng(8)
    labels, predicted, _ = _judged(rng, speakers=40, each=50)
    speakers = [f"r{n}" for n in range(2000)]
    golden = bootstrap_ci95(labels, predicted, speakers, 4, draws=500)[0]
    assert golden["uar"] == pytest.approx((0.5224085925186285, 0.56707803152763), abs=1e-12)
    assert golden["kappa"] == pytest.approx((0.36247266305717507, 0.4220231019029117), abs=1e-12)
    for block in (1, 2000 * 7, 2000 * 499):
        monkeypatch.setattr(intervals, "BLOCK", block)
        tracemalloc.start()
        assert bootstrap_ci95(labels, predicted, speakers, 4, draws=500)[0] == golden
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 16 * block + 2_500_000, "all draws at once are 16 MB"


@pytest.mark.parametrize(("n", "speakers"), [(0, 0), (3, 2)])
def test_refuses_lengths_that_do_not_fit(n, speakers):
    zeros = np.zeros(n, dtype=int)
    with pytest.raises(ValueError, match=f"{n}, {n} and {speakers}"):
        bootstrap_ci95(zeros, zeros, ["a"] * speakers, num_labels=2)


def test_the_gap_of_equal_predictions_is_nothing_that_could_be_tested():
    rng = np.random.default_rng(0)
    labels, guesses = rng.integers(0, 3, 60), rng.integers(0, 3, 60)
    speakers = [f"s{n % 6}" for n in range(60)]
    for gap in paired_gap(labels, guesses, guesses, speakers, 3).values():
        assert gap.difference == 0
        assert np.isnan([gap.low, gap.high, gap.p]).all()


@pytest.mark.parametrize("wrong", [1, 3])
def test_a_gap_that_is_the_same_for_every_speaker_cannot_be_tested(wrong):
    """Each of eight speakers says ten utterances of each emotion, of which one model misses so many more. Student's t
    of eight equal differences is a division by zero, which rounding turns into a p of 1e-15 and less."""
    labels = np.tile(np.repeat(np.arange(3), 10), 8)
    speakers = [f"s{n}" for n in range(8) for _ in range(30)]
    missed = np.tile(np.arange(30) % 10 < wrong, 8)
    other = np.where(missed, (labels + 1) % 3, labels)
    for name, gap in paired_gap(labels, labels, other, speakers, 3).items():
        assert gap.difference > 0.09, name
        assert np.isnan([gap.low, gap.high, gap.p]).all(), name


def test_the_gap_equals_a_paired_t_test_over_speakers_where_all_speak_alike():
    """With equally many utterances a speaker, the gap of accuracies is the mean of the speakers' gaps."""
    rng = np.random.default_rng(1)
    speaker = np.repeat(np.arange(12), 25)
    labels, one, other = (rng.integers(0, 3, 300) for _ in range(3))
    one = np.where(rng.uniform(size=300) < 0.15, labels, one)
    gap = paired_gap(labels, one, other, [f"s{s:02}" for s in speaker], 3, draws=40_000)["accuracy"]
    right = [np.array([np.mean((said == labels)[speaker == s]) for s in range(12)]) for said in (one, other)]
    test = stats.ttest_rel(*right)
    ends = test.confidence_interval(0.95)
    assert gap.difference == pytest.approx(np.mean(right[0] - right[1]))
    assert (gap.low, gap.high) == pytest.approx((ends.low, ends.high), abs=0.002)
    assert gap.p == pytest.approx(test.pvalue, rel=0.05)


@given(st.integers(2, 8), st.floats(0, 1), st.floats(0, 1), st.integers(0, 2**32 - 1))
@settings(max_examples=60)
def test_a_gap_is_certain_where_its_interval_leaves_out_nothing(speakers, first, second, seed):
    rng = np.random.default_rng(seed)
    names = [f"s{n % speakers}" for n in range(speakers * 8)]
    labels = rng.integers(0, 3, len(names))
    one, other = (
        np.where(rng.random(len(names)) < right, labels, rng.integers(0, 3, len(names))) for right in (first, second)
    )
    forth, back = paired_gap(labels, one, other, names, 3, 50), paired_gap(labels, other, one, names, 3, 50)
    for name in HEADLINE:
        gap, most = forth[name], 2 if name == "kappa" else 1
        if np.isnan(gap.p):  # without a spread over speakers
            assert np.isnan([gap.low, gap.high, back[name].p]).all()
            continue
        assert -most <= gap.low <= gap.difference <= gap.high <= most
        assert 0 <= gap.p <= 1
        assert (gap.p < 0.05) == (gap.low > 0 or gap.high < 0) or gap.p == pytest.approx(0.05, abs=1e-6)
        assert (back[name].difference, back[name].low, back[name].high) == pytest.approx(
            (-gap.difference, -gap.high, -gap.low)
        )


def test_the_paired_test_raises_few_false_alarms():
    """300 pairs of classifiers that are equally good: 15 alarms expected, 30 and more by chance once in 5000 times."""
    classifier, alarms = interval_coverage.of_uar(0.6), 0
    for simulation in range(300):
        labels, said, names = interval_coverage.simulate(np.random.default_rng(simulation), [classifier] * 2, 10, False)
        alarms += paired_gap(labels, *said, names, 6, draws=300)["uar"].p < 0.05
    assert 2 <= alarms <= 30


def test_a_gap_needs_two_speakers_and_equal_lengths():
    labels = np.array([0, 1])
    with pytest.raises(ValueError, match="at least 2 speakers"):
        paired_gap(labels, labels, labels, ["a", "a"], 2)
    with pytest.raises(ValueError, match="one length"):
        paired_gap(labels, labels[:1], labels, ["a", "b"], 2)

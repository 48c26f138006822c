"""Which models answer together: against plain loops that multiply probabilities and count recalls."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ser_ray.evaluation import ensemble
from ser_ray.evaluation.enrolment import Enrolled
from ser_ray.evaluation.ensemble import Candidate, Member
from ser_ray.evaluation.predictions import Predictions
from ser_ray.evaluation.runs import Run

EMOTIONS = ("angry", "happy", "sad")


def _said(seed: int, fold: int = 0, n: int = 40, right: float = 0.6, knows: int | None = None) -> Predictions:
    """A model that is right so often, and with ``knows`` always on one emotion; utterances are those of the fold."""
    rng, of_fold = np.random.default_rng((seed, fold)), np.random.default_rng(fold)
    labels = of_fold.integers(0, 3, n)
    sure = (rng.random(n) < right) | (labels == (-1 if knows is None else knows))
    said = np.where(sure, labels, rng.integers(0, 3, n))
    logits_NK = 2 * np.eye(3)[said] + 0.7 * rng.standard_normal((n, 3))
    probabilities = np.exp(logits_NK) / np.exp(logits_NK).sum(axis=1, keepdims=True)
    ids = tuple(f"c/{fold}-{i}" for i in range(n))
    return Predictions(EMOTIONS, ids, ("c",) * n, tuple(f"c/{fold}-{i % 7}" for i in range(n)), labels, probabilities)


def _candidate(trial: str, seed: int, folds: tuple[int, ...] = (0,), **how: float | int) -> Candidate:
    runs = tuple(Run(trial, fold, seed, f"finals/{trial}-fold{fold}-seed{seed}/epoch_001") for fold in folds)
    dev = tuple(_said(100 * int(trial) + seed, fold, **how) for fold in folds)
    return Candidate(runs, dev, 1.0 + 0.25 * seed)


def _several(seed: int, folds: tuple[int, ...] = (0, 1)) -> list[Candidate]:
    return [_candidate(f"{1 + seed + n}", n % 2, folds, right=0.4 + 0.05 * n) for n in range(5)]


def _product(parts: list[np.ndarray]) -> np.ndarray:
    """The geometric mean, one utterance and one emotion at a time."""
    found = np.empty_like(parts[0])
    for n in range(len(found)):
        for k in range(found.shape[1]):
            value = 1.0
            for part in parts:
                value *= part[n][k] ** (1 / len(parts))
            found[n, k] = value
        found[n] /= sum(found[n])
    return found


def _uar(labels: np.ndarray, probabilities: np.ndarray) -> float:
    recalls = []
    for k in set(labels.tolist()):
        own = [n for n, label in enumerate(labels) if label == k]
        recalls.append(sum(int(np.argmax(probabilities[n]) == k) for n in own) / len(own))
    return sum(recalls) / len(recalls)


def _by_hand(candidates: list[Candidate], rounds: int) -> dict[int, int]:
    """Forward selection as it is described: every product is computed anew."""
    chosen: list[int] = []
    history: list[tuple[float, list[int]]] = []
    for _ in range(rounds):
        scored = []
        for extra in range(len(candidates)):
            uars, losses = [], []
            for split in range(len(candidates[0].dev)):
                parts = [candidates[c].calibrated()[split].probabilities for c in (*chosen, extra)]
                mixed, labels = _product(parts), candidates[0].dev[split].labels
                uars.append(_uar(labels, mixed))
                losses.append(-np.mean([np.log(mixed[n][label]) for n, label in enumerate(labels)]))
            scored.append((round(sum(uars) / len(uars), 10), -round(sum(losses) / len(losses), 10), -extra))
        best = max(range(len(candidates)), key=lambda c: scored[c])
        chosen = [*chosen, best]
        history.append((scored[best][0], list(chosen)))
    top = max(uar for uar, _ in history)
    winner = next(members for uar, members in history if uar == top)
    return {c: winner.count(c) for c in sorted(set(winner))}


@pytest.mark.parametrize("seed", range(3))
def test_selection_is_that_of_a_plain_loop(seed):
    candidates = _several(10 * seed)
    expected = _by_hand(candidates, 4)
    found = ensemble.select(candidates, 4, "uar")
    assert {candidates.index(member.candidate): member.weight for member in found} == {
        c: pytest.approx(times / sum(expected.values())) for c, times in expected.items()
    }


def test_some_of_these_have_several_members():
    assert max(len(_by_hand(_several(10 * seed), 4)) for seed in range(3)) > 1


@given(seed=st.integers(0, 50))
def test_an_ensemble_is_never_worse_than_its_best_candidate_on_the_dev_that_chose_it(seed):
    candidates = _several(seed, (0,))
    own = {c.runs[0]: c.dev[0] for c in candidates}
    singles = [ensemble.mean_metric([c.dev[0]], "uar") for c in candidates]
    alone = ensemble.select(candidates, 1, "uar")
    assert len(alone) == 1
    assert ensemble.mean_metric(ensemble.answers(alone, own), "uar") == pytest.approx(max(singles))
    several = ensemble.answers(ensemble.select(candidates, 5, "uar"), own)
    assert ensemble.mean_metric(several, "uar") >= max(singles) - 1e-12


@given(seed=st.integers(0, 50))
def test_the_order_of_utterances_changes_nothing(seed):
    candidates = _several(seed, (0,))
    order = np.random.default_rng(seed).permutation(40)
    shuffled = [replace(c, dev=(c.dev[0].at(order),)) for c in candidates]
    weights = [[(m.candidate.runs, m.weight) for m in ensemble.select(own, 3, "uar")] for own in (candidates, shuffled)]
    assert weights[0] == weights[1]


def test_the_same_model_twice_is_one_member():
    one = _candidate("1", 0)
    same = [replace(one, runs=(Run("2", 0, 0, "elsewhere"),)), one]
    assert ensemble.select(same, 5, "uar") == [Member(same[0], 1.0)]


def test_answers_are_the_product_of_what_is_calibrated():
    members = [Member(_candidate("1", 0, (0, 1)), 0.75), Member(_candidate("2", 1, (0, 1)), 0.25)]
    by_run = {run: part for m in members for run, part in zip(m.candidate.runs, m.candidate.dev, strict=True)}
    found = ensemble.answers(members, by_run)
    for split in (0, 1):
        first, second = (m.candidate.dev[split].probabilities ** (1 / m.candidate.temperature) for m in members)
        first, second = (part / part.sum(axis=1, keepdims=True) for part in (first, second))
        np.testing.assert_allclose(found[split].probabilities, _product([first, first, first, second]), atol=1e-12)
        np.testing.assert_array_equal(
            ensemble.answers(members, by_run, split)[0].probabilities, found[split].probabilities
        )
    alone = ensemble.answers([Member(members[1].candidate, 1.0)], by_run)
    assert alone[1] is by_run[members[1].candidate.runs[1]], "a member alone is calibrated once, as any model"


def test_dev_is_answered_by_what_other_speakers_chose():
    """Part by part: the choice is made from predictions that do not have the part's speakers at all."""
    candidates = _several(3)
    parts, metric = ensemble.held_out(candidates, 3, "uar")
    speakers = sorted({speaker for part in candidates[0].dev for speaker in part.speakers})
    for number in range(5):
        out = {speaker for n, speaker in enumerate(speakers) if n % 5 == number}
        rest = [
            replace(c, dev=tuple(p.at([n for n, s in enumerate(p.speakers) if s not in out]) for p in c.dev))
            for c in candidates
        ]
        members = ensemble.select(rest, 3, "uar")
        for split, part in enumerate(parts):
            rows = [n for n, s in enumerate(part.speakers) if s in out]
            own = [m.candidate.calibrated() for m in (replace(m, candidate=_whole(m, candidates)) for m in members)]
            expected = ensemble.combined([c[split] for c in own], [m.weight for m in members])
            np.testing.assert_allclose(part.probabilities[rows], expected.probabilities[rows], atol=1e-9)
    assert metric == pytest.approx(np.mean([_uar(part.labels, part.probabilities) for part in parts]))


def _whole(member: Member, candidates: list[Candidate]) -> Candidate:
    return next(c for c in candidates if c.runs == member.candidate.runs)


def test_one_speaker_chooses_no_ensemble():
    one = _candidate("1", 0)
    alone = replace(one, dev=(replace(one.dev[0], speakers=("c/a",) * 40),))
    assert ensemble.held_out([alone, alone], 3, "uar") is None


# -- who may be combined


def _runs(folds: tuple[int, ...], seeds: tuple[int, ...]) -> dict[str, list[Run]]:
    """As `runs.runs_of` lists them: the search's own fold and seed first."""
    pairs = sorted(((f, s) for f in folds for s in seeds), key=lambda pair: (pair != (1, 0), pair))
    return {i: [Run(i, fold, seed, f"{i}-{fold}-{seed}") for fold, seed in pairs] for i in ("001", "002")}


def _dev_of(runs: dict[str, list[Run]]) -> dict[Run, Predictions]:
    return {run: _said(int(i) + 10 * run.seed, run.fold) for i, own in runs.items() for run in own}


def test_only_runs_of_one_fold_answer_together():
    runs = _runs((0, 1, 2), (0, 1))
    soup = [Run("002", fold, 0, f"soups/002-{fold}", soup=True) for fold in (1, 0, 2)]
    runs["002"] += soup
    candidates = ensemble.candidates_of(runs, _dev_of(runs), rotated=False)
    names = [(c.runs[0].trial_id, c.runs[0].seed, c.runs[0].soup) for c in candidates]
    assert names == [(i, s, False) for i in ("001", "002") for s in (0, 1)] + [("002", 0, True)]
    for candidate in candidates:
        assert [run.fold for run in candidate.runs] == [1, 0, 2], "the fold of the search is first: it goes to best/"
        assert len({(run.trial_id, run.seed, run.soup) for run in candidate.runs}) == 1
    members = [Member(candidates[0], 0.5), Member(candidates[4], 0.5)]
    for run, fold in zip(ensemble.runs_of(members), (1, 0, 2), strict=True):
        assert (run.trial_id, run.fold) == (ensemble.NAME, fold)
        assert run.checkpoint == f"0.5 x 001-{fold}-0 + 0.5 x soups/002-{fold}"


def test_with_a_rotated_dev_only_runs_of_one_seed_do():
    """The second seed of a fold was trained on what is dev for the first."""
    runs = _runs((0, 1), (0, 1))
    candidates = ensemble.candidates_of(runs, _dev_of(runs), rotated=True)
    assert [c.runs[0].trial_id for c in candidates] == ["001", "002"]
    for candidate in candidates:
        assert [(run.fold, run.seed) for run in candidate.runs] == [(1, 0), (1, 1), (0, 0), (0, 1)]


def test_a_trial_is_a_model_with_all_of_its_runs():
    runs = _runs((0, 1), (0, 1))["001"]
    chosen = ensemble.trial(runs, [_said(1, run.fold) for run in runs])
    assert chosen.name == "001"
    assert chosen.needed == runs
    assert [(run.fold, run.seed) for run in chosen.single] == [(0, 0), (1, 0)]


def test_who_uses_no_voices_answers_as_ever():
    members = [Member(_candidate("1", 0, (0, 1)), 0.5), Member(_candidate("2", 0, (0, 1)), 0.5)]
    plain = {run: part for m in members for run, part in zip(m.candidate.runs, m.candidate.dev, strict=True)}
    knowing = {
        run: [Enrolled(0, (plain[run],), 0.0), Enrolled(2, (_said(7, run.fold), _said(8, run.fold)), 2.0)]
        for run in members[0].candidate.runs
    }
    curves = ensemble.enrolled_answers(members, knowing, plain)
    assert [[(point.recordings, len(point.draws)) for point in curve] for curve in curves] == [[(0, 1), (2, 2)]] * 2
    for split, curve in enumerate(curves):
        expected = ensemble.answers(members, plain, split)[0]
        np.testing.assert_array_equal(curve[0].draws[0].probabilities, expected.probabilities)
        first, second = (m.candidate.runs[split] for m in members)
        drawn = ensemble.answers(members, {first: _said(8, first.fold), second: plain[second]}, split)[0]
        np.testing.assert_array_equal(curve[1].draws[1].probabilities, drawn.probabilities)


def test_what_is_said():
    record = {
        "used": True,
        "candidates": 6,
        "members": [
            {"trial_id": "003", "seed": 1, "soup": False, "weight": 0.75},
            {"trial_id": "001", "seed": 0, "soup": True, "weight": 0.25},
        ],
        "single": "003",
        "dev": {"ensemble": 0.84, "held_out": 0.81, "single": 0.79},
        "costs": {
            "ensemble": {"parameters": 4.2e7, "megabytes": 168.0, "milliseconds": 210.0},
            "single": {"parameters": 2.1e7, "megabytes": 84.0, "milliseconds": 100.0, "seconds": 3.6, "device": "CPU"},
        },
    }
    said = " ".join(ensemble.sentences(record, "UAR"))
    assert "ensemble of 2 models" in said
    assert "trial 003, seed 1, weight 0.75; trial 001, mean weights of its seeds, weight 0.25" in said
    assert "UAR 0.810 on dev speakers that did not choose it, 0.790 with the best single model, trial 003" in said
    assert "42.0 M parameters, 168 MB and 210 ms for an utterance of 3.6 s (CPU)" in said
    assert "21.0 M parameters, 84 MB and 100 ms" in said
    (unused,) = ensemble.sentences(record | {"used": False}, "UAR")
    assert "No ensemble is used" in unused
    assert ensemble.sentences({}, "UAR") == []

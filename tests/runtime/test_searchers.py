"""What Tune is handed, without Ray: trials in their order, those that were cut off first, budgets, ASHA's memory."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from optuna.trial import TrialState
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher
from search_fixtures import SEARCH, record, space

from ser_ray.evaluation import folder
from ser_ray.evaluation.folder import TrialRecord
from ser_ray.runtime.searchers import FixedQueue, OptunaSearcher, ReplayingASHA
from ser_ray.trials.records import ATTEMPTS, Trials


def searcher(directory: Path, **budget) -> tuple[OptunaSearcher, Trials]:
    settings = space(SEARCH, **{"trials": 3} | budget)
    trials = Trials(directory, settings.search)
    return OptunaSearcher(settings, trials, gpus=1), trials


def finish(search: OptunaSearcher, tune_id: str, status: str = "finished", seconds: float = 1.0) -> None:
    """As Tune does: the searcher first, then the callback."""
    name = search.live[tune_id]
    folder.append_history(search.trials.results_dir / "trials" / name, record(1, 0.5, 0.5))
    search.on_trial_complete(tune_id, {"best_dev_uar": 0.5})
    search.trials.update(name, seconds=seconds, status=status)


def test_trials_are_numbered_and_end(tmp_path):
    search, _ = searcher(tmp_path)
    for number in range(1, 4):
        handed = search.suggest(f"tune-{number}")
        assert handed["trial_id"] == f"{number:03d}"
        assert 1e-5 <= handed["values"]["optimizer.lr"] <= 1e-3
    assert search.suggest("tune-4") is None  # what runs may be cut off, and come again
    for number in range(1, 4):
        finish(search, f"tune-{number}")
    assert search.suggest("tune-5") == Searcher.FINISHED
    assert [trial.value for trial in search.study.trials] == [0.5] * 3


def test_what_was_cut_off_goes_on_before_anything_new(tmp_path):
    search, _ = searcher(tmp_path)
    first, second = search.suggest("a"), search.suggest("b")
    finish(search, "b")
    again, trials = searcher(tmp_path)  # another process, after a kill
    assert again.suggest("c") == first
    assert [tried.status for tried in trials] == ["running", "finished"]
    assert again.suggest("d")["trial_id"] == "003"
    assert second["values"] in [trial.params for trial in again.study.trials] or "adapter.rank" in second["values"]


def test_a_trial_whose_process_dies_is_handed_out_again(tmp_path):
    search, trials = searcher(tmp_path, trials=1)
    handed = search.suggest("a")
    search.on_trial_complete("a", error=True)
    trials.interrupted("001", "its process died")
    assert search.suggest("b") == handed
    finish(search, "b")
    assert search.suggest("c") == Searcher.FINISHED
    assert len(search.study.trials) == 1


def test_a_trial_that_fails_is_told_before_the_next_is_chosen(tmp_path):
    search, trials = searcher(tmp_path, trials=2)
    search.suggest("a")
    search.on_trial_complete("a", error=True)  # as Tune does: the searcher first, then the callback
    trials.update("001", status="failed", error="epoch 1: the loss is nan")
    search.suggest("b")
    assert [trial.state for trial in search.study.trials] == [TrialState.FAIL, TrialState.RUNNING]


def test_every_attempt_is_counted_as_it_is_handed_out(tmp_path):
    """Before a process of it is there: one that dies at once is begun no more than so often."""
    search, trials = searcher(tmp_path, trials=1)
    handed = 0
    while search.suggest(f"t{handed}") != Searcher.FINISHED:
        search.on_trial_complete(f"t{handed}", error=True)
        trials.interrupted("001", "its process died")
        handed += 1
    assert handed == ATTEMPTS
    assert [trial.state for trial in search.study.trials] == [TrialState.FAIL]


def test_finals_that_die_at_once_are_given_up_too(tmp_path):
    trials = Trials(tmp_path, [], kind="finals")
    trials.add("001-fold1-seed0", {})
    queue, handed = FixedQueue(trials), 0
    while queue.suggest(f"t{handed}") != Searcher.FINISHED:
        queue.on_trial_complete(f"t{handed}", error=True)
        trials.interrupted("001-fold1-seed0", "its process died")
        handed += 1
    assert handed == ATTEMPTS


def test_one_that_was_short_of_memory_is_handed_out_with_half_of_the_batch(tmp_path):
    search, trials = searcher(tmp_path, trials=1)
    assert search.suggest("a")["halved"] is False
    search.on_trial_complete("a", error=True)
    trials.short_of_memory("001", "out of memory")
    assert search.suggest("b")["halved"] is True


def test_points_given_first_are_tried_first_once(tmp_path):
    first = [{"adapter.method": "frozen", "optimizer.lr": 1e-4}, {"adapter.method": "lora", "adapter.rank": 8}]
    search, _ = searcher(tmp_path, first=first)
    assert search.suggest("a")["values"] == first[0]
    finish(search, "a")
    again, _ = searcher(tmp_path, first=first)
    assert first[1].items() <= again.suggest("b")["values"].items()
    finish(again, "b")
    again.suggest("c")
    assert len(again.trials.known) == 3


def test_a_grid_ends_with_its_last_point(tmp_path):
    search, _ = searcher(tmp_path, sampler="grid", grid_points=2, trials=50)
    number = 0
    while (handed := search.suggest(f"t{number}")) != Searcher.FINISHED:
        finish(search, f"t{number}")
        number += 1
        assert handed["trial_id"] == f"{number:03d}"
    assert number == 6


@pytest.mark.parametrize(("budget", "begun"), [({"gpu_hours": 1.5}, 2), ({"gpu_hours": 0.5}, 1), ({"hours": 1e-9}, 0)])
def test_no_trial_begins_once_the_budget_is_spent(tmp_path, budget, begun):
    search, trials = searcher(tmp_path, trials=10, **budget)
    while (handed := search.suggest("t")) != Searcher.FINISHED:
        assert handed is not None
        finish(search, "t", seconds=3600.0)
    assert len(trials.known) == begun


def trained(directory: Path, trial_id: str, curve: list[float]) -> None:
    for epoch, best in enumerate(curve, start=1):
        folder.append_history(directory / "trials" / trial_id, record(epoch, best, best))
    folder.write_trial(directory / "trials", TrialRecord(trial_id, {}, "finished"))


def test_asha_remembers_what_earlier_sessions_saw(tmp_path):
    trained(tmp_path, "001", [0.5, 0.6, 0.7, 0.8])
    trained(tmp_path, "002", [0.4, 0.5, 0.6, 0.7])
    settings = space(SEARCH, grace=1)
    trials = Trials(tmp_path, settings.search)
    scheduler = ReplayingASHA(settings, trials)
    trials.add("003", {})
    bad = SimpleNamespace(trial_id="tune-3", config={"trial_id": "003"})
    scheduler.on_trial_add(None, bad)
    assert scheduler.on_trial_result(None, bad, record(1, 0.1, 0.1)) == TrialScheduler.STOP
    trials.add("004", {})
    good = SimpleNamespace(trial_id="tune-4", config={"trial_id": "004"})
    scheduler.on_trial_add(None, good)
    assert scheduler.on_trial_result(None, good, record(1, 0.9, 0.9)) == TrialScheduler.CONTINUE


def test_asha_does_not_count_a_continued_trial_twice(tmp_path):
    trained(tmp_path, "001", [0.5, 0.6])
    folder.write_trial(tmp_path / "trials", TrialRecord("001", {}, "running"))
    settings = space(SEARCH, grace=1)
    scheduler = ReplayingASHA(settings, Trials(tmp_path, settings.search))
    should_continue = SimpleNamespace(trial_id="tune-9", config={"trial_id": "001"})
    scheduler.on_trial_add(None, should_continue)
    scheduler.on_trial_result(None, should_continue, record(3, 0.7, 0.7))
    rungs = dict(scheduler._brackets[0]._rungs)
    assert {milestone: dict(seen) for milestone, seen in rungs.items() if seen} == {
        1: {"001": 0.5},
        2: {"001": 0.6},
    }


def test_asha_counts_a_trial_once_however_often_it_is_begun(tmp_path):
    settings = space(SEARCH, grace=1)
    trials = Trials(tmp_path, settings.search)
    trials.add("001", {})
    scheduler = ReplayingASHA(settings, trials)
    for begun in range(3):
        again = SimpleNamespace(trial_id=f"tune-{begun}", config={"trial_id": "001"})
        scheduler.on_trial_add(None, again)
        scheduler.on_trial_result(None, again, record(1, 0.5, 0.5))
        folder.append_history(tmp_path / "trials" / "001", record(1, 0.5, 0.5))
        trials.update("001")
    assert [dict(seen) for milestone, seen in scheduler._brackets[0]._rungs if milestone == 1] == [{"001": 0.5}]


@pytest.mark.parametrize("searched", [{"choice": [4, 20]}, {"randint": [4, 20]}])
def test_asha_goes_by_the_largest_searched_number_of_epochs(tmp_path, searched):
    settings = space({"epochs": searched}, grace=1)
    trials = Trials(tmp_path, settings.search)
    trials.add("001", {"epochs": 20})
    scheduler = ReplayingASHA(settings, trials)
    long = SimpleNamespace(trial_id="tune-1", config={"trial_id": "001"})
    scheduler.on_trial_add(None, long)
    decisions = [scheduler.on_trial_result(None, long, record(epoch, 0.5, 0.5)) for epoch in range(1, 20)]
    assert set(decisions) == {TrialScheduler.CONTINUE}, "the experiment's own ten epochs are not the end"
    assert [milestone for milestone, _ in scheduler._brackets[0]._rungs] == [16, 8, 4, 2, 1]

"""Attempts of a trial: bounded whatever dies and whenever, forgiven where somebody stopped the search, tried once more
with half of the batch where memory was short; and trials that go on as epochs were added."""

from __future__ import annotations

from pathlib import Path

import pytest
from search_fixtures import SEARCH, record, space

from ser_ray.evaluation import folder
from ser_ray.trials.records import ATTEMPTS, Trials


def session(directory: Path, epochs: int = 10, patience: int = 4) -> Trials:
    """As a command begins, in a process of its own."""
    trials = Trials(directory, SEARCH)
    experiment = space({}).experiment.model_copy(update={"epochs": epochs, "patience": patience})
    trials.resume(lambda values: experiment)
    return trials


def line(directory: Path, epoch: int, uar: float = 0.5, best: float = 0.5) -> None:
    folder.append_history(directory / "trials" / "001", record(epoch, uar, best))


def test_processes_that_die_before_they_start_are_counted(tmp_path):
    """`start` is what Tune calls of a process that is there; those that die before never come to it."""
    trials = session(tmp_path)
    trials.add("001", {})
    over = []
    while not over or not over[-1]:
        trials.begin("001")
        over.append(trials.interrupted("001", "its process died").over)
    assert len(over) == ATTEMPTS
    assert trials.known["001"].error == f"its process died ({ATTEMPTS} times)"
    assert [row["error"] for row in folder.read_trial_rows(tmp_path)] == [f"its process died ({ATTEMPTS} times)"]


def test_deaths_that_take_the_search_along_are_counted_over_sessions(tmp_path):
    session(tmp_path).add("001", {})
    for _ in range(ATTEMPTS):
        trials = session(tmp_path)
        assert not trials.known["001"].over
        trials.begin("001")
        trials.start("001")  # and here everything dies
    given_up = session(tmp_path).known["001"]
    assert given_up.status == "failed"
    assert given_up.error == f"its process died, and the search with it ({ATTEMPTS} times)"
    asked_again = session(tmp_path)
    assert asked_again.known["001"].status == "running", "the next command tries again what failed"
    asked_again.begin("001")
    assert not session(tmp_path).known["001"].over, "from the first attempt on"


@pytest.mark.parametrize("heard", [True, False], ids=["heard of", "after its line, unheard"])
def test_a_trial_that_comes_further_each_time_is_not_given_up(tmp_path, heard):
    session(tmp_path).add("001", {})
    for epoch in range(1, 2 * ATTEMPTS):
        trials = session(tmp_path)
        trials.begin("001")
        line(tmp_path, epoch)
        if heard:
            assert not trials.interrupted("001", "its process died").over
        assert not session(tmp_path, epochs=99).known["001"].over


def test_seconds_are_those_of_all_attempts(tmp_path):
    trials = session(tmp_path)
    trials.add("001", {})
    for _ in range(2):
        trials.begin("001")
        trials.update("001", seconds=3.0)
        trials.interrupted("001", "its process died")
    assert trials.known["001"].seconds == 6.0


def test_a_search_that_somebody_stops_costs_no_attempt(tmp_path):
    session(tmp_path).add("001", {})
    for _ in range(2 * ATTEMPTS):
        trials = session(tmp_path)
        trials.begin("001")
        trials.release()
    assert session(tmp_path).known["001"].attempts == 0


def test_one_that_is_short_of_memory_is_tried_once_more_with_half(tmp_path):
    trials = session(tmp_path)
    trials.add("001", {})
    trials.begin("001")
    line(tmp_path, 1)
    again = trials.short_of_memory("001", "out of memory: lower x")
    assert (again.status, again.halved, len(again.history)) == ("running", True, 1), "its epochs so far are kept"
    assert [row["halved"] for row in folder.read_trial_rows(tmp_path)] == ["batch_seconds"]
    later = session(tmp_path)  # another process knows it too
    assert later.known["001"].halved
    later.begin("001")
    assert later.short_of_memory("001", "out of memory: lower x").status == "failed"
    assert later.known["001"].error == "out of memory: lower x (half of batch_seconds was tried)"


@pytest.mark.parametrize(
    ("status", "best_epoch", "epochs", "should_continue"),
    [
        ("finished", 3, 4, True),
        ("finished", 3, 3, False),
        ("finished", 1, 4, False),  # patience of 2 ended it as well
        ("finished", 2, 4, True),
        ("stopped", 3, 4, False),
    ],
)
def test_what_ended_with_its_last_epoch_goes_on_where_there_are_more(
    tmp_path, status, best_epoch, epochs, should_continue
):
    trials = session(tmp_path)
    trials.add("001", {})
    for epoch in range(1, 4):
        last = record(epoch, 0.5, 0.5) | {"best_epoch": min(epoch, best_epoch), "last": epoch == 3}
        folder.append_history(tmp_path / "trials" / "001", last)
    trials.update("001", status=status)
    assert session(tmp_path, epochs, patience=2).known["001"].over != should_continue


def test_only_what_is_wanted_is_looked_at(tmp_path):
    trials = session(tmp_path)
    for name in ("001", "002"):
        trials.add(name, {})
        trials.update(name, status="failed")
    trials.resume(lambda values: space({}).experiment, wanted={"002"})
    assert [tried.over for tried in trials] == [True, False]

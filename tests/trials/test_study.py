"""The study as the results folder tells it: continued, extended, warm-started, with one objective and several."""

from __future__ import annotations

import json
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState
from search_fixtures import SEARCH, record, space

from ser_ray.evaluation import folder
from ser_ray.evaluation.folder import TrialRecord
from ser_ray.schema import UserError
from ser_ray.trials import study
from ser_ray.trials.records import ATTEMPTS, Trials


def tried(number: int, uar: float, status: str = "finished", **values) -> TrialRecord:
    values = {"adapter.method": "frozen", "optimizer.lr": 1e-4} | values
    history = (record(1, uar, uar), record(2, uar / 2, uar, seconds=4.0))
    return TrialRecord(f"{number:03d}", values, status, history=history)


def test_the_study_holds_what_was_tried_with_the_running_best():
    known = [tried(1, 0.4), tried(2, 0.6, "stopped"), tried(3, 0.9, "failed"), tried(4, 0.8, "running")]
    made = study.make(space(SEARCH), known)
    assert [trial.state for trial in made.trials] == [TrialState.COMPLETE, TrialState.COMPLETE, TrialState.FAIL]
    assert [trial.value for trial in made.trials[:2]] == [0.4, 0.6]
    assert made.best_trial.intermediate_values == {1: 0.6, 2: 0.6}
    assert made.best_params == {"adapter.method": "frozen", "optimizer.lr": 1e-4}


def test_a_continued_search_asks_what_the_unbroken_one_would_have_asked():
    settings = space(SEARCH, trials=9, seed=5)

    def ask_all(made: optuna.Study, known: list[TrialRecord], count: int) -> list[TrialRecord]:
        for number in range(len(known) + 1, count + 1):
            trial, values = study.begin(made, settings, number, None)
            known.append(tried(number, values["optimizer.lr"] * 100, **values))
            study.end(made, settings, trial, known[-1])
        return known

    unbroken = ask_all(study.make(settings, []), [], 9)
    first = ask_all(study.make(settings, []), [], 4)
    continued = ask_all(study.make(settings, first), list(first), 9)
    assert [dict(t.values) for t in continued] == [dict(t.values) for t in unbroken]
    assert len({str(t.values) for t in unbroken}) > 5


def test_other_seeds_ask_other_points():
    drawn = [study.begin(study.make(space(SEARCH, seed=s), []), space(SEARCH, seed=s), 1, None)[1] for s in range(4)]
    assert len({values["optimizer.lr"] for values in drawn}) == 4


def test_a_point_given_first_is_kept_and_completed():
    settings = space(SEARCH)
    _, values = study.begin(study.make(settings, []), settings, 1, {"adapter.method": "lora"})
    assert values["adapter.method"] == "lora"
    assert values["adapter.rank"] in (4, 8)
    assert 1e-5 <= values["optimizer.lr"] <= 1e-3


def test_several_objectives_look_for_the_front():
    settings = space(SEARCH, also=["seconds_per_epoch", "trainable_parameters"])
    made = study.make(settings, [tried(1, 0.4), tried(2, 0.6)])
    assert made.trials[1].values == [0.6, 3.0, 1000.0]
    assert [direction.name for direction in made.directions] == ["MAXIMIZE", "MINIMIZE", "MINIMIZE"]
    assert [trial.number for trial in made.best_trials] == [1]  # as cheap, and better
    trial, values = study.begin(made, settings, 3, None)
    study.end(made, settings, trial, tried(3, 0.5, **values))
    assert made.trials[2].values == [0.5, 3.0, 1000.0]


def test_a_warm_start_takes_what_fits_the_space(tmp_path):
    for one in (
        tried(1, 0.4),
        tried(2, 0.6, **{"adapter.method": "lora", "adapter.rank": 16}),  # no such rank here
        tried(3, 0.7, **{"optimizer.lr": 1.0}),  # outside of the range
        tried(4, 0.5, **{"head.dropout": 0.1}),  # not searched here
        tried(5, 0.3, "running"),
    ):
        folder.write_trial(tmp_path / "trials", one)
        for line in one.history:
            folder.append_history(tmp_path / "trials" / one.trial_id, line)
    made = study.make(space(SEARCH, warm_start=[str(tmp_path)]), [tried(1, 0.9)])
    assert [trial.value for trial in made.trials] == [0.4, 0.9]
    with pytest.raises(UserError, match=r"tune\.warm_start"):
        study.make(space(SEARCH, warm_start=[str(tmp_path / "nothing")]), [])


def test_a_grid_is_tried_in_its_order():
    settings = space(SEARCH, sampler="grid", grid_points=2)
    assert len(study.first_points(settings)) == 6
    with pytest.raises(ValueError, match="grid defines all points"):
        space(SEARCH, sampler="grid", first=[{"optimizer.lr": 1e-4}])


def test_trials_write_what_they_learn_and_give_up_after_some_deaths(tmp_path: Path):
    trials = Trials(tmp_path, SEARCH)
    trials.add("001", {"optimizer.lr": 1e-4})
    folder.append_history(tmp_path / "trials" / "001", record(1, 0.4, 0.4))
    trials.update("001", seconds=10.0)
    again = Trials(tmp_path, SEARCH)
    assert [t.history[-1]["dev_uar"] for t in again] == [0.4]
    again.update("001", seconds=5.0, status="finished")
    assert json.loads((tmp_path / "trials/001/trial.json").read_text())["seconds"] == 15.0
    (row,) = folder.read_trial_rows(tmp_path)
    assert (row["trial_id"], row["status"], row["optimizer.lr"], row["adapter.rank"]) == (
        "001",
        "finished",
        "0.0001",
        "",
    )
    again.add("002", {})
    for attempt in range(1, ATTEMPTS + 1):
        again.begin("002")
        assert again.interrupted("002", "its process died").over == (attempt == ATTEMPTS)
    assert again.known["002"].error == f"its process died ({ATTEMPTS} times)"
    folder.append_history(tmp_path / "trials" / "002", record(1, 0.4, 0.4))
    again.update("002", status="running")
    again.begin("002")
    assert not again.interrupted("002", "its process died").over, "an epoch in between makes it count anew"
    assert len(json.loads((tmp_path / "sessions.json").read_text())) >= 1

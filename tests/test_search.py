"""The search without Ray: what Optuna is asked, conditional keys, points tried first, a study that closed a trial."""

from __future__ import annotations

import optuna
import pytest
from optuna.trial import TrialState

from ser_ray.config import Distribution, SearchSpace
from ser_ray.tune import SafeOptunaSearch, Suggest, _searcher

SEARCH = {
    "adapter.method": {"choice": ["frozen", "lora", "qlora"]},
    "adapter.rank": {"choice": [4, 8], "when": {"adapter.method": ["lora", "qlora"]}},
    "adapter.targets": {"choice": [["q_proj"], ["q_proj", "v_proj"]], "when": {"adapter.method": ["lora"]}},
    "optimizer.lr": {"loguniform": [1e-5, 1e-3]},
    "head.dropout": {"uniform": [0.0, 0.5]},
    "epochs": {"randint": [2, 4]},
}


def space(**tune) -> SearchSpace:
    experiment = {"name": "x", "corpora": {"synthetic": None}, "backbone": "embedded/tiny-whisper"}
    return SearchSpace.model_validate({"experiment": experiment, "search": SEARCH, "tune": tune})


def ask(count: int, settings: SearchSpace) -> list[dict]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    suggest = Suggest(settings.search)
    return [suggest(study.ask()) for _ in range(count)]


def test_every_suggestion_is_in_its_range_and_makes_a_trial():
    settings = space()
    for values in ask(50, settings):
        assert 1e-5 <= values["optimizer.lr"] <= 1e-3
        assert 0 <= values["head.dropout"] <= 0.5
        assert values["epochs"] in (2, 3, 4)
        trial = settings.trial(values)
        assert trial.epochs == values["epochs"]


def test_conditional_keys_are_asked_only_where_they_mean_something():
    seen = set()
    for values in ask(60, space()):
        seen.add(values["adapter.method"])
        assert ("adapter.rank" in values) == (values["adapter.method"] in ("lora", "qlora"))
        assert ("adapter.targets" in values) == (values["adapter.method"] == "lora")
        assert values.get("adapter.targets", ("q_proj",)) in (("q_proj",), ["q_proj"], ["q_proj", "v_proj"])
    assert seen == {"frozen", "lora", "qlora"}


def test_the_points_given_first_are_tried_first():
    first = [
        {"adapter.method": "lora", "adapter.rank": 8, "adapter.targets": ["q_proj", "v_proj"], "optimizer.lr": 1e-4},
        {"adapter.method": "frozen", "optimizer.lr": 1e-3},
    ]
    searcher = _searcher(space(first=first))
    for number, point in enumerate(first):
        values = searcher.suggest(f"trial-{number}")
        assert {key: values[key] for key in point} == {key: point[key] for key in point}


def test_the_same_seed_suggests_the_same():
    one, other = _searcher(space(seed=3)), _searcher(space(seed=3))
    assert [one.suggest(str(i)) for i in range(4)] == [other.suggest(str(i)) for i in range(4)]


def test_a_result_for_a_trial_that_the_study_has_closed_is_let_pass():
    searcher = _searcher(space())
    searcher.suggest("a")
    searcher._ot_study.tell(searcher._ot_trials["a"], 0.5, state=TrialState.COMPLETE)
    searcher.on_trial_result("a", {"best_dev_uar": 0.6, "training_iteration": 2})
    with pytest.raises(optuna.exceptions.UpdateFinishedTrialError):
        super(SafeOptunaSearch, searcher).on_trial_result("a", {"best_dev_uar": 0.6, "training_iteration": 3})


def test_data_are_not_searched():
    with pytest.raises(ValueError, match="same for all trials"):
        SearchSpace.model_validate(
            {"experiment": space().experiment, "search": {"protocol.fold": Distribution(choice=(0, 1))}}
        )

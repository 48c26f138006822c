"""Importances from a results folder: the key that matters comes first, and few trials say nothing."""

import pytest
from report_fixtures import write_trials

from ser_ray.evaluation.folder import read_trials
from ser_ray.trials.importance import importances


def test_the_key_that_matters_comes_first(tmp_path):
    space = write_trials(tmp_path, 30)
    found = importances(space, read_trials(tmp_path / "trials"))
    assert found is not None
    assert next(iter(found.shares)) == "optimizer.lr"
    assert set(found.shares) == {"optimizer.lr", "head.dropout", "adapter.method", "adapter.rank"}  # rank: half have it
    assert sum(found.shares.values()) == pytest.approx(1)
    assert found.shares["optimizer.lr"] > 0.5
    assert (found.trials, found.top) == (30, 5)


def test_costs_and_earlier_searches_do_not_count(tmp_path):
    space = write_trials(tmp_path, 12)
    tried = read_trials(tmp_path / "trials")
    plain = importances(space, tried)
    tune = space.tune.model_copy(update={"also": ("peak_memory_mb",), "warm_start": ("/gone",)})
    assert importances(space.model_copy(update={"tune": tune}), tried) == plain


@pytest.mark.parametrize("count", [0, 7])
def test_few_trials_say_nothing(tmp_path, count):
    space = write_trials(tmp_path, count)
    assert importances(space, read_trials(tmp_path / "trials")) is None

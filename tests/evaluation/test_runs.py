"""When a search counts as evaluated."""

from __future__ import annotations

from search_fixtures import SEARCH, space

from ser_ray import disk
from ser_ray.evaluation import runs


def test_more_epochs_than_were_evaluated_are_another_budget(tmp_path):
    settings = space(SEARCH)
    longer = settings.model_copy(update={"experiment": settings.experiment.model_copy(update={"epochs": 11})})
    disk.write_json(tmp_path / "evaluation" / "test.json", {"budget": runs.budget(settings)})
    assert runs.is_evaluated(tmp_path, settings)
    assert not runs.is_evaluated(tmp_path, longer)

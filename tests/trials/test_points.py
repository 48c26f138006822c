"""Points of a search space: ranges, conditions, lists as values, grids."""

from __future__ import annotations

import itertools

import numpy as np
import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from search_fixtures import MANY_KEYS, space

from ser_ray.config import Distribution, SearchSpace
from ser_ray.trials import points


def asked(count: int, settings: SearchSpace) -> list[points.Point]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    return [points.ask(study.ask(), settings.search) for _ in range(count)]


def test_every_point_is_in_its_range_and_makes_a_trial():
    settings = space(MANY_KEYS)
    for values in asked(50, settings):
        assert 1e-5 <= values["optimizer.lr"] <= 1e-3
        assert 0 <= values["head.dropout"] <= 0.5
        assert values["epochs"] in (2, 3, 4)
        assert settings.trial(values).epochs == values["epochs"]


def test_conditional_keys_are_asked_only_where_they_mean_something():
    seen = set()
    for values in asked(60, space(MANY_KEYS)):
        seen.add(values["adapter.method"])
        assert ("adapter.rank" in values) == (values["adapter.method"] in ("lora", "qlora"))
        assert ("adapter.targets" in values) == (values["adapter.method"] == "lora")
        assert list(values.get("adapter.targets", ["q_proj"])) in (["q_proj"], ["q_proj", "v_proj"])
    assert seen == {"frozen", "lora", "qlora"}


def test_first_layer_may_depend_on_the_backbone():
    search = {
        "backbone": {"choice": ["embedded/tiny-whisper", "embedded/tiny-wav2vec2"]},
        "adapter.first_layer": {"randint": [0, 2], "when": {"backbone": ["embedded/tiny-whisper"]}},
    }
    for values in asked(20, space(search)):
        assert ("adapter.first_layer" in values) == (values["backbone"] == "embedded/tiny-whisper")


def test_a_grid_has_every_combination_once():
    search = {key: Distribution.model_validate(value) for key, value in MANY_KEYS.items()}
    grid = points.grid(search, 3, seed=0)
    rates, dropouts = np.geomspace(1e-5, 1e-3, 3), np.linspace(0, 0.5, 3)
    rest = list(itertools.product(rates, dropouts, (2, 3, 4)))
    methods = [("frozen",), *(("qlora", rank) for rank in (4, 8)), *itertools.product(["lora"], (4, 8), ("a", "b"))]
    assert len(grid) == len(methods) * len(rest)
    assert len({str(point) for point in grid}) == len(grid)
    assert all(space(MANY_KEYS).trial(point) for point in grid[:20])
    assert points.grid(search, 3, seed=0) == grid != points.grid(search, 3, seed=1)


@given(st.lists(st.sampled_from([1, 0.5, True, None, "a"]) | st.lists(st.text(max_size=3), max_size=2), max_size=4))
def test_encoded_values_are_scalars_and_tell_values_apart(values):
    encoded = [points.encode(value) for value in values]
    assert all(value is None or isinstance(value, bool | int | float | str) for value in encoded)
    for one, other in itertools.combinations(zip(values, encoded, strict=True), 2):
        assert (one[1] == other[1]) == (one[0] == other[0])


def test_data_are_not_searched():
    with pytest.raises(ValueError, match="all trials use the same data"):
        space({"protocol.fold": {"choice": [0, 1]}})

"""Where the places of a YAML text are in it, also where it has aliases."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ser_ray import config
from ser_ray.schema import UserError

BOMB = ["a0: &a0 [1, 2]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9))]
KEYS = st.text(alphabet="abcxyz._", min_size=1, max_size=6)
CONTENT = st.recursive(
    st.none() | st.booleans() | st.integers() | KEYS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)


def places(content: object, place: tuple[str | int, ...] = ()) -> set[tuple[str | int, ...]]:
    inside = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return {place}.union(*(places(value, (*place, key)) for key, value in inside))


@given(CONTENT, st.booleans())
def test_every_place_has_the_line_that_it_is_written_on(content, flow):
    text = yaml.safe_dump(content, default_flow_style=flow)
    lines = config.line_numbers(text)
    assert lines.keys() == places(config.read_yaml(text)) - {()}
    for place, line in lines.items():
        if isinstance(place[-1], str) and not flow:
            assert place[-1] in text.splitlines()[line - 1]


def test_an_alias_has_the_line_of_its_own_place():
    text = "first: &it\n  - 1\n  - 2\nsecond: *it\n"
    assert config.read_yaml(text) == {"first": [1, 2], "second": [1, 2]}
    assert config.line_numbers(text) == {("first",): 1, ("first", 0): 2, ("first", 1): 3, ("second",): 4}


@pytest.mark.parametrize("overrides", [[], ["a0=3"]])
@pytest.mark.parametrize(
    "lines", [BOMB, ["experiment: &self", "  name: x", "  adapter: *self"]], ids=["bomb", "circle"]
)
def test_aliases_of_aliases_end(tmp_path, lines, overrides):
    path = tmp_path / "space.yaml"
    path.write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"not readable as YAML: its aliases stand for"):
        config.load(path, overrides)


def test_an_override_has_no_bomb_either():
    with pytest.raises(UserError, match="the value is not readable as YAML"):
        config.load(config.default_space(), [f"experiment={{{', '.join(BOMB)}}}"])


def test_the_experiment_of_a_checkpoint_is_read_with_lines(tmp_path):
    path = tmp_path / "experiment.yaml"
    path.write_text("name: x\ncorpora: {synthetic: }\nbackbone: b\nepochs: 0\n")
    with pytest.raises(UserError, match=r"experiment\.yaml:4: epochs: input should be greater"):
        config.load_experiment(path)
    path.write_text("name: [")
    with pytest.raises(UserError, match=r"experiment\.yaml: not readable as YAML"):
        config.load_experiment(path)

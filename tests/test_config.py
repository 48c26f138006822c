"""The configuration: what is accepted, what is refused and how, and that it survives being written."""

import json
import typing
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ser_ray import config, explain
from ser_ray.config import Experiment, SearchSpace, load
from ser_ray.schema import UserError

SPACES = sorted((Path(__file__).parent.parent / "search_spaces").glob("*.yaml"))
MINIMAL = """
experiment:
  name: x
  corpora: {synthetic: }
  backbone: embedded/tiny-whisper
search:
  adapter.rank: {choice: [4, 8]}
  optimizer.lr: {loguniform: [1e-5, 1e-3]}
tune:
  first: [{adapter.rank: 4, optimizer.lr: 1e-4}]
"""


@pytest.fixture
def space_file(tmp_path: Path) -> Path:
    path = tmp_path / "space.yaml"
    path.write_text(MINIMAL)
    return path


@pytest.mark.parametrize("path", SPACES, ids=lambda path: path.stem)
def test_every_search_space_that_ships_is_valid(path):
    space = load(path)
    assert space.search
    assert path.read_text().startswith("#"), "a space says at its top what it is"


def test_a_space_survives_being_written(space_file, tmp_path):
    space = load(space_file)
    again = tmp_path / "again.yaml"
    again.write_text(config.dump(space))
    assert load(again) == space
    assert config.differences(space, load(again)) == []


@given(st.text(alphabet="0123456789noyestruflaeE.+-:_ ", min_size=1, max_size=8))
def test_any_speaker_name_survives_yaml(name):
    experiment = Experiment.model_validate(
        {
            "name": "x",
            "corpora": {"synthetic": None},
            "backbone": "b",
            "protocol": {"scheme": "given_folds", "given": [[name], ["b"], ["c"]]},
        }
    )
    assert Experiment.model_validate(config.read_yaml(config.dump(experiment))) == experiment


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1.0e-5", 1e-5),
        ("-3", -3),
        ("0", 0),
        (".5", 0.5),
        ("08", "08"),
        ("03", "03"),
        ("no", "no"),
        ("off", "off"),
        ("true", True),
        ("null", None),
        ("12:30:45", "12:30:45"),
        ("2024-01-01", "2024-01-01"),
    ],
)
def test_yaml_reads_as_people_mean_it(text, value):
    read = config.read_yaml(text)
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("experiment.epochz=3", ["experiment.epochz", "unknown key", "epochs"]),
        ("experiment.optimizer.lr=7", ["experiment.optimizer.lr", "7"]),
        ("experiment.optimizer.lr=fast", ["experiment.optimizer.lr", "'fast'"]),
        ("experiment.epochs=2.5", ["experiment.epochs", "2.5"]),
        ("experiment.epochs=0", ["experiment.epochs", "0"]),
        ("experiment.adapter.method=qlorra", ["experiment.adapter.method", "'qlorra'"]),
        ("experiment.head.pooling=atentive", ["experiment.head.pooling: unknown value", "did you mean attentive?"]),
        ("experiment.head.kind=xyz", ["experiment.head.kind: unknown value 'xyz'; known: pooled"]),
        ("experiment.loss=3", ["experiment.loss: input should be a valid string, not 3"]),
        ("search.loss={choice: [focal, facal]}", ["search.loss", "did you mean focal"]),
        ("experiment.emotions=[happy, joyful]", ["joyful", "named twice"]),
        ("experiment.emotions=[angry]", ["at least two"]),
        ("experiment.merge={calm: fine}", ["fine"]),
        ("experiment.corpora={}", ["experiment.corpora", "at least one"]),
        ("experiment.exclude=[duplicats]", ["experiment.exclude", "neither a .csv file nor one of duplicates", "mean"]),
        ("search.exclude={choice: [duplicates]}", ["search.exclude", "all trials use the same data"]),
        ("experiment.protocol.fold=5", ["experiment.protocol.fold", "0 to 4, not 5"]),
        ("experiment.protocol.scheme=given_folds", ["protocol.given"]),
        ("experiment.protocol.scheme=leave_one_corpus_out", ["protocol.held_out"]),
        ("experiment.head={init: probe, hidden: 8}", ["head.hidden"]),
        ("experiment.name=../x", ["experiment.name"]),
        ("search.adapter.rnk={choice: [1]}", ["search.adapter.rnk", "unknown key", "adapter.rank"]),
        ("search.adapter.rank={choice: [0]}", ["adapter.rank", "0"]),
        ("search.adapter.rank={choice: []}", ["adapter.rank", "empty"]),
        ("search.adapter.rank={choice: [1], uniform: [0, 1]}", ["exactly one"]),
        ("search.optimizer.lr={loguniform: [1e-3, 1e-5]}", ["lower bound"]),
        ("search.optimizer.lr={loguniform: [0, 1e-5]}", ["above 0"]),
        ("search.epochs={randint: [1, 3], when: {head.hidden: [0]}}", ["head.hidden", "not searched"]),
        ("tune.first=[{epochs: 3}]", ["tune.first", "epochs"]),
        ("nonsense=1", ["nonsense", "unknown key"]),
        ("nonsense", ["key=value"]),
        ("experiment.name=[", ["YAML"]),
    ],
)
def test_what_does_not_fit_is_one_line_that_names_it(space_file, override, words):
    with pytest.raises(UserError) as error:
        load(space_file, [override])
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("name", ["a", "b"]),
        ("corpora", [{"synthetic": None}]),
        ("label", ["intended", "perceived"]),
        ("labels", [{}, {"synthetic": {"mad": "angry"}}]),
        ("labels.synthetic", [{"mad": "angry"}]),
        ("emotions", [["angry", "sad"], ["angry", "happy"]]),
        ("merge", [{}]),
        ("merge.calm", ["neutral"]),
        ("audio.trim_db", [30.0, 40.0]),
        ("protocol.fold", [0, 1]),
        ("protocol.seed", [0, 1]),
    ],
)
def test_what_the_data_are_is_not_searched(space_file, key, values):
    with pytest.raises(UserError, match=f"search.{key}: all trials use the same data"):
        load(space_file, [f"search.{key}={json.dumps({'choice': values})}"])


@pytest.mark.parametrize(
    ("search", "most"),
    [({}, 10), ({"epochs": {"choice": [3, 7]}}, 7), ({"epochs": {"randint": [2, 30]}}, 30)],
)
def test_the_longest_trial_has_the_most_epochs(space_file, search, most):
    assert load(space_file, [f"search={json.dumps(search)}", "tune.first=[]"]).most_epochs() == most


def test_a_file_without_the_newest_keys_has_their_defaults(space_file, tmp_path):
    """Those of version 0.1.0 and before: a search that was started with it can be continued."""
    space, older = load(space_file), tmp_path / "older.yaml"
    content = config.read_yaml(config.dump(space))
    del content["experiment"]["loss"], content["experiment"]["head"]["kind"]
    older.write_text(yaml.safe_dump(content))
    assert config.differences(load(older), space) == []


def test_epochs_may_grow_and_not_shrink(space_file):
    old, more = load(space_file), load(space_file, ["experiment.epochs=11"])
    assert config.refused(old, more) == []
    assert config.refused(more, old) == ["experiment.epochs: 11 -> 10, which may only grow"]
    assert config.refused(old, load(space_file, ["experiment.epochs=11", "experiment.patience=2"])) == [
        "experiment.patience: 4 -> 2"
    ]


def test_half_of_a_batch_makes_the_same_step(space_file):
    whole = load(space_file, ["experiment.batch_seconds=30", "experiment.optimizer.accumulate=3"]).experiment
    half = whole.halved()
    assert (half.batch_seconds, half.optimizer.accumulate) == (15, 6)
    assert half.batch_seconds * half.optimizer.accumulate == whole.batch_seconds * whole.optimizer.accumulate


def test_a_missing_file_and_a_file_that_is_no_yaml_are_said(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load(tmp_path / "absent.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("experiment: {")
    with pytest.raises(UserError, match="not readable as YAML"):
        load(broken)
    broken.write_text("- 1")
    with pytest.raises(UserError, match="expected a mapping"):
        load(broken)


def test_an_override_of_a_searched_key_fixes_it(space_file):
    space = load(space_file, ["experiment.adapter.rank=32"])
    assert space.experiment.adapter.rank == 32
    assert list(space.search) == ["optimizer.lr"]
    assert space.tune.first == ({"optimizer.lr": 1e-4},)


@pytest.mark.parametrize(
    ("first", "left"),
    [
        (
            [{"adapter.rank": 4, "optimizer.lr": 1e-4}, {"adapter.rank": 8, "optimizer.lr": 1e-4}],
            [{"optimizer.lr": 1e-4}],
        ),
        ([{"adapter.rank": 4}, {"adapter.rank": 8, "optimizer.lr": 1e-4}], [{"optimizer.lr": 1e-4}]),
        ([{"adapter.rank": 4}], []),
    ],
)
def test_first_points_that_an_override_makes_alike_are_tried_once(space_file, first, left):
    content = yaml.safe_load(space_file.read_text())
    content["tune"] = {"first": first}
    space_file.write_text(yaml.safe_dump(content))
    assert load(space_file, ["experiment.adapter.rank=32"]).tune.first == tuple(left)


@pytest.mark.parametrize("tune", ["twelve", {"first": "one"}, {"first": [3]}])
def test_a_broken_tune_beside_an_override_is_one_line(space_file, tune):
    content = yaml.safe_load(space_file.read_text())
    content["tune"] = tune
    space_file.write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match=r"^[^\n]*tune[^\n]*$"):
        load(space_file, ["experiment.adapter.rank=32"])


@pytest.mark.parametrize(("method", "left"), [("qlora", {"adapter.rank", "head.dropout"}), ("full", set())])
def test_what_depends_on_a_fixed_key_is_searched_always_or_never(tmp_path, method, left):
    content = yaml.safe_load(MINIMAL)
    content["search"] = {
        "adapter.method": {"choice": ["qlora", "full"]},
        "adapter.rank": {"choice": [2, 4], "when": {"adapter.method": ["qlora"]}},
        "head.dropout": {"uniform": [0.0, 0.5], "when": {"adapter.rank": [2]}},
    }
    content["tune"] = {"first": [{"adapter.method": "qlora", "adapter.rank": 2, "head.dropout": 0.1}]}
    path = tmp_path / "space.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    space = load(path, [f"experiment.adapter.method={method}"])
    assert space.search.keys() == left
    assert [point.keys() for point in space.tune.first] == ([left] if left else [])
    assert all("adapter.method" not in distribution.when for distribution in space.search.values())


@pytest.mark.parametrize("when", ["qlora", 3, ["adapter.method"], {"adapter.method": {"a": 1}}])
def test_a_broken_condition_beside_an_override_is_one_line(tmp_path, when):
    content = yaml.safe_load(MINIMAL)
    content["search"] = {"adapter.method": {"choice": ["qlora", "full"]}, "adapter.rank": {"choice": [2], "when": when}}
    path = tmp_path / "space.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    with pytest.raises(UserError, match=r"adapter\.rank"):
        load(path, ["experiment.adapter.method=full"])


def test_a_trial_is_the_base_with_its_values(space_file):
    space = load(space_file)
    trial = space.trial({"adapter.rank": 4, "optimizer.lr": 1e-5})
    assert (trial.adapter.rank, trial.optimizer.lr) == (4, 1e-5)
    assert trial.head == space.experiment.head
    with pytest.raises(UserError, match=r"adapter\.rnk"):
        space.trial({"adapter.rnk": 4})


def test_differences_name_the_keys(space_file):
    old, new = load(space_file), load(space_file, ["experiment.epochs=3"])
    assert config.differences(old, new) == ["experiment.epochs: 10 -> 3"]


def test_fingerprints_follow_content_not_order():
    assert config.fingerprint({"a": 1, "b": [1, 2]}) == config.fingerprint({"b": [1, 2], "a": 1})
    assert config.fingerprint({"a": 1}) != config.fingerprint({"a": 2})


def test_every_field_says_what_it_is_for_or_is_a_section():
    sections = [config.Experiment, config.Audio, config.Protocol, config.Adapter, config.Head, config.Augment]
    sections += [config.Optimizer, config.Tune, config.Resources, config.Storage]
    for section in sections:
        for name, field in section.model_fields.items():
            is_section = isinstance(field.annotation, type) and issubclass(field.annotation, config.Section)
            assert is_section or field.description, f"{section.__name__}.{name}"


def numbers_in(annotation: object) -> bool:
    """Whether a type has numbers in it."""
    return annotation in (int, float) or any(map(numbers_in, typing.get_args(annotation)))


def test_every_number_has_a_unit_and_nothing_else_has():
    keys = {key.name: key for key in explain.every_key()}
    for name, field in config.every_field(SearchSpace):
        units = [one for one in field.metadata if isinstance(one, config.Unit)]
        assert len(units) == numbers_in(field.annotation), f"{name}: {units}"
        assert bool(keys[name].unit) == numbers_in(field.annotation)


@pytest.mark.parametrize(
    ("name", "summary"),
    [
        ("experiment.audio.min_seconds", "number above 0 and at most 30, in s; default 0.3"),
        ("experiment.augment.noise_snr_db", "list of number | null, in dB; default null"),
        ("experiment.optimizer.warmup", "number at least 0 and below 1, share of the steps; default 0.1"),
        ("experiment.seed", "integer at least 0, no unit; default 0"),
        ("tune.gpu_hours", "number | null above 0, in GPU-h; default null"),
        ("storage.results", "text; default results"),
    ],
)
def test_a_key_is_summarised_with_its_unit(name, summary):
    (key,) = [key for key in explain.every_key() if key.name == name]
    assert key.summary == summary


def test_the_space_is_frozen():
    space = SearchSpace.model_validate(config.read_yaml(MINIMAL))
    with pytest.raises(ValueError, match="frozen"):
        space.experiment.epochs = 3  # type: ignore[misc]


def test_dev_rotates_over_seeds_only(space_file):
    assert load(space_file, ["tune.rotate_dev=true", "tune.final_seeds=2"]).tune.rotate_dev
    with pytest.raises(UserError, match="final_seeds to 2"):
        load(space_file, ["tune.rotate_dev=true"])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("gpus_per_worker=1.5", "a fraction of one GPU, or a whole number of GPUs"),
        ("gpus_per_worker=-1", "a fraction of one GPU, or a whole number of GPUs"),
        ("cpus_per_worker=0", "more than 0, or auto"),
    ],
)
def test_resources_that_no_cluster_can_give_are_refused(given, said):
    with pytest.raises(UserError, match=said):
        config.load(config.default_space(), [f"resources.{given}"])

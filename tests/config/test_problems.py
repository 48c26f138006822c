"""All problems of a search space are shown at once, each with its place, its line and what may have been meant."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ser_ray import config
from ser_ray.config import Distribution, Experiment, SearchSpace
from ser_ray.schema import UserError

FIVE = """\
experiment:
  name: five
  corpora: {synthetic: }
  backbone: embedded/tiny-whisper
  emotions: [angry, anger]
  adapter: {method: lora, ranc: 4}
  epochs: 0
search:
  adapter.rnk: {choice: [4, 8]}
  optimizer.lr: {uniform: [0.1, 0.2], when: {head.dropout: [0.1]}}
tune:
  first:
    - {optimizer.lr: 0.1}
    - {optimiser.lr: 0.1}
"""

GOOD = """\
experiment:
  name: good
  corpora: {mine: /data/mine.csv, synthetic: }
  backbone: embedded/tiny-whisper
  labels: {mine: {ang: angry}}
  emotions: [angry, happy, sad]
  merge: {calm: sad}
  protocol: {scheme: leave_one_corpus_out, held_out: mine}
  adapter: {rank: 4}
  head: {init: random, hidden: 8}
  augment: {noise_snr_db: [10.0, 20.0]}
search:
  adapter.method: {choice: [lora, full]}
  adapter.rank: {choice: [4, 8], when: {adapter.method: [lora]}}
  optimizer.lr: {loguniform: [1e-5, 1e-3]}
  head.dropout: {uniform: [0.0, 0.5]}
  head.layer_mix: {choice: [weighted, concat]}
tune:
  trials: 4
  final_seeds: 1
  rotate_dev: false
  first:
    - {adapter.rank: 4, optimizer.lr: 1e-4}
    - {optimizer.lr: 1e-4}
resources:
  cpus_per_worker: 1
  gpus_per_worker: auto
storage:
  prefix_gb: 1
""".splitlines()

WRONG = {
    "  name: good": ("  name: ../x", "experiment.name: string should match pattern"),
    "  labels: {mine: {ang: angry}}": (
        "  labels: {mine: {ang: ''}}",
        "experiment.labels.mine.ang: the emotion is empty; name one",
    ),
    "  merge: {calm: sad}": (
        "  merge: {calm: sat}",
        "experiment.merge.calm: 'sat' is not among the experiment's emotions; did you mean sad?",
    ),
    "  protocol: {scheme: leave_one_corpus_out, held_out: mine}": (
        "  protocol: {scheme: leave_one_corpus_out}",
        "experiment.protocol.scheme: leave_one_corpus_out needs protocol.held_out",
    ),
    "  adapter: {rank: 4}": ("  adapter: {ranc: 4}", "experiment.adapter.ranc: unknown key; did you mean rank?"),
    "  head: {init: random, hidden: 8}": (
        "  head: {init: probe, hidden: 8}",
        "experiment.head.init: probe needs a linear head: set head.hidden to 0",
    ),
    "  augment: {noise_snr_db: [10.0, 20.0]}": (
        "  augment: {noise_snr_db: [20.0, 10.0]}",
        "experiment.augment.noise_snr_db: this is [low, high], but the first value is above the second",
    ),
    "  adapter.rank: {choice: [4, 8], when: {adapter.method: [lora]}}": (
        "  adapter.rank: {choice: [4, 8], when: {adapter.metod: [lora]}}",
        "search.adapter.rank.when.adapter.metod: this key is not searched; did you mean adapter.method?",
    ),
    "  optimizer.lr: {loguniform: [1e-5, 1e-3]}": (
        "  optimizer.lr: {loguniform: [1e-3, 1e-5]}",
        "search.optimizer.lr.loguniform: the lower bound 0.001 is not below the upper bound 1e-05",
    ),
    "  head.dropout: {uniform: [0.0, 0.5]}": (
        "  head.dropuot: {uniform: [0.0, 0.5]}",
        "search.head.dropuot: unknown key; did you mean head.dropout?",
    ),
    "  head.layer_mix: {choice: [weighted, concat]}": (
        "  head.layer_mix: {choice: [weighted, lst]}",
        "search.head.layer_mix: input should be 'weighted', 'concat' or 'last', not 'lst'",
    ),
    "  trials: 4": ("  trails: 4", "tune.trails: unknown key; did you mean trials?"),
    "  rotate_dev: false": ("  rotate_dev: true", "tune.rotate_dev: dev changes with each further seed"),
    "    - {adapter.rank: 4, optimizer.lr: 1e-4}": (
        "    - {adapter.rnk: 4, optimizer.lr: 1e-4}",
        "tune.first.0.adapter.rnk: this key is not searched; did you mean adapter.rank?",
    ),
    "    - {optimizer.lr: 1e-4}": ("    - {optimizer.lr: 7.0}", "tune.first.1.optimizer.lr: input should be less than"),
    "  cpus_per_worker: 1": ("  cpus_per_worker: 0", "resources.cpus_per_worker: give more than 0, or auto, not 0"),
    "  gpus_per_worker: auto": ("  gpus_per_worker: .inf", "resources.gpus_per_worker: give a fraction of one GPU"),
    "  prefix_gb: 1": ("  prefix_gb: -1", "storage.prefix_gb: input should be greater than or equal to 0, not -1"),
}
"""A line of `GOOD` -> the same with a mistake, and what is then said."""


def problems(path: Path, text: str, *overrides: str) -> list[str]:
    """What is said about a file, a line for each problem."""
    path.write_text(text)
    with pytest.raises(UserError) as error:
        config.load(path, overrides)
    first, *rest = str(error.value).splitlines()
    if rest:
        assert first == f"{path}: {len(rest)} problems"
    return [line.removeprefix("  ") for line in rest or [first.removeprefix(f"{path}:")]]


def test_problems_of_every_kind_have_their_lines(tmp_path):
    assert problems(tmp_path / "space.yaml", FIVE) == [
        "line 5: experiment.emotions.1: 'anger' is named twice, first as 'angry'",
        "line 6: experiment.adapter.ranc: unknown key; did you mean rank?",
        "line 7: experiment.epochs: input should be greater than or equal to 1, not 0",
        "line 9: search.adapter.rnk: unknown key; did you mean adapter.rank?",
        "line 10: search.optimizer.lr.when.head.dropout: this key is not searched; known: adapter.rnk, optimizer.lr",
        "line 14: tune.first.1.optimiser.lr: this key is not searched; did you mean optimizer.lr?",
    ]


@given(st.sets(st.sampled_from(sorted(WRONG)), min_size=1))
def test_no_mistake_hides_another(tmp_path_factory, mistakes):
    lines = [WRONG[line][0] if line in mistakes else line for line in GOOD]
    said = problems(tmp_path_factory.mktemp("space") / "space.yaml", "\n".join(lines))
    expected = sorted((GOOD.index(line) + 1, WRONG[line][1]) for line in mistakes)
    assert len(said) == len(expected)
    for text, (number, words) in zip(said, expected, strict=True):
        assert text.startswith(f"{number}: {words}" if len(said) == 1 else f"line {number}: {words}")


def test_the_lines_without_mistakes_are_a_search_space(tmp_path):
    path = tmp_path / "space.yaml"
    path.write_text("\n".join(GOOD))
    assert config.load(path).search.keys() >= {"adapter.rank", "head.dropout"}
    assert WRONG.keys() <= set(GOOD)


def test_what_the_command_line_gives_has_no_line(tmp_path):
    path, text = tmp_path / "space.yaml", "\n".join(GOOD)
    assert problems(path, text, "experiment.emotions=[angry, '']", "search.head.init={choice: [prob]}") == [
        "experiment.emotions.1: the emotion is empty; name one",
        "search.head.init: input should be 'random' or 'probe', not 'prob'",
    ]
    removed = problems(path, text.replace("{optimizer.lr: 1e-4}", "{optimizer.lr: 7.0}"), "experiment.adapter.rank=4")
    assert removed == [f"{GOOD.index('  first:') + 1}: tune.first.1.optimizer.lr: input should be less than or equal "
                       "to 1, not 7.0"]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("search.lr={uniform: [0.1, 0.2]}", "search.lr: unknown key; did you mean optimizer.lr?"),
        ("search.dropout={choice: [0.1]}", "did you mean adapter.dropout or head.dropout?"),
        ("search.experiment.adapter.rank={choice: [4]}", "did you mean adapter.rank?"),
        ("search.xyz={choice: [4]}", "search.xyz: unknown key; ser-ray config lists all"),
        ("search.adapter.rank.x={choice: [4]}", "search.adapter.rank.x: unknown key"),
        ("search.adapter.rank={chioce: [4]}", "search.adapter.rank.chioce: unknown key; did you mean choice?"),
        ("search.adapter={choice: [{rank: 0}]}", "search.adapter.rank: input should be greater than or equal to 1"),
        ("search.head.hidden={choice: [8], when: {head.hidden: [8]}}", "when.head.hidden: list head.hidden before"),
        (
            "search={epochs: {choice: [2], when: {seed: [1]}}, seed: {choice: [1]}}",
            "search.epochs.when.seed: list seed before",
        ),
        ("experiment.emotions=[sad, angry, sad]", "experiment.emotions.2: 'sad' is named twice"),
        ("experiment.emotions=[sad]", "experiment.emotions: name at least two emotions"),
        ("experiment.merge={calm: hapy}", "experiment.merge.calm: 'hapy' is not among the experiment's emotions; did"),
        ("experiment.merge={sad: happy}", "experiment.merge.sad: 'sad' is also in emotions; remove it from one of"),
        ("experiment.labels={mien: {}}", "experiment.labels.mien: 'mien' is not among the corpora; did you mean mine?"),
        ("experiment.protocol={scheme: random, folds: 3, fold: 3}", "experiment.protocol.fold: the folds are 0 to 2"),
        ("experiment.protocol={held_out: a, train_on: [b, a]}", "experiment.protocol.train_on.1: 'a' is held out"),
        ("experiment.head={init: probe, layer_mix: last}", "experiment.head.init: probe needs all layers"),
    ],
)
def test_what_is_said_about_a_mistake(tmp_path, given, said):
    assert any(said in line for line in problems(tmp_path / "space.yaml", "\n".join(GOOD), given))


def test_values_that_do_not_fit_together_name_the_other_key(tmp_path):
    path = tmp_path / "space.yaml"
    search = "  head.init: {choice: [probe, random]}\n  head.hidden: {choice: [0, 8]}\n"
    text = "\n".join(GOOD).replace("hidden: 8", "hidden: 0").replace("search:\n", f"search:\n{search}")
    path.write_text(text)
    assert "head.init" in config.load(path).search
    both = text.replace("    - {optimizer.lr: 1e-4}", "    - {head.init: probe, head.hidden: 8, optimizer.lr: 1e-4}")
    assert problems(path, both)[0].endswith(
        "tune.first.1.head.init: probe needs a linear head: set head.hidden to 0",
    )
    fixed = text.replace("  head.init: {choice: [probe, random]}\n", "").replace("init: random", "init: probe")
    assert problems(path, fixed)[0].endswith(
        "search.head.hidden: this does not fit head.init: probe needs a linear head: set head.hidden to 0"
    )


VARIANTS = "  adapter.method: {{choice: [lora, qlora]}}\n  adapter.variant: {{choice: {}{}}}\n"


@pytest.mark.parametrize(
    ("values", "when", "said"),
    [
        ("[plain, loftq]", ", when: {adapter.method: [qlora]}", None),
        ("[plain, pissa]", ", when: {adapter.method: [lora]}", None),
        ("[plain, dora]", ", when: {adapter.method: [lora, qlora]}", None),
        ("[plain, loftq]", "", "search.adapter.variant: loftq makes up for the error of 4-bit weights: set adapter"),
        (
            "[plain, pissa]",
            ", when: {adapter.method: [lora, qlora]}",
            "search.adapter.variant: with qlora, pissa would",
        ),
    ],
)
def test_values_of_a_key_are_looked_at_as_its_conditions_say(tmp_path, values, when, said):
    path, (before, _, after) = (
        tmp_path / "space.yaml",
        "\n".join(GOOD).partition("  adapter.method: {choice: [lora, full]}\n"),
    )
    text = before + VARIANTS.format(values, when) + after
    if said is None:
        path.write_text(text)
        assert "adapter.variant" in config.load(path).search
    else:
        assert said in problems(path, text)[0]


def test_a_search_space_from_python_is_checked_too():
    experiment = Experiment(name="x", corpora={"synthetic": None}, backbone="b")
    fine = Distribution(choice=(4, 8))
    space = SearchSpace(experiment=experiment, search={"adapter.rank": fine})
    assert SearchSpace.model_validate(space) == space
    with pytest.raises(ValueError, match=r"search\.adapter\.rnk: unknown key; did you mean adapter\.rank\?"):
        SearchSpace(experiment=experiment, search={"adapter.rnk": fine})
    with pytest.raises(ValueError, match=r"tune\.first\.0\.adapter\.rank: input should be .*, not 0"):
        SearchSpace(
            experiment=experiment, search={"adapter.rank": fine}, tune=config.Tune(first=({"adapter.rank": 0},))
        )


@pytest.mark.parametrize("space", [[], "x", {"search": 3, "tune": []}, {"search": {"a": 3}, "tune": {"first": [3]}}])
def test_what_is_no_search_space_at_all_is_said(space):
    with pytest.raises(ValueError, match=r"experiment|mapping|dictionary"):
        SearchSpace.model_validate(space)

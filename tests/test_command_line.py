"""The command line: help of every verb, what is refused in one line, and the verbs that only tell."""

from __future__ import annotations

import inspect
import os
from pathlib import Path

import pytest

from ser_ray import __main__, __version__, config
from ser_ray.__main__ import VERBS, main
from ser_ray.schema import UserError

BROKEN = """\
experiment:
  name: broken
  corpora: {synthetic: }
  backbon: embedded/tiny-whisper
  adapter: {method: qlora, ranc: 8}
tune:
  trials: 0
"""


@pytest.mark.parametrize("verb", VERBS)
def test_help_explains_arguments_with_two_examples_and_the_exit_codes(verb, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main([verb, "--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"Usage: ser-ray {verb}" in said
    assert said.partition("Examples")[2].count("ser-ray ") == 2
    assert "Exit codes: 0 done, 1 failed, 2" in said
    for name in inspect.signature(getattr(__main__, verb)).parameters:
        parameter = inspect.signature(getattr(__main__, verb), eval_str=True).parameters[name]
        (described,) = parameter.annotation.__metadata__
        assert described.help, f"{verb}: {name}"


def test_help_lists_every_verb(capsys):
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f" {verb} " in said for verb in VERBS)
    assert main([]) == 2
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.endswith(f"{__version__}\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["tuen"], "ser-ray tuen: No such command 'tuen'. Did you mean 'tune'? See ser-ray --help"),
        (["train"], "ser-ray train: Missing argument 'SPACE.yaml'. See ser-ray train --help"),
        (["report", "x", "--pages", "3"], "ser-ray report: No such option: --pages"),
        (["predict", "x", "y.wav", "--format", "xml"], "'xml' is not one of 'table', 'jsonl', 'csv'"),
        (["train", "nowhere.yaml"], "ser-ray train: nowhere.yaml: no such file"),
        (["new", "dema"], "ser-ray new: dema: no such search space; there are demo, "),
        (["config", "adaptr"], "ser-ray config: adaptr: no such key; did you mean adapter?"),
    ],
)
def test_what_is_refused_is_one_line(arguments, said, capsys):
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_all_problems_of_a_file_are_shown_at_once_with_their_lines(tmp_path, capsys):
    path = tmp_path / "broken.yaml"
    path.write_text(BROKEN)
    assert main(["prepare", str(path)]) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"ser-ray prepare: {path}: 3 problems",
        "  line 4: experiment.backbon: unknown key; did you mean backbone?",
        "  line 5: experiment.adapter.ranc: unknown key; did you mean rank?",
        "  line 7: tune.trials: input should be greater than or equal to 1, not 0",
    ]
    assert main(["train", str(path), "tune.trials=2", "experiment.adapter={}"]) == 2
    assert "line 1: experiment.backbone: this key is required" in capsys.readouterr().err


def test_a_space_without_a_backbone_is_enough_where_none_is_used(tmp_path):
    path = tmp_path / "data.yaml"
    path.write_text("experiment: {name: data, corpora: {synthetic: }}\n")
    assert config.load(path, needs_backbone=False).experiment.backbone == config.UNSPECIFIED
    with pytest.raises(ValueError, match=r"experiment\.backbone: this key is required"):
        config.load(path)


def test_a_built_in_space_is_listed_and_copied_with_its_comments(tmp_path, capsys):
    assert main(["spaces"]) == 0
    listed = capsys.readouterr().out
    for name, path in config.built_in_spaces().items():
        assert f"{name}\n" in listed
        assert main(["new", name]) == 0
        copy = tmp_path / f"{name}.yaml"
        copy.write_text(capsys.readouterr().out)
        assert copy.read_text() == path.read_text()
        assert config.load(copy) == config.load(path)


def test_every_key_is_explained(capsys):
    assert main(["config"]) == 0
    said = capsys.readouterr().out
    for name in ("experiment.adapter.rank", "tune.trials", "resources.workers", "storage.cache", "search"):
        assert f"{name}: " in said


def test_a_key_is_shown_with_its_value_and_where_that_is_from(tmp_path, capsys):
    demo = config.default_space()
    assert main(["config", "experiment.adapter.rank", str(demo)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "experiment.adapter.rank: integer at least 1 and at most 512, no unit; default 8"
    line = next(n for n, text in enumerate(demo.read_text().splitlines(), 1) if "adapter:" in text)
    assert said[1] == f"  here: 8 ({demo}, line {line})"
    assert said[2].strip()
    assert main(["config", "pooling"]) == 0
    assert capsys.readouterr().out.startswith(
        "experiment.head.pooling: mean | statistics | attentive; default attentive"
    )
    assert main(["config", "epochs", str(demo), "experiment.epochs=3"]) == 0
    assert "here: 3 (given on the command line)" in capsys.readouterr().out
    assert main(["config", "tune.seed", str(demo)]) == 0
    assert "here: 0 (default)" in capsys.readouterr().out


def test_a_renamed_verb_works_and_says_its_name(capsys):
    assert main(["premium", "nowhere.yaml"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "ser-ray premium is called ser-ray leakage now"
    assert said[1].startswith("ser-ray leakage: nowhere.yaml: no such file")


def test_a_name_that_is_not_utf8_is_refused_in_one_line(capsys):
    """But by predict, which writes no record of itself."""
    assert main(["train", os.fsdecode(b"caf\xe9.yaml")]) == 2
    assert capsys.readouterr().err == (
        "ser-ray train: caf\\xe9.yaml: this name is not UTF-8, as records and Ray need it; rename it\n"
    )


def test_every_verb_is_a_module_of_its_name_or_of_what_it_does():
    package = Path(__main__.__file__).parent
    modules = {"config": "explain", "new": "spaces"}
    assert all((package / f"{modules.get(verb, verb)}.py").is_file() for verb in VERBS)


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "ser-ray audit: interrupted; the same command continues"),
        (UserError("what, where, what to do"), 2, "ser-ray audit: what, where, what to do"),
        (EOFError("a broken file"), None, ""),
        (BrokenPipeError(32, "a socket"), None, ""),
        (OSError(28, "No space left on device", "/data/x"), 2, "ser-ray audit: "),
    ],
    ids=lambda value: type(value).__name__,
)
def test_how_a_verb_ends_is_how_the_command_ends(raised, code, said, capsys, monkeypatch):
    """Not as the library of the command line would have it, which takes some errors for an interrupt."""

    def failing(path: Path, overrides: list[str]) -> int:
        raise raised

    monkeypatch.setattr("ser_ray.audit.main", failing)
    if code is None:
        with pytest.raises(type(raised)):
            main(["audit", "x.yaml"])
    else:
        assert main(["audit", "x.yaml"]) == code
        assert said in capsys.readouterr().err


def test_lines_are_those_of_the_file_also_where_an_override_removes_points(tmp_path):
    path = tmp_path / "space.yaml"
    path.write_text(config.default_space().read_text())
    with pytest.raises(UserError, match=r"space\.yaml: tune\.first"):
        config.load(path, ["experiment.backbone=embedded/tiny-whisper", "tune.first=[{x: 1}]"])


def test_problems_of_a_trial_are_one_line():
    space = config.load(config.default_space())
    with pytest.raises(UserError, match=r"^[^\n]*batch_seconds[^\n]*; [^\n]*epochs[^\n]*$"):
        space.trial({"epochs": 0, "batch_seconds": -1.0})


def test_what_a_mapping_sets_and_what_not(capsys):
    demo = str(config.default_space())
    assert main(["config", "experiment.adapter", demo, "experiment.adapter={method: lora, rank: 4}"]) == 0
    said = capsys.readouterr().out
    assert "experiment.adapter.rank: integer" in said
    assert said.count("given on the command line") == 2
    assert main(["config", demo, "experiment.epochs=3"]) == 0
    assert "here: 3 (given on the command line)" in capsys.readouterr().out


def test_prepare_without_a_file_is_the_demo(monkeypatch):
    prepared = []
    monkeypatch.setattr("ser_ray.prepare.prepare", lambda space, console: prepared.append(space.experiment.name) or [])
    monkeypatch.setattr("ser_ray.prepare.summary", lambda index: "")
    monkeypatch.setattr("ser_ray.prepare.shards.read_index", lambda directories: None)
    assert main(["prepare"]) == 0
    assert prepared == ["demo"]


def test_a_name_with_a_line_break_leaves_the_message_one_line(tmp_path, capsys):
    assert main(["train", str(tmp_path / "two\nlines.yaml")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert r"two\nlines.yaml: no such file" in line


def test_a_verb_that_is_none_is_printed_as_it_can_be(capsys):
    assert main([os.fsdecode(b"caf\xe9\x1b")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(r"ser-ray caf\xe9\x1b: ")


@pytest.mark.parametrize("verb", ["train", "evaluate", "report", "rerun", "table"])
def test_an_impossible_path_is_one_line(tmp_path, verb, capsys):
    (tmp_path / "circle").symlink_to("circle")
    for path in (tmp_path / ("x" * 300), tmp_path / "circle"):
        assert main([verb, str(path)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"ser-ray {verb}: ")

"""YAML that is damaged, or made to cost: one line, before it costs anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from ser_ray import config
from ser_ray.schema import UserError

LAUGHS = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9))
MERGED = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 9))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: " + "[" * 90_000, "nested too deep"),
        ("a: " + "[" * 300 + "]" * 300, "nested too deep"),
        ("- " * 3000 + "x", "nested too deep"),
        ("".join("  " * depth + f"k{depth}:\n" for depth in range(150)), "nested too deep"),
        ("a: b\n" * 100_000, "bytes are too many"),
        (LAUGHS, "aliases"),
        (MERGED, "aliases"),
        ("&a [*a]", "aliases"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("a: !!bool x", "not what its tag says"),
        ("a: !!int x", "not what its tag says"),
        ("a: !!timestamp 2001-99-99", "not what its tag says"),
        ("a: " + "1" * 10_000, "not what its tag says"),
        ("a: \0", "unacceptable character"),
        ("'" * 50_000, ""),
        ("", ""),
    ],
    ids=range(16),
)
def test_one_line_says_what_is_wrong(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "experiment.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        config.load_experiment(path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(path))
    with pytest.raises(UserError):
        config.load(path)


def test_many_problems_are_not_all_listed(tmp_path: Path) -> None:
    path = tmp_path / "experiment.yaml"
    path.write_text("".join(f"k{n}: 1\n" for n in range(1000)))
    with pytest.raises(UserError, match=r"1001 problems(.|\n)*and 971 more$") as caught:
        config.load(path)
    assert all("\n" not in line for line in caught.value.args)  # each is one that the command line prints
    with pytest.raises(UserError, match=r"\(and 1002 more problems\)$") as caught:  # of a checkpoint
        config.load_experiment(path)
    assert "\n" not in str(caught.value)


def test_keys_may_hold_anything(tmp_path: Path) -> None:
    path = tmp_path / "experiment.yaml"
    path.write_text('"a\\nb\\e[31m": 1\n')
    with pytest.raises(UserError) as caught:
        config.load(path)
    assert "\x1b" not in str(caught.value)
    assert "a b" in str(caught.value)

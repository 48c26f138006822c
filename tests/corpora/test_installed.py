"""Corpora of other packages, by entry point: the example of the documentation, and packages that do not fit."""

from __future__ import annotations

import shutil
import sys
import tomllib
from pathlib import Path

import pytest

from ser_ray import corpora
from ser_ray.corpora import describe
from ser_ray.schema import UserError

EXAMPLE = Path(__file__).resolve().parents[2] / "docs" / "examples" / "own_corpus"


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Installs a module with its entry points, as pip would lay them out."""
    monkeypatch.syspath_prepend(str(tmp_path / "site"))

    def installed(project: dict, *modules: Path) -> None:
        name, version = project["name"].replace("-", "_"), project["version"]
        meta = tmp_path / "site" / f"{name}-{version}.dist-info"
        meta.mkdir(parents=True)
        (meta / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {version}\n")
        points = project["entry-points"]["ser_ray.corpora"]
        lines = [f"{name} = {module}" for name, module in points.items()]
        (meta / "entry_points.txt").write_text("\n".join(["[ser_ray.corpora]", *lines]))
        for module in modules:
            shutil.copy(module, tmp_path / "site")
        corpora.installed.cache_clear()

    yield installed
    corpora.installed.cache_clear()
    sys.modules.pop("call_centre", None)


@pytest.fixture
def calls(tmp_path):
    directory = tmp_path / "calls"
    directory.mkdir()
    for name in ("agent01_angry_0001", "agent02_sad_0001", "agent02_bored_0002", "jingle"):
        (directory / f"{name}.wav").touch()
    return directory


def test_the_example_is_read(install, calls):
    with pytest.raises(UserError, match="call_centre: not a known corpus; use crema_d"):
        corpora.read("call_centre", calls)
    install(tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"], EXAMPLE / "call_centre.py")
    utterances, rejected = corpora.read("call_centre", calls)
    assert [(u.utterance_id, u.speaker, u.emotion) for u in utterances] == [
        ("call_centre/agent01_angry_0001", "call_centre/agent01", "angry"),
        ("call_centre/agent02_sad_0001", "call_centre/agent02", "sad"),
    ]
    assert {one.path: one.reason for one in rejected} == {
        "agent02_bored_0002.wav": "bored is not one of angry, happy, neutral, sad",
        "jingle.wav": "the name is not speaker_emotion_number",
    }
    assert describe.speech_of("call_centre") == "spontaneous"
    assert describe.differences("call_centre", {}) == []
    with pytest.raises(UserError, match=r"use crema_d, .*, call_centre; or give a table"):
        corpora.read("other", calls)


def test_a_package_that_does_not_fit_is_one_line(install, calls, tmp_path):
    (tmp_path / "empty_corpus.py").write_text("")
    points = {"gone": "nowhere_at_all", "empty": "empty_corpus"}
    install(
        {"name": "broken", "version": "1", "entry-points": {"ser_ray.corpora": points}}, tmp_path / "empty_corpus.py"
    )
    with pytest.raises(UserError, match=r"experiment\.corpora\.gone: its module nowhere_at_all cannot be imported"):
        corpora.read("gone", calls)
    with pytest.raises(UserError, match=r"experiment\.corpora\.empty: its module empty_corpus has no function parse"):
        corpora.read("empty", calls)


def test_the_name_of_a_built_in_corpus_is_refused(install, calls):
    points = {"ravdess": "mine"}
    install({"name": "my-ravdess", "version": "1", "entry-points": {"ser_ray.corpora": points}})
    with pytest.raises(UserError, match="my-ravdess: its corpus 'ravdess' has the name of a built-in one"):
        corpora.read("calls", calls)

"""Where the paths of a space lead: absolute, as they were given, and hub ids not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from ser_ray import config
from ser_ray.config import SearchSpace
from ser_ray.runtime.paths import resolve_paths


def space(backbone: str, cache: Path | str = "cache") -> SearchSpace:
    experiment = {"name": "tiny", "corpora": {"synthetic": None}, "backbone": backbone}
    return SearchSpace.model_validate({"experiment": experiment, "storage": {"cache": str(cache)}})


def test_a_link_is_named_as_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be set to lead elsewhere when what it names moves, and a checkpoint that names it is still whole."""
    (tmp_path / "scratch" / "wavlm").mkdir(parents=True)
    (tmp_path / "scratch" / "wavlm" / "config.json").write_text("{}")
    (tmp_path / "models").symlink_to(tmp_path / "scratch")
    monkeypatch.chdir(tmp_path)
    given, direct = resolve_paths(space("models/wavlm", "models")), resolve_paths(space("scratch/wavlm", "scratch"))
    assert given.experiment.backbone == str(tmp_path / "models" / "wavlm")
    assert given.storage.cache == str(tmp_path / "models")
    assert config.differences(given, direct) == [], "the same place"
    assert resolve_paths(space("scratch/../models/wavlm")).experiment.backbone == given.experiment.backbone


def test_a_hub_id_stays_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even beside a folder of that name that holds no backbone, such as one of results."""
    (tmp_path / "openai" / "whisper-base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_paths(space("openai/whisper-base")).experiment.backbone == "openai/whisper-base"

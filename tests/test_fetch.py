"""`ser-ray fetch` from a hub on loopback, and what a trial finds of it afterwards without one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from backbone_fixtures import write_backbone
from hub_fixture import hub

NAME = "somebody/wav2vec2-tiny"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_backbone("wav2vec2-group", tmp_path_factory.mktemp("hub") / "model")


@pytest.fixture
def space(tmp_path: Path) -> Path:
    content = {
        "experiment": {"name": "x", "corpora": {"synthetic": None}, "backbone": NAME},
        "search": {"backbone": {"choice": [NAME, "embedded/tiny-whisper"]}},
        "storage": {"results": str(tmp_path / "results"), "cache": str(tmp_path / "cache")},
    }
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return tmp_path / "space.yaml"


def ser_ray(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: Hugging Face's library reads its settings once, when it is imported."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    command = [sys.executable, "-m", "ser_ray", *arguments]
    return subprocess.run(command, env={**kept, **environment}, capture_output=True, text=True)


@pytest.mark.slow
def test_what_was_fetched_is_found_offline(space, published, tmp_path):
    to = tmp_path / "models"
    with hub({NAME: published}) as (endpoint, asked):
        done = ser_ray("fetch", str(space), "--to", str(to), HF_ENDPOINT=endpoint, HF_HUB_DISABLE_TELEMETRY="1")
        assert done.returncode == 0, done.stderr
        first = len(asked)
        assert any(line.startswith("GET") and line.endswith("model.safetensors") for line in asked)
        again = ser_ray("fetch", str(space), "--to", str(to), HF_ENDPOINT=endpoint, HF_HUB_DISABLE_TELEMETRY="1")
        assert again.returncode == 0
        assert not any(line.startswith("GET") and line.endswith("model.safetensors") for line in asked[first:])
    assert f"backbone {NAME}: wav2vec2" in done.stdout
    assert "backbone embedded/tiny-whisper: whisper" in done.stdout
    assert f"export HF_HUB_CACHE={to} HF_HUB_OFFLINE=1" in done.stdout
    assert list(to.glob("models--somebody--wav2vec2-tiny/snapshots/*/model.safetensors"))
    # As on a compute node: the corpus is missing, which is said only after the backbones were found.
    missing = ["experiment.corpora={ravdess: /nowhere}"]
    found = ser_ray("cache", str(space), *missing, HF_HUB_CACHE=str(to), HF_HUB_OFFLINE="1")
    assert found.returncode == 2


@pytest.mark.parametrize("offline", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_backbone_that_is_not_there_is_named_before_any_trial(space, tmp_path, offline):
    own = {"HF_HUB_CACHE": str(tmp_path / "empty"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    if offline:
        done = ser_ray("tune", str(space), HF_HUB_OFFLINE="1", **own)
    else:
        with hub({}) as (endpoint, _):
            done = ser_ray("fetch", str(space), HF_ENDPOINT=endpoint, **own)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert f"backbone {NAME}: no such directory, and not available from the hub" in line
    assert ("HF_HUB_OFFLINE is set" in line) is offline
    assert not (tmp_path / "results").exists()


def test_fetching_offline_is_refused(space):
    done = ser_ray("fetch", str(space), HF_HUB_OFFLINE="1")
    assert done.returncode == 2
    assert "unset it here" in done.stderr

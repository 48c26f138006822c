"""Tiny backbones on disk, written once a session."""

from __future__ import annotations

from pathlib import Path

import pytest
from backbone_fixtures import VARIANTS, write_backbone


@pytest.fixture(scope="session")
def backbones_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that holds one backbone of every variant, by its name."""
    directory = tmp_path_factory.mktemp("backbones")
    for variant in VARIANTS:
        write_backbone(variant, directory / variant)
    return directory

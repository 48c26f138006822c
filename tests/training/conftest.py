"""Tiny backbones on disk, written once a session; one thread, since threads cost more than they bring at this size."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from backbone_fixtures import VARIANTS, write_backbone
from threadpoolctl import threadpool_limits


@pytest.fixture(scope="session")
def backbones_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that holds one backbone of every variant, by its name."""
    directory = tmp_path_factory.mktemp("backbones")
    for variant in VARIANTS:
        write_backbone(variant, directory / variant)
    return directory


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """For scikit-learn's probes; `backbone_fixtures` does it for torch."""
    with threadpool_limits(1):
        yield

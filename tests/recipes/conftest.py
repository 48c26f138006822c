"""A little of the training speech, for all tests of it."""

from pathlib import Path

import pytest

from recipes.embedded import speech

PER_PART = 5


@pytest.fixture(scope="session")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two parts of five utterances."""
    directory = tmp_path_factory.mktemp("spoken")
    speech.make(directory, 2 * PER_PART * speech.MEAN_SECONDS / 3600, per_part=PER_PART)
    return directory

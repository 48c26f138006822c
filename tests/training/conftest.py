"""One thread for the tests of training, since threads cost more than they bring at this size."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from threadpoolctl import threadpool_limits


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """For scikit-learn's probes; `backbone_fixtures` does it for torch."""
    with threadpool_limits(1):
        yield

"""A test that ends its process costs that test: all others run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ENDS = """
import os

import pytest

@pytest.mark.parametrize("i", range({tests}))
def test(i):
    if i == {dies}:
        os._exit(1)
"""


@pytest.mark.parametrize(("files", "dies"), [(1, 0), (4, 3), (4, 4), (4, 5)])
def test_a_process_that_dies_costs_one_test(tmp_path: Path, files: int, dies: int):
    """Also where it has done other files before, where one test is left, or none."""
    for i in range(files - 1):
        (tmp_path / f"test_{i}.py").write_text(ENDS.format(tests=3, dies=-1))
    (tmp_path / "test_last.py").write_text(ENDS.format(tests=6, dies=dies))
    (tmp_path / "conftest.py").write_text(
        f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import scheduling\n"
        "def pytest_xdist_make_scheduler(config, log):\n    return scheduling.Files(config, log)\n"
    )
    command = [sys.executable, "-m", "pytest", "-n", "2", "--dist", "loadfile", "-p", "no:cacheprovider"]
    found = subprocess.run(
        [*command, "--rootdir", tmp_path, tmp_path], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert found.returncode == 1, found.stdout + found.stderr
    assert f"1 failed, {3 * (files - 1) + 5} passed" in found.stdout
    assert f"test_last.py::test[{dies}]" in found.stdout

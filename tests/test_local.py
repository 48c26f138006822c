"""Without a cluster: one core is enough, and a debugger stops where it is told to."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ser_ray.training import step

CHECKOUT = Path(__file__).resolve().parent.parent


@pytest.fixture
def small(tmp_path: Path, tiny_corpus: Path) -> list[str]:
    """The demo over the tiny corpus."""
    places = [f"storage.results={tmp_path}/results", f"storage.cache={tmp_path}/cache"]
    return [
        *places,
        f"experiment.corpora={{ravdess: {tiny_corpus}}}",
        "experiment.backbone=embedded/tiny-whisper",
        "experiment.epochs=1",
        "tune.trials=2",
        "tune.grace=1",
    ]


@pytest.mark.slow
def test_training_under_a_debugger_stops_in_the_loop(small):
    code = step.add_gradients.__code__
    body = next(line for _, _, line in code.co_lines() if line and line > code.co_firstlineno)
    stop = [f"b {step.__file__}:{body}", "c", "p 'stopped with', sorted(locals())", "w", "q"]
    commands = [word for one in stop for word in ("-c", one)]
    arguments = ["search_spaces/demo.yaml", *small, "resources.workers=0"]
    command = [sys.executable, "-m", "pdb", *commands, "-m", "ser_ray.train", *arguments]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=600)
    assert "stopped with" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]
    assert "'batch'" in done.stdout
    assert "loop.py" in done.stdout.partition("stopped with")[2], "the stack leads into the loop"


@pytest.mark.ray
@pytest.mark.slow
def test_a_search_on_one_core_finishes(small, tmp_path):
    command = [sys.executable, "-m", "ser_ray.tune", *small]
    core = {min(os.sched_getaffinity(0))}
    kept = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    done = subprocess.run(
        command,
        cwd=CHECKOUT,
        env={**kept, "RAY_TMPDIR": f"/tmp/ser_ray_{os.getpid()}"},  # apart from a cluster that somebody has started
        capture_output=True,
        text=True,
        timeout=1200,
        preexec_fn=lambda: os.sched_setaffinity(0, core),
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "1 node, 1 core, 0 GPUs" in done.stdout, "people are told cores; Ray has one more CPU, for the data"
    with (tmp_path / "results" / "demo" / "trials.csv").open() as file:
        assert [row["status"] for row in csv.DictReader(file)] == ["finished"] * 2

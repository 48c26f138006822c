"""The embedded demo as a submitted job on a cluster that ``ray start`` made: what the README promises, with a quarter
of its trials, one of their epochs, and nothing known of speakers."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray_head import RAY, ray_head

CHECKOUT = Path(__file__).resolve().parent.parent
TRIALS = 2
"""The points that the demo's file names, one of each family."""
EPOCHS = 1
"""After the probe, with which the head starts."""


@pytest.fixture
def head(tmp_path: Path) -> Iterator[tuple[dict[str, str], str]]:
    """A head node whose jobs have a home of their own; yields environment and dashboard address."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path))
        # A job's "python" is the head's.
        patch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        with ray_head(tmp_path, jobs=True) as started:
            yield started.environment, started.dashboard


def submit(environment: dict[str, str], address: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*RAY, "job", "submit", f"--address={address}", "--working-dir=.", "--", "python", "-m", "ser_ray.tune"]
    for _ in range(30):
        done = subprocess.run(
            [*command, *arguments],
            cwd=CHECKOUT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=1500,
            check=False,
        )
        if "No available agent" not in done.stderr:  # the dashboard answers before the node's agent is there
            break
        time.sleep(2)
    return done


def wait_for(environment: dict[str, str], address: str) -> None:
    for _ in range(60):
        listed = subprocess.run(
            [*RAY, "job", "list", f"--address={address}"], env=environment, capture_output=True, check=False
        )
        if listed.returncode == 0:
            return
        time.sleep(1)
    raise AssertionError(listed.stderr.decode())


@pytest.mark.ray
@pytest.mark.slow
def test_the_demo_runs_as_a_submitted_job(head, tmp_path):
    environment, address = head
    wait_for(environment, address)
    smaller = [f"tune.trials={TRIALS}", f"experiment.epochs={EPOCHS}", "experiment.head.speaker=none"]
    done = submit(environment, address, f"storage.cache={tmp_path / 'cache'}", *smaller)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    results = tmp_path / "ser_ray" / "results" / "demo"
    assert str(results) in done.stdout, "the job says where its results go"
    rows = list(csv.DictReader((results / "trials.csv").open()))
    assert len(rows) == TRIALS
    assert {row["backbone"] for row in rows} == {"embedded/tiny-whisper", "embedded/tiny-wav2vec2"}
    assert "method: qlora" in (results / "best" / "experiment.yaml").read_text()
    test = json.loads((results / "evaluation" / "test.json").read_text())
    assert test["uar"] > 0.65
    assert (results / "report.html").is_file()
    _, said = done.stdout.split("Running entrypoint")  # what comes before is the job command's own
    for internal in ("(raylet", "(TrainController", "WARNING", "Traceback", "INFO "):
        assert internal not in said, internal

    refused = submit(environment, address, "storage.results=results")
    assert refused.returncode != 0
    assert "relative" in refused.stdout + refused.stderr

    stranger = {key: value for key, value in environment.items() if not key.startswith("RAY_AUTH")}
    assert submit(stranger, address).returncode != 0, "a job without the token is refused"

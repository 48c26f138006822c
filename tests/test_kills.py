"""A search that is killed or interrupted, as a process of its own: what continues, and what stays closed.

Beside the session's own Ray: with two clusters on a machine a stopped trial must still give back what it held.
"""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from test_verbs import results_of, write_space

from ser_ray.evaluation.folder import trial_history


@pytest.fixture(scope="module")
def space(tiny_corpus, tmp_path_factory, ray_cluster) -> Path:
    return write_space(tmp_path_factory.mktemp("kills"), tiny_corpus)


def start_tune(space: Path, name: str, *overrides: str) -> subprocess.Popen[str]:
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    command = [sys.executable, "-m", "ser_ray.tune", str(space), f"experiment.name={name}", *overrides]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_search_continues_and_loses_nothing(space):
    driver = start_tune(space, "killed")
    for line in driver.stdout:
        if "1 of 3 trials done" in line:
            break
    driver.kill()
    driver.wait(60)
    results = results_of(space, "killed")
    before = {row["trial_id"]: row for row in csv.DictReader((results / "trials.csv").open())}
    done = [trial_id for trial_id, row in before.items() if row["status"] in ("finished", "stopped")]
    histories = {trial_id: trial_history(results / "trials" / trial_id) for trial_id in done}

    again = start_tune(space, "killed")
    text, _ = again.communicate(timeout=600)
    assert again.returncode == 0, text
    assert "continuing the search" in text
    assert "1 of 3 trials done" in text
    after = {row["trial_id"]: row for row in csv.DictReader((results / "trials.csv").open())}
    assert len(after) == 3
    assert {row["status"] for row in after.values()} <= {"finished", "stopped"}
    # Losses and seconds too: an epoch may be told again, but not trained again.
    assert {trial_id: trial_history(results / "trials" / trial_id) for trial_id in done} == histories
    assert len(json.loads((results / "evaluation/test_openings.json").read_text())) == 1


@pytest.mark.ray
@pytest.mark.slow
def test_one_of_two_workers_dies_and_the_trial_goes_on(space):
    driver = start_tune(space, "two", "resources.workers=2", "tune.trials=1", "tune.finalists=1", "experiment.epochs=6")
    text = ""
    for line in driver.stdout:
        text += line
        if "epoch  1" in line:
            break
    workers = [
        process
        for process in psutil.Process(driver.pid).children(recursive=True)
        if "RayTrainWorker" in " ".join(process.cmdline())
    ]
    assert len(workers) == 2, text
    workers[0].kill()
    rest, _ = driver.communicate(timeout=600)
    assert driver.returncode == 0, text + rest
    assert "goes on from its last epoch" in rest
    assert "goes on after epoch" in rest
    (row,) = csv.DictReader((results_of(space, "two") / "trials.csv").open())
    assert row["status"] == "finished"
    lines = (results_of(space, "two") / "trials" / "001" / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == list(range(1, len(lines) + 1)), "none trained twice"


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_an_interrupted_search_says_so_and_keeps_the_test_set_closed(space, number):
    name = f"interrupted-{number.name}"
    driver = start_tune(space, name)
    for line in driver.stdout:
        if "epoch  1" in line:
            break
    driver.send_signal(number)
    text, _ = driver.communicate(timeout=120)
    assert driver.returncode == 130, text
    assert not (results_of(space, name) / "evaluation").exists()

"""A search that is killed or interrupted, as a process of its own: what continues, and what stays closed.

Beside the session's own Ray: with two clusters on a machine a stopped trial must still give back what it held. Where a
worker is killed models are trained; the others train nothing, as what they show lies around it.
"""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import deaf
import psutil
import pytest
import stub_trainable
from ray_head import ray_head
from test_verbs import results_of, train, write_space

from ser_ray.evaluation.folder import read_trials, trial_history


@pytest.fixture(scope="module")
def space(tiny_corpus, tiny_cache, tmp_path_factory, ray_cluster) -> Path:
    return write_space(tmp_path_factory.mktemp("kills"), tiny_corpus, tiny_cache)


@pytest.fixture
def stub(untrained) -> dict[str, str]:
    """Variables with which nothing is trained, and an epoch takes a while."""
    return stub_trainable.environment(untrained, epoch_s=0.5)


def start(verb: str, space: Path, name: str, *overrides: str, **environment: str) -> subprocess.Popen[str]:
    own = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | environment
    settings = [f"experiment.name={name}", "storage.prefix_gb=0", *overrides]
    command = [sys.executable, "-m", f"ser_ray.{verb}", str(space), *settings]
    return subprocess.Popen(command, env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def start_tune(space: Path, name: str, *overrides: str, **environment: str) -> subprocess.Popen[str]:
    return start("tune", space, name, *overrides, **environment)


def wait_for_line(driver: subprocess.Popen[str], text: str, at_most_s: float = 900.0) -> str:
    """All that it has said until then. Fails, showing that, if it ends without the line; it is ended after a while."""
    said = ""
    ends = threading.Timer(at_most_s, driver.kill)
    ends.start()
    try:
        for line in driver.stdout:
            said += line
            if text in line:
                return said
    finally:
        ends.cancel()
    pytest.fail(f"it ended without a line that has {text!r}, or was ended after {at_most_s:g} s; it said:\n{said}")


def processes(driver: subprocess.Popen[str], word: str) -> list[psutil.Process]:
    """Those of its Ray with that on their command lines."""
    started = psutil.Process(driver.pid).children(recursive=True)
    return [process for process in started if word in " ".join(process.cmdline())]


@pytest.mark.parametrize("goes_on", ["", "; import time; time.sleep(600)"])
def test_a_wait_for_a_line_that_does_not_come_ends_and_shows_the_others(goes_on):
    command = [sys.executable, "-c", f"print('first', flush=True){goes_on}"]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as driver,
        pytest.raises(pytest.fail.Exception, match=r"without a line that has 'second'.*\nfirst\n"),
    ):
        wait_for_line(driver, "second", at_most_s=5.0)


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_search_continues_and_loses_nothing(space, stub):
    driver = start_tune(space, "killed", **stub)
    wait_for_line(driver, "1 of 3 trials done")
    driver.kill()
    driver.wait(60)
    results = results_of(space, "killed")
    before = {row["trial_id"]: row for row in csv.DictReader((results / "trials.csv").open())}
    done = [trial_id for trial_id, row in before.items() if row["status"] in ("finished", "stopped")]
    histories = {trial_id: trial_history(results / "trials" / trial_id) for trial_id in done}

    again = start_tune(space, "killed", **stub)
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
def test_a_search_to_which_ray_tells_nothing_joins_it_anew(space, stub):
    """One trial's process has started, and the search does not hear of it."""
    settings = ["experiment.name=deaf", "storage.prefix_gb=0"]
    own = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | stub
    command = [sys.executable, deaf.__file__, "tune", str(space), *settings]
    done = subprocess.run(command, env=own, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("joining Ray anew, trials go on from their last epochs") == 1
    assert "continuing the search" in done.stdout
    rows = list(csv.DictReader((results_of(space, "deaf") / "trials.csv").open()))
    assert [row["status"] in ("finished", "stopped") for row in rows] == [True] * 3
    trials = read_trials(results_of(space, "deaf") / "trials")
    assert {trial.attempts for trial in trials} == {1}, "what Ray lost is not counted against a trial"


@pytest.mark.ray
@pytest.mark.slow
def test_one_of_two_workers_dies_and_the_trial_goes_on(space):
    driver = start_tune(space, "two", "resources.workers=2", "tune.trials=1", "tune.finalists=1", "experiment.epochs=4")
    text = wait_for_line(driver, "epoch  1")
    workers = processes(driver, "RayTrainWorker")
    assert len(workers) == 2, text
    workers[0].kill()
    rest, _ = driver.communicate(timeout=600)
    assert driver.returncode == 0, text + rest
    assert "continues from its last epoch" in rest
    assert "continues after epoch" in rest
    (row,) = csv.DictReader((results_of(space, "two") / "trials.csv").open())
    assert row["status"] == "finished"
    lines = (results_of(space, "two") / "trials" / "001" / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == list(range(1, len(lines) + 1)), "none trained twice"


@pytest.mark.ray
@pytest.mark.slow
def test_a_trial_whose_worker_was_killed_comes_to_the_same_numbers(space):
    """As one that is trained here, from the same point, and that nobody disturbs.

    Of its epochs there are so many that it is still training when its first line was read, on a busy machine too.
    """
    own = ["experiment.epochs=12", "experiment.patience=12"]
    point = ["tune.trials=1", "tune.finalists=1", "tune.first=[{adapter.method: full, optimizer.lr: 1.0e-3}]"]
    driver = start_tune(space, "worker", *own, *point)
    text = wait_for_line(driver, "epoch  1")
    (worker,) = processes(driver, "ray::ImplicitFunc")  # with .train while an epoch is trained
    worker.kill()
    unbroken = train(space, "undisturbed", "resources.workers=0", *own)
    rest, _ = driver.communicate(timeout=600)
    assert driver.returncode == 0, text + rest
    assert "continues after epoch" in rest
    lines = (results_of(space, "worker") / "trials" / "001" / "history.jsonl").read_text().splitlines()
    for ours, theirs in zip(map(json.loads, lines), unbroken, strict=True):
        assert ours["epoch"] == theirs["epoch"]
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-3)
        assert ours["dev_loss"] == pytest.approx(theirs["dev_loss"], rel=1e-3)
        assert ours["lr"] == pytest.approx(theirs["lr"])


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_an_interrupted_search_says_so_and_keeps_the_test_set_closed(space, stub, number):
    name = f"interrupted-{number.name}"
    driver = start_tune(space, name, **stub)
    wait_for_line(driver, "epoch  1")
    driver.send_signal(number)
    text, _ = driver.communicate(timeout=120)
    assert driver.returncode == 130, text
    assert not (results_of(space, name) / "evaluation").exists()


HOLD = """
import ray, time
ray.init(log_to_driver=False)
class Holder: pass
holder = ray.remote(Holder).options(num_cpus=ray.cluster_resources()["CPU"]).remote()
ray.get(holder.__ray_ready__.remote())
print("held", flush=True)
time.sleep(3600)
"""
"""Other work, which holds all CPUs of a cluster."""


@pytest.mark.ray
@pytest.mark.slow
def test_a_command_that_waits_for_a_full_cluster_ends_with_ctrl_c(tiny_corpus, tiny_cache, tmp_path):
    space = write_space(tmp_path, tiny_corpus, tiny_cache)
    with ray_head(tmp_path) as head:
        there = head.environment | {"RAY_ADDRESS": head.address}
        command = [sys.executable, "-c", HOLD]
        with subprocess.Popen(command, env=there, stdout=subprocess.PIPE, text=True) as other:
            wait_for_line(other, "held", at_most_s=300.0)
            driver = start("train", space, "waiting", "search={}", "tune.first=[]", **there)
            said = wait_for_line(driver, "waiting for 1 x (1 CPUs, 0 GPUs), each on one node; 0 of 3 CPUs", 300.0)
            driver.send_signal(signal.SIGINT)
            rest, _ = driver.communicate(timeout=120)
            other.kill()
    assert driver.returncode == 130, said + rest
    assert rest.splitlines()[-1] == "ser-ray train: interrupted; the same command continues"

"""One trial: memory that does not suffice, two commands at once, epochs that are added, a cluster that is full."""

from __future__ import annotations

import csv
import errno
import fcntl
import io
import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import ray
import torch
from rich.console import Console
from test_verbs import results_of, write_space

import ser_ray.train
from ser_ray import config, disk
from ser_ray.__main__ import main
from ser_ray.evaluation.folder import trial_history
from ser_ray.models.classifier import EmotionClassifier
from ser_ray.runtime import cluster

LOCAL = ("resources.workers=0", "storage.prefix_gb=0")
SHORT = {
    "CUDA": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "bitsandbytes": RuntimeError("Error out of memory at line 380 in file /src/csrc/ops.cu"),
}


@pytest.fixture(scope="module")
def space(tiny_corpus, tmp_path_factory) -> Path:
    return write_space(tmp_path_factory.mktemp("train"), tiny_corpus)


def train(space: Path, name: str, *overrides: str) -> int:
    return main(["train", str(space), f"experiment.name={name}", *LOCAL, *overrides])


def trial(space: Path, name: str) -> Path:
    return results_of(space, name) / "trials" / "single"


def history(space: Path, name: str) -> list[dict]:
    return trial_history(trial(space, name))


def row(space: Path, name: str) -> dict[str, str]:
    with (results_of(space, name) / "trials.csv").open() as file:
        (found,) = csv.DictReader(file)
    return found


def fail_in_epoch(
    monkeypatch: pytest.MonkeyPatch, trial: Path, error: Exception, epoch: int, times: int
) -> list[float]:
    """The first step of that epoch fails, so often; returns the place for the batch_seconds of every time."""
    real, seconds = EmotionClassifier.forward, list[float]()

    def failing(model: EmotionClassifier, *inputs: torch.Tensor) -> torch.Tensor:
        if model.training and len(trial_history(trial)) == epoch - 1 and len(seconds) < times:
            seconds.append(model.experiment.batch_seconds)
            raise error
        return real(model, *inputs)

    monkeypatch.setattr(EmotionClassifier, "forward", failing)
    return seconds


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line]
    return line


@pytest.mark.parametrize("kind", SHORT)
def test_a_trial_that_is_short_of_memory_goes_on_with_half_of_the_batch(space, monkeypatch, capsys, kind):
    name = f"short-{kind}"
    tried_with = fail_in_epoch(monkeypatch, trial(space, name), SHORT[kind], epoch=2, times=1)
    assert train(space, name) == 0
    said = capsys.readouterr().out
    assert "out of memory: lower experiment.batch_seconds (8)" in said
    assert "retrying with half of batch_seconds" in said
    assert [record["epoch"] for record in history(space, name)] == [1, 2]
    assert tried_with == [8]
    folders = trial(space, name)
    lines = (folders / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2], "what was trained is not trained again"
    half = config.load_experiment(folders / "epoch_002" / "experiment.yaml")
    assert (half.batch_seconds, half.optimizer.accumulate) == (4, 2)
    assert (row(space, name)["halved"], row(space, name)["status"]) == ("batch_seconds", "finished")
    assert json.loads((folders / "trial.json").read_text())["halved"] is True


def test_memory_that_is_short_again_is_one_line(space, monkeypatch, capsys):
    tried_with = fail_in_epoch(monkeypatch, trial(space, "never"), SHORT["CUDA"], epoch=1, times=9)
    assert train(space, "never") == 2
    assert "out of memory: lower experiment.batch_seconds (4), or set experiment.recompute" in one_line(capsys)
    assert tried_with == [8, 4]
    found = row(space, "never")
    assert (found["status"], found["halved"]) == ("failed", "batch_seconds")
    assert "half of batch_seconds was tried" in found["error"]


def test_another_error_is_not_tried_again(space, monkeypatch):
    tried_with = fail_in_epoch(monkeypatch, trial(space, "boom"), RuntimeError("boom"), epoch=1, times=9)
    with pytest.raises(RuntimeError, match="boom"):
        train(space, "boom")
    assert tried_with == [8]


@pytest.mark.parametrize("verb", ["train", "evaluate"])
def test_two_commands_do_not_work_on_one_folder(space, capsys, verb):
    results = results_of(space, f"busy-{verb}")
    assert train(space, f"busy-{verb}", "experiment.epochs=1") == 0
    before = {path: path.read_bytes() for path in results.rglob("*.*") if path.is_file()}
    capsys.readouterr()
    with disk.locked(results / ".lock"):
        code = main(["evaluate", str(results)]) if verb == "evaluate" else train(space, f"busy-{verb}")
    assert code == 2
    assert f"{results}: another process works on this; wait for it, or set experiment.name" in one_line(capsys)
    assert {path: path.read_bytes() for path in results.rglob("*.*") if path.is_file()} == before


def test_a_file_system_without_locks_keeps_nobody_from_training(space, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert train(space, "no-locks", "experiment.epochs=1") == 0


def test_a_finished_run_takes_more_epochs(space, capsys):
    assert train(space, "more", "experiment.epochs=1") == 0
    first = history(space, "more")
    assert first[-1]["last"], "it was over"
    assert train(space, "more", "experiment.epochs=3") == 0
    longer = history(space, "more")
    assert [record["epoch"] for record in longer] == [1, 2, 3]
    assert longer[0] == first[0], "nothing is trained again"
    assert [record["last"] for record in longer[1:]] == [False, True]
    # The rates of the longer schedule, linear to zero at its own end.
    assert longer[0]["lr"] == 0 < longer[2]["lr"] + 1e-12 <= longer[1]["lr"]
    assert row(space, "more")["epochs"] == "3"
    assert config.load(results_of(space, "more") / "search.yaml").experiment.epochs == 3
    assert train(space, "more", "experiment.epochs=2") == 2
    assert "experiment.epochs: 3 -> 2, which may only grow" in one_line(capsys)


def test_patience_that_ended_a_run_ends_it_with_more_epochs_too(space):
    still = ["experiment.optimizer.lr=1e-12", "experiment.optimizer.head_lr=1e-12", "experiment.patience=1"]
    assert train(space, "patient", "experiment.epochs=2", *still) == 0
    before = history(space, "patient")
    assert before[-1]["best_epoch"] == 1
    assert train(space, "patient", "experiment.epochs=4", *still) == 0
    assert history(space, "patient") == before


def test_data_that_changed_since_a_run_began_are_refused(tiny_corpus, tmp_path, capsys):
    """Its trials would have trained on one corpus, and be evaluated on another."""
    corpus = tmp_path / "ravdess"
    shutil.copytree(tiny_corpus, corpus)
    space = write_space(tmp_path, corpus)
    assert train(space, "changed", "experiment.epochs=1") == 0
    before = {path: path.read_bytes() for path in results_of(space, "changed").rglob("*") if path.is_file()}
    max(corpus.rglob("*.wav")).unlink()
    capsys.readouterr()
    assert train(space, "changed", "experiment.epochs=2") == 2
    said = capsys.readouterr().err
    assert "the data of ravdess have changed since this search began; set experiment.name" in said
    assert before == {path: path.read_bytes() for path in results_of(space, "changed").rglob("*") if path.is_file()}
    assert train(space, "another", "experiment.epochs=1") == 0


@pytest.mark.ray
@pytest.mark.slow
def test_a_cluster_that_is_full_is_waited_for_and_said(tiny_corpus, tiny_cache, tmp_path, monkeypatch, full_cluster):
    monkeypatch.setattr(cluster, "LOOK_S", 1.0)
    path = write_space(tmp_path, tiny_corpus, tiny_cache)
    space = config.load(path, ["search={}", "tune.first=[]", "experiment.epochs=1", "resources.gpus_per_worker=0"])
    said = io.StringIO()
    with ThreadPoolExecutor() as executor:
        training = executor.submit(ser_ray.train.train, space, Console(file=said, width=400), ["train"])
        while "waiting for" not in said.getvalue() and not training.done():
            time.sleep(0.1)
        full_cluster()
        assert training.result() == results_of(path, "tiny")
    free = f"0 of {ray.cluster_resources()['CPU']:g} CPUs and 0 of 0 GPUs are free, other work holds the rest"
    assert said.getvalue().count(f"waiting for 1 x (1 CPUs, 0 GPUs), each on one node; {free}") == 1
    assert said.getvalue().count("waiting for") == 1
    assert [record["epoch"] for record in history(path, "tiny")] == [1]

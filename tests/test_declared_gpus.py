"""GPUs without a GPU: Ray is told of some where no CUDA device is, and everything ends, trained on the CPU.

What waits for a GPU that its own trial holds hangs here as it does on a card. The spaces are those that are shipped,
over the tiny corpus; searches run as commands, as users start them.
"""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from ray_head import ray_head

CHECKOUT = Path(__file__).resolve().parent.parent
ENDS_WITHIN_S = 900
"""What is still there then hangs: alone on two cores a search of these takes less than one."""

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU: what is declared is there"),
]


@dataclass(frozen=True)
class Cluster:
    """A Ray of its own on loopback."""

    environment: dict[str, str]
    home: Path
    corpus: Path

    def start(self, *arguments: str, verb: str = "tune") -> subprocess.Popen[str]:
        """A command of ser-ray, whose output goes to a file that `ended` reads."""
        name = next(a for a in arguments if a.startswith("experiment.name=")).partition("=")[2]
        shared = [f"storage.results={self.home / 'results'}", f"storage.cache={self.home / 'cache'}"]
        command = [sys.executable, "-m", f"ser_ray.{verb}", *arguments, *shared]
        with (self.home / f"{name}.txt").open("w") as said:
            return subprocess.Popen(command, cwd=CHECKOUT, env=self.environment, stdout=said, stderr=said, text=True)

    def search(self, space: str, name: str, *overrides: str) -> subprocess.Popen[str]:
        """A shipped space over the tiny corpus."""
        data = [f"experiment.name={name}", f"experiment.corpora={{ravdess: {self.corpus}}}"]
        small = ["experiment.epochs=1", "tune.finalists=1", "experiment.batch_seconds=20"]
        return self.start(f"search_spaces/{space}", *data, *small, *overrides)

    def ended(self, name: str, process: subprocess.Popen[str]) -> str:
        """What a search said, which is over and has its winner."""
        try:
            process.wait(ENDS_WITHIN_S)
        finally:
            process.kill()
        said = (self.home / f"{name}.txt").read_text()
        assert process.returncode == 0, said[-3000:]
        results = self.home / "results" / name
        assert {row["status"] for row in rows(results)} <= {"finished", "stopped"}, said
        assert (results / "evaluation" / "test.json").is_file()
        assert "Traceback" not in said
        return said


def rows(results: Path) -> list[dict[str, str]]:
    with (results / "trials.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@contextmanager
def cluster_of(gpus: int, home: Path, corpus: Path) -> Iterator[Cluster]:
    """Two cores for trials, one for the data, and GPUs that are not there."""
    with ray_head(home, gpus=gpus) as head:
        environment = head.environment | {"PYTHONPATH": str(CHECKOUT), "RAY_ADDRESS": head.address}
        yield Cluster(environment, home, corpus)


@pytest.fixture(scope="module")
def no_gpu(tmp_path_factory, tiny_corpus) -> Iterator[Cluster]:
    with cluster_of(0, tmp_path_factory.mktemp("none"), tiny_corpus) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def one_gpu(tmp_path_factory, tiny_corpus) -> Iterator[Cluster]:
    with cluster_of(1, tmp_path_factory.mktemp("one"), tiny_corpus) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def two_gpus(tmp_path_factory, tiny_corpus) -> Iterator[Cluster]:
    with cluster_of(2, tmp_path_factory.mktemp("two"), tiny_corpus) as cluster:
        yield cluster


FROZEN = ["experiment.adapter={method: frozen}", "search={optimizer.lr: {loguniform: [1e-4, 1e-2]}}", "tune.first=[]"]
"""A head of statistics on what is frozen throughout: what is cached are moments."""
WHISPER = ["experiment.backbone=embedded/tiny-whisper"]
SPACES = {
    "demo": ["demo.yaml"],
    "ravdess-whisper": ["ravdess_whisper.yaml", *WHISPER, "experiment.protocol={folds: 3}"],
    "frozen": ["demo.yaml", *WHISPER, *FROZEN],
}
"""What is shipped, and what departs from it over the tiny corpus."""


def check_plan(cluster: Cluster, name: str, **expected: object) -> None:
    found = json.loads((cluster.home / "results" / name / "plan.json").read_text())["allocation"]
    assert {key: found[key] for key in expected} == expected


def test_two_searches_at_once_share_one_gpu_and_both_end(one_gpu):
    """The demo and a frozen search: each needs for its caches, trials and scores the GPU that the other holds."""
    demo = one_gpu.search("demo.yaml", "demo", "tune.trials=2")
    frozen = one_gpu.search("demo.yaml", "frozen", "tune.trials=2", *FROZEN)
    said = one_gpu.ended("demo", demo)
    one_gpu.ended("frozen", frozen)
    assert re.search(r"Ray: 1 node, 3 cores, 1 GPU; 1 trial at once", said)
    check_plan(one_gpu, "demo", cuda=False, precision="fp32", trials_at_once=1, worker={"cpus": 2.0, "gpus": 1.0})


def test_four_trials_on_one_gpu_with_finals_over_folds(one_gpu):
    """ravdess_whisper.yaml as it was seen to hang: a quarter of the card each."""
    quarter = ["resources.gpus_per_worker=0.25", "resources.cpus_per_worker=0.5", "tune.trials=4"]
    folds = ["experiment.protocol={scheme: speaker_kfold, folds: 3}", "tune.final_folds=[0, 1]"]
    process = one_gpu.search("ravdess_whisper.yaml", "quarters", *WHISPER, *quarter, *folds)
    one_gpu.ended("quarters", process)
    check_plan(one_gpu, "quarters", trials_at_once=4)
    assert list((one_gpu.home / "results" / "quarters" / "finals").glob("*-fold1-seed0/epoch_*"))


def test_a_trial_of_two_workers_on_two_gpus(two_gpus):
    """Gradients go over gloo where no CUDA device is; the cache is made before, by a pool."""
    workers = ["resources.workers=2", "resources.cpus_per_worker=1", "tune.trials=1"]
    said = two_gpus.ended("workers", two_gpus.search("demo.yaml", "workers", *workers))
    assert "made in" in said
    check_plan(two_gpus, "workers", workers=2, trials_at_once=1, worker={"cpus": 1.0, "gpus": 1.0})


@pytest.mark.parametrize("name", SPACES)
def test_searches_end_on_two_gpus(two_gpus, name):
    space, *own = SPACES[name]
    two_gpus.ended(name, two_gpus.search(space, name, "tune.trials=2", *own))
    check_plan(two_gpus, name, trials_at_once=2, worker={"cpus": 1.0, "gpus": 1.0})


@pytest.mark.parametrize("name", SPACES)
def test_trials_that_take_every_cpu_end(no_gpu, name):
    """Two cores and no GPU: a trial of two CPUs holds all that there is for trials."""
    space, *own = SPACES[name]
    no_gpu.ended(name, no_gpu.search(space, name, "resources.cpus_per_worker=2", "tune.trials=2", *own))
    check_plan(no_gpu, name, trials_at_once=1, worker={"cpus": 2.0, "gpus": 0.0})


def cached_by(cluster: Cluster, arguments: Sequence[str]) -> str:
    """The output of ``ser-ray cache``."""
    process = cluster.start(*arguments, verb="cache")
    process.wait(ENDS_WITHIN_S)
    assert process.returncode == 0
    return next(cluster.home.glob("cached.txt")).read_text()


def test_a_cache_is_made_and_found_where_a_gpu_is_declared(one_gpu):
    data = ["search_spaces/demo.yaml", "experiment.name=cached", f"experiment.corpora={{ravdess: {one_gpu.corpus}}}"]
    assert re.search(r"made in|found", cached_by(one_gpu, data))
    assert "made in" not in cached_by(one_gpu, data)

"""The real sbatch script on a real Slurm of two nodes, each with an address of its own.

One search trains models. The others train nothing (`stub_trainable`), and their epochs take as long as is needed for
something to happen meanwhile.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import network_fixture as network
import pytest
import stub_trainable
from demo_fixture import small_demo
from slurm_fixture import Slurm, slurm, unavailable_reason

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "cluster" / "slurm.sbatch"
ENDED = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL")

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.slow,
    pytest.mark.skipif(bool(unavailable_reason()), reason=f"no Slurm here: {unavailable_reason()}"),
]


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with slurm(tmp_path_factory.mktemp("slurm"), nodes=2, cpus=2) as running:
        yield running


class Job:
    """A submitted script, its directory, and what it printed."""

    def __init__(self, running: Slurm, directory: Path, options: str, *arguments: str, **environment: str) -> None:
        self.slurm, self.directory = running, directory
        directory.mkdir(exist_ok=True)
        env = {
            "SER_RAY_PYTHON": sys.executable,
            "RAY_AUTH_TOKEN_PATH": str(directory / "token"),
            "PYTHONPATH": str(REPOSITORY),
            "OMP_NUM_THREADS": "1",
        }
        self.submitted = time.time()
        command = ["sbatch", "--parsable", "--nodes=2", "--cpus-per-task=1", "--time=20", *options.split()]
        self.id = running(*command, str(SCRIPT), *arguments, env=env | environment, cwd=directory)

    def wait(self, state: str | None = None, seconds: float = 600) -> Job:
        """Until it has ended, or is in that state."""
        wanted = (state,) if state else ENDED
        self.slurm.wait(lambda: self.slurm.state(self.id) in wanted, f"job {self.id} in {wanted}", seconds)
        return self

    def seconds(self) -> float:
        """Since it was submitted."""
        return time.time() - self.submitted

    def printed(self) -> str:
        path = self.directory / f"slurm-{self.id}.out"
        return path.read_text() if path.is_file() else ""

    def until(self, done: Callable[[], bool], what: str) -> None:
        """As `Slurm.wait`, for as long as a full machine may take; fails with what the job has printed."""
        try:
            self.slurm.wait(done, what, 600)
        except TimeoutError as error:
            raise AssertionError(f"{error}; it printed:\n{self.printed()}") from error

    def wait_for(self, text: str) -> None:
        """Until it has printed that."""
        self.until(lambda: text in self.printed(), f"{text!r} from job {self.id}")

    def ended(self) -> tuple[str, int]:
        """Its state and exit code, when it and all that it started are gone."""
        self.wait().leaves_nothing()
        return self.slurm.state(self.id), self.slurm.exit_code(self.id)

    def leaves_nothing(self) -> None:
        """Until all that it started is gone; on a full machine the end of a killed process takes a while too."""
        try:
            self.slurm.wait(lambda: left_behind(self.id) == [], "end of the job's processes", 180)
        except TimeoutError as error:
            raise AssertionError(f"{error}: {left_behind(self.id)}") from error


def left_behind(job: str) -> list[str]:
    """Processes that the job started (they inherit its number), and directories that its Ray made."""
    found = [str(path) for path in Path("/tmp").glob(f"ray-{job}.*")]
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"\0SLURM_JOB_ID={job}\0".encode() in b"\0" + (process / "environ").read_bytes():
                found.append((process / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue  # it ended meanwhile
    return found


def broken_on(node: str, what: str, directory: Path) -> str:
    """A Python that does something else on one node."""
    directory.mkdir(exist_ok=True)
    path = directory / "python"
    path.write_text(f'#!/bin/bash\n[ "$SLURMD_NODENAME" != {node} ] || {what}\nexec {sys.executable} "$@"\n')
    path.chmod(0o755)
    return str(path)


def epochs(results: Path) -> dict[str, list[int]]:
    """Trial -> the epochs in its history."""
    return {
        path.parent.name: [json.loads(line)["epoch"] for line in path.read_text().splitlines()]
        for path in sorted(results.glob("trials/*/history.jsonl"))
    }


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What all nodes see: one cache for all tests."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def demo(shared: Path, tiny_corpus: Path) -> Callable[..., list[str]]:
    """The demo, small, found from any directory: its name and what is other -> arguments."""
    return partial(_demo, tiny_corpus, shared)


def _demo(corpus: Path, storage: Path, name: str, *more: str) -> list[str]:
    return small_demo(REPOSITORY / "search_spaces" / "demo.yaml", name, corpus, storage, *more)


@pytest.fixture(scope="module")
def stub(untrained: Path) -> Callable[[float], dict[str, str]]:
    """Seconds an epoch -> the variables of a job that trains nothing."""
    return partial(stub_trainable.environment, untrained)


def test_the_demo_runs_over_both_nodes(nodes, shared, demo, tmp_path):
    """Though Ray starts on one of them at the second try only."""
    python = broken_on("n2", f"! mkdir {tmp_path}/tried 2> /dev/null || exit 3", tmp_path)
    job = Job(nodes, tmp_path, "", *demo("both"), SER_RAY_PYTHON=python)
    assert job.ended() == ("COMPLETED", 0), job.printed()
    assert "Ray: 2 nodes, 4 cores" in job.printed()
    with (shared / "results" / "both" / "trials.csv").open() as file:
        assert [row["status"] for row in csv.DictReader(file)].count("finished") >= 1
    ran_on = {
        line for note in (shared / "results/both/trials").glob("*/notes.txt") for line in note.read_text().split()
    }
    assert {f"({network.address(1)})", f"({network.address(2)})"} <= ran_on
    assert (shared / "results" / "both" / "report.html").is_file()
    token = tmp_path / "token"
    assert oct(token.stat().st_mode & 0o777) == "0o600"
    assert re.search(r"ssh -L 8265:127.0.0.1:\d+ ", job.printed())


def test_two_jobs_at_once_do_not_meet(nodes, demo, stub, tmp_path):
    jobs = [
        Job(nodes, tmp_path / str(n), "", *demo(f"beside-{n}", "tune.trials=2"), SER_RAY_INTERFACE=interface, **stub(5))
        for n, interface in enumerate(("", network.INSIDE))
    ]
    for job in jobs:
        job.wait_for("searching")
    for job in jobs:
        assert job.ended() == ("COMPLETED", 0), job.printed()
        assert "Ray: 2 nodes" in job.printed()
    addresses = [re.search(r"at (\S+), its log", job.printed())[1] for job in jobs]
    assert addresses[0] != addresses[1]
    assert all(address.startswith(f"{network.NET}.") for address in addresses)
    assert (tmp_path / "0/token").read_text() != (tmp_path / "1/token").read_text()


@pytest.mark.parametrize("task", ["1", "2"])
def test_bad_yaml_is_exit_code_2_in_every_task_of_an_array(nodes, tmp_path, task):
    (tmp_path / "bad-1.yaml").write_text("experiment: [\n")
    job = Job(nodes, tmp_path, f"--array={task} --nodes=1", str(tmp_path / "bad-%a.yaml"))
    assert job.ended() == ("FAILED", 2)
    printed = (tmp_path / f"slurm-{job.id}_{task}.out").read_text()
    assert f"bad-{task}.yaml" in printed
    assert ("not readable as YAML" if task == "1" else "no such file") in printed


def test_a_node_that_never_comes_up_is_named_and_ends_the_job(nodes, demo, tmp_path):
    python = broken_on("n2", "exec sleep 1000", tmp_path)
    job = Job(nodes, tmp_path, "", *demo("absent"), SER_RAY_PYTHON=python, SER_RAY_WAIT="15")
    assert job.ended() == ("FAILED", 2)
    assert "1 of 2 nodes came up within 15 s" in job.printed()


def test_a_node_where_ray_does_not_start_ends_the_job(nodes, demo, tmp_path):
    job = Job(nodes, tmp_path, "", *demo("failed"), SER_RAY_PYTHON=broken_on("n2", "exit 3", tmp_path))
    state, code = job.ended()
    assert (state, code != 0) == ("FAILED", True)
    assert "Ray has ended on a node" in job.printed()


@pytest.mark.parametrize("comes_back", [True, False])
def test_a_node_where_ray_is_lost_costs_at_most_an_epoch(nodes, shared, demo, stub, tmp_path, comes_back):
    name = f"lost-{comes_back}"
    arguments = demo(name, "experiment.epochs=6", "experiment.patience=6", "tune.scheduler=none")
    once = broken_on("n2", f"mkdir {tmp_path}/started 2> /dev/null || exit 3", tmp_path)
    job = Job(nodes, tmp_path, "", *arguments, SER_RAY_PYTHON=sys.executable if comes_back else once, **stub(6))
    job.until(lambda: len(epochs(shared / "results" / name)) >= 2, "histories of two trials")
    time.sleep(max(0.0, 70 - job.seconds()))  # Ray that ends earlier has failed to start
    temp = f"/tmp/ray-{job.id}.".encode()
    of_ray = [pid for pid in network.pids(2) if temp in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert of_ray
    for pid in of_ray:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    log = tmp_path / f"ray-{job.id}.0.log"
    what, times = ("Ray runtime started", 3) if comes_back else ("Ray is lost on n2", 1)
    job.until(lambda: log.read_text().count(what) == times, f"{what!r} in {log}")
    assert job.ended() == ("COMPLETED", 0), job.printed()
    found = epochs(shared / "results" / name)
    assert list(found.values()) == [list(range(1, 7))] * 4, "none lost, none twice"


def test_a_requeued_job_goes_on(nodes, shared, demo, stub, tmp_path):
    """On a head whose Ray does not start at first, as on a busy node."""
    arguments = demo("again", "experiment.epochs=6", "experiment.patience=6", "tune.trials=2")
    fails_once = f'[[ "$*" != *"scripts start"* ]] || ! mkdir {tmp_path}/failed 2> /dev/null || exit 3'
    job = Job(nodes, tmp_path, "", *arguments, SER_RAY_PYTHON=broken_on("n1", fails_once, tmp_path), **stub(1))
    job.wait_for("epoch  1")
    assert "Ray has ended on n1, start 1 of 3" in (tmp_path / f"ray-{job.id}.0.log").read_text()
    nodes("scontrol", "requeue", job.id)
    job.wait("PENDING")
    before = epochs(shared / "results" / "again")
    job.leaves_nothing()
    nodes("scontrol", "update", f"JobId={job.id}", "StartTime=now")
    assert job.ended() == ("COMPLETED", 0), job.printed()
    assert "continuing the search" in job.printed()
    after = epochs(shared / "results" / "again")
    assert all(after[trial][: len(known)] == known for trial, known in before.items())
    assert all(own == list(range(1, len(own) + 1)) for own in after.values()), after


def test_the_time_limit_saves_and_queues_again(nodes, shared, demo, stub, tmp_path):
    job = Job(nodes, tmp_path, "--time=2 --signal=B:USR1@60", *demo("limit", "tune.trials=8"), **stub(8))
    job.wait_for("queued again")
    job.wait("PENDING")
    assert "interrupted; the same command continues" in job.printed()
    nodes("scontrol", "update", f"JobId={job.id}", "StartTime=now", "TimeLimit=20")
    assert job.ended() == ("COMPLETED", 0), job.printed()
    found = epochs(shared / "results" / "limit")
    assert len(found) == 8
    assert all(own == list(range(1, len(own) + 1)) for own in found.values()), found


def test_a_cancelled_job_leaves_nothing_and_can_go_on(nodes, demo, stub, tmp_path):
    job = Job(nodes, tmp_path, "", *demo("cancelled"), **stub(5))
    job.wait_for("starts:")
    nodes("scancel", job.id)
    assert job.ended()[0] == "CANCELLED"

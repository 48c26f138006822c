"""up.sh and down.sh over two hosts that are network namespaces, jobs submitted to them, and a host that is lost.

Searches train nothing (`stub_trainable`); what trains models is the trial that two hosts share.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import network_fixture as network
import pytest
import stub_trainable
from demo_fixture import small_demo

from ser_ray.__main__ import main

CHECKOUT = Path(__file__).resolve().parents[2]
TEMP = f"/tmp/ray-up-{os.getuid()}-6379"

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.slow,
    pytest.mark.skipif(bool(network.unavailable_reason()), reason=f"no hosts here: {network.unavailable_reason()}"),
]


@dataclass(frozen=True)
class Standing:
    """A cluster that up.sh started, from a login node's point of view."""

    home: Path
    env: dict[str, str]
    corpus: Path

    def script(self, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run up.sh or down.sh."""
        command = [str(CHECKOUT / "cluster" / name), *arguments]
        return subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=300)

    def submit(self, *arguments: str, verb: str = "tune", **environment: str) -> subprocess.Popen[str]:
        """As through the tunnel that up.sh prints."""
        job = ["-m", "ray.scripts.scripts", "job", "submit", "--address=http://127.0.0.1:8265", "--working-dir=."]
        command = network.inside(1, sys.executable, *job, "--", sys.executable, "-m", f"ser_ray.{verb}", *arguments)
        env = {**self.env, "RAY_AUTH_MODE": "token", **environment}
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=env, cwd=CHECKOUT, stdout=pipe, stderr=subprocess.STDOUT, text=True)

    def demo(self, name: str, *more: str) -> list[str]:
        """The demo, small, out of the job's working directory."""
        own = ("storage.prefix_gb=0", *more)
        return small_demo("search_spaces/demo.yaml", name, self.corpus, self.home / "shared", *own)

    def results(self, name: str) -> Path:
        """Where that search is."""
        return self.home / "shared" / "results" / name


def processes(temp: str) -> list[int]:
    """Those with the cluster's directory on their command lines."""
    found = subprocess.run(["pgrep", "-f", "--", f"[/]{temp.removeprefix('/')}/"], capture_output=True, text=True)
    return [int(word) for word in found.stdout.split()]


@pytest.fixture
def standing(tmp_path: Path, tiny_corpus: Path, untrained: Path) -> Iterator[Callable[..., Standing]]:
    """Starts one; ``hide``: a directory that the second host does not see."""
    # Every host has a /tmp/ray-... of its own: where two share one, each clears away the other's working directories.
    into, temp = tmp_path / "into", TEMP
    into.write_text(
        "#!/bin/bash\nhost=$1; shift\n"
        f"mkdir -p {temp} {tmp_path}/own-$host\n"
        f'set -- "mount --bind {tmp_path}/own-$host {temp};" "$@"\n'
        '[ "$host" != n2 ] || [ -z "$HIDE" ] || set -- "mount -t tmpfs none $HIDE;" "$@"\n'
        'exec ip netns exec "sr-$host" bash -c "$*"\n'
    )
    into.chmod(0o755)
    (tmp_path / "shared").mkdir()
    made: list[Standing] = []

    def start(hide: str = "", **more: str) -> Standing:
        own = {"HOME": str(tmp_path), "SER_RAY_SSH": str(into), "SER_RAY_PYTHON": sys.executable, "HIDE": hide, **more}
        own |= {"SER_RAY_CPUS": "2", "OMP_NUM_THREADS": "1"} | stub_trainable.environment(untrained, epoch_s=2)
        kept = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "XDG_STATE_HOME")}
        made.append(Standing(tmp_path, {**kept, **own}, tiny_corpus))
        done = made[0].script("up.sh", "n1", "n2")
        assert done.returncode == 0, done.stdout + done.stderr
        assert "2 nodes, 6 cores" in done.stdout
        return made[0]

    with network.hosts(2):
        yield start
        for cluster in made:
            done = cluster.script("down.sh")
            assert done.returncode == 0, done.stdout + done.stderr
            assert processes(TEMP) == []
            assert cluster.script("down.sh").returncode == 2, "there is none any more"
    shutil.rmtree(TEMP, ignore_errors=True)  # empty: what lies below is mounted for a host alone


def test_a_job_uses_both_hosts_and_nobody_without_the_token(standing):
    cluster = standing()
    assert (cluster.home / ".ray" / "auth_token").stat().st_mode & 0o777 == 0o600
    assert "is up already" in cluster.script("up.sh", "n1", "n2").stderr
    job = cluster.submit(*cluster.demo("both"))
    printed, _ = job.communicate(timeout=900)
    assert job.returncode == 0, printed
    notes = " ".join(path.read_text() for path in cluster.results("both").glob("trials/*/notes.txt"))
    assert set(re.findall(r"runs on \S+ \((\S+)\)", notes)) == {network.address(1), network.address(2)}
    stranger = cluster.submit(*cluster.demo("never"), RAY_AUTH_MODE="disabled")
    printed, _ = stranger.communicate(timeout=120)
    assert stranger.returncode != 0
    assert not cluster.results("never").exists()


def test_the_workers_of_one_trial_are_on_both_hosts_and_take_the_steps_of_one(standing, tmp_path):
    # Hosts here share a name, by which gloo would look for its network; on a real cluster each has its own.
    cluster = standing(GLOO_SOCKET_IFNAME=network.INSIDE)
    alike = ["experiment.augment.gain_db=0", "experiment.head.dropout=0", "experiment.adapter.method=full"]
    alike += ["experiment.optimizer.lr=2e-4", "experiment.epochs=3"]
    together = ["resources.workers=2", "resources.cpus_per_worker=2", "experiment.batch_seconds=5"]  # of a worker
    job = cluster.submit(*cluster.demo("apart", *alike, *together), verb="train")
    printed, _ = job.communicate(timeout=900)
    assert job.returncode == 0, printed
    assert main(["train", *cluster.demo("alone", *alike, "resources.workers=0", "experiment.batch_seconds=10")]) == 0
    apart, alone = (
        [json.loads(line) for line in next(cluster.results(name).rglob("history.jsonl")).read_text().splitlines()]
        for name in ("apart", "alone")
    )
    assert [one["epoch"] for one in apart] == [1, 2, 3]
    for one, other in zip(apart, alone, strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=0.2), "other batches, the same data"


def test_a_path_that_one_host_does_not_see_is_one_line_with_its_name(standing, tmp_path):
    cluster = standing(hide=str(tmp_path / "shared"))
    job = cluster.submit(*cluster.demo("never"))
    printed, _ = job.communicate(timeout=300)
    assert job.returncode != 0
    place = cluster.home / "shared" / "results"
    assert f"({network.address(2)}): storage.results: {place} is not there; give a path that every node sees" in printed
    assert not cluster.results("never").exists()


def test_a_host_that_is_lost_costs_at_most_an_epoch(standing):
    cluster = standing()
    job = cluster.submit(*cluster.demo("lost", "experiment.epochs=6", "experiment.patience=6", "tune.scheduler=none"))
    history = cluster.results("lost") / "trials"
    ends = time.monotonic() + 300
    while len(list(history.glob("*/history.jsonl"))) < 2 and time.monotonic() < ends and job.poll() is None:
        time.sleep(0.2)
    assert job.poll() is None, job.stdout.read()
    on_host = network.pids(2)
    assert on_host
    for pid in on_host:
        os.kill(pid, signal.SIGKILL)
    printed, _ = job.communicate(timeout=900)
    assert job.returncode == 0, printed
    with (cluster.results("lost") / "trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == ["finished"] * 4
    for path in sorted(history.glob("*/history.jsonl")):
        epochs = [json.loads(line)["epoch"] for line in path.read_text().splitlines()]
        assert epochs == list(range(1, 7)), "none lost, none twice"

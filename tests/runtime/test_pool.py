"""Actors that share jobs: an exception ends them all and gives back what they held; a busy cluster is waited for."""

from __future__ import annotations

import io
import os
import time
from pathlib import Path

import pytest
import ray
from rich.console import Console

from ser_ray.runtime import cluster
from ser_ray.runtime import pool as pool_module
from ser_ray.runtime.allocation import Worker
from ser_ray.runtime.pool import RESTARTS, Pool
from ser_ray.schema import UserError

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


@ray.remote
class Squarer:
    """Squares numbers; other jobs fail, or die."""

    def square(self, number: int) -> int:
        return number * number

    def work(self, seconds: float) -> int:
        """Takes a while; returns which process did it."""
        time.sleep(seconds)
        return os.getpid()

    def refuse(self) -> None:
        raise UserError("this file cannot be read; remove it")

    def fail(self) -> None:
        raise ZeroDivisionError("a fault of ours")

    def die(self, traces: str, times: int) -> int:
        """Leaves a trace and dies, so many times."""
        before = len(list(Path(traces).iterdir()))
        if before < times:
            (Path(traces) / str(before)).touch()
            os._exit(1)
        return before


def free_cpus() -> float:
    return ray.available_resources().get("CPU", 0.0)


def wait_for_all_cpus() -> None:
    for _ in range(150):
        if free_cpus() == ray.cluster_resources()["CPU"]:
            return
        time.sleep(0.2)
    raise AssertionError(f"{free_cpus()} of {ray.cluster_resources()['CPU']} CPUs were given back")


def pool(said: io.StringIO | None = None, size: int = 2, grows: bool = False) -> Pool:
    return Pool(Squarer, (), size, Worker(1.0, 0.0), Console(file=said or io.StringIO(), width=300), grows)


def test_every_job_is_done_once_and_all_is_given_back():
    with pool() as squarers:
        jobs = {n: (lambda actor, n=n: actor.square.remote(n)) for n in range(7)}
        assert dict(squarers.map(jobs, "squares")) == {n: n * n for n in range(7)}
    wait_for_all_cpus()


@pytest.mark.parametrize(("alone_s", "processes"), [(1000.0, 1), (0.0, 2)])
def test_it_grows_where_jobs_last_longer_than_a_start(monkeypatch, alone_s, processes):
    """Jobs wait for the second process, as long as it may take to start on a busy machine."""
    monkeypatch.setattr(pool_module, "GROWS_AFTER_S", alone_s)
    with pool(grows=True) as squarers:
        assert len(squarers.actors) == 1
        jobs = {n: (lambda actor: actor.work.remote(0.1 if alone_s else 1.0)) for n in range(40)}
        done: set[int] = set()
        for _, process in squarers.map(jobs, "work"):
            done.add(process)
            if len(done) == 2:
                break
        assert len(done) == len(squarers.actors) == processes
    wait_for_all_cpus()


def test_what_jobs_have_waited_counts_over_all_calls(monkeypatch):
    with pool(grows=True) as squarers:
        jobs = {n: (lambda actor: actor.work.remote(0.3)) for n in range(4)}
        assert len(set(dict(squarers.map(jobs, "work")).values())) == 1
        assert squarers.waited_s > 0.5, "three of them, for one after the other"
        monkeypatch.setattr(pool_module, "GROWS_AFTER_S", squarers.waited_s / 2)
        list(squarers.map({0: jobs[0]}, "work"))
        assert len(squarers.actors) == 1, "nothing waited"
        list(squarers.map(jobs, "work"))
        assert len(squarers.actors) == 2
    wait_for_all_cpus()


@pytest.mark.parametrize(("job", "error"), [("refuse", UserError), ("fail", ZeroDivisionError)])
def test_what_a_job_raises_ends_the_pool(job, error):
    jobs = {n: (lambda actor, n=n: actor.square.remote(n)) for n in range(3)}
    with pytest.raises(error), pool() as squarers:
        list(squarers.map(jobs | {"bad": lambda actor: getattr(actor, job).remote()}, "squares"))
    wait_for_all_cpus()


def test_a_process_that_dies_is_started_again_but_not_for_ever(tmp_path):
    often, always = tmp_path / "often", tmp_path / "always"
    for place in (often, always):
        place.mkdir()
    with pool(size=1) as squarers:
        jobs = {"dies": lambda actor: actor.die.remote(str(often), RESTARTS)}
        assert dict(squarers.map(jobs, "deaths")) == {"dies": RESTARTS}
    with (
        pytest.raises(UserError, match=rf"deaths: its process died \({RESTARTS + 1} times\)"),
        pool(size=1) as squarers,
    ):
        list(squarers.map({"dies": lambda actor: actor.die.remote(str(always), 99)}, "deaths"))
    assert len(list(always.iterdir())) == RESTARTS + 1
    wait_for_all_cpus()


def test_a_cluster_that_is_full_is_waited_for_and_said(monkeypatch):
    """Somebody holds every CPU and lets go after a while: the pool works with what it then gets."""
    monkeypatch.setattr(cluster, "PATIENCE_S", 1.0)
    wait_for_all_cpus()

    @ray.remote
    def hold(seconds: float) -> None:
        time.sleep(seconds)

    everything = ray.cluster_resources()["CPU"]
    held = hold.options(num_cpus=everything).remote(5.0)
    while free_cpus() > 0:
        time.sleep(0.1)
    said = io.StringIO()
    with pool(said) as squarers:
        assert dict(squarers.map({3: lambda actor: actor.square.remote(3)}, "squares")) == {3: 9}
    room = f"0 of {everything:g} CPUs and 0 of 0 GPUs are free, other work holds the rest"
    assert f"squares: waiting for 1 CPUs and 0 GPUs on one node; {room}" in said.getvalue()
    ray.get(held)

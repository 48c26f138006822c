"""Who waits for actors notices that Ray tells of none any more."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time
from pathlib import Path

import deaf
import pytest
import ray
from rich.console import Console
from search_fixtures import space

from ser_ray import tune
from ser_ray.runtime import cluster, contact
from ser_ray.runtime.contact import Contact
from ser_ray.schema import LostMessageError

TESTS = Path(__file__).resolve().parents[1]
POOL = """
import io, os, time
import ray
from rich.console import Console
from ser_ray.runtime import cluster, contact, pool
from ser_ray.runtime.allocation import Worker
from ser_ray.schema import LostMessageError
import deaf

contact.EVERY_S, contact.LOOK_S = 1.0, 0.5

class Own:
    def number(self):
        return 3

def number():
    with pool.Pool(ray.remote(Own), (), 1, Worker(1.0, 0.0), Console(file=io.StringIO())) as actors:
        return dict(actors.map({"a": lambda actor: actor.number.remote()}, "test"))

os.environ.update(deaf.HELD_BACK)
cluster.connect()
try:
    print(number())
except LostMessageError as error:
    print(error)
cluster.leave()
for name in deaf.HELD_BACK:
    del os.environ[name]
cluster.connect()
print(number())
"""


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contact, "EVERY_S", 0.0)
    monkeypatch.setattr(contact, "LOOK_S", 0.0)


def check(ours: Contact, times: int) -> None:
    for _ in range(times):
        ours.check()
        time.sleep(0.01)


@pytest.mark.ray
@pytest.mark.usefixtures("full_cluster", "at_once")
def test_answers_come_again_and_again_also_where_no_cpu_is_free(monkeypatch):
    monkeypatch.setattr(contact, "LOOKS", 10**9)
    ours, answers = Contact(), set()
    for _ in range(30_000):
        check(ours, 1)
        answers.add(ours.last_answer)
        if len(answers) > 3:
            return
    pytest.fail("no answers came")


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster", "at_once")
def test_one_that_has_not_started_is_waited_for(monkeypatch):
    """The machine, or the cluster, may be full: that is not the message that was lost."""

    class Silent(contact.Asked):
        def answer(self) -> None:
            time.sleep(600)

    monkeypatch.setattr(contact, "Asked", Silent)
    ours = Contact()
    with monkeypatch.context() as context:
        context.setattr(contact, "_has_started", lambda actor: False)
        check(ours, 100)
    with pytest.raises(LostMessageError, match="Ray no longer tells"):
        check(ours, 6000)
    assert ours.looks == contact.LOOKS
    ray.kill(ours.actor)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster", "at_once")
def test_one_whose_process_was_killed_has_started_and_its_death_is_an_answer(monkeypatch):
    class Dies(contact.Asked):
        def answer(self) -> None:
            os._exit(1)

    monkeypatch.setattr(contact, "Asked", Dies)
    ours = Contact()
    check(ours, 1)
    asked = ours.actor
    ray.wait([ours.answer], timeout=120)
    assert contact._has_started(asked)
    check(ours, 1)
    assert ours.actor is None


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_ray_that_was_joined_by_others_is_not_left(monkeypatch):
    """A program that searches may have other work there."""

    def lost(*_: object) -> None:
        raise LostMessageError("Ray no longer tells; give the same command again")

    monkeypatch.setattr(cluster, "_joined", False)
    monkeypatch.setattr(tune, "_run", lost)
    with pytest.raises(LostMessageError, match="give the same command again"):
        tune.run(space({}), Console(file=io.StringIO()), [])
    assert ray.is_initialized()


@pytest.mark.ray
def test_a_pool_whose_ray_tells_nothing_ends_and_works_after_a_new_connection():
    own = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    own["PYTHONPATH"] = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    done = subprocess.run([sys.executable, "-c", POOL], env=own, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if deaf.HELD_BACK["RAY_testing_asio_delay_us"] not in line]
    assert lines[0].endswith("give the same command again")
    assert lines[1:] == ["{'a': 3}"]

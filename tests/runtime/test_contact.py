"""Who waits for actors notices that Ray tells of none any more."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import deaf
import pytest
import ray

from ser_ray.runtime import contact
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

contact.SILENT_S, contact.LOOK_S = 1.0, 0.5

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
del os.environ["RAY_testing_asio_delay_us"]
cluster.connect()
print(number())
"""


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contact, "SILENT_S", 0.0)
    monkeypatch.setattr(contact, "LOOK_S", 0.0)


def check(ours: Contact, times: int) -> None:
    for _ in range(times):
        ours.check()
        time.sleep(0.01)


@pytest.mark.ray
@pytest.mark.usefixtures("full_cluster", "soon")
def test_an_actor_that_answers_is_news_also_where_no_cpu_is_free():
    ours = Contact()
    for _ in range(3):
        started = ours.last_news
        while ours.last_news == started:
            ours.check()
            time.sleep(0.05)
    ours.check()
    assert ours.actor is not None
    ours.news()
    assert ours.actor is None, "news of another ends the question"


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster", "soon")
def test_one_that_is_not_alive_yet_is_waited_for(monkeypatch):
    """The machine, or the cluster, may be full: that is not the message that was lost."""

    class Silent(contact.Asked):
        def answer(self) -> None:
            time.sleep(600)

    monkeypatch.setattr(contact, "Asked", Silent)
    ours = Contact()
    with monkeypatch.context() as context:
        context.setattr(contact, "_is_alive", lambda actor: False)
        check(ours, 100)
    with pytest.raises(LostMessageError, match="Ray no longer tells"):
        check(ours, 6000)
    assert contact._is_alive(ours.actor)
    assert ours.seen_alive == contact.LOOKS
    ray.kill(ours.actor)


@pytest.mark.ray
def test_a_pool_whose_ray_tells_nothing_ends_and_works_after_a_new_connection():
    own = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    own["PYTHONPATH"] = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    done = subprocess.run([sys.executable, "-c", POOL], env=own, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if deaf.HELD_BACK["RAY_testing_asio_delay_us"] not in line]
    assert lines[0].endswith("give the same command again")
    assert lines[1:] == ["{'a': 3}"]

"""Notice that this process no longer hears of its actors.

Ray 2.60 loses a message now and then (results/LOG.md, 2026-11-30). The process that it was for then hears of none of
its actors any more, neither that one started nor that one died, and would wait for ever.
"""

from __future__ import annotations

import time
from typing import Any, Final

import ray
from ray._private import state

from ser_ray.schema import LostMessageError

SILENT_S: Final = 180.0
"""After so many seconds without news, which an epoch may take, a new actor is started, to hear of it: that costs a
second."""
LOOK_S: Final = 5.0
"""Seconds between two looks into Ray's own list of actors."""
LOOKS: Final = 12
"""So many looks have that actor as alive before its answer is missed, which takes milliseconds, and some seconds on a
machine that is full. Looks, not seconds: this process may have been stopped for a while."""


class Contact:
    """For who waits for actors: `news` with every message of one, and `check` again and again in between."""

    def __init__(self) -> None:
        self.news()

    def __getstate__(self) -> None:
        """Goes with a callback that Tune pickles with its state, which is never read."""

    def news(self) -> None:
        """There was news of an actor."""
        self.last_news = time.monotonic()
        self.actor: Any = None
        self.answer: Any = None
        self.seen_alive = 0
        self.next_look = 0.0

    def check(self) -> None:
        """Raises LostMessageError where an actor lives, by Ray's list, that this process has not heard of."""
        now = time.monotonic()
        if self.actor is None:
            if now - self.last_news > SILENT_S:
                self.actor = ray.remote(num_cpus=0)(Asked).remote()
                self.answer = self.actor.answer.remote()
        elif ray.wait([self.answer], timeout=0)[0]:
            self.news()
        elif now > self.next_look:
            self.next_look = now + LOOK_S
            self.seen_alive += _is_alive(self.actor)
            if self.seen_alive >= LOOKS:
                raise LostMessageError(
                    "Ray no longer tells this command of the processes that it starts (a fault of Ray 2.60); give the "
                    "same command again"
                )


class Asked:
    """An actor that answers."""

    def answer(self) -> None:
        """Returns at once."""


# -- below: how it is done


def _is_alive(actor: Any) -> bool:
    """By a question to Ray, whose answer needs none of the messages that are lost."""
    return bool(state.actors(actor._actor_id.hex()).get("State") == "ALIVE")

"""Notice that this process no longer hears of its actors.

Ray 2.60 loses a message now and then (results/LOG.md, 2026-11-30). The process that it was for then hears of none of
its actors any more, neither that one started nor that one died, and would wait for ever. Results of actors that it
knows still come, so they prove nothing.
"""

from __future__ import annotations

import time
from typing import Any, Final

import ray
from ray._private import state

from ser_ray.schema import LostMessageError

EVERY_S: Final = 180.0
"""Seconds between two actors that are started to hear of them. One costs a second of a core."""
LOOK_S: Final = 5.0
"""Seconds between two looks into Ray's own list of actors."""
LOOKS: Final = 12
"""So many looks find that actor started, by that list, before its answer is missed, which takes milliseconds, and some
seconds on a machine that is full. Looks, not seconds: this process may have been stopped for a while."""

LOST: Final = "Ray no longer tells this command of the processes that it starts (a fault of Ray 2.60)"


class Contact:
    """For who waits for actors: `check` it again and again."""

    actor: Any
    answer: Any
    last_answer: float
    looks: int
    next_look: float

    def __init__(self) -> None:
        self._renew()

    def check(self) -> None:
        """Raises LostMessageError where an actor has started, by Ray's list, that this process has not heard of."""
        now = time.monotonic()
        if self.actor is None:
            if now - self.last_answer > EVERY_S:
                self.actor = ray.remote(num_cpus=0)(Asked).remote()
                self.answer = self.actor.answer.remote()
        elif ray.wait([self.answer], timeout=0)[0]:  # also where its process was killed
            self._renew()
        elif now > self.next_look:
            self.next_look = now + LOOK_S
            self.looks += _has_started(self.actor)
            if self.looks >= LOOKS:
                raise LostMessageError(f"{LOST}; give the same command again")

    def _renew(self) -> None:
        self.last_answer = time.monotonic()
        self.actor = self.answer = None
        self.looks = 0
        self.next_look = 0.0


class Asked:
    """An actor that answers."""

    def answer(self) -> None:
        """Returns at once."""


# -- below: how it is done


def _has_started(actor: Any) -> bool:
    """By a question to Ray, whose answer needs none of the messages that are lost. One that has died since counts."""
    return state.actors(actor._actor_id.hex()).get("State") in ("ALIVE", "DEAD")

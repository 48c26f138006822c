"""How many trials share a GPU where `resources.gpus_per_worker` is auto: as many as their memory and the cores allow.

A trial of a small backbone leaves most of a card idle: between its short kernels the card waits for the trial's Python.
The memory of a step is measured on a GPU, when the plan is made; the choice is arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from ser_ray.config import Experiment, SearchSpace
from ser_ray.runtime.allocation import DATA_CPUS, Node
from ser_ray.runtime.plan import variants

MEMORY_FIELDS: Final = ("backbone", "adapter.method", "adapter.first_layer", "batch_seconds", "recompute")
"""The keys on which the memory of a step depends most. Of the others, such as the rank, `MARGIN` takes account."""
MARGIN: Final = 1.25
"""A trial gets this many times what its step was measured to take."""
SHARED_PART: Final = 0.5
"""Trials that share a card fill at most this part of it: a step that takes more of the memory has large kernels, which
keep the card busy by themselves."""
MOST: Final = 4
"""Trials on a card at most: their kernels run in turns, and of four at least one has something to run. It was not
measured on a GPU whether more would gain."""


@dataclass(frozen=True)
class Footprint:
    """What the largest step of a search takes of a GPU's memory."""

    step_bytes: int
    """Tensors at the peak; 0: unknown, as there is no GPU, or not even one step fits."""
    card_bytes: int
    context_bytes: int
    """What a process takes besides its tensors."""
    of: str = ""
    """The backbone and method of that step."""


def trials_on_a_card(footprint: Footprint, cores: float, trials: float) -> int:
    """How many trials share a card that has ``cores`` CPU cores to itself, if there are ``trials`` for each card.

    >>> gib = 2**30
    >>> trials_on_a_card(Footprint(2 * gib, 80 * gib, gib), cores=16, trials=24)
    4
    >>> trials_on_a_card(Footprint(20 * gib, 80 * gib, gib), cores=16, trials=24)
    1
    """
    if not footprint.step_bytes:
        return 1
    each = footprint.context_bytes + MARGIN * footprint.step_bytes
    by_memory = int(SHARED_PART * footprint.card_bytes / each)
    return max(1, min(MOST, by_memory, int(cores), int(trials)))


def chosen(
    space: SearchSpace, nodes: Sequence[Node], trials: int, measure: Callable[[SearchSpace], Footprint]
) -> tuple[float, str]:
    """The GPUs of a worker that auto stands for, and a sentence that says why. ``measure`` is called only if it can
    matter."""
    cards = [node for node in nodes if node.gpus]
    for_each = min(trials, space.tune.concurrency or trials) / sum(node.gpus for node in cards)
    cores = min((node.cpus - DATA_CPUS) / node.gpus for node in cards)
    if space.resources.workers != 1:
        return 1.0, "a GPU for each worker: a trial of several workers shares none"
    if for_each < 2:
        return 1.0, "a GPU for each trial: there are fewer than two trials for each"
    if cores < 2:
        return 1.0, "a GPU for each trial: its node has fewer than two cores for each"
    footprint = measure(space)
    count = trials_on_a_card(footprint, cores, for_each)
    share = int(10_000 / count) / 10_000  # rounded down: three of 0.3333 fit
    return share, f"{_named(count)}: {_reason(footprint)}; resources.gpus_per_worker=1 gives each a GPU of its own"


def measured(space: SearchSpace) -> Footprint:
    """The largest step that a trial of the space takes, on the GPU of this process; a step that is too large, or no
    GPU, is one of 0 bytes."""
    import torch

    from ser_ray.models.precision import CONTEXT_BYTES, choose_device
    from ser_ray.training.memory import is_out_of_memory
    from ser_ray.training.step_memory import step_bytes

    device = choose_device()
    if device.type != "cuda":
        return Footprint(0, 0, CONTEXT_BYTES)
    _, card_bytes = torch.cuda.mem_get_info()
    largest = Footprint(0, card_bytes, CONTEXT_BYTES)
    for experiment in largest_steps(space):
        name = f"{experiment.backbone} ({experiment.adapter.method})"
        try:
            taken = step_bytes(experiment, device)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return Footprint(0, card_bytes, CONTEXT_BYTES, name)
        if taken > largest.step_bytes:
            largest = Footprint(taken, card_bytes, CONTEXT_BYTES, name)
    return largest


def largest_steps(space: SearchSpace) -> list[Experiment]:
    """For every backbone, method and kind of memory that a trial can have, the one with the largest batches and the
    most blocks that are trained."""
    largest: dict[tuple[str, str, bool], Experiment] = {}
    for experiment in variants(space, MEMORY_FIELDS):
        key = (experiment.backbone, experiment.adapter.method, experiment.recompute)
        largest[key] = max(largest.get(key, experiment), experiment, key=_size)
    return list(largest.values())


# -- below: how it is done


def _size(experiment: Experiment) -> tuple[float, int]:
    return experiment.batch_seconds, -experiment.adapter.first_layer


def _named(count: int) -> str:
    return "a GPU for each trial" if count == 1 else f"{count} trials on each GPU"


def _reason(footprint: Footprint) -> str:
    if not footprint.step_bytes:
        return f"not one step of {footprint.of} fits on it" if footprint.of else "no GPU was found to measure a step on"
    step, card = footprint.step_bytes / 2**30, footprint.card_bytes / 2**30
    return f"the largest step, of {footprint.of}, takes {step:.2f} of its {card:.0f} GiB"

"""How many trials share a GPU: by the memory of a step, the cores, and the trials there are; and what is said of it."""

from __future__ import annotations

import io

import pytest
import torch
from backbone_fixtures import experiment
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from ser_ray import config
from ser_ray.config import SearchSpace
from ser_ray.models.precision import memory_fraction
from ser_ray.runtime import cluster, nodes, sharing
from ser_ray.runtime.allocation import Node
from ser_ray.runtime.sharing import Footprint, chosen, largest_steps, trials_on_a_card
from ser_ray.training import step_memory

GIB = 2**30
CONTEXT = 600 * 2**20
SMALL = Footprint(GIB, 80 * GIB, CONTEXT, "whisper-tiny (lora)")


def space(*overrides: str) -> SearchSpace:
    return config.load(config.default_space(), ["search={}", "tune.first=[]", *overrides])


@pytest.mark.parametrize(
    ("step", "card", "cores", "trials", "count"),
    [
        (1, 80, 16, 24, 4),  # no more than four gain anything
        (1, 80, 3, 24, 3),  # a core for each
        (1, 80, 16, 2.5, 2),  # no more than there are
        (15, 80, 16, 24, 2),
        (20, 80, 16, 24, 1),  # 1.25 times 20 GiB, twice, are more than half of the card
        (20, 141, 16, 24, 2),
        (1, 8, 16, 24, 2),
        (100, 80, 16, 24, 1),
        (0, 80, 16, 24, 1),  # it was not measured
    ],
)
def test_by_memory_cores_and_trials(step, card, cores, trials, count):
    assert trials_on_a_card(Footprint(step * GIB, card * GIB, CONTEXT), cores, trials) == count


@given(step=st.integers(1, 200 * GIB), card=st.integers(4 * GIB, 200 * GIB), cores=st.floats(1, 64))
def test_a_share_has_room_for_the_step_that_was_measured(step, card, cores):
    count = trials_on_a_card(Footprint(step, card, CONTEXT), cores, 100)
    if count > 1:
        share = int(10_000 / count) / 10_000
        assert memory_fraction(share, card) * card >= step
        assert int(1 / share) == count, "Ray puts as many on the card"


def measure(footprint: Footprint, asked: list[SearchSpace]):
    def found(own: SearchSpace) -> Footprint:
        asked.append(own)
        return footprint

    return found


@pytest.mark.parametrize(
    ("offered", "trials", "overrides", "gpus", "said"),
    [
        ([(17, 1)], 24, (), 0.25, "4 trials on each GPU: the largest step, of whisper-tiny (lora), takes 1.00 of its"),
        ([(9, 4), (64, 0)], 24, (), 0.5, "2 trials on each GPU"),
        ([(17, 4), (17, 4)], 24, (), 0.3333, "3 trials on each GPU"),
        ([(17, 1)], 24, ("tune.concurrency=2",), 0.5, "2 trials on each GPU"),
        ([(17, 1)], 1, (), 1.0, None),
        ([(17, 8)], 15, (), 1.0, None),
        ([(2, 1)], 24, (), 1.0, None),
        ([(17, 1)], 24, ("resources.workers=2",), 1.0, None),
    ],
)
def test_a_step_is_measured_where_it_matters(offered, trials, overrides, gpus, said):
    asked: list[SearchSpace] = []
    own = space(*overrides)
    found, reason = chosen(own, [Node(*node) for node in offered], trials, measure(SMALL, asked))
    assert found == gpus
    assert asked == ([] if said is None else [own])
    assert reason.startswith(said or "a GPU for each")


def test_what_could_not_be_measured_is_said():
    for footprint, said in (
        (Footprint(0, 0, CONTEXT), "no GPU was found to measure a step on"),
        (Footprint(0, 8 * GIB, CONTEXT, "whisper-large (full)"), "not one step of whisper-large (full) fits on it"),
    ):
        found, reason = chosen(space(), [Node(17, 1)], 24, measure(footprint, []))
        assert found == 1.0
        assert said in reason


def test_the_largest_step_of_every_backbone_and_method():
    search = (
        "search={batch_seconds: {choice: [20, 80]}, adapter.method: {choice: [lora, frozen]}, "
        "adapter.first_layer: {choice: [0, 1]}, adapter.rank: {choice: [2, 64]}}"
    )
    found = {(e.adapter.method, e.adapter.first_layer, e.batch_seconds) for e in largest_steps(space(search))}
    assert found == {("lora", 0, 80.0), ("frozen", 0, 80.0)}


def test_batches_are_as_large_as_the_experiment_allows(backbones_dir):
    for seconds, most in ((20.0, 30.0), (60.0, 3.0), (120.0, 30.0)):
        own = experiment(backbones_dir / "whisper", batch_seconds=seconds, audio={"max_seconds": most})
        batches = step_memory.largest_batches(own)
        assert max(batch.inputs.shape[1] for batch in batches) == most * 16_000
        for batch in batches:
            padded = batch.inputs.numel() / 16_000
            assert padded <= seconds or len(batch) == 1
            assert padded + batch.inputs.shape[1] / 16_000 > seconds


@pytest.mark.parametrize("method", ["frozen", "lora", "qlora", "full"])
def test_the_steps_are_those_of_training(backbones_dir, method, monkeypatch):
    """All that is trained has a state of the optimiser afterwards, which counts both steps."""
    optimizers = []
    made = step_memory.loop.make_optimizer
    monkeypatch.setattr(
        step_memory.loop, "make_optimizer", lambda model: optimizers.append(made(model)) or optimizers[0]
    )
    own = experiment(backbones_dir / "wavlm-layer", adapter={"method": method}, batch_seconds=8)
    step_memory.run_steps(own, torch.device("cpu"))
    (optimizer,) = optimizers
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    assert parameters
    assert {int(optimizer.state[p]["step"]) for p in parameters} == {2}


def test_the_cluster_says_what_auto_chose(monkeypatch):
    monkeypatch.setattr(nodes, "alive", lambda: [{"Resources": {"CPU": 17.0, "GPU": 1.0}}])
    monkeypatch.setattr(cluster, "_device", lambda worker, console: (True, "bf16"))
    monkeypatch.setattr(cluster, "_on_gpus", lambda gpus, console, function, *arguments: SMALL)
    console = Console(file=io.StringIO())
    shared = cluster.allocate(space(), 24, console, share=True)
    assert (shared.trials_at_once, shared.worker.gpus, shared.worker.cpus) == (4, 0.25, 4.0)
    assert "4 trials on each GPU" in shared.sharing
    assert "measuring" in console.file.getvalue()
    for own, share in ((space(), False), (space("resources.gpus_per_worker=1"), True)):
        whole = cluster.allocate(own, 24, console, share=share)
        assert (whole.trials_at_once, whole.worker.gpus, whole.sharing) == (1, 1.0, "")


def test_without_a_gpu_nothing_is_measured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert sharing.measured(space()).step_bytes == 0

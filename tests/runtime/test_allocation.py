"""What a trial takes of a cluster, counted node by node; what stays idle, and why."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ser_ray import config
from ser_ray.config import SearchSpace
from ser_ray.runtime.allocation import DATA_CPUS, Node, Worker, allocate, capacity
from ser_ray.schema import UserError


def space(concurrency: int | None = None, **resources) -> SearchSpace:
    found = config.load(config.default_space())
    settled = config.Resources.model_validate(resources)
    tune = found.tune.model_copy(update={"concurrency": concurrency})
    return found.model_copy(update={"resources": settled, "tune": tune})


@pytest.mark.parametrize(
    ("nodes", "worker", "fits"),
    [
        ([(4, 0)], (1, 0), 3),
        ([(4, 0), (4, 0)], (1, 0), 6),  # a CPU for the data on every node
        ([(1, 0), (1, 0)], (1, 0), 1),  # too small for that: on one
        ([(4, 0), (4, 0)], (4, 0), 1),  # the data's CPU is on the other
        ([(4, 0), (4, 0)], (5, 0), 0),  # eight CPUs, but none has five
        ([(5, 0), (4, 0)], (4, 0), 1),
        ([(5, 0), (5, 0)], (4, 0), 2),
        ([(8, 1), (8, 1)], (4, 1), 2),
        ([(8, 1), (8, 1)], (4, 0.25), 2),
        ([(16, 0), (4, 1)], (4, 1), 1),  # the data's CPU is where no GPU is
        ([(16, 0)], (1, 1), 0),
        ([(1.5, 0)], (0.5, 0), 1),
    ],
)
def test_what_fits_is_counted_node_by_node(nodes, worker, fits):
    offered = [Node(*node) for node in nodes]
    assert capacity(offered, Worker(*worker)) == fits
    wanted = space(cpus_per_worker=worker[0] * 1.0, gpus_per_worker=worker[1] * 1.0)
    if fits:
        assert allocate(offered, wanted, trials=100).trials_at_once == fits
    else:
        with pytest.raises(UserError, match="has too few GPUs" if worker[1] else "is too small"):
            allocate(offered, wanted, trials=100)


@pytest.mark.parametrize(
    ("nodes", "cpus", "at_once"),
    [
        ([(12, 4)], 2, 4),  # 4 CPUs each would leave a GPU idle
        ([(16, 8)], 1, 8),
        ([(17, 4)], 4, 4),
        ([(64, 4)], 4, 4),  # no more than a worker can use
        ([(4, 8)], 0.3, 8),  # fewer CPUs than GPUs
        ([(3, 1)], 2, 1),
        ([(12, 4), (64, 4)], 2, 8),  # the same for all trials
        ([(12, 4), (2, 0)], 2, 4),  # a node without a GPU says nothing of those with one
        ([(3, 0)], 1, 2),
    ],
)
def test_cpus_follow_the_gpus_of_a_node(nodes, cpus, at_once):
    found = allocate([Node(*node) for node in nodes], space(), trials=100)
    assert (found.worker.cpus, found.trials_at_once) == (cpus, at_once)
    assert not any("GPUs idle" in line for line in found.idle)


def test_a_share_of_a_gpu_counts_gpu_by_gpu():
    found = allocate([Node(17, 2)], space(gpus_per_worker=0.3), trials=100)
    assert found.trials_at_once == 6, "three on each"
    assert found.worker.cpus == 2


@pytest.mark.parametrize(
    ("nodes", "settings", "trials", "reason"),
    [
        ([(17, 4)], {}, 3, "1 of 4 GPUs idle: there are 3 trials to run"),
        ([(17, 4)], {}, 1, "3 of 4 GPUs idle: there is one trial to run"),
        ([(17, 4)], {"concurrency": 2}, 9, "2 of 4 GPUs idle: tune.concurrency is 2"),
        ([(12, 4)], {"cpus_per_worker": 4.0}, 9, "2 of 4 GPUs idle: a worker takes 4 CPUs"),
        ([(17, 3)], {"workers": 2}, 9, "1 of 3 GPUs idle: a trial takes 2 workers, and 3 fit"),
        ([(17, 2)], {"gpus_per_worker": 0.0}, 9, "2 of 2 GPUs idle: resources.gpus_per_worker is 0"),
        ([(17, 1)], {"gpus_per_worker": 0.4}, 9, "0.2 of 1 GPUs idle: workers of 0.4 GPUs do not fill the nodes"),
        ([(9, 0)], {}, 2, "6 of 8 cores idle: there are 2 trials to run"),
    ],
)
def test_what_stays_idle_is_said_with_its_reason(nodes, settings, trials, reason):
    found = allocate([Node(*node) for node in nodes], space(**settings), trials)
    assert len(found.idle) == 1
    assert found.idle[0].startswith(reason)


@given(
    st.lists(st.tuples(st.integers(1, 64), st.integers(0, 8)), min_size=1, max_size=5),
    st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0, "auto"]),
    st.integers(1, 3),
)
def test_no_more_is_given_than_there_is(nodes, gpus, workers):
    offered = [Node(*node) for node in nodes]
    try:
        found = allocate(offered, space(gpus_per_worker=gpus, workers=workers), trials=1000)
    except UserError:
        return
    held = found.trials_at_once * workers
    assert held <= found.pool
    assert held * found.worker.cpus <= sum(node.cpus for node in offered) - DATA_CPUS + 1e-6
    assert held * found.worker.gpus <= sum(node.gpus for node in offered) + 1e-6

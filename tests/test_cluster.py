"""The cluster as a trial meets it: what a stopped one held is given back."""

from __future__ import annotations

import time

import pytest
import ray
from ray.util.placement_group import placement_group, placement_group_table

from ser_ray import cluster


@ray.remote(num_cpus=0)
class Controller:
    """Like Ray Train's: it makes a placement group and dies without removing it."""

    def reserve(self) -> str:
        self.group = placement_group([{"CPU": 0.1}])
        ray.get(self.group.ready())
        return self.group.id.hex()


def state(group: str) -> str:
    return placement_group_table()[group]["state"]


@pytest.mark.ray
def test_a_group_outlives_its_controller_until_it_is_freed(ray_cluster):
    controller = Controller.remote()
    group = ray.get(controller.reserve.remote())
    ray.kill(controller)
    time.sleep(2)
    assert state(group) == "CREATED", "if Ray frees it by itself now, free_group can go"
    cluster.free_group(group)
    assert state(group) == "REMOVED"
    cluster.free_group(group)


@pytest.mark.ray
def test_a_group_of_an_earlier_cluster_is_nothing_to_free(ray_cluster):
    cluster.free_group("0" * 35 + "1")
    cluster.free_group("ab" * 18)

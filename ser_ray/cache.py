"""Compute the cached features that the trials of a search space can use: ``ser-ray cache SPACE.yaml``.

`tune` and `train` do it by themselves; this command does it beforehand. See `ser_ray.runtime.feature_cache`.
"""

from __future__ import annotations

if __name__ == "__main__":
    import sys

    from ser_ray.__main__ import main as command

    sys.exit(command(["cache", *sys.argv[1:]]))

from pathlib import Path

from ser_ray import config, prepare
from ser_ray.protocols.task import load_task
from ser_ray.runtime import cluster, paths, plan
from ser_ray.runtime.feature_cache import made_first
from ser_ray.terminal import PlainConsole


def main(path: Path, overrides: list[str]) -> int:
    """``ser-ray cache``: make every cache that the trials of a search space can use."""
    space = paths.resolve_paths(config.load(path, overrides))
    console = PlainConsole()
    plan.check(space)
    cluster.connect(space)
    allocation = cluster.allocate(space, space.tune.trials, console)
    shard_dirs = prepare.prepare(space, console=console)
    planned = plan.make(space, allocation, shard_dirs, load_task(space.experiment, shard_dirs))
    for reason in planned.uncacheable_reasons():
        console.print(f"{'not' if planned.cacheable() else 'nothing is'} cached: {reason}")
    with made_first(planned, console):
        return 0

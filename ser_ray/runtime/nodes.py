"""Check the nodes of a cluster before the first trial: all are up, see the same files, have the same packages and code,
and have the GPUs that they offer.

Otherwise a path that one node does not see, or another version of a package there, shows hours later, in the trials
that happen to run on it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ser_ray.config import SearchSpace
from ser_ray.schema import UserError

EXPECTED: Final = "SER_RAY_NODES"
"""How many nodes to wait for; ``cluster/slurm.sbatch`` sets it."""
PATIENCE: Final = "SER_RAY_WAIT"
"""For how many seconds to wait for them."""
PACKAGES: Final = ("torch", "transformers", "peft", "bitsandbytes", "ray", "pyarrow", "numpy")
"""Packages whose version changes metrics, or breaks what is sent between processes."""
CODE: Final = Path(__file__).resolve().parents[1]
"""The package itself."""


def alive() -> list[dict[str, Any]]:
    """Ray's description of the nodes that are up."""
    return [node for node in ray.nodes() if node["Alive"]]


def wait() -> None:
    """Wait until as many nodes are up as were asked for. Raises UserError where they do not come up in time."""
    expected, patience = int(os.environ.get(EXPECTED, "1")), float(os.environ.get(PATIENCE, "300"))
    started, printed = time.monotonic(), False
    while (count := len(alive())) < expected:
        if time.monotonic() - started > patience:
            names = ", ".join(name(node) for node in alive())
            raise UserError(
                f"cluster: {count} of {expected} nodes came up within {patience:g} s ({names}); Ray's log says why "
                f"the others did not; {PATIENCE} sets how long to wait"
            )
        if not printed:
            printed = True
            print(f"waiting for nodes: {count} of {expected} are up", file=sys.stderr, flush=True)
        time.sleep(0.5)


def check(space: SearchSpace) -> None:
    """Check every node of a cluster that has several.

    Raises UserError, naming the node, for a path that it does not see, a package or code that differs from this
    process's, and GPUs that it offers but does not have.
    """
    nodes = alive()
    if len(nodes) < 2:
        return
    needed = _needed(space)
    with _left_in({"storage.results": space.storage.results, "storage.cache": space.storage.cache}) as traces:
        own = _look({})
        pending = [(node, _ask(node, needed | traces)) for node in nodes]
        for node, answer in [(node, _answer(node, asked)) for node, asked in pending]:
            if answer["unseen"]:
                key = answer["unseen"][0]
                path = needed.get(key) or getattr(space.storage, key.partition(".")[2])
                raise UserError(f"node {name(node)}: {key}: {path} is not there; give a path that every node sees")
            _compare(name(node), answer["versions"], own["versions"])
            offered = node["Resources"].get("GPU", 0)
            if offered > answer["gpus"]:
                raise UserError(
                    f"node {name(node)}: offers {offered:g} GPUs, but nvidia-smi lists {answer['gpus']}; start its "
                    "Ray with the GPUs that it has (--num-gpus), or fix its driver"
                )


def name(node: Mapping[str, Any]) -> str:
    """A node's name and address, human-readable."""
    return f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"


# -- below: how it is done


def _needed(space: SearchSpace) -> dict[str, str]:
    """Key -> a path that trials read."""
    paths = {f"experiment.corpora.{key}": path for key, path in space.experiment.corpora.items() if path}
    paths |= {f"backbone {name}": name for name in space.backbones() if Path(name).is_absolute()}
    given = space.experiment.protocol.given
    return paths | (
        {"experiment.protocol.given": given} if isinstance(given, str) and Path(given).is_absolute() else {}
    )


@contextmanager
def _left_in(places: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """Key -> a new file there while the body runs; a node that does not see it has another disk under the same name."""
    left: dict[str, Path] = {}
    try:
        for key, place in places.items():
            trace = Path(place) / f".seen-by-all-{uuid.uuid4().hex[:8]}"
            try:
                trace.parent.mkdir(parents=True, exist_ok=True)
                trace.touch()
            except OSError as error:
                raise UserError(f"{key}: cannot write to {place}: {error.strerror}") from None
            left[key] = trace
        yield {key: str(trace) for key, trace in left.items()}
    finally:
        for trace in left.values():
            trace.unlink(missing_ok=True)


def _ask(node: Mapping[str, Any], paths: Mapping[str, str]) -> Any:
    there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    return _look_there.options(num_cpus=0, scheduling_strategy=there).remote(dict(paths))


def _answer(node: Mapping[str, Any], asked: Any) -> dict[str, Any]:
    try:
        answer: dict[str, Any] = ray.get(asked)
    except ray.exceptions.RayError as error:
        last = str(error).strip().splitlines()[-1]
        raise UserError(f"node {name(node)}: cannot run ser_ray there: {last}") from None
    return answer


def _compare(node: str, theirs: Mapping[str, str], ours: Mapping[str, str]) -> None:
    for package, version in ours.items():
        if theirs[package] != version:
            raise UserError(
                f"node {node}: {package} is {theirs[package]}, here it is {version}; install the same on every node "
                "(constraints.txt)"
            )


def _look(paths: Mapping[str, str]) -> dict[str, Any]:
    """Missing paths, versions and GPUs of this machine."""
    return {
        "unseen": [key for key, path in paths.items() if not Path(path).exists()],
        "versions": {"python": sys.version.split()[0], "ser_ray's code": _code()} | _versions(PACKAGES),
        "gpus": _gpus(),
    }


@ray.remote
def _look_there(paths: dict[str, str]) -> dict[str, Any]:
    return _look(paths)


def _versions(packages: Sequence[str]) -> dict[str, str]:
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "missing"
    return versions


def _code() -> str:
    """A digest of all files of the package, not of this folder alone."""
    digest = hashlib.sha256()
    for path in sorted(CODE.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _gpus() -> int:
    """GPUs that nvidia-smi lists, whatever devices Ray lets this task see."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return 0
    listed = subprocess.run([command, "-L"], capture_output=True, text=True, check=False)  # noqa: S603
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())

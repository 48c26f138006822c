"""Bring the backbones that a search space names to where compute nodes without internet find them.

    python -m ser_ray.fetch SPACE.yaml [--to DIR] [key=value ...]

On a node with internet, such as a cluster's login node. They go into Hugging Face's cache, or the one at ``--to``, in
its own layout. Each is loaded as a trial would load it, which brings exactly the files that are needed; then again by
a process that is told to stay offline, as the compute nodes will.
"""

if __name__ == "__main__":
    import sys

    from ser_ray.__main__ import main as command

    sys.exit(command(["fetch", *sys.argv[1:]]))

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console

from ser_ray import config
from ser_ray.schema import UserError

CACHE = "HF_HUB_CACHE"
OFFLINE = "HF_HUB_OFFLINE"


def main(arguments: list[str]) -> int:
    """``ser-ray fetch SPACE.yaml [--to DIR] [key=value ...]``."""
    parser = argparse.ArgumentParser(prog="ser-ray fetch", description="Bring the backbones of a search space.")
    parser.add_argument("space", type=Path)
    parser.add_argument("--to", type=Path, help="the cache directory; default: Hugging Face's own")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    given = parser.parse_args(arguments)
    space = config.load(given.space, given.overrides)
    if os.environ.get(OFFLINE, "0") not in ("", "0"):
        raise UserError(f"{OFFLINE} is set: unset it here, and set it on the compute nodes")
    if given.to is not None:
        os.environ[CACHE] = str(given.to.expanduser().resolve())  # before Hugging Face's library reads it
    from huggingface_hub import constants

    from ser_ray.models import backbones  # after it

    console = Console(highlight=False, soft_wrap=True)
    for name in space.backbones():
        started = time.monotonic()
        console.print(f"backbone {name} ...")
        backbone = backbones.load(name)
        millions = sum(p.numel() for p in backbone.parameters()) / 1e6
        _check_offline(name)
        took = f"{time.monotonic() - started:.0f} s"
        console.print(f"backbone {name}: {backbone.family}, {millions:.1f} M parameters, loads offline; {took}")
    console.print(f"on the compute nodes: export {CACHE}={constants.HF_HUB_CACHE} {OFFLINE}=1")
    return 0


def _check_offline(name: str) -> None:
    code = "import sys; from ser_ray.models import backbones; backbones.load(sys.argv[1])"
    command = [sys.executable, "-c", code, name]
    done = subprocess.run(command, env={**os.environ, OFFLINE: "1"}, capture_output=True, text=True)  # noqa: S603
    if done.returncode:
        raise UserError(f"backbone {name}: came, but does not load offline: {done.stderr.strip().splitlines()[-1]}")

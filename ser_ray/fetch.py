"""Download the backbones that a search space names into a cache for compute nodes without internet.

    python -m ser_ray.fetch SPACE.yaml [--to DIR] [key=value ...]

Run it on a node with internet, such as a cluster's login node. The files go into Hugging Face's cache, or into ``--to``
in the same layout. Each backbone is loaded as a trial would load it, which downloads exactly the files that are needed;
then again by a process in offline mode, as on the compute nodes.
"""

if __name__ == "__main__":
    import sys

    from ser_ray.__main__ import main as command

    sys.exit(command(["fetch", *sys.argv[1:]]))

import os
import subprocess
import sys
import time
from pathlib import Path

from ser_ray import config
from ser_ray.disk import resolved
from ser_ray.schema import UserError
from ser_ray.terminal import PlainConsole

CACHE = "HF_HUB_CACHE"
OFFLINE = "HF_HUB_OFFLINE"


def main(path: Path, overrides: list[str], to: Path | None = None) -> int:
    """``ser-ray fetch``: download the backbones of a space into the cache directory ``to``, by default Hugging Face's
    own."""
    space = config.load(path, overrides)
    if os.environ.get(OFFLINE, "0") not in ("", "0"):
        raise UserError(f"{OFFLINE} is set: unset it here, and set it on the compute nodes")
    if to is not None:
        os.environ[CACHE] = str(resolved(to))  # before Hugging Face's library reads it
    from huggingface_hub import constants

    from ser_ray.models import backbones  # after HF_HUB_CACHE is set

    console = PlainConsole()
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
        reason = done.stderr.strip().splitlines()[-1]
        raise UserError(f"backbone {name}: downloaded, but does not load offline: {reason}")

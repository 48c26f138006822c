"""What made a result: the code, command, packages, hardware, data and seed."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

from ser_ray import __version__
from ser_ray.config import SearchSpace
from ser_ray.speech import shards

_PACKAGES = ("torch", "torchaudio", "transformers", "peft", "bitsandbytes", "ray", "optuna", "pyarrow", "scikit-learn")


def provenance(space: SearchSpace, shard_dirs: list[Path], argv: list[str]) -> dict[str, Any]:
    """The content of provenance.json: the code, command, packages, hardware, data and seed that made a result."""
    import torch  # here, so that a worker that only prepares data need not load it

    manifests = {str(directory): shards.read_manifest(directory) for directory in shard_dirs}
    return {
        "version": __version__,
        "git": _git_commit(),
        "argv": argv,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "finished": None,
        "host": platform.node(),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "seed": space.experiment.seed,
        "data": [
            {"corpus": manifest["corpus"], "directory": directory, "fingerprint": manifest["content_sha256"]}
            | {key: manifest[key] for key in ("utterances", "hours")}
            | {"rejected": len(manifest["rejected"])}
            for directory, manifest in manifests.items()
        ],
    }


# -- below: how it is done


def _git_commit() -> str | None:
    """The commit of the running checkout; None if it is not one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    except FileNotFoundError:  # no git on this machine
        return None
    return done.stdout.strip() or None

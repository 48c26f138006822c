"""up.sh and down.sh inside an interactive Slurm allocation."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from slurm_fixture import PATH, slurm, unavailable_reason

REPOSITORY = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.slow,
    pytest.mark.skipif(bool(unavailable_reason()), reason=f"no Slurm here: {unavailable_reason()}"),
]

SESSION = """\
set -e
cluster/up.sh
srun --overlap --nodes=1 --ntasks=1 --nodelist=n1 env RAY_AUTH_MODE=token $SER_RAY_PYTHON -m ray.scripts.scripts \\
    job submit --address=http://127.0.0.1:8265 --working-dir=. -- $SER_RAY_PYTHON -m ser_ray.prepare $SPACE $PLACES
cluster/down.sh
"""
"""What somebody types there; the dashboard is on the head's loopback, so the job is submitted from the head."""


def test_a_cluster_over_an_allocation_takes_a_job(tiny_corpus, tmp_path):
    environment = {
        **{key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "XDG_STATE_HOME")},
        "HOME": str(tmp_path),
        "PATH": PATH,
        "PYTHONPATH": str(REPOSITORY),
        "SER_RAY_PYTHON": sys.executable,
        "SER_RAY_CPUS": "1",
        "SPACE": "search_spaces/demo.yaml",
        "PLACES": f"storage.results={tmp_path}/results storage.cache={tmp_path}/cache "
        f'experiment.corpora={{"ravdess":{tiny_corpus}}}',
    }
    with slurm(tmp_path / "slurm", nodes=2, cpus=2) as running:
        done = subprocess.run(
            ["salloc", "--quiet", "--nodes=2", "--ntasks-per-node=1", "bash", "-c", SESSION],
            env={**environment, "SLURM_CONF": str(running.directory / "slurm.conf")},
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "2 nodes, 4 cores" in done.stdout
        assert "96 utterances" in done.stdout
        running.wait(lambda: running("sinfo", "-h", "-o", "%T %D") == "idle 2", "idle nodes: its steps have ended", 120)
        left = subprocess.run(["pgrep", "-f", "--", f"[/]tmp/ray-up-{os.getuid()}-6379/"], capture_output=True)
        assert not left.stdout
        assert not Path(f"/tmp/ray-up-{os.getuid()}-6379").exists()

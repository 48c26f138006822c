"""A real Slurm of several nodes on one machine: each slurmd in a network namespace of its own.

Needs Debian's slurm-wlm and munge beside what `network_fixture` needs. Every process that it starts it ends.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import network_fixture as network

PATH = os.environ["PATH"] + ":/usr/sbin:/sbin"
DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch")
CONFIGURATION = """\
ClusterName=ser-ray-test
SlurmctldHost=localhost({controller})
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/munge
CredType=cred/munge
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool-%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
KillWait=30
SchedulerParameters=defer,sched_interval=2
MinJobAge=3600
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""


def unavailable_reason() -> str | None:
    """What is missing for it; None where it can run."""
    missing = [name for name in DAEMONS if shutil.which(name, path=PATH) is None]
    return f"{missing[0]} is not installed (apt install slurm-wlm munge)" if missing else network.unavailable_reason()


@dataclass
class Slurm:
    """The daemons, and Slurm's commands."""

    directory: Path
    daemons: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def __call__(self, *command: str, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> str:
        """The output of one of Slurm's commands."""
        given = {**os.environ, "SLURM_CONF": str(self.directory / "slurm.conf"), "PATH": PATH, **(env or {})}
        return subprocess.run(command, check=True, capture_output=True, text=True, env=given, cwd=cwd).stdout.strip()

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED, FAILED, TIMEOUT, ..."""
        return self._field(job, "JobState")

    def exit_code(self, job: str) -> int:
        """Of the batch script."""
        return int(self._field(job, "ExitCode").partition(":")[0])

    def wait(self, done: Callable[[], bool], what: str, seconds: float = 60) -> None:
        """Until ``done()``."""
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            try:
                if done():
                    return
            except subprocess.CalledProcessError:
                pass  # the controller is not up yet
            time.sleep(0.2)
        raise TimeoutError(f"no {what} after {seconds:.0f} s; logs in {self.directory}")

    def run(self, *command: str) -> None:
        """Start a daemon; its output goes to a file. It dies with this process, should that be killed."""
        log = self.directory / f"{len(self.daemons)}.log"
        env = {**os.environ, "SLURM_CONF": str(self.directory / "slurm.conf"), "PATH": PATH}
        with log.open("wb") as file:
            self.daemons.append(
                subprocess.Popen(["setpriv", "--pdeathsig=KILL", *command], stdout=file, stderr=file, env=env)
            )
        time.sleep(0.3)

    def stop(self) -> None:
        """End the daemons, newest first."""
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in self.daemons:
            daemon.wait(timeout=30)

    def _field(self, job: str, name: str) -> str:
        shown = self("scontrol", "-o", "show", "job", job)
        return next(word.partition("=")[2] for word in shown.split() if word.startswith(f"{name}="))


@contextmanager
def slurm(directory: Path, nodes: int = 2, cpus: int = 2) -> Iterator[Slurm]:
    """One of idle nodes n1, n2, ..., while the body runs."""
    running = Slurm(directory)
    with network.hosts(nodes):
        try:
            _configure(directory, nodes, cpus)
            socket, key = str(directory / "munge"), str(directory / "munge.key")
            files = (("pid-file", "munge.pid"), ("log-file", "munge.log"), ("seed-file", "munge.seed"))
            own = [f"--{option}={directory / name}" for option, name in files]
            running.run("munged", "--foreground", "--force", f"--socket={socket}", f"--key-file={key}", *own)
            running.run("slurmctld", "-D")
            for number in range(1, nodes + 1):
                running.run(*network.inside(number, "slurmd", "-D", "-N", f"n{number}"))
            running.wait(lambda: running("sinfo", "-h", "-o", "%T %D") == f"idle {nodes}", "idle nodes")
            yield running
        finally:
            running.stop()


def _configure(directory: Path, nodes: int, cpus: int) -> None:
    text = CONFIGURATION.format(directory=directory, controller=network.address(254))
    for number in range(1, nodes + 1):
        (directory / f"spool-n{number}").mkdir(parents=True)
        text += f"NodeName=n{number} NodeAddr={network.address(number)} CPUs={cpus} RealMemory=4000\n"
    (directory / "state").mkdir()
    (directory / "slurm.conf").write_text(text)
    (directory / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    key = directory / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)

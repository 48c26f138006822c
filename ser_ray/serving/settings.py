"""What a server is started with: the arguments of its application, in a configuration file of Ray Serve too."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from ser_ray.serving.limits import Limits

THREADS = 4
"""Of one replica on CPUs: a small model gains little from more, and other replicas can use them."""


class Settings(BaseModel):
    """Of `ser_ray.serving.deployment:application`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    checkpoints: dict[str, str] = Field(min_length=1)
    """Name -> directory, as every node of the cluster sees it. The first one answers where none is named."""
    host: str = "127.0.0.1"
    """Where the server listens: without a key it has to be this machine alone."""
    key_file: str | None = None
    """As every node sees it."""
    replicas: int | None = Field(None, ge=1)
    """Of the model; None: by load, from one to as many as the cluster has room for."""
    limits: Limits = Limits()
    batched: bool = True
    """False answers one request after the other: for comparison."""


def cpus_of_replica(cores: int) -> int:
    """CPUs of a replica without a GPU: one core is left for HTTP and for decoding.

    >>> cpus_of_replica(1), cpus_of_replica(2), cpus_of_replica(16)
    (1, 1, 4)
    """
    return max(1, min(THREADS, cores - 1))


def most_replicas(cores: int, gpus: int) -> int:
    """How many there may be by load: one a GPU, or as many as the cores have room for.

    >>> most_replicas(2, 0), most_replicas(16, 0), most_replicas(16, 8)
    (1, 3, 8)
    """
    return gpus or max(1, (cores - 1) // cpus_of_replica(cores))

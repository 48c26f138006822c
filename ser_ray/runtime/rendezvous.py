"""How the processes of a trial find each other on a Ray of one's own: by a file, over loopback.

Ray Train has torch's store for it (``env`` and ``tcp`` alike), which listens on all addresses of the machine and asks
for nothing. On a cluster, whose nodes share no directory that only their owner can enter, it is still used.
"""

from __future__ import annotations

import os
import socket
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _set_torch_distributed_env_vars, _setup_torch_process_group, _TorchBackend

LOOPBACK = ("lo", "lo0")
"""Names of the interface, on Linux and on macOS."""


@dataclass
class ByFile(TorchConfig):
    """`TorchConfig` for workers that are all on this machine."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        """What sets the workers up."""
        return _ByFile


# -- below: how it is done


class _ByFile(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        """As Ray Train's own, but for the address of the store."""
        session = Path(ray._private.worker._global_node.get_session_dir_path())
        url = f"file://{session / f'rendezvous-{uuid.uuid4().hex}'}"  # a file of an earlier group would confuse torch
        worker_group.execute(_set_torch_distributed_env_vars)
        entering = [
            worker_group.execute_single_async(
                rank,
                _enter,
                backend=backend_config.backend,
                world_rank=rank,
                world_size=len(worker_group),
                init_method=url,
                timeout_s=backend_config.timeout_s,
            )
            for rank in range(len(worker_group))
        ]
        ray.get(entering)


def _enter(**group: Any) -> None:
    """In a worker. gloo would listen on the address that the machine's name has."""
    names = [name for _, name in socket.if_nameindex() if name in LOOPBACK]
    if names:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", names[0])
    _setup_torch_process_group(**group)

"""What tests of the server share: recordings in memory, a backend in this process, and what a refusal has to be."""

from __future__ import annotations

import base64
import io
import json
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import soundfile
import uvicorn

from ser_ray.serving import answering
from ser_ray.serving.app import make_app
from ser_ray.serving.keys import Keys
from ser_ray.serving.limits import Limits
from ser_ray.serving.loaded import LoadedModels
from ser_ray.serving.settings import Settings

HERE = "http://127.0.0.1:8000"


def wav(seconds: float, seed: int = 0, rate: int = 16_000, format: str = "WAV") -> bytes:
    """A tone in noise, as a file."""
    rng = np.random.default_rng(seed)
    time = np.arange(int(seconds * rate)) / rate
    tone = 0.3 * np.sin(2 * np.pi * rng.uniform(100, 600) * time) + 0.05 * rng.standard_normal(len(time))
    file = io.BytesIO()
    soundfile.write(file, tone, rate, format=format)
    return file.getvalue()


def pcm(seconds: float, rate: int) -> bytes:
    """The same as int16."""
    samples, _ = soundfile.read(io.BytesIO(wav(seconds, 4, rate)), dtype="int16")
    return samples.astype("<i2").tobytes()


def encoded(recording: bytes) -> str:
    """As JSON has it."""
    return base64.b64encode(recording).decode()


def refused(answer: Any, status: int) -> str:
    """The reason in a refusal, which has to be one line of JSON with nothing else in it."""
    assert answer.status_code == status, answer.text
    assert "\n" not in answer.text
    assert "Traceback" not in answer.text
    content = json.loads(answer.text)
    assert set(content) == {"error", "status"}
    assert content["status"] == status
    return content["error"]


@dataclass
class Here:
    """`service.Backend` in this process; ``broken``: what it raises in place of an answer."""

    loaded: LoadedModels
    broken: Exception | None = None
    ready: bool = True

    async def answer(self, job: answering.Job) -> answering.Reply:
        """One job alone."""
        if self.broken:
            raise self.broken
        return answering.answer([answering.known_of(job, self.loaded.get(job.model))])[0]

    async def enrol(self, model: str, windows: Sequence[np.ndarray], name: str) -> dict[str, Any]:
        """As a replica."""
        return answering.enrolled(self.loaded.get(model), windows, name)

    async def is_ready(self) -> bool:
        """As it is told."""
        return self.ready


@contextmanager
def answering_at(
    checkpoints: Mapping[str, str], here: Here, keys: Keys | None = None, **limits: float
) -> Iterator[int]:
    """The application over real sockets, without Ray; its port."""
    settings = Settings(checkpoints=dict(checkpoints), limits=Limits.model_validate(limits))
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        app = make_app(settings, here, keys or Keys({}))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        try:
            yield int(listening.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join()

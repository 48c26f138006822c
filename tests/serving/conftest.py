"""Small checkpoints to serve, and the application over them without Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from backbone_fixtures import experiment
from serving_fixtures import HERE, Here
from starlette.testclient import TestClient

from ser_ray.models import checkpoint
from ser_ray.models.classifier import build
from ser_ray.serving.app import make_app
from ser_ray.serving.keys import Keys
from ser_ray.serving.limits import Limits
from ser_ray.serving.loaded import LoadedModels
from ser_ray.serving.settings import Settings


@pytest.fixture(scope="session")
def checkpoints(backbones_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two frozen ones on one backbone, the second of which uses voices and cuts recordings after 2 s."""
    folder = tmp_path_factory.mktemp("served")
    for name, seed, more in (
        ("plain", 0, {}),
        ("known", 1, {"head": {"speaker": "standardize"}, "audio": {"max_seconds": 2.0}}),
    ):
        described = experiment(
            backbones_dir / "whisper",
            ("angry", "happy", "sad"),
            name=name,
            seed=seed,
            adapter={"method": "frozen"},
            **more,
        )
        model = build(described)
        if model.head.speaker is not None:
            speech = 0.1 * torch.randn(5, model.head.embedding_width, generator=torch.Generator().manual_seed(seed))
            model.head.speaker.fit(speech, ["c/a", "c/a", "c/b", "c/b", "c/b"])
        with torch.no_grad():  # so that answers are told apart
            model.head.classifier[-1].weight.mul_(5)
        checkpoint.save(model, folder / name / "best", {"epoch": 0, "dev_uar": 0.5})
    return {name: str(folder / name / "best") for name in ("plain", "known")}


@pytest.fixture(scope="session")
def here(checkpoints: dict[str, str]) -> Here:
    return Here(LoadedModels(checkpoints, 4))


@pytest.fixture
def serving(checkpoints: dict[str, str], here: Here) -> Iterator[Callable[..., TestClient]]:
    """Starts the application with limits, keys and another backend; its processes end with the test."""
    opened = []

    def start(keys: Keys | None = None, backend: Any = None, **limits: float) -> TestClient:
        settings = Settings(checkpoints=checkpoints, limits=Limits.model_validate(limits))
        app = make_app(settings, backend or here, keys or Keys({}))
        opened.append(TestClient(app, base_url=HERE, raise_server_exceptions=False))
        return opened[-1].__enter__()

    yield start
    for client in opened:
        client.__exit__(None, None, None)

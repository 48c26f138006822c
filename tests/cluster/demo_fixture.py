"""The demo, small, as the tests of clusters search it."""

from __future__ import annotations

from pathlib import Path


def small_demo(space: str | Path, name: str, storage: Path, *more: str) -> list[str]:
    """Arguments of a verb: the demo's file, few short trials, absolute storage, then ``more``."""
    return [
        str(space),
        f"experiment.name={name}",
        "experiment.backbone=embedded/tiny-whisper",
        "experiment.head.init=random",  # a probe would be one epoch more, the one before the first
        "experiment.epochs=2",
        "tune.trials=4",
        f"storage.results={storage}/results",
        f"storage.cache={storage}/cache",
        *more,
    ]

"""The demo, small and over the tiny corpus, as the tests of clusters search it."""

from __future__ import annotations

from pathlib import Path


def small_demo(space: str | Path, name: str, corpus: Path, storage: Path, *more: str) -> list[str]:
    """Arguments of a verb: the demo's file, another corpus, few short trials, absolute storage, then ``more``."""
    return [
        str(space),
        f"experiment.name={name}",
        f"experiment.corpora={{ravdess: {corpus}}}",
        "experiment.head.init=random",  # a probe would be one epoch more, the one before the first
        "experiment.head.speaker=none",  # a pass over train more after each
        "experiment.epochs=2",
        "experiment.batch_seconds=10",
        "search={optimizer.lr: {loguniform: [3.0e-4, 3.0e-3]}}",
        "tune.first=[]",
        "tune.trials=4",
        f"storage.results={storage}/results",
        f"storage.cache={storage}/cache",
        *more,
    ]

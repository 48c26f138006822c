"""The proof of an export: the largest difference between its probabilities and those of `ser-ray predict`.

An export is loaded in a fresh process that cannot import ser_ray, and answers the same recordings. Above the limit it
is not an export of the checkpoint, and is thrown away.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from ser_ray.evaluation import metrics
from ser_ray.exporting import QUANTISED, Format, Options
from ser_ray.exporting.merged import is_quantised
from ser_ray.exporting.recordings import Recordings
from ser_ray.models.ensemble import Model
from ser_ray.schema import SAMPLING_RATE
from ser_ray.training.inference import predict as predict_recordings

EXACT: Final = 1e-4
"""Of a probability: the limit in fp32. Sums in another order differ by less than a tenth of it."""
ROUNDED: Final = 2e-2
"""The limit for weights in fewer bits than the checkpoint's, or more: fp16, int8, and NF4 merged on the original."""

_WITHOUT_US: Final = (
    "import runpy, sys; sys.modules['ser_ray'] = None; del sys.argv[0]; "
    "runpy.run_path(sys.argv[0], run_name='__main__')"
)


@dataclass(frozen=True)
class Difference:
    """How the answers of an export differ from those of its checkpoint, on N recordings."""

    recordings: int
    largest: float
    """Over all recordings and emotions, of the probabilities."""
    mean: float
    """Over the same, of the absolute differences."""
    equal: float
    """Share of the recordings with the same most probable emotion."""
    uar: float | None
    """Of the checkpoint; None where the emotions of the recordings are not known."""
    uar_export: float | None


@dataclass(frozen=True)
class Proof:
    """What `prove` measured, and on what."""

    source: str
    """The recordings, in words."""
    limit: float
    difference: Difference

    @property
    def holds(self) -> bool:
        """Whether the largest difference is within the limit; that of probabilities that are not finite is not."""
        return bool(self.difference.largest <= self.limit)

    def content(self) -> dict[str, Any]:
        """For export.json."""
        return {"on": self.source, "limit": self.limit, **asdict(self.difference)}

    def __str__(self) -> str:
        d = self.difference
        uar = "" if d.uar is None else f"; UAR {d.uar:.3f} and {d.uar_export:.3f}"
        return (
            f"probabilities differ by at most {d.largest:.1e} (limit {self.limit:g}) and by {d.mean:.1e} on average; "
            f"the same emotion for {d.equal:.1%}{uar}; {d.recordings} recordings, {self.source}"
        )


def compare(ours_NK: np.ndarray, theirs_NK: np.ndarray, labels: np.ndarray | None = None) -> Difference:
    """The difference of two tables of probabilities of the same N recordings; ``labels``: (N,), if they are known.

    >>> compare(np.array([[0.9, 0.1], [0.4, 0.6]]), np.array([[0.8, 0.2], [0.6, 0.4]])).equal
    0.5
    """
    assert ours_NK.shape == theirs_NK.shape, (ours_NK.shape, theirs_NK.shape)
    apart_NK = np.abs(ours_NK - theirs_NK)

    def uar(probabilities_NK: np.ndarray) -> float | None:
        if labels is None:
            return None
        return float(metrics.uar(metrics.confusion(labels, probabilities_NK.argmax(1), probabilities_NK.shape[1])))

    equal_N = ours_NK.argmax(1) == theirs_NK.argmax(1)
    limits = float(apart_NK.max()), float(apart_NK.mean())
    return Difference(len(ours_NK), *limits, float(equal_N.mean()), uar(ours_NK), uar(theirs_NK))


def prove(form: Format, target: Path, directory: Path, model: Model, recordings: Recordings, options: Options) -> Proof:
    """Compare the export in ``target`` with the checkpoint in ``directory``, which ``model`` is as `merged.reference`
    loads it.

    Recordings that `ser-ray predict` refuses, such as one that is too short without its quiet ends, do not count.
    """
    found = list(predict_recordings(model, [(waveform, SAMPLING_RATE) for waveform in recordings.waveforms]))
    answers = [list(answer.probabilities.values()) for answer in found if answer.start is None]  # of whole recordings
    usable = [number for number, answer in enumerate(answers) if answer]
    theirs_NK = form.predict(target, directory, [recordings.waveforms[number] for number in usable], options)
    labels = None if recordings.labels is None else recordings.labels[usable]
    difference = compare(np.array([answers[number] for number in usable]), theirs_NK, labels)
    as_tested = not is_quantised(model) or options.base == QUANTISED
    exact = options.dtype == "fp32" and as_tested
    return Proof(recordings.source, EXACT if exact else ROUNDED, difference)


def in_fresh_process(script: Path, target: Path, waveforms: Sequence[np.ndarray], *more: str) -> np.ndarray:
    """What ``python script TARGET RECORDINGS.npz ANSWERS.npy MORE...`` writes to ANSWERS.npy, in a process where
    ser_ray cannot be imported. RECORDINGS.npz has the arrays 0, 1 and so on, each (T,) float32 at 16 kHz.

    Raises RuntimeError with what it printed where it fails.
    """
    with tempfile.TemporaryDirectory(prefix="ser-ray-") as scratch:
        given, made = Path(scratch) / "recordings.npz", Path(scratch) / "answers.npy"
        arrays: dict[str, Any] = {str(number): waveform for number, waveform in enumerate(waveforms)}
        np.savez(given, **arrays)
        # The modelling file of an export is copied to this cache, which may hold another of the same name.
        own = os.environ | {"HF_MODULES_CACHE": scratch, "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-c", _WITHOUT_US, str(script), str(target), str(given), str(made), *more]
        done = subprocess.run(command, env=own, cwd=scratch, capture_output=True, text=True)  # noqa: S603
        if done.returncode:
            raise RuntimeError(f"{target.name} does not load in a fresh process:\n{done.stderr[-2000:]}")
        answers_NK: np.ndarray = np.load(made)
    return answers_NK

"""The form in which the frozen part of a model is kept: what is the same in every epoch and every trial.

    states   (F, S, D) fp16: the input of block k, unless `head.layer_mix` is last the states below it as well
    moments  (M, D) fp32: where nothing of the backbone learns and pooling is plain, frames are not needed either

Moments: a head that mixes S states with weights w and pools mean and deviation over frames sees sum_l w_l mean_l and
sum_lm w_l w_m cov_lm, so the means of all states and their covariances (one row a pair) are all that it can ever ask
for: the same figures to rounding, from a hundredth of the bytes.

`ser_ray.models.prefix` makes it. Nothing here needs torch: a process that only finds or feeds it starts at once.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa

from ser_ray.config import fingerprint

FORMAT: Final = 3
"""Raised when `compute` gives something else; part of a cache's name."""
COLUMN: Final = "features"
SCHEMA: Final = pa.schema([("utterance_id", pa.string()), ("num_samples", pa.int32()), (COLUMN, pa.large_binary())])
"""num_samples are those of the speech: batches are packed by them, and so are the same as from speech."""
FRAMES_PER_SECOND: Final = 50
"""Of all four families: a frame each 20 ms."""


@dataclass(frozen=True)
class Prefix:
    """What is kept of every utterance; see the module's docstring."""

    backbone: str
    identity: str
    """A digest of its configuration and weights; the name may be a place that another machine does not have."""
    quantized: bool
    precision: str
    first_layer: int
    """Block k, whose input is the last state that is kept; the number of blocks where all are frozen."""
    num_states: int
    """S."""
    width: int
    """D."""
    moments: str | None
    """None: frames; else the pooling that they serve, mean or statistics."""

    @property
    def shape(self) -> tuple[int, int]:
        """Of one frame, (S, D); or of the moments, (M, D)."""
        pairs = self.num_states * (self.num_states + 1) // 2
        return self.num_states + (pairs if self.moments == "statistics" else 0), self.width

    @property
    def dtype(self) -> np.dtype[Any]:
        """fp16 for frames: with 11 bits eight times closer than bf16, and no hidden state comes near its range."""
        return np.dtype(np.float32 if self.moments else np.float16)

    def gigabytes(self, seconds: float, utterances: int) -> float:
        """What a cache of so much speech takes."""
        rows = utterances if self.moments else seconds * FRAMES_PER_SECOND
        return rows * self.shape[0] * self.shape[1] * self.dtype.itemsize / 1e9

    def read(self, buffer: pa.Buffer) -> np.ndarray:
        """Bytes -> (F, S, D), or (M, D)."""
        shape = self.shape if self.moments else (-1, *self.shape)
        return np.frombuffer(buffer, self.dtype).reshape(shape)

    def key(self) -> str:
        """The name of its cache: differs where anything differs that the values depend on."""
        return fingerprint(FORMAT, {name: value for name, value in asdict(self).items() if name != "backbone"})

    def __str__(self) -> str:
        states = "1 state" if self.num_states == 1 else f"{self.num_states} states"
        what = f"pooled {self.moments}" if self.moments else f"{states} a frame"
        return f"{self.backbone.rsplit('/', 1)[-1]} below layer {self.first_layer} ({what})"

"""The format of cached features: the output of a model's frozen part, which is the same in every epoch and trial.

    states   (F, S, D) fp16: the input of block k, and the states below it unless `head.layer_mix` is last
    moments  (M, D) fp32: no frames are needed if the backbone is frozen and the head can do without them

Moments: a head that mixes S states with weights w and pools mean and deviation over frames needs sum_l w_l mean_l and
sum_lm w_l w_m cov_lm. So the means of all states and their covariances (one row per pair) are all that it needs: the
same metrics up to rounding, from a part of the bytes (whisper-tiny, 4 s: 1/13).

`ser_ray.models.prefix` computes them. Nothing here needs torch, so a process that only looks up or reads the cache
starts quickly.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

import numpy as np
import pyarrow as pa

from ser_ray.config import fingerprint

FORMAT: Final = 4
"""Raised when the output of `ser_ray.models.prefix.compute` changes; part of a cache's name."""
COLUMN: Final = "features"
SCHEMA: Final = pa.schema([("utterance_id", pa.string()), ("num_samples", pa.int32()), (COLUMN, pa.large_binary())])
"""num_samples is that of the speech: batches are packed by it, so they are the same as from speech."""
FRAMES_PER_SECOND: Final = 50
"""Of all four families: one frame per 20 ms."""
Moments = Literal["mean", "statistics"]
"""mean: the means of the states. statistics: their covariances as well."""


@dataclass(frozen=True)
class Prefix:
    """What is cached of every utterance; see the module's docstring."""

    backbone: str
    identity: str
    """A digest of the backbone's configuration and weights; its name may be a path that another machine lacks."""
    quantized: bool
    precision: str
    first_layer: int
    """Block k, whose input is the last cached state; the number of blocks if all are frozen."""
    num_states: int
    """S."""
    width: int
    """D."""
    moments: Moments | None
    """None for frames."""

    @property
    def covariances(self) -> bool:
        """Whether the moments have them."""
        return self.moments == "statistics"

    @property
    def shape(self) -> tuple[int, int]:
        """Of one frame, (S, D); or of the moments, (M, D)."""
        pairs = self.num_states * (self.num_states + 1) // 2
        return self.num_states + (pairs if self.covariances else 0), self.width

    @property
    def dtype(self) -> np.dtype[Any]:
        """fp16 for frames: its 11 bits are eight times as precise as bf16, and no hidden state comes near its range."""
        return np.dtype(np.float32 if self.moments else np.float16)

    def gigabytes(self, seconds: float, utterances: int) -> float:
        """The size of a cache of so much speech."""
        rows = utterances if self.moments else seconds * FRAMES_PER_SECOND
        return rows * self.shape[0] * self.shape[1] * self.dtype.itemsize / 1e9

    def read(self, buffer: pa.Buffer) -> np.ndarray:
        """Bytes -> (F, S, D), or (M, D)."""
        shape = self.shape if self.moments else (-1, *self.shape)
        return np.frombuffer(buffer, self.dtype).reshape(shape)

    def key(self) -> str:
        """The name of its cache: it changes with everything that the values depend on."""
        return fingerprint(FORMAT, {name: value for name, value in asdict(self).items() if name != "backbone"})

    def __str__(self) -> str:
        states = "1 state" if self.num_states == 1 else f"{self.num_states} states"
        what = f"pooled {self.moments}" if self.moments else f"{states} a frame"
        return f"{self.backbone.rsplit('/', 1)[-1]} below layer {self.first_layer} ({what})"

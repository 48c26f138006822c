"""What an experiment chooses by name: a pooling, a head, a loss. One is added in a file of its own and a line here.

A table has ``module:attribute`` for every name. These are strings, so that reading a configuration imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from ser_ray.config.validation import hint

POOLINGS: Final = {
    "mean": "ser_ray.models.pooling.mean:MeanPooling",
    "statistics": "ser_ray.models.pooling.statistics:StatisticsPooling",
    "attentive": "ser_ray.models.pooling.attentive:AttentivePooling",
}
"""Each a `ser_ray.models.pooling.Pooling`."""
HEADS: Final = {
    "pooled": "ser_ray.models.heads.pooled:PooledHead",
}
"""Each a `ser_ray.models.heads.Head`."""
LOSSES: Final = {
    "cross_entropy": "ser_ray.training.losses.cross_entropy:cross_entropy",
    "focal": "ser_ray.training.losses.focal:focal",
}
"""Each a `ser_ray.training.losses.Loss`."""


@dataclass(frozen=True)
class NameIn:
    """Marks a text field of the configuration whose value must be a name in ``table``, when it is validated."""

    table: Mapping[str, str]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._checked, handler(source))

    def _checked(self, name: str) -> str:
        if name not in self.table:
            raise ValueError(f"unknown value {name!r}{hint(name, self.table)}")
        return name

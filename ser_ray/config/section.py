"""What sections of the configuration are made of: the class of all of them, lists of words, units."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Final

from pydantic import BaseModel, BeforeValidator, ConfigDict
from pydantic.fields import FieldInfo

from ser_ray.config.words import as_word


def as_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


Words = Annotated[tuple[str, ...], BeforeValidator(as_tuple)]


def with_word_keys(value: object) -> object:
    """A map whose keys are words, as they were written: in YAML 0 and true are none."""
    return {as_word(key): inner for key, inner in value.items()} if isinstance(value, dict) else value


Word = Annotated[str, BeforeValidator(as_word)]
"""A word as it was written, also where YAML takes it for a number."""


@dataclass(frozen=True)
class Unit:
    """What a number counts or measures: ``Annotated[float, Unit("s")]``. `ser_ray.explain` shows it."""

    name: str


NO_UNIT: Final = Unit("no unit")
"""Of a number that stands for itself: a seed, a rank, the number of a fold."""


class Section(BaseModel):
    """A section of the configuration: immutable, rejects unknown keys, does not convert types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


def every_field(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """The fields of a section and of the sections in it, in the order of the file, each with its dotted key."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from every_field(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field

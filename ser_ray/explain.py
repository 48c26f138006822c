"""What the keys of the configuration mean: ``ser-ray config [KEY] [SPACE.yaml]``. All of it is read from the fields."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from ser_ray import config
from ser_ray.config.choices import NameIn
from ser_ray.config.validation import existing, hint, with_values
from ser_ray.schema import UserError
from ser_ray.terminal import PlainConsole, titled

_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


@dataclass(frozen=True)
class Key:
    """A key of the configuration."""

    name: str
    """Dotted, such as experiment.adapter.rank."""
    type: str
    """What it takes, in words: an integer of at least 1."""
    unit: str
    """Of a number, in words: in s, share of the steps, no unit. Empty for what is no number."""
    default: str
    """As it would be written; "required" where there is none."""
    meaning: str
    """Its docstring: what it is for, the reason for its default."""

    @property
    def summary(self) -> str:
        """Type, unit and default: integer at least 1, in epochs; default 10."""
        return f"{', '.join(filter(None, (self.type, self.unit)))}; {self.default}"


def every_key() -> Iterator[Key]:
    """Every key, in the order of the file."""
    for name, field in config.every_field(config.SearchSpace):
        yield Key(name, _type(field), _unit(field), _default(field), " ".join((field.description or "").split()))


def main(wanted: str | None, path: Path | None, overrides: list[str]) -> int:
    """Print the keys that ``wanted`` names, wholly or by a part such as rank or adapter; all of them without it.

    Raises UserError where there is none.
    """
    console = PlainConsole()
    if wanted is not None and wanted.endswith((".yaml", ".yml")):  # no key, but a file
        overrides = [*([str(path)] if path is not None else []), *overrides]
        path, wanted = Path(wanted), None
    known = list(every_key())
    chosen = [key for key in known if wanted is None or f".{wanted}." in f".{key.name}."]
    if not chosen:
        assert wanted is not None
        parts = {part for key in known for part in (key.name, *key.name.split("."))}
        raise UserError(f"{wanted}: no such key{hint(wanted, parts, '; ser-ray config lists all')}")
    values = origins(path, overrides) if path is not None else {}
    for key in chosen:
        console.print(titled(key.name, f": {key.summary}"))
        if key.name in values:
            value, origin = values[key.name]
            console.print(f"  here: {value!r} ({origin})")
        console.print(f"  {key.meaning}")
    return 0


def origins(path: Path, overrides: list[str]) -> dict[str, tuple[Any, str]]:
    """Every key of a search space: its value, and whether that is of the file, the command line, or the default."""
    space = config.load(path, overrides, needs_backbone=False)
    lines = config.line_numbers(path.read_text(encoding="utf-8"))
    content = config.to_dict(space)
    given: dict[str, Any] = {}
    for override in overrides:
        name, _, text = override.partition("=")
        given = with_values(given, {name: config.read_yaml(text)}, known=False)
    answer = {}
    for key in every_key():
        place = tuple(key.name.split("."))
        value = reduce(dict.__getitem__, place, content)
        if existing(place, given) == place:
            origin = "given on the command line"
        elif place in lines:
            origin = f"{path}, line {lines[place]}"
        else:
            origin = "default"
        answer[key.name] = value, origin
    return answer


# -- below: how it is done


def _default(field: FieldInfo) -> str:
    if field.default_factory is not None:
        return f"default {field.get_default(call_default_factory=True)!r}"
    if field.default is PydanticUndefined:
        return "required"
    default = list(field.default) if isinstance(field.default, tuple) else field.default
    return f"default {'null' if default is None else default}"


def _type(field: FieldInfo) -> str:
    if tables := [one.table for one in field.metadata if isinstance(one, NameIn)]:
        return " | ".join(tables[0])
    bounds = [
        f"{words} {getattr(limit, name):g}"
        for limit in field.metadata
        for name, words in _BOUNDS.items()
        if getattr(limit, name, None) is not None
    ]
    return " ".join([_words(field.annotation), *([" and ".join(bounds)] if bounds else [])])


def _unit(field: FieldInfo) -> str:
    units = (one.name for one in field.metadata if isinstance(one, config.Unit))
    return next((name if name.startswith(("no ", "share ")) else f"in {name}" for name in units), "")


def _words(annotation: Any) -> str:
    origin, inside = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " | ".join(map(str, inside))
    if origin is typing.Annotated:
        return _words(inside[0])
    if origin in (types.UnionType, typing.Union):
        return " | ".join(_words(one) for one in inside)
    if origin is tuple:
        return f"list of {_words(inside[0])}"
    if origin is dict:
        return f"mapping of {_words(inside[0])} to {_words(inside[1])}"
    names = {int: "integer", float: "number", str: "text", bool: "true | false", type(None): "null", Any: "any value"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)).lower())

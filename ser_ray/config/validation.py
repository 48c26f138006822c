"""From plain content to a model of the configuration, or to a message that says what does not fit."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from ser_ray.schema import UserError

M = TypeVar("M", bound=BaseModel)


def to_dict(model: BaseModel) -> dict[str, Any]:
    """The model as plain JSON types, as it would be written to YAML."""
    return model.model_dump(mode="json")


def fingerprint(*parts: object) -> str:
    """Twelve hex digits that identify content; equal content gives equal digits.

    >>> fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    True
    """
    plain = [to_dict(part) if isinstance(part, BaseModel) else part for part in parts]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:12]


def with_values(content: dict[str, Any], values: Mapping[str, Any], known: bool = True) -> dict[str, Any]:
    """A copy of nested ``content`` with dotted keys set; with ``known``, only keys that exist already."""
    content = json.loads(json.dumps(content))
    for dotted, value in values.items():
        node = content
        *parents, last = key_parts(dotted)
        for part in parents:
            child = node.get(part) if known else node.setdefault(part, {})
            if child is None and not known:
                child = node[part] = {}
            if not isinstance(child, dict):
                raise UserError(f"{dotted}: no such field{hint(part, node)}")
            node = child
        if known and last not in node:
            raise UserError(f"{dotted}: no such field{hint(last, node)}")
        node[last] = value
    return content


def key_parts(dotted: str) -> list[str]:
    """``search.adapter.rank`` is the key ``adapter.rank`` of the search, not a field three levels deep."""
    head, dot, rest = dotted.partition(".")
    return [head, rest] if head == "search" and dot else dotted.split(".")


Place = tuple[str | int, ...]
"""Where something is in nested content: keys, and numbers of list items."""


def validated(
    model: type[M], content: object, where: object = "", lines: Mapping[Place, int] = MappingProxyType({})
) -> M:
    """``content`` as a ``model``. ``where``: the file that it is from, and ``lines`` the line of every place in it, 0
    for what was given on the command line.

    Raises UserError with every problem: of a file each with its line, in a list if there are several, else in one line.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        problems = _problems(error, model, content, lines)
    if not where:  # not of a file: in one line, as the error of a trial travels
        raise UserError("; ".join(text for _, text in problems))
    if len(problems) > 1:
        listed = (f"  {f'line {line}: ' if line else ''}{text}" for line, text in problems)
        raise UserError("\n".join([f"{where}: {len(problems)} problems", *listed]))
    line, text = problems[0]
    raise UserError(f"{where}:{line}: {text}" if line else f"{where}: {text}")


def _problems(
    error: ValidationError, model: type[BaseModel], content: object, lines: Mapping[Place, int]
) -> list[tuple[int, str]]:
    """Every place that does not fit, once, with its line if it is in a file: of a union's types the first complains."""
    by_place: dict[Place, tuple[int, str]] = {}
    for one in error.errors():
        place = existing(one["loc"], content)
        if one["type"] == "missing":
            place, message = one["loc"], "this key is required"
        elif one["type"] == "extra_forbidden":
            message = "unknown key" + hint(str(one["loc"][-1]), _fields_at(model, one["loc"][:-1]))
        elif one["type"] == "value_error":
            message = one["msg"].removeprefix("Value error, ")
        else:
            message = f"{one['msg'][0].lower()}{one['msg'][1:]}, not {one['input']!r}"
        location = ".".join(map(str, place))
        by_place.setdefault(place, (_line(place, lines), f"{location}: {message}" if location else message))
    return sorted(by_place.values(), key=lambda problem: problem[0])


def existing(place: Place, content: object) -> Place:
    """``place`` as far as it is one of ``content``: pydantic adds the type of a union that it tried."""
    for depth, part in enumerate(place):
        known = content if isinstance(content, dict) else dict(enumerate(content)) if isinstance(content, list) else {}
        if part not in known:
            return place[:depth]
        content = known[part]
    return place


def _line(place: Place, lines: Mapping[Place, int]) -> int:
    """The line of a place; of one that is missing, that of what should hold it; 0 if it is in no file."""
    inside = (place[:length] for length in range(len(place), 0, -1))
    return next((lines[outer] for outer in inside if outer in lines), 0)


def _fields_at(model: type[BaseModel], path: tuple[int | str, ...]) -> Iterable[str]:
    fields: Any = model
    for part in path:
        info = getattr(fields, "model_fields", {}).get(part)
        fields = info.annotation if info is not None else None
    return getattr(fields, "model_fields", {})


def hint(word: str, known: Iterable[str]) -> str:
    """What may have been meant by a word that is not known."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; known: {', '.join(sorted(known))}" if known else ""

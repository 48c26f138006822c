"""From plain content to a model of the configuration, or to a message that says what does not fit."""

from __future__ import annotations

import difflib
import hashlib
import json
import typing
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, Final, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from ser_ray.schema import UserError, shortened

M = TypeVar("M", bound=BaseModel)
_MOST_LISTED: Final = 30
"""Problems of one file that are listed: more fit on no screen, and mostly have one cause."""
_LONGEST: Final = 1000
"""Characters of one problem: all that may be at a place is named in some."""
_SHORT: Final = 240
"""The same of a file that nobody has written by hand: it is damaged, and nobody will mend it key by key."""


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

Problem = tuple[Place, str]
"""Where something does not fit, and what to do."""


class ProblemsError(ValueError):
    """Several problems in one field or section, each with its place in it. A validator raises it: of another error
    pydantic knows only the place of the field."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = list(problems)
        super().__init__("; ".join(map(_in_words, self.problems)))


def refuse(problems: Iterable[Problem]) -> None:
    """Raise `ProblemsError` if there are any."""
    if found := list(problems):
        raise ProblemsError(found)


def validated(
    model: type[M],
    content: object,
    where: object = "",
    lines: Mapping[Place, int] = MappingProxyType({}),
    listed: bool = True,
) -> M:
    """``content`` as a ``model``. ``where``: the file that it is from, and ``lines`` the line of every place in it, 0
    for what was given on the command line.

    Raises UserError with every problem: of a file each with its line, in a list if there are several, else in one line.
    Without ``listed`` with the first: of a file that nobody has written by hand.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        problems = problems_of(error, model, content)
    if not where:  # not of a file: in one line, as the error of a trial travels
        raise UserError("; ".join(map(_in_words, problems)))
    numbered = sorted(((_line(problem[0], lines), _in_words(problem)) for problem in problems), key=lambda one: one[0])
    if len(numbered) > 1 and listed:
        shown = [f"  {f'line {line}: ' if line else ''}{text}" for line, text in numbered[:_MOST_LISTED]]
        more = [f"  and {len(numbered) - _MOST_LISTED} more"] if len(numbered) > _MOST_LISTED else []
        raise UserError(f"{where}: {len(numbered)} problems", *shown, *more)
    line, text = numbered[0]
    text = text if listed else shortened(text, _SHORT)
    others = f" (and {len(numbered) - 1} more problems)" if len(numbered) > 1 else ""
    raise UserError(f"{where}:{line}: {text}{others}" if line else f"{where}: {text}{others}")


def problems_of(error: ValidationError, model: type[BaseModel], content: object) -> list[Problem]:
    """What does not fit, place by place: of a union's types the first complains."""
    found: dict[Place, list[Problem]] = {}
    for one in error.errors():
        place = one["loc"] if one["type"] == "missing" else existing(one["loc"], content)
        cause = one.get("ctx", {}).get("error")
        several = cause.problems if isinstance(cause, ProblemsError) else [((), _message(one, model))]
        found.setdefault(place, [((*place, *inner), text) for inner, text in several])
    return [problem for problems in found.values() for problem in problems]


def existing(place: Place, content: object) -> Place:
    """``place`` as far as it is one of ``content``: pydantic adds the type of a union that it tried."""
    for depth, part in enumerate(place):
        known = content if isinstance(content, dict) else dict(enumerate(content)) if isinstance(content, list) else {}
        if part not in known:
            return place[:depth]
        content = known[part]
    return place


def _in_words(problem: Problem) -> str:
    """In one line, and no longer than a reader reads: keys and values may be anything in a damaged file."""
    place, text = problem
    words = f"{'.'.join(map(str, place))}: {text}" if place else text
    printable = "".join(letter if letter.isprintable() else " " for letter in words[: _LONGEST + 1])
    return printable if len(words) <= _LONGEST else f"{printable[:_LONGEST]} ..."


def _line(place: Place, lines: Mapping[Place, int]) -> int:
    """The line of a place; of one that is missing, that of what should hold it; 0 if it is in no file."""
    inside = (place[:length] for length in range(len(place), 0, -1))
    return next((lines[outer] for outer in inside if outer in lines), 0)


def _message(one: ErrorDetails, model: type[BaseModel]) -> str:
    if one["type"] == "missing":
        return "this key is required"
    if one["type"] == "extra_forbidden":
        return "unknown key" + hint(str(one["loc"][-1]), _fields_at(model, one["loc"][:-1]))
    if one["type"] == "value_error":
        return one["msg"].removeprefix("Value error, ")
    return f"{one['msg'][0].lower()}{one['msg'][1:]}, not {one['input']!r}"


def _fields_at(model: type[BaseModel], path: Place) -> Iterable[str]:
    """The keys that may be at a place; none where any may."""
    known: Any = model
    for part in path:
        if typing.get_origin(known) is dict:
            known = typing.get_args(known)[1]
        else:
            field = getattr(known, "model_fields", {}).get(part)
            known = None if field is None else field.annotation
    return getattr(known, "model_fields", {})


def hint(word: str, known: Iterable[str], otherwise: str | None = None) -> str:
    """What may have been meant by a word that is not known; all that is known, or ``otherwise``, if nothing is close.

    >>> hint("ranc", ["rank", "alpha"]), hint("x", ["rank", "alpha"]), hint("x", ["rank"], "; see the manual")
    ('; did you mean rank?', '; known: alpha, rank', '; see the manual')
    """
    known = list(known)
    if close := difflib.get_close_matches(word, known, n=1):
        return f"; did you mean {close[0]}?"
    return otherwise if otherwise is not None else f"; known: {', '.join(sorted(known))}" if known else ""

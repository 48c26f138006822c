"""The keys that are searched: the values of each, and whether they fit the experiment around them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Final

from pydantic import BeforeValidator, Field, ValidationError, ValidationInfo, field_validator, model_validator

from ser_ray.config.experiment import Experiment
from ser_ray.config.section import Section, as_tuple, every_field
from ser_ray.config.validation import Problem, hint, problems_of, with_values
from ser_ray.schema import UserError

THE_SAME_FOR_ALL: Final = frozenset(
    {"name", "corpora", "labels", "label", "emotions", "merge", "exclude", "audio", "protocol"},
)
"""Fields of `Experiment` that define the data and their split: they cannot be searched."""

Range = tuple[float, float] | tuple[int, int] | None


class Distribution(Section):
    """The values of one searched key: exactly one of choice, uniform, loguniform, randint. Numbers have the unit of the
    key."""

    choice: Annotated[tuple[Any, ...] | None, BeforeValidator(as_tuple)] = None
    uniform: Annotated[tuple[float, float] | None, BeforeValidator(as_tuple)] = None
    loguniform: Annotated[tuple[float, float] | None, BeforeValidator(as_tuple)] = None
    randint: Annotated[tuple[int, int] | None, BeforeValidator(as_tuple)] = None
    """Both ends included."""
    when: dict[str, Annotated[tuple[Any, ...], BeforeValidator(as_tuple)]] = Field(default_factory=dict)
    """Conditions: the key is searched only in trials where every key listed here has one of the given values, such as
    ``when: {adapter.method: [lora, qlora]}``."""

    @field_validator("choice")
    @classmethod
    def _not_empty(cls, choice: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
        if choice == ():
            raise ValueError("it is empty; give at least one value")
        return choice

    @field_validator("uniform", "loguniform", "randint")
    @classmethod
    def _low_is_first(cls, ends: Range, info: ValidationInfo) -> Range:
        if ends is not None and ends[0] >= ends[1]:
            raise ValueError(f"the lower bound {ends[0]} is not below the upper bound {ends[1]}")
        if ends is not None and info.field_name == "loguniform" and ends[0] <= 0:
            raise ValueError(f"the lower bound {ends[0]} is not above 0, as the logarithm needs it")
        return ends

    @model_validator(mode="after")
    def _one_kind(self) -> Distribution:
        kinds = [k for k in ("choice", "uniform", "loguniform", "randint") if getattr(self, k) is not None]
        if len(kinds) != 1:
            raise ValueError("give exactly one of choice, uniform, loguniform, randint")
        return self

    def examples(self) -> tuple[Any, ...]:
        """The values that are validated: all choices, or both ends of a range."""
        ends = self.uniform or self.loguniform or self.randint
        return self.choice if self.choice is not None else tuple(ends or ())


def search_problems(space: Mapping[str, Any]) -> Iterator[Problem]:
    """What in ``search`` and ``tune.first`` names a key that is not there, or has a value that its key cannot have.

    ``space``: plain content of a search space, as it was given. What is wrong in it by itself is passed over here,
    because its own section says so: no problem hides another.
    """
    search, tune = _mapping(space.get("search")), _mapping(space.get("tune"))
    experiment = _mapping(space.get("experiment"))
    before = _problems_with(experiment, {})

    def added(values: Mapping[str, Any]) -> list[Problem]:
        return [_at_its_key(one, values) for one in _problems_with(experiment, values) if one not in before]

    for key in search:
        yield from ((("search", *place), text) for place, text in _problems_of_key(key, search, added))
    points = tune.get("first")
    for number, point in enumerate(points if isinstance(points, list) else ()):
        found = _problems_of_point(_mapping(point), search, added)
        yield from ((("tune", "first", number, *place), text) for place, text in found)


# -- below: how it is done

Added = Callable[[Mapping[str, Any]], list[Problem]]
"""Values of searched keys -> the problems that the experiment has with them, but not without them."""

_KEYS: Final = tuple(dotted for dotted, _ in every_field(Experiment))


def _mapping(content: object) -> Mapping[str, Any]:
    return content if isinstance(content, dict) else {}


def _problems_of_key(key: str, search: Mapping[str, Any], added: Added) -> Iterator[Problem]:
    """What is wrong with a searched key: its conditions, its name, its values."""
    order = list(search)
    for condition in _mapping(_mapping(search[key]).get("when")):
        if condition not in search:
            yield (key, "when", condition), f"this key is not searched{hint(condition, search)}"
        elif order.index(condition) >= order.index(key):
            yield (key, "when", condition), f"list {condition} before {key}, which depends on it"
    if key.split(".")[0] in THE_SAME_FOR_ALL:
        yield (key,), "all trials use the same data, to be comparable; remove this key"
    elif not any(f"{known}.".startswith(f"{key}.") for known in _KEYS):
        yield (key,), f"unknown key{_meant(key)}"
    else:
        points = [(before, {**before, key: value}) for value, before in _values(search[key])]
        found = (problem for before, point in points for problem in added(point) if problem not in added(before))
        yield from dict.fromkeys(found)


def _values(distribution: object) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The values of a searched key, each with every combination of values that its conditions allow to other keys."""
    try:
        known = Distribution.model_validate(distribution)
    except ValidationError:
        return
    for value, *conditions in itertools.product(known.examples(), *known.when.values()):
        yield value, dict(zip(known.when, conditions, strict=True))


def _problems_of_point(point: Mapping[str, Any], search: Mapping[str, Any], added: Added) -> Iterator[Problem]:
    """What is wrong with a point to begin with: keys that are not searched; where all are, its values."""
    strange = [key for key in point if key not in search]
    for key in strange:
        yield (key,), f"this key is not searched{hint(key, search)}"
    if not strange:
        yield from added(point)


def _problems_with(experiment: Mapping[str, Any], values: Mapping[str, Any]) -> list[Problem]:
    try:
        content = with_values(dict(experiment), values, known=False)
        Experiment.model_validate(content)
    except ValidationError as error:
        return problems_of(error, Experiment, content)
    except UserError:  # what should be a section is none, and a key in it cannot be set
        return []
    return []


def _at_its_key(problem: Problem, values: Mapping[str, Any]) -> Problem:
    """A problem of the experiment at the one of ``values`` that has it. If none has, the values together have it."""
    place, text = problem
    for key in values:
        parts = key.split(".")
        if all(one == other for one, other in zip(place, parts, strict=False)):
            return (key, *place[len(parts) :]), text
    return tuple(values) if len(values) == 1 else (), f"this does not fit {'.'.join(map(str, place))}: {text}"


def _meant(key: str) -> str:
    """Which key may have been meant by one that does not exist: one that ends alike, or has a similar name."""
    same = [known for known in _KEYS if known.rpartition(".")[2] == key.rpartition(".")[2]]
    return f"; did you mean {' or '.join(same)}?" if same else hint(key, _KEYS, "; ser-ray config lists all")

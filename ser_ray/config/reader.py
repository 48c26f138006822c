"""The only reader of YAML: a file and ``key=value`` overrides become a `SearchSpace`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from itertools import accumulate
from pathlib import Path
from typing import Any, Final

import yaml
from pydantic import BaseModel

from ser_ray.config.experiment import Experiment
from ser_ray.config.space import SearchSpace
from ser_ray.config.validation import Place, key_parts, to_dict, validated, with_values
from ser_ray.schema import UserError, reason_of, shortened

UNSPECIFIED: Final = "unspecified"
"""The backbone of a space that names none, where none is needed."""


def load(path: str | Path, overrides: Iterable[str] = (), *, needs_backbone: bool = True) -> SearchSpace:
    """Read a search space from YAML and apply ``key=value`` overrides.

    Without ``needs_backbone`` a space may leave ``experiment.backbone`` out: who only prepares or audits uses none.

    An override of a searched key fixes it: the key is removed from the search and from ``tune.first`` (points that
    become equal are tried once). Keys that are searched only with other values of it are removed too.

    Raises UserError for a file that is missing or not YAML, and with a line for every unknown key and invalid value.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a YAML search space, such as search_spaces/demo.yaml")
    content, lines = _read(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a mapping with the key experiment")
    for override in overrides:
        key, equals, value_text = override.partition("=")
        if not equals:
            given = shortened(repr(override), 160)
            raise UserError(f"{given}: overrides are written key=value, such as experiment.epochs=3")
        value = _parse_value(override, value_text)
        if key.startswith("experiment.") and isinstance(content.get("search"), dict):
            _fix_searched_key(content, key.removeprefix("experiment."), value)
        content = with_values(content, {key: value}, known=False)
        lines = _lines_left(lines, tuple(key_parts(key)))
    if not needs_backbone and isinstance(content.get("experiment"), dict):
        content["experiment"].setdefault("backbone", UNSPECIFIED)
    return validated(SearchSpace, content, path, lines)


def dump(model: BaseModel) -> str:
    """The model as YAML that `load` (or `load_experiment`) reads back to an equal one."""
    return yaml.dump(to_dict(model), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def load_experiment(path: str | Path) -> Experiment:
    """Read the ``experiment.yaml`` of a checkpoint. Raises UserError in one line, as a stranger's file may have it
    damaged."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; a checkpoint directory holds experiment.yaml")
    content, lines = _read(path)
    return validated(Experiment, content, path, lines, listed=False)


def built_in_spaces() -> dict[str, Path]:
    """The search spaces of the project: beside the package in a checkout, inside it in an installed wheel."""
    package = Path(__file__).parent.parent
    for folder in (package.parent / "search_spaces", package / "search_spaces"):
        if (folder / "demo.yaml").is_file():
            return {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    raise UserError("search_spaces/demo.yaml is not installed; name a search space")


def default_space() -> Path:
    """The embedded demo."""
    return built_in_spaces()["demo"]


def line_numbers(text: str) -> dict[Place, int]:
    """The line of every key and list item of a YAML text, from 1."""
    return _parse(text)[1]


def read_yaml(text: str) -> Any:
    """The content of a YAML text: 1e-5 is a number, 03 and no are text."""
    return _parse(text)[0]


# -- below: how it is done


class _Loader(yaml.SafeLoader):
    """YAML with less surprising scalars: 1e-5 is a number, 03 and 08 are strings, no and off are strings."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if not tag.endswith((":bool", ":float", ":int", ":timestamp"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_SCALARS = {
    "tag:yaml.org,2002:bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "tag:yaml.org,2002:int": (r"[-+]?(?:0|[1-9][0-9]*)", "-+0123456789"),
    "tag:yaml.org,2002:float": (
        r"[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(?:inf|Inf|nan|NaN))",
        "-+.0123456789",
    ),
}
for _tag, (_pattern, _first) in _SCALARS.items():
    _Loader.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$"), list(_first))


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads: the same rules decide which strings need quotes."""


_Dumper.yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


_MOST_VALUES: Final = 100_000
"""Of a file, with what its aliases stand for: a few lines of aliases of aliases can stand for more than fits into
memory. A search space has some hundred."""
_MOST_BYTES: Final = 100_000
"""Of a file: PyYAML takes a second or two for them. The search spaces of the project have a few thousand."""
_DEEPEST: Final = 50
"""Lists and mappings within each other. A search space has five."""


def _read(path: Path) -> tuple[Any, dict[Place, int]]:
    if (size := path.stat().st_size) > _MOST_BYTES:
        raise UserError(f"{path}: {size:,} bytes are too many for such a file, which has {_MOST_BYTES:,} at most")
    try:
        return _parse(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as YAML: {reason_of(error, 300)}") from None


def _parse(text: str) -> tuple[Any, dict[Place, int]]:
    """The content of a YAML text, and the line of every place in it. Raises YAMLError and nothing else."""
    try:
        return _composed(text)
    except yaml.YAMLError:
        raise
    except RecursionError:
        raise yaml.YAMLError("nested too deep") from None
    except Exception as error:  # of a tag such as !!int or !!bool on what is none: errors of many kinds
        raise yaml.YAMLError(f"a value is not what its tag says ({type(error).__name__}: {error})") from None


def _composed(text: str) -> tuple[Any, dict[Place, int]]:
    # Brackets that are not closed take PyYAML time that grows with their square.
    if max(accumulate((c in "[{") - (c in "]}") for c in text), default=0) > 10 * _DEEPEST:
        raise RecursionError
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        lines: dict[Place, int] = {}
        if node is None:
            return None, lines
        if _number(node, (), lines, {}) > _MOST_VALUES:
            raise yaml.YAMLError(f"its aliases stand for themselves, or for more than {_MOST_VALUES:,} values")
        return loader.construct_document(node), lines
    finally:
        loader.dispose()


def _number(node: yaml.Node, place: Place, lines: dict[Place, int], sizes: dict[int, float]) -> float:
    """Enter the lines below a node into ``lines``; returns its number of values, with those that aliases stand for.
    ``sizes`` has that of every node that was visited, since none is visited twice."""
    if id(node) in sizes:
        return sizes[id(node)]
    if len(place) > _DEEPEST:
        raise RecursionError
    sizes[id(node)] = math.inf  # of a node that holds itself it stays so
    size = 1.0
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = (*place, key.value if isinstance(key, yaml.ScalarNode) else "")
            lines[inner] = key.start_mark.line + 1
            size += _number(value, inner, lines, sizes)
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            lines[*place, number] = value.start_mark.line + 1
            size += _number(value, (*place, number), lines, sizes)
    sizes[id(node)] = size
    return size


def _lines_left(lines: dict[Place, int], at: Place) -> dict[Place, int]:
    """The lines of a file after an override at a place: what is there now is in no line. An override of the experiment
    may have removed points of tune.first, so that the others have moved."""
    first = ("tune", "first")

    def is_gone(place: Place) -> bool:
        return place[: len(at)] == at or (at[0] == "experiment" and place[:2] == first and place != first)

    return {place: line for place, line in lines.items() if not is_gone(place)} | {at: 0}


def _parse_value(override: str, text: str) -> Any:
    try:
        return read_yaml(text)
    except yaml.YAMLError:
        raise UserError(f"{shortened(repr(override), 160)}: the value is not readable as YAML; quote it") from None


def _fix_searched_key(content: dict[str, Any], key: str, value: object) -> None:
    """Remove ``key`` from the search. A key with a condition on it loses the condition if ``value`` meets it, and is
    removed too if not."""
    search = content["search"]
    search.pop(key, None)
    tune = content.get("tune")
    points = tune.get("first") if isinstance(tune, dict) else None
    if isinstance(points, list):  # anything else is left for validation to reject
        for point in points:
            if isinstance(point, dict):
                point.pop(key, None)
        points[:] = [point for number, point in enumerate(points) if point and point not in points[:number]]
    for name in [name for name, distribution in search.items() if _depends_on(distribution, key)]:
        if value not in search[name]["when"].pop(key):
            _fix_searched_key(content, name, None)


def _depends_on(distribution: object, key: str) -> bool:
    """Whether its ``when`` names that key; a malformed condition is left for validation to reject."""
    when = distribution.get("when") if isinstance(distribution, dict) else None
    return isinstance(when, dict) and isinstance(when.get(key), list)

"""Where the paths of a search space lead, on the machine and in the job that runs it."""

from __future__ import annotations

import os

from ser_ray import corpora
from ser_ray.config import Distribution, Experiment, SearchSpace
from ser_ray.corpora import table
from ser_ray.disk import expanded, name_place, readable
from ser_ray.schema import UserError


def resolve_paths(space: SearchSpace) -> SearchSpace:
    """The same space with absolute paths, as workers run in other directories.

    Inside a ``ray job submit`` the current directory is a copy that vanishes with the job: results then go to
    ``~/ser_ray/results`` unless the space sets it, and relative data or storage paths are refused with a UserError.
    """
    storage = space.storage
    if _submitted_job():
        for key in storage.model_fields_set & {"results", "cache"}:
            _refuse_relative(f"storage.{key}", getattr(storage, key))
        for corpus, directory in space.experiment.corpora.items():
            _refuse_relative(f"experiment.corpora.{corpus}", directory and str(corpora.parted(directory)[1]))
        if _is_file(given := space.experiment.protocol.given):
            _refuse_relative("experiment.protocol.given", str(given))
        for name in filter(_is_file, space.experiment.exclude):
            _refuse_relative("experiment.exclude", name)
        if "results" not in storage.model_fields_set:
            storage = storage.model_copy(update={"results": "~/ser_ray/results"})
    storage = storage.model_copy(update={"results": _absolute(storage.results), "cache": _absolute(storage.cache)})
    for key, path in (("storage.results", storage.results), ("storage.cache", storage.cache)):
        name_place(key, path)
    search = {key: _resolve_conditions(distribution) for key, distribution in space.search.items()}
    if "backbone" in search and search["backbone"].choice is not None:
        choice = tuple(_absolute_backbone(name) for name in search["backbone"].choice)
        search["backbone"] = search["backbone"].model_copy(update={"choice": choice})
    first = tuple(
        {key: _absolute_backbone(value) if key == "backbone" else value for key, value in point.items()}
        for point in space.tune.first
    )
    return space.model_copy(
        update={
            "experiment": _resolve_experiment(space.experiment),
            "storage": storage,
            "search": search,
            "tune": space.tune.model_copy(update={"first": first}),
        }
    )


# -- below: how it is done


def _resolve_experiment(experiment: Experiment) -> Experiment:
    places = {name: given and _absolute_corpus(given) for name, given in experiment.corpora.items()}
    for name, given in places.items():
        path = corpora.parted(given)[1] if given else None
        if path and not path.is_dir() and not (table.is_table(path) and path.is_file()):
            raise UserError(f"experiment.corpora.{name}: {path}: no such directory; set it to where the corpus is")
    protocol = experiment.protocol
    if _is_file(protocol.given):
        protocol = protocol.model_copy(update={"given": _absolute(str(protocol.given))})
    exclude = tuple(_absolute(name) if _is_file(name) else name for name in experiment.exclude)
    backbone = _absolute_backbone(experiment.backbone)
    return experiment.model_copy(
        update={"corpora": places, "exclude": exclude, "protocol": protocol, "backbone": backbone}
    )


def _resolve_conditions(distribution: Distribution) -> Distribution:
    """Make the backbones in ``when`` absolute, as they then are in the choice."""
    when = distribution.when
    if "backbone" not in when:
        return distribution
    names = tuple(_absolute_backbone(name) for name in when["backbone"])
    return distribution.model_copy(update={"when": {**when, "backbone": names}})


def _is_file(given: object) -> bool:
    """Whether ``protocol.given``, or an entry of ``exclude``, is a table."""
    return isinstance(given, str) and given.endswith(".csv")


def _absolute(path: str) -> str:
    """Absolute, with links as they were given: one may be set to lead elsewhere when what it names moves."""
    absolute = os.path.abspath(expanded(path))  # noqa: PTH100 (Path.resolve follows links, absolute leaves ..)
    try:
        absolute.encode()
    except UnicodeEncodeError:  # in the file of the search, and in tables
        raise UserError(
            f"{readable(absolute)}: this path is not UTF-8; give one that is, such as a link to it"
        ) from None
    return absolute


def _absolute_corpus(given: str) -> str:
    prefix, path = corpora.parted(given)
    return f"{prefix}:{_absolute(str(path))}" if prefix else _absolute(given)


def _absolute_backbone(name: str) -> str:
    """A hub id stays one, even where a folder of that name lies that holds no backbone."""
    return _absolute(name) if (expanded(name) / "config.json").is_file() else name


def _submitted_job() -> bool:
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def _refuse_relative(key: str, path: str | None) -> None:
    if path is not None and not expanded(path).is_absolute():
        raise UserError(
            f"{key}: {path!r} is relative, but a submitted job runs in a temporary copy of the working directory; "
            "give an absolute path that every node sees"
        )

"""The configuration: one YAML file describes an experiment and the search space around it.

`load` turns a file and ``key=value`` overrides into a frozen `SearchSpace`, or raises a `UserError` that lists what
does not fit, and where.
"""

from ser_ray.config.adapter import Adapter
from ser_ray.config.changes import MAY_CHANGE, differences, refused
from ser_ray.config.distil import Distil
from ser_ray.config.enrolment import OTHERS, Enrolment
from ser_ray.config.experiment import EXCLUDABLE, Audio, Augment, Experiment, Head, Optimizer, Protocol
from ser_ray.config.reader import (
    UNSPECIFIED,
    built_in_spaces,
    default_space,
    dump,
    line_numbers,
    load,
    load_experiment,
    read_yaml,
)
from ser_ray.config.search import THE_SAME_FOR_ALL, Distribution
from ser_ray.config.section import NO_UNIT, Section, Unit, every_field
from ser_ray.config.space import Resources, SearchSpace, Storage, Tune
from ser_ray.config.validation import fingerprint, to_dict

__all__ = [
    "EXCLUDABLE",
    "MAY_CHANGE",
    "NO_UNIT",
    "OTHERS",
    "THE_SAME_FOR_ALL",
    "UNSPECIFIED",
    "Adapter",
    "Audio",
    "Augment",
    "Distil",
    "Distribution",
    "Enrolment",
    "Experiment",
    "Head",
    "Optimizer",
    "Protocol",
    "Resources",
    "SearchSpace",
    "Section",
    "Storage",
    "Tune",
    "Unit",
    "built_in_spaces",
    "default_space",
    "differences",
    "dump",
    "every_field",
    "fingerprint",
    "line_numbers",
    "load",
    "load_experiment",
    "read_yaml",
    "refused",
    "to_dict",
]

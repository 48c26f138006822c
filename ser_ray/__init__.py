"""ser_ray: fine-tune, search and evaluate speech backbones for emotion recognition, on Ray.

>>> import ser_ray
>>> sorted(set(ser_ray.__all__) & {"load", "read_results", "search"})
['load', 'read_results', 'search']
"""

from importlib import import_module
from typing import Any

__version__ = "0.2.0"
__all__ = [
    "Model",
    "Rows",
    "SearchResults",
    "SpeakerVoice",
    "UserError",
    "audit_data",
    "load",
    "prepare_data",
    "read_results",
    "search",
]


def __getattr__(name: str) -> Any:
    """The names of `ser_ray.api`, which is imported when one of them is used."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("ser_ray.api"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]

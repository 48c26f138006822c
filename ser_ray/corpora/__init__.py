"""Read a corpus on disk as utterances: one short module per corpus, which parses its file names.

Every corpus module has ``parse(path) -> Utterance``, which raises ValueError with the reason if a name is not one of
the corpus's. If the corpus has tables, ``annotate(directory, utterances)`` adds their content. ``PUBLISHED`` has the
published counts; ``SPEECH`` says whether the corpus is acted or synthetic. To add a corpus, write such a module and
name it in `MODULES`; from another package, name it in an entry point of the group ``ser_ray.corpora``
(docs/examples/own_corpus); or describe the corpus in a `table`, without any code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Final

from ser_ray.config.words import emotion_of
from ser_ray.corpora import table
from ser_ray.corpora.files import from_names
from ser_ray.corpora.rows import example_of
from ser_ray.schema import Rejected, UserError, Utterance

MODULES: Final = {
    "crema_d": "ser_ray.corpora.crema_d",
    "emodb": "ser_ray.corpora.emodb",
    "ravdess": "ser_ray.corpora.ravdess",
    "ravdess_song": "ser_ray.corpora.ravdess_song",
    "savee": "ser_ray.corpora.savee",
    "synthetic": "ser_ray.corpora.synthetic",
    "tess": "ser_ray.corpora.tess",
}
NAMES: Final = tuple(MODULES)
READERS: Final = {"audformat": "ser_ray.corpora.audformat", "emobox": "ser_ray.corpora.emobox"}
"""Word before a colon and a folder, as in ``emobox:DIR`` -> what reads it."""
PREFIXES: Final = (*READERS, "hf")
"""All such words; ``hf:DIR`` is unpacked first (`ser_ray.corpora.inside`)."""
ENTRY_POINTS: Final = "ser_ray.corpora"
NO_LABELS: Final[Mapping[str, str]] = {}


@cache
def installed() -> dict[str, str]:
    """Corpora of other packages: the name of each entry point, and the module that it names.

    Raises UserError for one that has the name of a built-in corpus.
    """
    found: dict[str, str] = {}
    for point in entry_points(group=ENTRY_POINTS):
        if point.name in MODULES:
            owner = point.dist.name if point.dist else "a package"
            raise UserError(
                f"{owner}: its corpus {point.name!r} has the name of a built-in one; rename its entry point"
            )
        found[point.name] = point.module
    return found


def module_of(name: str) -> ModuleType | None:
    """The module of a corpus, built in or installed; None for another name, such as that of a table.

    Raises UserError if an installed one cannot be imported, or has no ``parse``.
    """
    if name in MODULES:
        return import_module(MODULES[name])
    if name not in installed():
        return None
    try:
        module = import_module(installed()[name])
    except Exception as error:  # whatever a stranger's module does when it is imported
        raise UserError(
            f"experiment.corpora.{name}: its module {installed()[name]} cannot be imported: {error}"
        ) from None
    if not callable(getattr(module, "parse", None)):
        raise UserError(f"experiment.corpora.{name}: its module {module.__name__} has no function parse")
    return module


def parted(given: str | Path) -> tuple[str, Path]:
    """The word before the colon of a corpus's place, and the path after it.

    >>> parted("emobox:/data/EmoBox/data/cafe"), parted("/data/ravdess")
    (('emobox', PosixPath('/data/EmoBox/data/cafe')), ('', PosixPath('/data/ravdess')))
    """
    prefix, colon, rest = str(given).partition(":")
    return (prefix, Path(rest)) if colon and prefix in PREFIXES else ("", Path(given))


def folder_of(given: str | Path) -> Path:
    """The folder that the paths of a corpus's utterances are relative to."""
    prefix, path = parted(given)
    if prefix in READERS:
        folder: Path = import_module(READERS[prefix]).folder_of(path)
        return folder
    return path.parent if path.is_file() else path


def read(name: str, given: str | Path, labels: Mapping[str, str] = NO_LABELS) -> tuple[list[Utterance], list[Rejected]]:
    """The utterances of a corpus, sorted by id, and the audio files that are not used, with reasons.

    ``given`` is the corpus's directory; or, under a name that is no corpus's, a table (`table.SUFFIXES`) or a folder
    that one of `READERS` reads, such as ``emobox:DIR``. ``labels`` maps the emotion labels of these to emotions. Paths
    of utterances are relative to `folder_of` it, with ``/`` between their parts. Recordings are not opened.

    Raises UserError for an unknown corpus, a directory or table that does not exist or has no utterance, and labels
    for a corpus that is not a table.
    """
    prefix, path = parted(given)
    if prefix or (table.is_table(path) and not path.is_dir()):
        if name in MODULES or name in installed():
            raise UserError(
                f"experiment.corpora.{name}: a table needs a name of its own; {name} is read from its directory"
            )
        if prefix:
            found: tuple[list[Utterance], list[Rejected]] = import_module(READERS[prefix]).read(name, path, labels)
            return found
        if not path.is_file():
            raise UserError(f"{path}: no such table; set experiment.corpora.{name} to its path")
        return table.read(name, path, labels)
    module = module_of(name)
    if module is None:
        known = ", ".join((*NAMES, *installed()))
        tables = ", ".join(table.SUFFIXES)
        raise UserError(
            f"experiment.corpora.{name}: not a known corpus; use {known}; or give a table ({tables}), or a folder as "
            f"{', '.join(f'{prefix}:DIR' for prefix in PREFIXES)}; ser-ray table makes a table of a folder"
        )
    if labels:
        raise UserError(f"experiment.labels.{name}: only for tables; for {name} use experiment.merge")
    if not path.is_dir():
        raise UserError(f"{path}: no such directory; set experiment.corpora.{name} to the directory of {name}")
    utterances, rejected = from_names(path, module.parse)
    if not utterances:
        such = f" ({len(rejected)} rejected{example_of(rejected)})" if rejected else ""
        raise UserError(
            f"{path}: no recording is named like those of {name}{such}; "
            f"set experiment.corpora.{name} to the directory of {name}"
        )
    if hasattr(module, "annotate"):
        utterances = module.annotate(path, utterances)
    return [replace(utterance, emotion=emotion_of(utterance.emotion)) for utterance in utterances], rejected

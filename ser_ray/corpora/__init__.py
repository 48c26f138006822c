"""From a directory of recordings to utterances: one short file a corpus, which reads its file names.

Every corpus module has one function, ``parse(path) -> Utterance``, which raises ValueError with the reason where a name
is not one of the corpus's. To add a corpus, write such a file and name it in `MODULES`.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Final

from ser_ray.corpora.files import from_names
from ser_ray.schema import Rejected, UserError, Utterance

MODULES: Final = {
    "crema_d": "ser_ray.corpora.crema_d",
    "ravdess": "ser_ray.corpora.ravdess",
    "synthetic": "ser_ray.corpora.synthetic",
    "tess": "ser_ray.corpora.tess",
}
NAMES: Final = tuple(MODULES)


def read(name: str, directory: Path) -> tuple[list[Utterance], list[Rejected]]:
    """The utterances of a corpus, sorted by id, and the audio files that are not used, with reasons.

    Paths are relative to ``directory``, with ``/`` between their parts. Recordings are not opened.

    Raises UserError for a corpus that is not known, a directory that is not there, and one without an utterance.
    """
    if name not in MODULES:
        raise UserError(f"experiment.corpora.{name}: not a known corpus; they are {', '.join(NAMES)}")
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory; set experiment.corpora.{name} to where {name} lies")
    utterances, rejected = from_names(directory, import_module(MODULES[name]).parse)
    if not utterances:
        such = f" ({len(rejected)} rejected, such as {rejected[0].path}: {rejected[0].reason})" if rejected else ""
        raise UserError(
            f"{directory}: no recording (.wav, .flac) under a name of {name}{such}; "
            f"set experiment.corpora.{name} to where {name} lies"
        )
    return utterances, rejected

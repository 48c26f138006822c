"""A sentence and a voice -> a waveform, by espeak-ng's library: what the synthetic corpus speaks with."""

from __future__ import annotations

import ctypes
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import espeakng_loader
import numpy as np

from ser_ray.schema import UserError

RATE: Final = 22_050
"""Hz, espeak-ng's own."""
ACCENTS: Final = ("en-us", "en", "en-us-nyc", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan")
"""Its English ones that differ clearly; en is British."""


@dataclass(frozen=True)
class Voice:
    """What a sentence is spoken with."""

    accent: str
    low: float
    """Hz: where the pitch moves between."""
    high: float
    words_per_minute: float
    formants: tuple[float, ...]
    """Nine resonances of the vocal tract, from below the first, in percent of those of espeak-ng's standard man."""


Speak = Callable[[str, Voice, int], np.ndarray]
"""(sentence, voice, seed) -> (T,) float64 in [-1, 1] at `RATE`."""

VOLUME: Final = 40
"""Of 100; peaks stay below 0.8. Louder, it clips, and its gain control carries over to the next sentence."""

_LOCK: Final = threading.Lock()
_SYNCHRONOUS, _DO_NOT_EXIT, _CHARACTERS, _UTF8 = 2, 0x8000, 1, 1
_RATE, _VOLUME = 1, 2
_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


@contextmanager
def synthesiser() -> Iterator[Speak]:
    """The synthesiser; it is global state in C, so one at a time in a process, begun anew for every sentence.

    Voices are files in espeak-ng's data directory: a private copy of the little of it that English needs takes ours.
    What a sentence sounds like depends on its arguments alone, not on what was said before.

    Raises UserError where espeak-ng does not start.
    """
    library = ctypes.CDLL(str(espeakng_loader.get_library_path()))
    library.espeak_Synth.argtypes = [ctypes.c_char_p, ctypes.c_size_t, *[ctypes.c_uint] * 4, *[ctypes.c_void_p] * 2]
    pieces: list[np.ndarray] = []

    def take(samples: Any, count: int, _events: object) -> int:
        if count > 0:
            pieces.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    callback = _Callback(take)

    def speak(sentence: str, voice: Voice, seed: int) -> np.ndarray:
        (data / "voices" / "!v" / "ours").write_text(_voice_file(voice), encoding="ascii")
        rate = library.espeak_Initialize(_SYNCHRONOUS, 0, os.fsencode(data), _DO_NOT_EXIT)
        library.espeak_ng_SetRandSeed(seed)
        library.espeak_SetSynthCallback(callback)
        no_voice = library.espeak_SetVoiceByName(f"{voice.accent}+ours".encode())
        if rate != RATE or no_voice:
            raise UserError(f"espeak-ng does not start from {data}; set TMPDIR to a shorter path, or reinstall it")
        failed = library.espeak_SetParameter(_RATE, round(voice.words_per_minute), 0)
        failed |= library.espeak_SetParameter(_VOLUME, VOLUME, 0)
        text = sentence.encode()
        failed |= library.espeak_Synth(text, len(text) + 1, 0, _CHARACTERS, 0, _UTF8, None, None)
        library.espeak_Terminate()
        assert not failed, f"espeak-ng returned {failed} for {voice}"
        spoken = np.concatenate(pieces) / 32768
        pieces.clear()
        return spoken

    with _LOCK, tempfile.TemporaryDirectory() as temporary:
        data = Path(temporary) / "espeak-ng-data"
        _copy_english(Path(espeakng_loader.get_data_path()), data)
        yield speak


def _copy_english(source: Path, target: Path) -> None:
    (target / "voices" / "!v").mkdir(parents=True)
    shutil.copytree(source / "lang" / "gmw", target / "lang" / "gmw")
    for name in ("phondata", "phonindex", "phontab", "intonations", "en_dict"):
        shutil.copy(source / name, target / name)


def _voice_file(voice: Voice) -> str:
    """espeak-ng's format of a voice variant (docs/voices.md there).

    No flutter, and a roughness beyond its scale, which is none: the phases of both outlast a restart, and what was
    said before would be heard.
    """
    shift = 1 + (voice.low - 82) / 82 / 4  # espeak-ng moves the formants with the pitch; a person's stay
    formants = [f"formant {i} {round(value / shift)} 100 100" for i, value in enumerate(voice.formants)]
    pitch = f"pitch {round(voice.low)} {round(voice.high)}"
    return "\n".join(["language variant", "name ours", pitch, "flutter 0", "roughness 8", *formants, ""])

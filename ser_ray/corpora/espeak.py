"""Text to speech by espeak-ng's library: a sentence and a voice -> a waveform.

`synthesiser` speaks the synthetic corpus; `narrator` speaks other languages as well, and returns the phones' times.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final

import espeakng_loader
import numpy as np

from ser_ray.schema import UserError

RATE: Final = 22_050
"""Hz: espeak-ng's own rate."""
ACCENTS: Final = ("en-us", "en", "en-us-nyc", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan")
"""espeak-ng's English accents that differ clearly; en is British."""


@dataclass(frozen=True)
class Voice:
    """The voice and manner in which a sentence is spoken."""

    accent: str
    """One of `ACCENTS`; for the narrator, any language of espeak-ng's."""
    low: float
    """Hz: the pitch moves between ``low`` and ``high``."""
    high: float
    words_per_minute: float
    formants: tuple[float, ...]
    """Formants 0 (below the first) to 8, in percent of those of espeak-ng's standard male voice."""


Speak = Callable[[str, Voice, int], np.ndarray]
"""(sentence, voice, seed) -> (T,) float64 in [-1, 1] at `RATE`."""
Phones = tuple[tuple[float, str], ...]
"""(Start in seconds, name in IPA as espeak-ng writes it), in order of time; pauses have an empty name."""
Narrate = Callable[[str, Voice, int], tuple[np.ndarray, Phones]]
"""(sentence, voice, seed) -> (T,) float64 in [-1, 1] at `RATE`, and its phones."""

VOLUME: Final = 40
"""Of 100; peaks stay below 0.8. If louder, espeak-ng clips, and its gain control affects the next sentence."""
NARRATOR_VOLUME: Final = 20
"""For voices up to twice as high as those of the synthetic corpus, which are louder; peaks stay below 0.7."""


@contextmanager
def synthesiser() -> Iterator[Speak]:
    """The synthesiser. Its state is global in C, so a process has one at a time; it restarts for every sentence.

    Voices are files in espeak-ng's data directory; ours go into a private copy of the few files that English needs.
    The waveform depends on the arguments alone, not on earlier sentences.

    Raises UserError where espeak-ng does not start.
    """
    with _started(_copy_english, _DO_NOT_EXIT, VOLUME) as narrate:
        yield lambda sentence, voice, seed: narrate(sentence, voice, seed)[0]


@contextmanager
def narrator() -> Iterator[Narrate]:
    """Like `synthesiser`, in any language and with the times of the phones.

    Raises UserError where espeak-ng does not start, or does not know the language.
    """
    with _started(_link_all, _DO_NOT_EXIT | _PHONEME_EVENTS | _IPA, NARRATOR_VOLUME) as narrate:
        yield narrate


# -- below: how it is done

_LOCK: Final = threading.Lock()
_SYNCHRONOUS, _PHONEME_EVENTS, _IPA, _DO_NOT_EXIT, _CHARACTERS, _UTF8 = 2, 1, 2, 0x8000, 1, 1
_RATE, _VOLUME = 1, 2
_END, _PHONEME = 0, 7


class _Event(ctypes.Structure):
    """espeak_EVENT of speak_lib.h; its last field is a union, of which phoneme events use the eight characters."""

    _fields_: ClassVar = [
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("name", ctypes.c_char * 8),
    ]


_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))


@contextmanager
def _started(copy: Callable[[Path, Path], None], options: int, volume: int) -> Iterator[Narrate]:
    library = ctypes.CDLL(str(espeakng_loader.get_library_path()))
    library.espeak_Synth.argtypes = [ctypes.c_char_p, ctypes.c_size_t, *[ctypes.c_uint] * 4, *[ctypes.c_void_p] * 2]
    pieces: list[np.ndarray] = []
    phones: list[tuple[float, str]] = []

    def receive(samples: Any, count: int, events: Any) -> int:
        if count > 0:
            pieces.append(np.ctypeslib.as_array(samples, (count,)).copy())
        phones.extend(_phones(events))
        return 0

    callback = _Callback(receive)

    def narrate(sentence: str, voice: Voice, seed: int) -> tuple[np.ndarray, Phones]:
        (data / "voices" / "!v" / "ours").write_text(_voice_file(voice), encoding="ascii")
        rate = library.espeak_Initialize(_SYNCHRONOUS, 0, os.fsencode(data), options)
        library.espeak_ng_SetRandSeed(seed)
        library.espeak_SetSynthCallback(callback)
        no_voice = library.espeak_SetVoiceByName(f"{voice.accent}+ours".encode())
        if rate != RATE or no_voice:
            raise UserError(
                f"espeak-ng does not start from {data} with voice {voice.accent}; "
                "set TMPDIR to a shorter path, or reinstall espeakng-loader"
            )
        failed = library.espeak_SetParameter(_RATE, round(voice.words_per_minute), 0)
        failed |= library.espeak_SetParameter(_VOLUME, volume, 0)
        text = sentence.encode()
        failed |= library.espeak_Synth(text, len(text) + 1, 0, _CHARACTERS, 0, _UTF8, None, None)
        library.espeak_Terminate()
        assert not failed, f"espeak-ng returned {failed} for {voice}"
        spoken = np.concatenate(pieces) / 32768, tuple(phones)
        pieces.clear()
        phones.clear()
        return spoken

    with _LOCK, tempfile.TemporaryDirectory() as temporary:
        data = Path(temporary) / "espeak-ng-data"
        copy(Path(espeakng_loader.get_data_path()), data)
        yield narrate


def _phones(events: Any) -> Iterator[tuple[float, str]]:
    """The phones among the events of one call, up to the event that ends the list."""
    for number in itertools.count():
        event = events[number]
        if event.type == _END:
            return
        if event.type == _PHONEME:
            yield event.sample / RATE, event.name.decode()


def _copy_english(source: Path, target: Path) -> None:
    (target / "voices" / "!v").mkdir(parents=True)
    shutil.copytree(source / "lang" / "gmw", target / "lang" / "gmw")
    for name in ("phondata", "phonindex", "phontab", "intonations", "en_dict"):
        shutil.copy(source / name, target / name)


def _link_all(source: Path, target: Path) -> None:
    shutil.copytree(source, target, copy_function=os.symlink, ignore=shutil.ignore_patterns("!v"))
    (target / "voices" / "!v").mkdir()


def _voice_file(voice: Voice) -> str:
    """A voice variant in espeak-ng's format (its docs/voices.md).

    Flutter is 0, and roughness is beyond its scale, which turns it off: the phases of both survive a restart, so
    earlier sentences would change the waveform.
    """
    shift = 1 + (voice.low - 82) / 82 / 4  # espeak-ng shifts the formants with the pitch; this undoes it
    formants = [f"formant {i} {round(value / shift)} 100 100" for i, value in enumerate(voice.formants)]
    pitch = f"pitch {round(voice.low)} {round(voice.high)}"
    return "\n".join(["language variant", "name ours", pitch, "flutter 0", "roughness 8", *formants, ""])

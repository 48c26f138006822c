"""Which files hold recordings, and how each kind is opened: by libsndfile, or by PyAV where that is installed.

libsndfile reads WAV, FLAC, Ogg, MP3 and the like. The formats of telephones, browsers and Windows (m4a, mp4, webm, amr,
wma, ...) need FFmpeg, which PyAV brings along: ``pip install 'ser-ray[formats]'``. Without it such a file is found all
the same, and refused with that advice.
"""

from __future__ import annotations

import importlib.util
import io
import math
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
import soundfile

CONTAINERS: Final = {
    ".wav": ("WAV", "WAVEX", "RF64"),
    ".flac": ("FLAC",),
    ".ogg": ("OGG",),
    ".opus": ("OGG",),
    ".mp3": ("MP3",),
    ".aiff": ("AIFF",),
    ".aif": ("AIFF",),
    ".au": ("AU",),
}
"""File suffix -> the containers that it stands for, by libsndfile's names."""
FFMPEG: Final = {
    "MP4": ("mov", 4, b"ftyp"),
    "WebM": ("matroska", 0, b"\x1aE\xdf\xa3"),
    "AMR": ("amr", 0, b"#!AMR"),
    "WMA": ("asf", 0, b"0&\xb2u\x8ef\xcf\x11"),
    "CAF": ("caf", 0, b"caff"),
    "AAC": ("aac", 0, b"\xff\xf1"),
    "MPEG-2 AAC": ("aac", 0, b"\xff\xf9"),
}
"""Containers that FFmpeg opens -> its name for them, and which bytes they hold where. Nothing else is given to it: some
of its formats are lists of other files, or of addresses."""
FFMPEG_SUFFIXES: Final = (
    *(".m4a", ".m4b", ".mp4", ".mov", ".3gp", ".webm", ".mka", ".mkv", ".amr", ".awb", ".wma", ".caf", ".aac"),
)
"""Usual suffixes of these."""
SUFFIXES: Final = (*CONTAINERS, *FFMPEG_SUFFIXES)
"""Of the files in a folder, those that are recordings."""
ADVICE: Final = "pip install 'ser-ray[formats]'"
POINTER: Final = b"version https://git-lfs.github.com/spec/"
"""How the file begins that Git LFS leaves in place of a large one."""
MAX_CHUNKS: Final = 1000
"""Chunks of a WAV file that are read in search of its audio; a few are usual."""
PREROLL: Final = 1.0
"""Seconds decoded and dropped before a part of a compressed recording: its decoder needs what precedes."""


class Unusable(ValueError):  # noqa: N818 (a finding, not a failure)
    """A recording that is not used; the message is the reason, in words, without the path."""


@dataclass(frozen=True)
class Opened:
    """An open recording."""

    rate: int
    """Hz."""
    channels: int
    frames: float
    """As the header claims, which may be wrong; infinite where nothing of the kind can be relied on."""
    container: str
    blocks: Callable[[int, int], Iterator[np.ndarray]]
    """Once: from a frame to the end, in blocks of at most so many frames: (T, C) float32 in [-1, 1]."""


def has_pyav() -> bool:
    """Whether the formats that need FFmpeg can be read here."""
    return importlib.util.find_spec("av") is not None


@contextmanager
def opened(path: Path) -> Iterator[Opened]:
    """Open a recording by what it holds, whatever its name. Raises Unusable, also while it is read."""
    with path.open("rb") as file:
        head = file.read(64)
        if head.startswith(POINTER):
            raise Unusable("a Git LFS pointer, not the recording; run git lfs pull")
        try:
            unclosed = _Unclosed(path) if (data := wav_data(file)) and not data.claimed and data.held else None
            sound = soundfile.SoundFile(unclosed or os.fsencode(path))  # as bytes: a name may be no UTF-8
        except soundfile.LibsndfileError as error:
            kind = next((kind for kind, (_, at, magic) in FFMPEG.items() if head[at:].startswith(magic)), None)
            if kind is None:
                raise Unusable(f"cannot be decoded: {error.error_string}") from error
            if not has_pyav():
                raise Unusable(f"{kind} is read by PyAV, which is missing: {ADVICE}") from error
            with _with_ffmpeg(file, kind) as found:
                yield found
            return
    with sound:
        try:
            yield Opened(sound.samplerate, sound.channels, sound.frames, sound.format, _reader(sound))
        except soundfile.LibsndfileError as error:
            raise Unusable(f"cannot be decoded: {error.error_string}") from error


@dataclass(frozen=True)
class WavData:
    """Where a WAV file has its audio."""

    place: int
    """Of the four bytes with its length."""
    claimed: int
    """Bytes, by these four. 0, or the largest number, where the file was written into a pipe."""
    held: int
    """Bytes from there to the end of the file; 0 if another chunk follows at once, as the audio is empty then."""


def wav_data(file: BinaryIO) -> WavData | None:
    """The audio of an open WAV file; None for another file."""
    size = file.seek(0, 2)
    file.seek(0)
    header = file.read(12)
    if header[:4] != b"RIFF" or header[8:] != b"WAVE":
        return None
    for _ in range(MAX_CHUNKS):
        place = file.tell() + 4
        if len(chunk := file.read(8)) < 8:
            return None
        name, claimed = struct.unpack("<4sI", chunk)
        held = size - file.tell()
        if name == b"data":
            return WavData(place, claimed, 0 if not claimed and _is_chunk(file, held) else held)
        file.seek(claimed + claimed % 2, 1)  # chunks begin at even offsets
    return None


# -- below: how it is done


def _is_chunk(file: BinaryIO, held: int) -> bool:
    name, claimed = struct.unpack("<4sI", file.read(8).ljust(8, b"\0"))
    return name.isascii() and name.decode("ascii").isprintable() and claimed <= held


class _Unclosed(io.FileIO):
    """A WAV file without the length of its audio, as if the length were there."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        data = wav_data(self)
        assert data
        self._place, self._length = data.place, struct.pack("<I", min(data.held, 2**32 - 1))
        self.seek(0)

    def readinto(self, buffer: Any) -> int:
        begin = self.tell()
        count = super().readinto(buffer) or 0
        for offset, byte in enumerate(self._length, start=self._place - begin):
            if 0 <= offset < count:
                memoryview(buffer).cast("B")[offset] = byte
        return count


def _reader(sound: soundfile.SoundFile) -> Callable[[int, int], Iterator[np.ndarray]]:
    def blocks(first: int, size: int) -> Iterator[np.ndarray]:
        if first:
            sound.seek(first)
        while len(block_TC := sound.read(size, dtype="float32", always_2d=True)):
            yield block_TC

    return blocks


@contextmanager
def _with_ffmpeg(file: BinaryIO, kind: str) -> Iterator[Opened]:
    """Of an open file: a name such as ``concat:a|b`` would mean something else to FFmpeg."""
    import av

    file.seek(0)
    try:
        # Titles and names of encoders need not be UTF-8, and say nothing that is used.
        with av.open(file, format=FFMPEG[kind][0], metadata_errors="replace") as container:
            if not container.streams.audio:
                raise Unusable("holds pictures, no audio")
            stream = container.streams.audio[0]
            if stream.codec_context is None:
                raise Unusable(f"cannot be decoded: {kind} with a codec that is not known")
            channels = stream.layout.nb_channels
            if not stream.rate or not channels:
                raise Unusable(f"cannot be decoded: {kind} that does not say its sampling rate and channels")
            yield Opened(stream.rate, channels, math.inf, kind, _ffmpeg_reader(container, stream, channels))
    except av.FFmpegError as error:
        raise Unusable(f"cannot be decoded: {error.strerror or error}") from error


def _ffmpeg_reader(container: Any, stream: Any, channels: int) -> Callable[[int, int], Iterator[np.ndarray]]:
    import av

    def blocks(first: int, size: int) -> Iterator[np.ndarray]:
        if first > PREROLL * stream.rate:
            container.seek(int((first / stream.rate - PREROLL) / stream.time_base), stream=stream)
        to_float: Any = None
        before: tuple[str, str, int] | None = None
        place: int | None = None
        for decoded in container.decode(stream):
            if place is None:
                seconds = decoded.pts * decoded.time_base if decoded.pts and decoded.time_base else 0
                place = round(float(seconds) * stream.rate)
            now = (decoded.format.name, decoded.layout.name, decoded.rate)
            if now != before:  # a stream may change on its way; what is given does not
                to_float, before = av.AudioResampler("flt", stream.layout, stream.rate), now
            for frame in to_float.resample(decoded):
                block_TC = frame.to_ndarray().reshape(-1, channels)
                begin, place = max(0, first - place), place + len(block_TC)
                for start in range(begin, len(block_TC), size):
                    yield block_TC[start : start + size]

    return blocks

"""Whatever a file contains, it is read or refused with a reason: no crash, no hang, no growth of memory.

The files are mutated in a process of its own, under a limit of memory: ``python tests/speech/test_fuzz.py 5000`` runs
it by hand and prints what came of the files.
"""

from __future__ import annotations

import io
import json
import resource
import signal
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile

KINDS = (
    ("wav", "PCM_16", 1),
    ("wav", "PCM_U8", 2),
    ("wav", "PCM_24", 1),
    ("wav", "FLOAT", 2),
    ("wav", "IMA_ADPCM", 1),
    ("flac", "PCM_16", 1),
    ("flac", "PCM_24", 2),
    ("ogg", "VORBIS", 1),
    ("ogg", "OPUS", 2),
    ("mp3", "MPEG_LAYER_III", 1),
)
HEADER = 128
"""Bytes that hold all fields of a header; a change there means more than one in the audio."""
ROOM = 2**30
"""Bytes of address space beyond what the imports take."""
PATIENCE = 60
"""Seconds for one file, after which it counts as a hang."""


def originals() -> list[tuple[str, bytes]]:
    """(suffix, content) of a tone of half a second in every kind."""
    found = []
    for suffix, subtype, channels in KINDS:
        tone = 0.4 * np.sin(2 * np.pi * 300 * np.arange(8_000) / 16_000)
        file = io.BytesIO()
        soundfile.write(file, np.stack([tone] * channels, axis=1), 16_000, format=suffix.upper(), subtype=subtype)
        found.append((suffix, file.getvalue()))
    return found


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """One to three mutations: bytes flipped, fields of the header replaced, ends cut, pieces moved or doubled."""
    data = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        at = int(rng.integers(0, max(1, min(len(data), HEADER if rng.random() < 0.7 else len(data)))))
        match rng.integers(0, 7):
            case 0:
                data[at : at + 1] = bytes([rng.integers(0, 256)])
            case 1:
                for position in rng.integers(0, max(1, len(data)), size=20):
                    data[position : position + 1] = bytes([rng.integers(0, 256)])
            case 2:
                value = int(rng.choice([0, 1, 2, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFFFFF0]))
                data[at : at + 4] = struct.pack(rng.choice(["<I", ">I"]), value)
            case 3:
                data[at : at + 2] = struct.pack("<H", int(rng.choice([0, 1, 3, 6, 7, 0x11, 0x55, 255, 0xFFFE, 0xFFFF])))
            case 4:
                del data[int(rng.integers(0, max(1, len(data)))) :]
            case 5:
                del data[at : at + int(rng.integers(1, 64))]
            case 6:
                end = at + int(rng.integers(1, 4096))
                data[at:at] = data[at:end]
    return bytes(data)


def with_checksums(content: bytes) -> bytes:
    """An OGG file whose pages have the checksums that they should (RFC 3533), so that damage reaches the decoder."""
    data = bytearray(content)
    at = data.find(b"OggS")
    while at >= 0 and at + 27 <= len(data):
        segments = data[at + 27 : at + 27 + data[at + 26]]
        end = min(len(data), at + 27 + len(segments) + sum(segments))
        data[at + 22 : at + 26] = bytes(4)
        checksum = 0
        for byte in data[at:end]:
            checksum = ((checksum << 8) & 0xFFFFFFFF) ^ CHECKSUMS[(checksum >> 24) ^ byte]
        data[at + 22 : at + 26] = struct.pack("<I", checksum)
        at = data.find(b"OggS", end)
    return bytes(data)


def _checksum(byte: int) -> int:
    value = byte << 24
    for _ in range(8):
        value = (value << 1) ^ (0x104C11DB7 if value & 0x80000000 else 0)
    return value


CHECKSUMS = [_checksum(byte) for byte in range(256)]


def resident() -> int:
    """Bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def fuzz(files: int, seed: int) -> dict[str, object]:
    """Load so many mutated files; what came of them, and how the process grew after the first tenth."""
    from ser_ray.config import Audio
    from ser_ray.speech.audio import Unusable, load_recording

    rng = np.random.default_rng(seed)
    kinds = originals()
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + ROOM, taken + ROOM))
    outcomes: Counter[str] = Counter()
    after_warming_up = 0
    with tempfile.TemporaryDirectory() as folder:
        for number in range(files):
            suffix, content = kinds[number % len(kinds)]
            path = Path(folder) / f"mutated.{suffix}"
            damaged = mutated(content, rng)
            path.write_bytes(with_checksums(damaged) if suffix == "ogg" and rng.random() < 0.8 else damaged)
            signal.alarm(PATIENCE)
            try:
                recording = load_recording(path, Audio(too_long="split"))
            except Unusable as reason:
                outcomes[f"{suffix} refused: {str(reason).split(':')[0].split(' of ')[0]}"] += 1
            else:
                for window in recording.windows:
                    assert window.dtype == np.float32
                    assert np.isfinite(window).all()
                    assert np.abs(window).max() <= 1
                outcomes[f"{suffix} {'flagged' if recording.flags else 'read'}"] += 1
            signal.alarm(0)
            if number == files // 10:
                after_warming_up = resident()
    growth = resident() - after_warming_up
    return {"outcomes": dict(sorted(outcomes.items())), "growth": growth, "total": outcomes.total()}


def check(files: int, seed: int) -> None:
    command = [sys.executable, __file__, str(files), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"seed {seed}: ended with {done.returncode}: {done.stderr[-2000:]}"
    found = json.loads(done.stdout)
    assert found["total"] == files
    assert found["growth"] < 100e6, found
    assert any("refused" in outcome for outcome in found["outcomes"])
    assert any("read" in outcome for outcome in found["outcomes"])


def test_checksums_of_ogg_pages_are_those_of_the_encoder():
    for suffix, content in originals():
        if suffix == "ogg":
            assert with_checksums(content) == content
            assert with_checksums(content[:30] + b"x" + content[31:]) != content


def test_mutated_files_are_read_or_refused():
    check(400, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_thousands_of_mutated_files_are_read_or_refused(seed):
    check(5_000, seed)


if __name__ == "__main__":
    json.dump(fuzz(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0), sys.stdout, indent=2)

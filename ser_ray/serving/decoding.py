"""Recordings of strangers are decoded by processes of their own (`decoder`), within a time that they cannot exceed."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from typing import Any

import numpy as np

from ser_ray.config import Audio
from ser_ray.serving import decoder
from ser_ray.serving.limits import Limits, Refused
from ser_ray.speech.pieces import Piece


class Decoders:
    """So many processes, each started when it is needed first, and again after its end."""

    def __init__(self, count: int, limits: Limits) -> None:
        self.limits = limits
        self.free: asyncio.LifoQueue[_Decoder | None] = asyncio.LifoQueue()
        for _ in range(count):
            self.free.put_nowait(None)

    async def pieces(self, recording: bytes, audio: Audio) -> list[Piece]:
        """The windows of a recording, as `pieces_of` gives them. Raises Refused for one that is too long (413), takes
        too long to decode (413), or ends its decoder (415)."""
        process = await self.free.get()
        asked = False
        try:
            process = process or await _started()
            asked = True
            work = asyncio.to_thread(process.decode, recording, audio, self.limits.seconds)
            pieces = await asyncio.wait_for(work, self.limits.decode_seconds)
            asked = False
        except TimeoutError:
            raise Refused(413, f"takes longer than {self.limits.decode_seconds:g} s to decode") from None
        except (OSError, ValueError):
            raise Refused(415, "cannot be decoded: its decoder ended") from None
        finally:
            if asked and process is not None:  # also where the client has gone: it may still be at work
                process.end()
                process = None
            self.free.put_nowait(process)
        if pieces and pieces[-1].reason == decoder.TOO_LONG:
            raise Refused(413, f"more than {self.limits.seconds:g} s of audio")
        return pieces

    def close(self) -> None:
        """End all that are not at work."""
        while not self.free.empty():
            process = self.free.get_nowait()
            if process:
                process.end()


# -- below: how it is done


async def _started() -> _Decoder:
    try:
        return await asyncio.to_thread(_Decoder)
    except (OSError, ValueError):  # no memory for a process, or none that answers
        raise Refused(503, "there is no room for a decoder", 5) from None


class _Decoder:
    """One process; its methods block."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "ser_ray.serving.decoder"]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, **pipes)  # noqa: S603 (this Python, and a module of ours)
        self._read()  # it is ready

    def decode(self, recording: bytes, audio: Audio, seconds: float) -> list[Piece]:
        """Raises OSError or ValueError where the process ends."""
        assert self.process.stdin is not None
        request = {"bytes": len(recording), "seconds": seconds, "audio": audio.model_dump()}
        self.process.stdin.write(json.dumps(request).encode() + b"\n" + recording)
        self.process.stdin.flush()
        return self._read()

    def end(self) -> None:
        """Whatever it does."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            try:
                if pipe is not None:
                    pipe.close()
            except OSError:  # what was not written yet cannot be any more
                continue

    def _read(self) -> list[Piece]:
        assert self.process.stdout is not None
        pieces = []
        for size, *about in json.loads(self.process.stdout.readline()):
            samples = None
            if size is not None:
                content = self.process.stdout.read(2 * size)
                samples = np.frombuffer(content, "<i2", size)
            pieces.append(Piece("", samples, *about))
        return pieces

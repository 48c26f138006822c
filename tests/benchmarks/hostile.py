"""Thousands of hostile requests to a server: each has a clear answer, and the next good one is answered.

    python tests/benchmarks/hostile.py CHECKPOINT --requests 10000 > results/benchmarks/hostile.md

A request is drawn from ``--seed``, its kind and its number alone. It ends well if the answer is one line of JSON with a
status that its kind may have, without a traceback, or if the client itself cut the connection. After every hundred a
good request has to have the same answer as at first. Anything else is a finding: it is printed, and the exit code is 1.
The server has a key, and decodes for 2 s and waits for a body for 2 s at most, so that slow ones end.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import functools
import io
import json
import random
import secrets
import struct
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import soundfile
from server_fixture import Server, serving
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake

AT_ONCE: Final = 8
SECONDS: Final = 120
"""Within which every request has to end; a busy machine takes its time."""
FORMATS: Final = ("WAV", "FLAC", "OGG", "MP3", "AIFF", "AU")
JSON: Final = {"content-type": "application/json"}
LIMITS: Final = ("--limit", "receive_seconds=2", "--limit", "decode_seconds=2", "--limit", "burst=1000000")


@dataclass
class Asked:
    """A server with its key, and what came of the requests so far."""

    server: Server
    key: str
    statuses: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    findings: list[str] = field(default_factory=list)

    async def post(
        self,
        path: str,
        body: bytes,
        headers: dict[str, str],
        *,
        claim: int | None = None,
        pause: float = 0,
        cut: int = -1,
    ) -> tuple[int, bytes] | None:
        """An answer, or None where the client cut the connection itself: after ``cut`` bytes. ``claim``: the length
        that it says. ``pause``: seconds before each of the first bytes."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.server.port)
        try:
            given = {"host": "127.0.0.1", "authorization": f"Bearer {self.key}", "connection": "close"} | headers
            given["content-length"] = str(len(body) if claim is None else claim)
            head = "".join(f"{name}: {value}\r\n" for name, value in given.items())
            writer.write(f"POST {path} HTTP/1.1\r\n{head}\r\n".encode("latin-1"))
            for begin in range(3 if pause else 0):
                await asyncio.sleep(pause)
                writer.write(body[begin : begin + 1])
            if cut >= 0:
                writer.write(body[:cut])
                await writer.drain()
                return None
            writer.write(body[3 if pause else 0 :])
            return await _answer(reader)
        finally:
            writer.close()


@functools.cache
def ten_minutes() -> bytes:
    """More audio than a request may have, in a small file. It is made before the first request: while it is, no other
    client of this process sends anything, and the server rightly finds them slow."""
    file = io.BytesIO()
    soundfile.write(file, 0.01 * np.tile([1.0, -1.0], 8000 * 600), 16_000, format="FLAC")
    return file.getvalue()


Kind = Callable[[Asked, random.Random], Awaitable["tuple[int, bytes] | None"]]


def recording(draw: random.Random, seconds: float = 0.6) -> bytes:
    """A tone, in a format that is drawn."""
    time = np.arange(int(seconds * 16_000)) / 16_000
    tone = 0.3 * np.sin(2 * np.pi * draw.uniform(100, 600) * time)
    file = io.BytesIO()
    soundfile.write(file, tone, 16_000, format=draw.choice(FORMATS))
    return file.getvalue()


async def mutated(asked: Asked, draw: random.Random) -> tuple[int, bytes] | None:
    """A recording with bytes changed, left out, or said twice."""
    content = bytearray(recording(draw))
    for _ in range(draw.choice((1, 3, 30, 300))):
        place = draw.randrange(min(len(content), draw.choice((64, len(content)))))
        content[place] = draw.randrange(256)
    if draw.random() < 0.3:
        place = draw.randrange(len(content))
        content = content[:place] + content[draw.randrange(len(content)) :]
    return await asked.post("/", bytes(content) or b"x", {})


async def noise(asked: Asked, draw: random.Random) -> tuple[int, bytes] | None:
    """Bytes that are nothing, with the beginning of a container perhaps."""
    begin = draw.choice((b"", b"RIFF", b"fLaC", b"OggS", b"\x1aE\xdf\xa3", b"\0\0\0\x20ftypM4A ", b"#!AMR\n", b"ID3"))
    return await asked.post("/", begin + draw.randbytes(draw.choice((1, 100, 5000, 200_000))), {})


async def claims(asked: Asked, draw: random.Random) -> tuple[int, bytes] | None:
    """A WAV header that claims hours, thousands of channels, or a rate of gigahertz."""
    rate, channels = draw.choice((16_000, 1, 2**31)), draw.choice((1, 2, 1000, 65_535))
    bits, claimed = draw.choice((16, 8, 24, 0)), draw.choice((2**32 - 1, 2**31, 0, 7))
    form = struct.pack("<HHIIHH", 1, channels, rate, rate * channels % 2**32, 2 * channels % 2**16, bits)
    head = b"RIFF" + struct.pack("<I", claimed) + b"WAVEfmt " + struct.pack("<I", 16) + form
    return await asked.post("/", head + b"data" + struct.pack("<I", claimed) + draw.randbytes(2000), {})


async def too_long(asked: Asked, draw: random.Random) -> tuple[int, bytes] | None:
    """A small file with ten minutes of audio, or a body that says that it is too large."""
    if draw.random() < 0.5:
        return await asked.post("/", b"RIFF", {}, claim=draw.choice((10**9, 10**15, 10**30)))
    return await asked.post("/", ten_minutes(), {})


async def wrong_types(asked: Asked, draw: random.Random) -> tuple[int, bytes] | None:
    """JSON whose values are of other types, and bodies whose type is not that of a recording."""
    odd = draw.choice((None, 1, -1.5, True, [], {}, "x", "%", "\0", "\ud800", 10**400, [[[]]], {"a": [1]}))
    audio = base64.b64encode(recording(draw)).decode()
    body = draw.choice(
        (
            {"inputs": odd},
            {"inputs": audio, "parameters": odd},
            {"files": odd},
            {"files": [odd]},
            {"files": [{"audio": odd}]},
            {"files": [{"audio": audio}], "voice": odd if isinstance(odd, dict) else {"format": odd}},
            {"files": [{"audio": audio}], "model": odd},
            odd,
        )
    )
    path = draw.choice(("/", "/v1/predict", "/v1/voices", "/v1/models", "/nowhere", "/?model=%00", "/%ff"))
    kind = draw.choice((JSON, {"content-type": "text/html"}, {"content-type": "multipart/form-data"}, {}))
    return await asked.post(path, json.dumps(body).encode(), dict(kind))


async def deep(asked: Asked, draw: random.Random) -> tuple[int, bytes] | None:
    """JSON that is nested too deep, or cut."""
    one = draw.choice((b"[", b'{"a":', b'{"files":[', b'{"inputs":['))
    content = one * draw.choice((10, 1000, 100_000))
    return await asked.post(draw.choice(("/", "/v1/predict", "/v1/voices")), content, dict(JSON))


async def wrong_keys(asked: Asked, draw: random.Random) -> tuple[int, bytes] | None:
    """No key, another one, or a part of the right one."""
    given = draw.choice(("", "Bearer", "Basic x", "Bearer x", f"Bearer {asked.key[:-1]}", "Bearer " + "\xe9" * 500))
    return await asked.post(draw.choice(("/", "/v1/predict")), recording(draw), {"authorization": given})


async def slow(asked: Asked, draw: random.Random) -> tuple[int, bytes] | None:
    """A body that does not come in time."""
    return await asked.post("/", recording(draw), {}, pause=1.0)


async def cut(asked: Asked, draw: random.Random) -> tuple[int, bytes] | None:
    """A client that goes away: in the middle of the body, or before the answer."""
    content = recording(draw)
    return await asked.post("/", content, {}, cut=draw.choice((0, 10, len(content) // 2, len(content))))


async def headers(asked: Asked, draw: random.Random) -> tuple[int, bytes] | None:
    """Headers that no client sends."""
    odd = draw.choice(
        ({"host": "evil.example\xff"}, {"origin": "https://evil.example"}, {"origin": "null"}, {"x": "y" * 30_000},
         {"content-type": "\xff" * 100}, {"accept-encoding": "x" * 5000}, {"content-type": "application/json; a=b"})
    )  # fmt: skip
    return await asked.post("/", recording(draw), dict(odd))


async def streams(asked: Asked, draw: random.Random) -> tuple[int, bytes] | None:
    """A stream with wrong messages, cut, or faster than speech."""
    start = json.dumps({"rate": 16_000, "key": asked.key})
    first = draw.choice(
        (start, "{", "[" * 10_000, '{"rate": -1}', '{"rate": 16000}', b"\0\0", start.replace("16000", "1e99"))
    )
    then = draw.choice((b"\0", b"\0" * 2**21, b"\1\2" * 2**18, "text", None))
    try:
        async with connect(f"ws://127.0.0.1:{asked.server.port}/v1/stream", max_size=2**24) as socket:
            await socket.send(first)
            for _ in range(4 if then else 0):
                await socket.send(then)
            if then is None and first == start:
                return None
            while True:
                content = await socket.recv()
                if "error" in json.loads(content):
                    return json.loads(content)["status"], str(content).encode()
    except (ConnectionClosed, InvalidHandshake):
        return None


KINDS: Final[dict[Kind, tuple[int, set[int]]]] = {
    mutated: (30, {200, 413, 415, 422}),
    noise: (10, {413, 415, 422}),
    claims: (12, {200, 413, 415, 422}),
    too_long: (3, {400, 413}),
    wrong_types: (15, {200, 404, 405, 415, 422}),
    deep: (10, {422}),
    wrong_keys: (8, {401}),
    slow: (1, {408}),
    cut: (5, set()),
    headers: (3, {200, 400, 403, 415, 422, 431}),
    streams: (3, {401, 413, 422, 429}),
}
"""What may be sent, how often of a hundred, and the statuses of its answers."""


async def one(asked: Asked, kind: Kind, seed: str) -> None:
    """One request of a kind, and its verdict."""
    name = kind.__name__
    try:
        answer = await asyncio.wait_for(kind(asked, random.Random(seed)), SECONDS)
    except (ConnectionError, asyncio.IncompleteReadError) as error:
        # A body that is refused before all of it was sent: the server closes, and the answer may be lost on the way.
        early = name in ("too_long", "slow", "headers")
        asked.statuses[name]["closed"] += 1
        asked.findings += [] if early else [f"{seed}: {error!r}"]
        return
    except TimeoutError:
        asked.findings.append(f"{seed}: no answer within {SECONDS} s")
        return
    status, content = answer or (0, b"{}")
    asked.statuses[name][str(status or "cut by the client")] += 1
    clear = status in (0, *KINDS[kind][1]) and b"Traceback" not in content and b"\n" not in content.rstrip(b"\n")
    if clear and status not in (0, 200, 400, 431):
        clear = set(json.loads(content)) == {"error", "status"}
    if not clear:
        asked.findings.append(f"{seed}: {status} {content[:300]!r}")


async def all_of_them(asked: Asked, requests: int, seed: int) -> list[tuple[int, dict[str, float]]]:
    """Every request, some at once; memory after each tenth."""
    ten_minutes()
    good = recording(random.Random("good"))
    first = await asked.post("/", good, {})
    assert _same(first, first), first
    memory = [(0, asked.server.megabytes())]
    draw = random.Random(seed)
    kinds = draw.choices(list(KINDS), [share for share, _ in KINDS.values()], k=requests)
    for begin in range(0, requests, 100):
        waiting = iter(range(begin, min(begin + 100, requests)))

        async def client(numbers: object = waiting) -> None:
            for number in numbers:  # type: ignore[attr-defined]
                await one(asked, kinds[number], f"{seed}-{kinds[number].__name__}-{number}")

        await asyncio.gather(*(client() for _ in range(AT_ONCE)))
        again = await asked.post("/", good, {})
        if not _same(again, first):
            asked.findings.append(f"after {begin + 100}: the good request has the answer {again!r}")
        if (begin + 100) % max(100, requests // 10) == 0:
            memory.append((begin + 100, asked.server.megabytes()))
    return memory


def page(asked: Asked, requests: int, memory: list[tuple[int, dict[str, float]]]) -> str:
    """As Markdown."""
    rows = [
        f"| {kind.__name__} | {(kind.__doc__ or '').split('.')[0]} | {sum(asked.statuses[kind.__name__].values())} | "
        + ", ".join(f"{status} ({n})" for status, n in sorted(asked.statuses[kind.__name__].items()))
        + " |"
        for kind in KINDS
    ]
    lines = [
        *("# Hostile requests", "", "```"),
        f"python tests/benchmarks/hostile.py CHECKPOINT --requests {requests} > results/benchmarks/hostile.md",
        *("```", "", *(__doc__ or "").strip().split("\n\n")[2].splitlines(), ""),
        f"{requests} requests, {AT_ONCE} at once. Findings: {len(asked.findings)}.",
        *("", "| kind | what | requests | statuses |", "|---|---|---|---|", *rows, ""),
        "| requests | " + " | ".join(f"{name}, MB" for name in memory[0][1]) + " |",
        "|---|" + "---|" * len(memory[0][1]),
        *(f"| {n} | " + " | ".join(f"{held.get(name, 0):.0f}" for name in memory[0][1]) + " |" for n, held in memory),
    ]
    return "\n".join([*lines, *(f"\n- {finding}" for finding in asked.findings)])


def main() -> int:
    """Print the page; 1 where there is a finding."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    key = secrets.token_urlsafe(32)
    with tempfile.NamedTemporaryFile("w") as file:
        file.write(f"benchmark {key}\n")
        file.flush()
        program = [sys.executable, "-m", "ser_ray", "serve", given.checkpoint, "--key-file", file.name, *LIMITS]
        with serving(program) as server:
            asked = Asked(server, key)
            memory = asyncio.run(all_of_them(asked, given.requests, given.seed))
    print(page(asked, given.requests, memory))
    return int(bool(asked.findings))


async def _answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    head = await reader.readuntil(b"\r\n\r\n")
    return int(head.split()[1]), await reader.read()


def _same(one: tuple[int, bytes] | None, other: tuple[int, bytes] | None) -> bool:
    if one is None or other is None or one[0] != 200:
        return False
    mine, theirs = ({row["label"]: row["score"] for row in json.loads(content)} for _, content in (one, other))
    return all(abs(mine[label] - theirs[label]) < 1e-5 for label in theirs)


if __name__ == "__main__":
    sys.exit(main())

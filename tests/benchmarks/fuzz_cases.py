"""The cases of `fuzz.py`: what a command is given, each drawn from a random generator of its own.

A case is a command line over files that this module writes into a folder: a table, a checkpoint, recordings, or a
name. Mutations know the structure of what they change (a cell, a type, a tensor, a header); others change bytes.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import shutil
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
import yaml

RATE = 16_000
WORDS = ("angry", "Happy", "SAD", "neutral", "joy", "frustrated", "0", "1", "no", "low", "tie", "angst")
NASTY = (
    *(
        "",
        " ",
        "\t",
        "nan",
        "NaN",
        "NaT",
        "<NA>",
        "null",
        "None",
        "unknown",
        "-",
        "--help",
        "~",
        "~nobody/x",
        "$HOME",
        "%s%n",
        "*",
    ),
    *(
        "-1",
        "1e309",
        "-inf",
        "inf",
        "1e-400",
        "0x10",
        "1_000",
        "٣",
        "\uff19",
        "1.5.2",
        "1,5",
        "0 days 00:00:01.5",
        "-0.0",
    ),
    *("2026-01-01", "99:99:99", "1" * 5000, "9" * 19, "00", "True", "no", "tie", "unknown#a", "../../../../etc/passwd"),
    *("/etc/passwd", "/dev/zero", "/dev/stdin", ".", "..", "/", "//", "a/", "x/../a.wav", "a.wav/b", "con", "a\\b.wav"),
    *(
        "[bold]x[/bold]",
        "[/]",
        ":smile:",
        "{speaker}",
        "{{",
        "<script>",
        "'",
        '"',
        '""',
        ",",
        ";",
        "|",
        "=1+1",
        "#",
        "?",
    ),
    *(
        "a\nb",
        "a\rb",
        "a\r\nb",
        "a\tb",
        "\0",
        "a\0b",
        "\x1b[31mred",
        "\x07",
        "\x9b2J",
        "\u202egpj.wav",
        "a\u2066b\u2069",
    ),
    *(
        "\u200fabc",
        "\u200e",
        "\u061c",
        "\u2028",
        "\u2029x",
        "\ufeff",
        "\u0085",
        "é",
        "e\u0301",
        "😀",
        "👨‍👩‍👧" * 20,
        "ﷺ",
    ),
    *("x" * 255, "x" * 300, "é" * 200, "x/" * 500, "x" * 140_000, "\uffff", "\U0010ffff", "ß", "İ", "K"),
)
"""Values for any cell, key and name."""


@dataclass
class Case:
    """A command line, and what is known of it beforehand."""

    mutation: str
    argv: list[str]
    stdin: bytes = b""
    call: Callable[[], int] | None = None
    """In place of the command: what it is to call."""
    feeds: dict[Path, bytes] = field(default_factory=dict)
    """Pipes, and what somebody writes into them meanwhile."""


class Material:
    """What all cases share, written once: recordings, checkpoints, a search space."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.wavs = [folder / "audio" / f"{name}.wav" for name in "abcdef"]
        self.recordings = folder / "recordings"
        self.checkpoints = folder / "checkpoints"
        if not (folder / "complete").is_file():
            self._write()
            (folder / "complete").touch()

    def _write(self) -> None:
        from backbone_fixtures import VARIANTS, experiment, write_backbone

        self.wavs[0].parent.mkdir(parents=True)
        for number, path in enumerate(self.wavs):
            soundfile.write(path, speech(number), RATE, subtype="PCM_16")
        self.recordings.mkdir()
        for name, options in {
            **{"pcm16.wav": {"subtype": "PCM_16"}, "float.wav": {"subtype": "FLOAT"}, "ulaw.wav": {"subtype": "ULAW"}},
            **{"pcm24.wav": {"subtype": "PCM_24"}, "adpcm.wav": {"subtype": "MS_ADPCM"}, "a.flac": {}, "a.ogg": {}},
            **{"opus.ogg": {"subtype": "OPUS", "format": "OGG"}, "a.mp3": {}, "a.aiff": {}, "a.au": {}},
        }.items():
            soundfile.write(self.recordings / name, speech(1), RATE, **options)
        for codec, name in (("aac", "a.m4a"), ("aac", "a.aac"), ("libopus", "a.webm"), ("wmav2", "a.wma")):
            _encode(self.recordings / name, codec)
        for variant in VARIANTS:
            write_backbone(variant, self.folder / "backbones" / variant)
        methods = {
            "lora": ("wav2vec2-layer", {"adapter": {"method": "lora", "rank": 2}, "head": {"pooling": "attentive"}}),
            "qlora": ("hubert-group", {"adapter": {"method": "qlora", "rank": 2}}),
            "full": ("wavlm-group", {"adapter": {"method": "full"}}),
            "full-whisper": ("whisper", {"adapter": {"method": "full"}, "head": {"pooling": "statistics"}}),
            "frozen": ("whisper", {"adapter": {"method": "frozen"}}),
        }
        for name, (variant, sections) in methods.items():
            described = experiment(self.folder / "backbones" / variant, **sections)
            save_checkpoint(described, self.checkpoints / name)


def save_checkpoint(described: Any, directory: Path) -> None:
    """Of an untrained model, with the state of an optimizer that has made a step."""
    import torch

    from ser_ray.models import checkpoint
    from ser_ray.models.classifier import build

    model = build(described)
    optimizer = torch.optim.AdamW(model.head.parameters())
    sum(parameter.sum() for parameter in model.head.parameters()).backward()
    optimizer.step()
    counters = {"epoch": 1, "step": 3, "best": 0.5, "best_epoch": 1, "scaler": {}}
    checkpoint.save_training_state(directory, optimizer, counters)
    checkpoint.save(model, directory, {"epoch": 1, "dev_uar": 0.5})
    (directory / "README.md").write_text("# a model\n", encoding="utf-8")


def speech(number: int, seconds: float = 0.6) -> np.ndarray:
    """(T,) of loud and quiet noise and a tone, another one for every number."""
    random = np.random.default_rng(number)
    time = np.arange(int(seconds * RATE)) / RATE
    envelope = 0.05 + np.sin(7 * time + number) ** 2
    return 0.2 * envelope * (0.3 * random.standard_normal(len(time)) + np.sin((900 + 300 * number) * time))


def _encode(path: Path, codec: str) -> None:
    """A recording in a format that only FFmpeg writes."""
    import av

    with av.open(str(path), "w") as container:
        rate = 48_000 if codec == "libopus" else 16_000
        stream = container.add_stream(codec, rate=rate, layout="mono")
        stream.bit_rate = 32_000
        samples = np.repeat(speech(2), rate // RATE)
        resampler = av.AudioResampler(stream.codec_context.format, "mono", rate, frame_size=stream.frame_size or 1024)
        frame = av.AudioFrame.from_ndarray((32767 * samples).astype("<i2")[None], format="s16", layout="mono")
        frame.sample_rate = rate
        for part in (*resampler.resample(frame), *resampler.resample(None)):
            container.mux(stream.encode(part))
        container.mux(stream.encode(None))


# -- bytes


def mutated_bytes(content: bytes, random: Random) -> tuple[str, bytes]:
    """One way in which a file is damaged."""
    ways: dict[str, Callable[[], bytes]] = {
        "cut": lambda: content[: random.randrange(len(content) + 1)],
        "empty": lambda: b"",
        "flipped": lambda: _flipped(content, random, len(content)),
        "flipped at its head": lambda: _flipped(content, random, min(64, len(content))),
        "a part twice": lambda: content[: len(content) // 2] + content[len(content) // 3 :],
        "without its head": lambda: content[random.randrange(1, 64) :],
        "zeros": lambda: content[: len(content) // 4] + bytes(len(content) // 2) + content[3 * len(content) // 4 :],
        "bytes put in": lambda: _with_bytes(content, random),
        "noise": lambda: random.randbytes(random.choice((1, 7, 100, 5000))),
        "gzip": lambda: gzip.compress(content),
    }
    way = random.choice(tuple(ways))
    return way, ways[way]()


def _flipped(content: bytes, random: Random, before: int) -> bytes:
    changed = bytearray(content)
    for _ in range(random.choice((1, 1, 2, 5, 40)) if before else 0):
        changed[random.randrange(before)] ^= 1 << random.randrange(8)
    return bytes(changed)


def _with_bytes(content: bytes, random: Random) -> bytes:
    at = random.randrange(len(content) + 1)
    put = random.choice((b"\0", b"\xff\xff\xff\xff", b"\n", b'"', b",", b"\xed\xa0\x80", random.randbytes(8)))
    return content[:at] + put * random.choice((1, 1, 3, 1000)) + content[at:]


def _nasty(random: Random) -> str:
    return random.choice(NASTY)


# -- tables


@dataclass
class Sheet:
    """A table before it is written."""

    header: list[str]
    rows: list[list[Any]]
    delimiter: str = ","
    encoding: str = "utf-8"
    newline: str = "\n"
    quoting: int = csv.QUOTE_MINIMAL
    suffix: str = ".csv"

    def column(self, name: str) -> int:
        """Its place; a random one's would do as well where it is gone."""
        return self.header.index(name) if name in self.header else 0


def sheet_of(wavs: list[Path], random: Random) -> Sheet:
    """A table that is right."""
    header = ["path", "speaker", "emotion"]
    rows = [[path.name, f"s{number // 2}", WORDS[number % 3]] for number, path in enumerate(wavs)]
    optional = {
        "split": lambda n: ("train", "train", "dev", "dev", "test", "test")[n],
        "start": lambda n: "0.0",
        "end": lambda n: "0.5",
        "gender": lambda n: "fm"[n // 2 % 2],
        "text": lambda n: f"t{n}",
        "rater": lambda n: f"r{n}",
        "language": lambda n: "en",
        "notes": lambda n: "",
    }
    for name in random.sample(tuple(optional), random.choice((0, 0, 1, 3))):
        header.append(name)
        for number, row in enumerate(rows):
            row.append(optional[name](number))
    return Sheet(header, rows)


def _cell(sheet: Sheet, random: Random) -> None:
    for _ in range(random.choice((1, 1, 2, 6))):
        row = random.choice(sheet.rows)
        row[random.randrange(len(row))] = _nasty(random)


def _whole_column(sheet: Sheet, random: Random) -> None:
    at = random.randrange(len(sheet.header))
    one = _nasty(random)
    for row in sheet.rows:
        row[at] = one if random.random() < 0.8 else _nasty(random)


def _header(sheet: Sheet, random: Random) -> None:
    at = random.randrange(len(sheet.header))
    change = random.choice(("nasty", "gone", "twice", "case", "spaces", "all gone", "swapped", "optional"))
    if change == "gone":
        sheet.header.pop(at)
        for row in sheet.rows:
            row.pop(at)
    elif change == "twice":
        sheet.header.append(sheet.header[at])
        for row in sheet.rows:
            row.append(row[at])
    elif change == "all gone":
        sheet.header[:] = []
    elif change == "swapped":
        random.shuffle(sheet.header)
    else:
        words = {"nasty": _nasty(random), "case": sheet.header[at].upper(), "spaces": f" {sheet.header[at]} "}
        sheet.header[at] = words.get(change, random.choice(("start", "end", "split", "rater", "path")))


def _ragged(sheet: Sheet, random: Random) -> None:
    for _ in range(random.choice((1, 3))):
        row = random.choice(sheet.rows)
        if random.random() < 0.5:
            row.extend([_nasty(random) or "more"] * random.choice((1, 2, 2000)))
        else:
            del row[random.randrange(len(row) + 1) :]


def _again(sheet: Sheet, random: Random) -> None:
    """Rows of one recording: votes, copies, contradictions."""
    for _ in range(random.choice((1, 2, 5))):
        row = list(random.choice(sheet.rows))
        row[random.randrange(len(row))] = random.choice((*WORDS, row[0], "s9", "test"))
        sheet.rows.append(row)


def _labels(sheet: Sheet, random: Random) -> None:
    for row in sheet.rows:
        row[min(sheet.column("emotion"), len(row) - 1)] = random.choice((*WORDS, 0, 1.0, -3, "ANG", "a,b", "é"))


def _times(sheet: Sheet, random: Random) -> None:
    for name in ("start", "end"):
        if name not in sheet.header:
            sheet.header.append(name)
            for row in sheet.rows:
                row.append("")
        for row in sheet.rows:
            row[-1] = random.choice(
                ("", "0", "0.2", "1e3", "1e308", "-0", "nan", "0:00:00.1", "0 days 00:00:00.4", "x")
            )


def _dialect(sheet: Sheet, random: Random) -> None:
    sheet.delimiter = random.choice((";", "\t", "|", " ", ":", ","))
    sheet.suffix = random.choice((".csv", ".tsv", ".CSV", ".Tsv", ".csv"))
    sheet.newline = random.choice(("\r", "\r\n", "\n", "\n\n", "\r\r\n", "\u2028"))
    sheet.quoting = random.choice((csv.QUOTE_ALL, csv.QUOTE_MINIMAL))


def _encoding(sheet: Sheet, random: Random) -> None:
    sheet.encoding = random.choice(
        ("utf-16", "utf-16-le", "utf-32", "latin-1", "utf-8-sig", "cp1252", "cp037", "utf-7")
    )
    random.choice(sheet.rows)[-1] = "é"


def _quotes(sheet: Sheet, random: Random) -> None:
    sheet.quoting = csv.QUOTE_NONE
    random.choice(sheet.rows)[0] = random.choice(('"a.wav', 'a".wav', '"a"b.wav"', '""', '"\n', "'a.wav'"))


def _many(sheet: Sheet, random: Random) -> None:
    sheet.rows *= random.choice((50, 300))
    if random.random() < 0.5:
        sheet.rows = [[*row[:-1], f"{row[-1]}{n}"] for n, row in enumerate(sheet.rows)]


def _none(sheet: Sheet, random: Random) -> None:
    if random.random() < 0.7:
        sheet.rows.clear()


SHEETS: dict[str, Callable[[Sheet, Random], None]] = {
    "nothing changed": lambda sheet, random: None,
    "cells": _cell,
    "a column": _whole_column,
    "the header": _header,
    "ragged rows": _ragged,
    "rows again": _again,
    "labels": _labels,
    "times": _times,
    "delimiters and line ends": _dialect,
    "encoding": _encoding,
    "quotes": _quotes,
    "many rows": _many,
    "no rows": _none,
}


def _as_csv(sheet: Sheet) -> bytes:
    buffer = io.StringIO(newline="")
    quoting = csv.QUOTE_MINIMAL if sheet.quoting == csv.QUOTE_NONE else sheet.quoting
    writer = csv.writer(buffer, delimiter=sheet.delimiter, lineterminator=sheet.newline, quoting=quoting)  # type: ignore[arg-type]
    for row in (sheet.header, *sheet.rows):
        if sheet.quoting == csv.QUOTE_NONE:
            buffer.write(sheet.delimiter.join(map(str, row)) + sheet.newline)
        else:
            writer.writerow(row)
    return buffer.getvalue().encode(sheet.encoding, "surrogatepass" if sheet.encoding == "utf-8" else "replace")


def _columns(sheet: Sheet) -> dict[str, list[Any]]:
    """As Parquet has them: rows of one length."""
    width = len(sheet.header)
    rows = [[*row, *[None] * width][:width] for row in sheet.rows]
    return {name: [row[at] for row in rows] for at, name in enumerate(sheet.header)}


def _as_text(value: Any) -> str | None:
    return None if value is None else str(value).encode("utf-8", "replace").decode()


def _parquet_array(values: list[Any], wavs: list[Path], random: Random) -> tuple[str, pa.Array]:
    """A column of another type than text."""
    texts = [_as_text(value) for value in values]
    size = len(texts)
    wild = [random.choice((None, 0, 1, -1, 2**31, 5)) for _ in texts]
    stamps = [random.choice((None, datetime(2026, 1, 1), datetime(1, 1, 1))) for _ in texts]
    kinds: dict[str, Callable[[], pa.Array]] = {
        "decimal": lambda: pa.array([v if v is None else Decimal(v) for v in wild], pa.decimal128(20, 3)),
        "timestamp": lambda: pa.array(stamps, random.choice((pa.timestamp("us"), pa.timestamp("ms", "Europe/Berlin")))),
        "timestamp out of range": lambda: pa.array([2**62] * size, pa.int64()).cast(pa.timestamp("s"), safe=False),
        "date": lambda: pa.array([random.choice((None, date(2026, 1, 1))) for _ in texts]),
        "date out of range": lambda: pa.array([2**31 - 1] * size, pa.int32()).cast(pa.date32()),
        "duration": lambda: pa.array([random.choice((None, timedelta(seconds=0.3))) for _ in texts]),
        "duration out of range": lambda: pa.array([2**62] * size, pa.int64()).cast(pa.duration("s")),
        "time": lambda: pa.array([1] * size, pa.int32()).cast(pa.time32("s")),
        "list": lambda: pa.array([[t] for t in texts], pa.list_(pa.string())),
        "struct": lambda: pa.array([{"value": t} for t in texts]),
        "map": lambda: pa.array([[("k", t)] for t in texts], pa.map_(pa.string(), pa.string())),
        "nested": lambda: pa.array([[[{"a": [t]}]] for t in texts]),
        "dictionary": lambda: pa.array(texts, pa.string()).dictionary_encode(),
        "binary": lambda: pa.array([None if t is None else t.encode() for t in texts], pa.binary()),
        "binary that is no text": lambda: pa.array([b"\xff\xfe\x00"] * size, pa.binary()),
        "fixed binary": lambda: pa.array([b"abcd"] * size, pa.binary(4)),
        "audio": lambda: pa.array([random.choice(wavs).read_bytes() for _ in texts], pa.binary()),
        "large text": lambda: pa.array(texts, pa.large_string()),
        "nulls": lambda: pa.nulls(size),
        "float": lambda: pa.array([random.choice((0.0, 1.5, float("nan"), float("inf"), -1e308)) for _ in texts]),
        "int": lambda: pa.array(wild, pa.int64()),
        "half": lambda: pa.array([np.float16(1.5)] * size, pa.float16()),
        "bool": lambda: pa.array([bool(random.getrandbits(1)) for _ in texts]),
    }
    kind = random.choice(tuple(kinds))
    return kind, kinds[kind]()


def _parquet_table(sheet: Sheet, wavs: list[Path], random: Random) -> tuple[str, pa.Table]:
    columns = _columns(sheet)
    names, arrays, said = list(columns), [], "text"
    for values in columns.values():
        arrays.append(pa.array([_as_text(value) for value in values], pa.string()))
    if names and random.random() < 0.7:
        at = random.randrange(len(names))
        said, arrays[at] = _parquet_array(list(columns.values())[at], wavs, random)
    if random.random() < 0.3:
        said, array = f"{said}, with recordings", _audio_column(len(sheet.rows), wavs, random)
        names, arrays = [*names, "audio"], [*arrays, array]
        if "path" in names and random.random() < 0.7:
            at = names.index("path")
            del names[at], arrays[at]
    table = pa.Table.from_arrays(arrays, names)
    if random.random() < 0.1:
        table = table.replace_schema_metadata(
            {b"huggingface": random.choice((b"{", b"[]", b'{"info": null}', _FEATURES))}
        )
    return said, table


_FEATURES = json.dumps({"info": {"features": {"emotion": {"_type": "ClassLabel", "names": ["a", None, 3]}}}}).encode()


def _audio_column(size: int, wavs: list[Path], random: Random) -> pa.Array:
    good = [random.choice(wavs).read_bytes() for _ in range(size)]
    damaged = [mutated_bytes(one, random)[1] if random.random() < 0.4 else one for one in good]
    kind = random.choice(("binary", "struct", "struct without bytes", "text", "list", "large"))
    if kind == "struct":
        return pa.array(
            [{"bytes": b, "path": random.choice((None, "a.wav", _as_text(_nasty(random))))} for b in damaged]
        )
    if kind == "struct without bytes":
        return pa.array([{"path": "a.wav"} for _ in damaged])
    if kind == "text":
        return pa.array(["a.wav"] * size)
    if kind == "list":
        return pa.array([[0.0, 1.0]] * size)
    return pa.array(damaged, pa.large_binary() if kind == "large" else pa.binary())


def _as_parquet(table: pa.Table, random: Random) -> bytes:
    options: dict[str, Any] = {
        "row_group_size": random.choice((1, 2, 10_000)),
        "compression": random.choice(("snappy", "none", "zstd", "gzip")),
        "use_dictionary": random.random() < 0.5,
    }
    for version in random.sample(("1.0", "2.6"), 2):
        buffer = io.BytesIO()
        try:
            pq.write_table(table, buffer, version=version, **options)
            break
        except pa.ArrowException:  # the older version does not know all types
            continue
    return buffer.getvalue()


def table_case(material: Material, folder: Path, random: Random) -> Case:
    """``ser-ray prepare`` and ``audit`` of a table, or of a list of speakers or utterances that goes with one."""
    for path in material.wavs:
        os.link(path, folder / path.name)
    sheet = sheet_of(material.wavs, random)
    role = random.choice(("table",) * 8 + ("given", "exclude"))
    good = folder / "good.csv"
    good.write_bytes(_as_csv(sheet))
    if role == "given":
        sheet = Sheet(["speaker", "fold"], [[f"mine/s{n}", n] for n in range(3)])
    elif role == "exclude":
        sheet = Sheet(["utterance_id", "reason", "exclude"], [["mine/a", "noise", "yes"], ["mine/b", "", ""]])
    is_parquet = role == "table" and random.random() < 0.5
    said = random.choice(tuple(SHEETS))
    SHEETS[said](sheet, random)
    if is_parquet:
        kind, table = _parquet_table(sheet, material.wavs, random)
        content, suffix, mutation = _as_parquet(table, random), ".parquet", f"parquet: {kind}"
    else:
        content, suffix, mutation = _as_csv(sheet), sheet.suffix, f"{role if role != 'table' else 'csv'}: {said}"
    if random.random() < 0.25:
        way, content = mutated_bytes(content, random)
        mutation = f"{mutation.partition(':')[0]}: bytes: {way}"
    path = folder / f"mine{suffix}"
    path.write_bytes(content)
    keys = {"table": "experiment.corpora.mine", "given": "experiment.protocol.given", "exclude": "experiment.exclude"}
    value = json.dumps([str(path)] if role == "exclude" else str(path))
    overrides = [f"experiment.corpora.mine={json.dumps(str(good))}", f"{keys[role]}={value}"]
    if role == "given":
        overrides.append("experiment.protocol.scheme=given_folds")
    if random.random() < 0.1:
        overrides.append(
            f"experiment.labels.mine={json.dumps({_nasty(random)[:200]: random.choice(WORDS), 'sad': 'sad'})}"
        )
    verb = "audit" if role != "table" else random.choice(("prepare", "audit"))
    return Case(mutation, [verb, str(_space(folder)), *overrides, "resources.workers=0"])


def _space(folder: Path) -> Path:
    path = folder / "space.yaml"
    content = {
        "experiment": {
            **{"name": "fuzz", "corpora": {"mine": "mine.csv"}, "backbone": "embedded/tiny-wav2vec2"},
            "protocol": {"folds": 3},
        },
        "storage": {"cache": str(folder / "cache"), "results": str(folder / "results")},
    }
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


# -- checkpoints


def _values(random: Random) -> Any:
    deep: Any = 0
    for _ in range(random.choice((3, 60, 3000))):
        deep = [deep] if random.random() < 0.9 else {"a": deep}
    return random.choice(
        (
            None,
            True,
            False,
            0,
            1,
            -1,
            2,
            3,
            7,
            10**9,
            10**30,
            2**63,
            0.5,
            -0.0,
            1e308,
            float("nan"),
            float("inf"),
            "",
            [],
            {},
            [None],
            {"a": 1},
            [1] * 3,
            "x",
            deep,
            "a" * 3000,
            *NASTY[: len(NASTY) - 8],
        )
    )


def _mutated_object(content: Any, random: Random) -> tuple[str, Any]:
    """One place of nested content changed."""
    places: list[tuple[Any, Any]] = []
    todo = [content]
    while todo:
        node = todo.pop()
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, value in items:
            places.append((node, key))
            todo.append(value)
    if not places:
        return "a key added", {_nasty(random): _values(random)}
    node, key = random.choice(places)
    way = random.choice(
        ("a value changed",) * 4 + ("a key removed", "a key added", "a key renamed", "all of it changed")
    )
    if way == "a key removed":
        del node[key]
    elif way == "a value changed":
        old = node[key]
        bigger = old * random.choice((-1, 0, 2, 1000, 10**12)) if isinstance(old, int | float) else _values(random)
        node[key] = random.choice((bigger, str(old), [old], _values(random)))
    elif way == "a key added" and isinstance(node, dict):
        node[random.choice(("auto_map", "trust_remote_code", "x", _nasty(random)[:300]))] = _values(random)
    elif way == "a key renamed" and isinstance(node, dict):
        node[_nasty(random)[:300]] = node.pop(key)
    elif way == "all of it changed":
        return way, _values(random)
    return way, content


def _text_of(content: Any, random: Random) -> str:
    try:
        return json.dumps(content)
    except RecursionError:
        return "[" * 100_000


_BOMB = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{','.join([f'*{chr(97 + n)}'] * 9)}]\n" for n in range(9)
)
_TEXTS = (
    *(
        "",
        " ",
        "null",
        "[]",
        "{}",
        "0",
        '"x"',
        "{",
        "[" * 100_000,
        '{"a":' * 50_000,
        "{}{}",
        "NaN",
        "\ufeff{}",
        "//\n{}",
    ),
    *(
        "{" + '"a": 1,' * 3 + '"a": 2}',
        "!!python/object/apply:os.system [ls]",
        "!!int x",
        "!!binary '='",
        "&a [*a]",
        _BOMB,
    ),
    *(
        "a: &a {<<: *a}",
        "? [a]\n: b",
        "- " * 5000,
        "a: |\n" + " x\n" * 30_000,
        "%YAML 9.9\n---\na: 1",
        "---\na\n---\nb",
        "\t",
    ),
)


def _mutated_text(path: Path, random: Random) -> str:
    """A JSON or YAML file, changed by its structure."""
    if random.random() < 0.2:
        path.write_text(random.choice(_TEXTS), encoding="utf-8")
        return "other text"
    text = path.read_text(encoding="utf-8")
    way, content = _mutated_object(yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text), random)
    path.write_bytes(_text_of(content, random).encode("utf-8", "surrogatepass"))
    return way


def _mutated_tensors(path: Path, random: Random) -> str:
    """A safetensors file, by its head and its tensors."""
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    head, data = json.loads(raw[8 : 8 + size]), bytearray(raw[8 + size :])
    names = [name for name in head if name != "__metadata__"]
    name = random.choice(names)
    way = random.choice(
        (
            "NaN",
            "infinity",
            "huge",
            "zeros",
            "dtype",
            "shape",
            "offsets",
            "removed",
            "renamed",
            "added",
            "length of head",
            "metadata",
            "head is no object",
            "transposed",
            "head in spaces",
            "half precision",
        )
    )
    entry, claimed = head[name], None
    begin, end = entry["data_offsets"]
    values = {"NaN": b"\0\0\xc0\x7f", "infinity": b"\0\0\x80\x7f", "huge": b"\xff\xff\x7f\x7f", "zeros": b"\0\0\0\0"}
    if way in values and end > begin:
        at = begin + 4 * random.randrange(max(1, (end - begin) // 4))
        span = 4 if random.random() < 0.5 else end - at
        data[at : at + span] = (values[way] * (span // 4 + 1))[:span]
    elif way == "dtype":
        entry["dtype"] = random.choice(("F64", "I32", "F16", "BF16", "U8", "BOOL", "F8_E4M3", "C64", "X", 3, None))
    elif way == "half precision":
        entry["dtype"] = random.choice(("F16", "BF16"))
        entry["shape"] = [2 * entry["shape"][0], *entry["shape"][1:]] if entry["shape"] else [2]
    elif way == "shape":
        entry["shape"] = random.choice(
            (
                [],
                [0],
                [1, *entry["shape"]],
                entry["shape"][::-1],
                [2**62, 4],
                [-1],
                [10**30],
                "x",
                [1.5],
                [2**32, 2**32],
            )
        )
    elif way == "transposed":
        entry["shape"] = entry["shape"][::-1]
    elif way == "offsets":
        entry["data_offsets"] = random.choice(
            ([0, 4], [begin, end + 4], [end, begin], [-4, 0], [2**63, 2**63 + 4], [], "x")
        )
    elif way == "removed":
        head.pop(name)
    elif way == "renamed":
        head[random.choice((_nasty(random)[:1000], name.upper(), f"x.{name}"))] = head.pop(name)
    elif way == "added":
        head[random.choice(("x", _nasty(random)[:1000]))] = {
            "dtype": "F32",
            "shape": [1],
            "data_offsets": [len(data), len(data) + 4],
        }
        data += b"\0\0\x80\x3f"
    elif way == "length of head":
        claimed = random.choice((0, 1, 8, 2**63, 2**64 - 1, 10**8, 10**6, len(raw), size - 1, size + 1))
    elif way == "metadata":
        head["__metadata__"] = random.choice(
            ({"format": "tf"}, {"format": "mlx"}, {}, None, [], {"x": 1}, {"format": "x" * 9999})
        )
    text = json.dumps(head).encode("utf-8", "surrogatepass")
    if way == "head is no object":
        text = random.choice((b"[]", b"1", b"null", b"", b"{", b"[" * 100_000, b'{"a":{}}', b"\xff\xfe"))
    elif way == "head in spaces":
        text += b" " * random.choice((1, 7, 100_000))
    path.write_bytes(struct.pack("<Q", len(text) if claimed is None else claimed) + text + bytes(data))
    return way


def _mutated_file(path: Path, others: list[Path], random: Random) -> str:
    """A file as a whole."""
    ways: dict[str, Callable[[], object]] = {
        "removed": path.unlink,
        "a directory": lambda: (path.unlink(), path.mkdir()),
        "a link to itself": lambda: (path.unlink(), path.symlink_to(path.name)),
        "a link to nothing": lambda: (path.unlink(), path.symlink_to("/nowhere/at/all")),
        "a link to a device": lambda: (path.unlink(), path.symlink_to("/dev/zero")),
        "a pipe": lambda: (path.unlink(), os.mkfifo(path)),
        "another of its files": lambda: shutil.copyfile(random.choice(others), path),
        "4 GB of zeros": lambda: os.truncate(path, 2**32),
        "4 GB more than it had": lambda: os.truncate(path, path.stat().st_size + 2**32),
    }
    way = random.choice(tuple(ways))
    ways[way]()
    return way


def checkpoint_case(material: Material, folder: Path, random: Random) -> Case:
    """``ser-ray predict`` with a checkpoint that was changed; of the state of its training, what resumes from it."""
    name = random.choice(sorted(path.name for path in material.checkpoints.iterdir()))
    target = folder / "checkpoint"
    shutil.copytree(material.checkpoints / name, target)
    files = sorted(path for path in target.rglob("*") if path.is_file())
    path = random.choice(files)
    inside = path.relative_to(target).as_posix()
    others = [file for file in files if file != path]
    text = path.suffix in (".json", ".yaml")
    draw = random.random()
    if draw < 0.1:
        way = _mutated_file(path, others, random)
    elif draw < 0.3 or not (text or path.suffix == ".safetensors"):
        way, content = mutated_bytes(path.read_bytes(), random)
        path.write_bytes(content)
        way = f"bytes: {way}"
    else:
        way = _mutated_text(path, random) if text else _mutated_tensors(path, random)
    case = Case(f"{path.name}: {way}", ["predict", str(target), str(material.wavs[0]), "--format", "jsonl"])
    if inside.startswith("training/"):
        case.call = lambda: _resume(target, material.checkpoints / name)
    return case


def _resume(changed: Path, whole: Path) -> int:
    import torch

    from ser_ray.models import checkpoint
    from ser_ray.training import loop

    model = checkpoint.load(whole)
    copies = [torch.nn.Parameter(parameter.detach().clone()) for parameter in model.head.parameters()]
    optimizer = torch.optim.AdamW(copies)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    loop._resume(model, optimizer, scaler, changed)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return 0


# -- recordings


def _wav_with(content: bytes, random: Random) -> bytes:
    """A WAV file with another number in its header."""
    changed = bytearray(content)
    places = {4: "<I", 16: "<I", 20: "<H", 22: "<H", 24: "<I", 28: "<I", 32: "<H", 34: "<H", 40: "<I"}
    for _ in range(random.choice((1, 1, 2))):
        at = random.choice(tuple(places))
        most = 2**32 - 1 if places[at] == "<I" else 2**16 - 1
        value = random.choice(
            (0, 1, 2, 3, 8, 16, 24, 32, 64, 255, 4000, 3999, 768_000, 768_001, 44_100, 0xFFFE, most, most - 1)
        )
        struct.pack_into(places[at], changed, at, min(value, most))
    return bytes(changed)


def _wav_of(samples: np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, options.pop("rate", RATE), format="WAV", **options)
    return buffer.getvalue()


def _odd_wav(random: Random) -> tuple[str, bytes]:
    """A WAV file that is right, of sound that is not."""
    with_nan, with_inf = speech(0), speech(0)
    with_nan[random.randrange(9000)] = np.nan
    with_inf[random.randrange(9000)] = np.inf
    makers: dict[str, Callable[[], bytes]] = {
        "NaN": lambda: _wav_of(with_nan, subtype="FLOAT"),
        "infinity": lambda: _wav_of(with_inf, subtype="FLOAT"),
        "1e38": lambda: _wav_of(3e38 * speech(0), subtype="FLOAT"),
        "1e300": lambda: _wav_of(1e300 * speech(0), subtype="DOUBLE"),
        "denormal": lambda: _wav_of(1e-42 * speech(0), subtype="FLOAT"),
        "silence": lambda: _wav_of(np.zeros(9000)),
        "constant": lambda: _wav_of(np.full(9000, 0.3)),
        "no samples": lambda: _wav_of(np.zeros(0)),
        "one sample": lambda: _wav_of(np.ones(1)),
        "255 channels": lambda: _wav_of(np.repeat(speech(0)[:, None], 255, 1)),
        "channels that cancel": lambda: _wav_of(np.stack([speech(0), -speech(0)], 1)),
        "4 kHz": lambda: _wav_of(speech(0), rate=4000),
        "768 kHz": lambda: _wav_of(np.tile(speech(0), 8), rate=768_000),
        "1 Hz": lambda: _wav_of(speech(0), rate=1),
        "above 8 kHz only": lambda: _wav_of(0.5 * np.sin(2.5 * np.arange(40_000)), rate=48_000),
        "a minute": lambda: _wav_of(np.tile(speech(0), 100)),
        "8 bit": lambda: _wav_of(speech(0), subtype="PCM_U8"),
    }
    kind = random.choice(tuple(makers))
    return kind, makers[kind]()


def input_case(material: Material, folder: Path, random: Random) -> Case:
    """``ser-ray predict`` of one to three recordings, and of what is none."""
    audio = folder / "audio"
    audio.mkdir()
    paths: list[str] = []
    ways: list[str] = []
    case = Case("", [])
    for number in range(random.choice((1, 1, 2, 3))):
        way, path = _recording(material, audio, number, case, random)
        ways.append(way)
        paths.append(path)
    case.mutation = ways[0]
    form = random.choice(("jsonl", "jsonl", "csv", "table"))
    case.argv = ["predict", str(material.checkpoints / "frozen"), *paths, "--format", form]
    return case


def _recording(material: Material, audio: Path, number: int, case: Case, random: Random) -> tuple[str, str]:
    """What was written, and its path as an argument."""
    source = random.choice(sorted(material.recordings.iterdir()))
    kind = random.choice(
        ("bytes",) * 5 + ("wav header",) * 4 + ("odd wav",) * 2 + ("name", "object", "pipe", "other format")
    )
    path = audio / f"{number}{source.suffix}"
    if kind == "bytes":
        way, content = mutated_bytes(source.read_bytes(), random)
        path.write_bytes(content)
        return f"{source.suffix}: {way}", str(path)
    if kind == "wav header":
        source = material.recordings / random.choice(("pcm16.wav", "float.wav", "ulaw.wav", "adpcm.wav", "pcm24.wav"))
        path.with_suffix(".wav").write_bytes(_wav_with(source.read_bytes(), random))
        return f"{source.name}: header", str(path.with_suffix(".wav"))
    if kind == "odd wav":
        way, content = _odd_wav(random)
        path.write_bytes(content)
        return f"WAV of {way}", str(path)
    if kind == "other format":
        shutil.copyfile(source, path.with_suffix(random.choice((".wav", ".mp3", ".m4a", ".raw", ".txt", ".amr", ""))))
        return "named as another format", str(next(audio.glob(f"{number}*")))
    if kind == "pipe":
        _, content = mutated_bytes(source.read_bytes(), random) if random.random() < 0.5 else ("", source.read_bytes())
        if random.random() < 0.5:
            case.stdin = content
            return "standard input", "-"
        os.mkfifo(path)
        case.feeds[path] = content
        return "a pipe", str(path)
    name, made = _named_object(audio, number, source, random) if kind == "object" else _named(audio, source, random)
    return f"{kind}: {made}", name


def _named(audio: Path, source: Path, random: Random) -> tuple[str, str]:
    """A recording under a name that is nasty, or of bytes."""
    raw = random.choice((*(one.encode() for one in NASTY), b"caf\xe9", b"\xff\xfe", b"\xed\xa0\x80", b"x" * 250))
    name = os.fsdecode(raw.replace(b"/", b"_").replace(b"\0", b"_") + source.suffix.encode())
    try:
        shutil.copyfile(source, audio / name)
    except OSError:
        return str(audio / name), "too long"
    return (str(audio), "in a folder") if random.random() < 0.3 else (str(audio / name), "given")


def _named_object(audio: Path, number: int, source: Path, random: Random) -> tuple[str, str]:
    """What is no recording."""
    path = audio / f"object{number}{source.suffix}"
    kind = random.choice(
        ("directory", "circle", "dangling", "socket", "device", "nothing", "pipe in a folder", "LFS", "256 MB more")
    )
    kind = kind if kind != "pipe in a folder" or random.random() < 0.8 else "no permission"
    if kind == "directory":
        path.mkdir()
    elif kind == "circle":
        path.mkdir()
        (path / "up").symlink_to(audio)
        (path / "own").symlink_to("own")
        (path / "own.wav").symlink_to("own.wav")
        shutil.copyfile(source, path / f"x{source.suffix}")
    elif kind == "dangling":
        path.symlink_to(random.choice(("nowhere.wav", path.name)))
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(os.path.relpath(path))
    elif kind == "device":
        # Not /proc/kmsg: whoever reads it waits for the kernel's next line, as at a terminal for the next key.
        return random.choice(("/dev/null", "/dev/zero", "/dev/full", "/proc/self/mem", "/sys")), kind
    elif kind == "pipe in a folder":
        path.mkdir()
        os.mkfifo(path / "p.wav")
        shutil.copyfile(source, path / f"x{source.suffix}")
    elif kind == "LFS":
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    elif kind == "256 MB more":  # FFmpeg looks through all of it, at some 100 MB a second
        shutil.copyfile(source, path)
        os.truncate(path, 2**28)
    elif kind == "no permission":
        shutil.copyfile(source, path)
        path.chmod(0)
    return str(path), kind


# -- names


_OBJECTS = (
    "nothing",
    "empty",
    "text",
    "bytes",
    "directory",
    "circle",
    "pipe",
    "socket",
    "a recording",
    "results",
    "loops",
)


def name_case(material: Material, folder: Path, random: Random) -> Case:
    """Every verb's arguments that are paths: nasty names, of things that are not what the verb wants."""
    raw = random.choice(
        (*(one.encode() for one in NASTY), b"caf\xe9", b"\xff\xfe", b"\xed\xa0\x80", b"y" * 255, b"z" * 4096)
    )
    name = raw.replace(b"\0", b"_")[:5000]  # no argument has a null byte, nor more than 128 KiB
    kind, path = random.choice(_OBJECTS), ""
    if random.random() < 0.8:
        path = os.fsdecode(os.fsencode(folder) + b"/" + name.strip(b"/"))
    else:
        kind, path = "as it is", os.fsdecode(name)
    if kind != "as it is":
        try:
            _make(Path(path), kind, material)
        except (OSError, ValueError):
            kind = "nothing"
    verbs: dict[str, Callable[[], list[str]]] = {
        "new": lambda: [path],
        "config": lambda: random.choice(([path], ["adapter.rank", path], ["adapter.rank", path, path])),
        "table": lambda: random.choice(([path], [str(material.recordings), "--pattern", path[-300:]])),
        **{
            verb: lambda: random.choice(
                ([path], [str(_space(folder)), path], [str(_space(folder)), f"experiment.corpora.mine={path}"])
            )
            for verb in ("prepare", "audit", "cache", "train", "tune", "leakage", "fetch")
        },
        "evaluate": lambda: [path],
        "rerun": lambda: [path],
        "report": lambda: random.choice(([path], [path, str(folder)], [path, path, "--output", path])),
        "predict": lambda: random.choice(
            (
                [path, str(material.wavs[0])],
                [str(material.checkpoints / "frozen"), path, str(material.wavs[0])],
                [str(material.checkpoints / "frozen"), str(material.wavs[0]), "--output", path],
                [str(material.checkpoints / "frozen"), str(material.wavs[0]), "--backbone", path],
            )
        ),
        "": lambda: [path],
    }
    verb = random.choice(tuple(verbs))
    arguments = verbs[verb]()
    if verb == "predict" and kind == "pipe":  # of which nobody writes: it would wait, as every program does
        kind, arguments = "pipe that is fed", [str(material.checkpoints / "frozen"), path]
    case = Case(f"{verb or 'no verb'}: {kind}", [verb, *arguments] if verb else arguments)
    if kind == "pipe that is fed":
        case.feeds[Path(path)] = b"no recording"
    return case


def _make(path: Path, kind: str, material: Material) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind in ("empty", "text", "bytes"):
        path.write_bytes({"empty": b"", "text": b"experiment: {backbone: x}\n", "bytes": b"\xff\0\xfe"}[kind])
    elif kind == "directory":
        path.mkdir()
    elif kind == "circle":
        path.symlink_to(path.name)
    elif kind == "loops":
        path.mkdir()
        (path / "again").symlink_to(path)
        shutil.copyfile(material.wavs[0], path / "a.wav")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(os.path.relpath(path))
    elif kind == "a recording":
        shutil.copyfile(material.wavs[0], path)
    elif kind == "results":
        path.mkdir()
        for name in ("trials.csv", "search.yaml", "provenance.json"):
            (path / name).write_text("{}")


KINDS: dict[str, Callable[[Material, Path, Random], Case]] = {
    "tables": table_case,
    "checkpoints": checkpoint_case,
    "inputs": input_case,
    "names": name_case,
}

"""Damaged and odd files and names, thousands of them, given to the commands: an answer, or one line, and nothing else.

    python tests/benchmarks/fuzz.py --tables 10000 --checkpoints 5000 --inputs 3000 --names 2000 \\
        --scratch /dev/shm > results/benchmarks/fuzz.md

A case is a command line over files that `fuzz_cases.py` writes, drawn from ``--seed``, the kind and its number alone.
It runs in this project's own `main`, in a child process that does many of them (``--workers``), under a time limit. It
ends well if the command has done its work, and what it printed is printable, with probabilities that are finite and sum
to 1; or if it says in one line what is wrong (exit code 2, or 1 where ``predict`` answers for the other recordings).
Anything else (another exception, no end, a process that dies) is a finding: it is written below ``--findings``, with
the command that shows it again, and the exit code is 1. The memory of a child is read after a tenth of its cases of a
kind, and after the last.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import ctypes
import gc
import io
import json
import math
import multiprocessing
import os
import platform
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from fuzz_cases import KINDS, Case, Material  # noqa: E402

SECONDS = 60
"""Of one case, after which it counts as a hang: a case takes milliseconds, a loaded machine some seconds."""
LINE = 400
"""Characters of a message, without the names that it quotes from the command line."""
DATA_GIB = 8
"""What a child may have of memory: a header that makes it ask for more is a finding."""
BIDIRECTIONAL = set("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
COLUMNS = (
    *("cases", "done", "answered in part", "refused in one line", "findings", "different messages"),
    *("slowest, CPU s", "growth, MB per 1,000 cases"),
)
ABOUT = (
    "What is done, by kind: `prepare` and `audit` of a table (CSV, TSV, Parquet, with and without recordings inside),",
    "of a list of folds or of what to exclude; `predict` with a checkpoint (LoRA, QLoRA, full, frozen) or, where the",
    "state of its training was changed, a resumed step; `predict` of recordings, pipes and what is none; every verb",
    "with names and things that it does not expect, as far as it comes before it would start Ray. Messages are counted",
    "by their words, without names and numbers.",
)
OTHER_VERBS = "Ray was asked for"
"""How the commands end here that would start Ray: they have read their arguments by then."""


@dataclass(frozen=True)
class Ended:
    """How one case ended."""

    mutation: str
    outcome: str
    """``done``, ``refused`` (one line), ``answered in part`` (predict), or ``FINDING``."""
    what: str = ""
    """The message, or what is wrong with it."""
    detail: str = ""
    """Of a finding: the command and what it printed."""
    seconds: float = 0.0


class Hang(BaseException):
    """The time is up. Not an Exception, which a command may turn into a message."""


class Wrong(Exception):  # noqa: N818
    """A command ended in a way that it should not."""


def run_case(kind: str, number: int, seed: int, material: Material) -> Ended:
    """One case, in this process, in a folder of its own."""
    random = Random(f"{seed}/{kind}/{number}")
    folder = Path(tempfile.mkdtemp(prefix="f", dir=material.folder))
    started = time.process_time()
    case = Case("(making the case)", [])
    out, err = io.TextIOWrapper(io.BytesIO(), "utf-8", newline=""), io.StringIO()
    try:
        before = Path.cwd()
        os.chdir(folder)
        case = KINDS[kind](material, folder, random)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            outcome, what = _judged(case, folder, out, err)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        detail = ""
    except (Exception, Hang, SystemExit) as error:
        if case.argv == []:
            raise
        outcome = "FINDING"
        what = _named(error)
        detail = f"{case.argv!r:.3000}\n\n{traceback.format_exc()[-6000:]}\n-- stderr\n{err.getvalue()[-3000:]}"
    finally:
        os.chdir(before)
        shutil.rmtree(folder, ignore_errors=True)
    return Ended(case.mutation, outcome, what, detail, time.process_time() - started)


def _named(error: BaseException) -> str:
    """An error by its kind and the function of the project that raised it: those of one cause are counted together."""
    if isinstance(error, Wrong):
        return str(error)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/ser_ray/" in f.filename]
    place = f"{Path(frames[-1].filename).name}:{frames[-1].name}" if frames else "?"
    return f"{type(error).__name__} in {place}"


@contextlib.contextmanager
def _fed(pipes: dict[Path, bytes]) -> Iterator[None]:
    """Somebody who writes into each pipe, until it is read or the case has ended."""

    def feed(path: Path, content: bytes) -> None:
        with contextlib.suppress(OSError), path.open("wb") as pipe:
            pipe.write(content)

    threads = [threading.Thread(target=feed, args=pipe, daemon=True) for pipe in pipes.items()]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        for thread, path in zip(threads, pipes, strict=True):
            while thread.is_alive():
                os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))  # who opened it for writing waits for this
                thread.join(0.01)


def _judged(case: Case, folder: Path, out: io.TextIOWrapper, err: io.StringIO) -> tuple[str, str]:
    """Run it; outcome and message. Raises Wrong for an end that is none of those that are right."""
    from ser_ray.__main__ import main
    from ser_ray.schema import UserError

    stdin = io.TextIOWrapper(io.BytesIO(case.stdin))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), _as_stdin(stdin), _fed(case.feeds):
        if case.call:
            try:
                code = case.call()
            except UserError as error:
                code = 2
                print(f"ser-ray train: {error}", file=err)
        else:
            code = main(case.argv)
    out.flush()
    printed = out.buffer.getvalue().decode("utf-8", "surrogateescape")  # type: ignore[attr-defined]
    form = "table" if case.argv[0] == "predict" and not case.call else ""
    form = case.argv[case.argv.index("--format") + 1] if "--format" in case.argv else form
    is_data = form in ("jsonl", "csv") or case.argv[0] == "table"
    _check_printable(err.getvalue() + ("" if is_data else printed))
    if code == 2:
        return "refused", _one_line(case, err.getvalue(), folder)
    if form and not case.call:
        _check_answers(printed, form)
    if code == 1 and form:
        return "answered in part", _first_reason(case, err.getvalue())
    if code != 0:
        raise Wrong(f"exit code {code}")
    return "done", ""


@contextlib.contextmanager
def _as_stdin(stream: io.TextIOWrapper) -> Iterator[None]:
    before, sys.stdin = sys.stdin, stream
    try:
        yield
    finally:
        sys.stdin = before


def _check_printable(text: str) -> None:
    for letter in set(text) - {"\n", "\t"}:
        if unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") or letter in BIDIRECTIONAL:
            raise Wrong(f"prints U+{ord(letter):04X}, which a terminal obeys or cannot show")


def _one_line(case: Case, err: str, folder: Path) -> str:
    """The message, which is the last line, without what is particular to the case. A search space has its problems
    listed, each in a line."""
    lines = err.rstrip("\n").split("\n")
    numbers = [number for number, line in enumerate(lines) if line.startswith("ser-ray")]
    first = numbers[-1] if numbers else 0
    listed = lines[first].endswith(" problems") and all(line.startswith("  ") for line in lines[first + 1 :])
    if not numbers or not (first == len(lines) - 1 or (listed and case.argv[0] != "predict")):
        raise Wrong(f"the message is not one line, but {len(lines) - first}")
    bare = lines[first]
    for argument in sorted((part for one in case.argv for part in one.split("=")), key=len, reverse=True):
        for quoted in (argument, argument.replace(str(folder), ""), os.path.normpath(argument)):
            bare = bare.replace(quoted, "") if len(quoted) > 20 else bare
    bare = bare.replace(str(folder), "")
    if len(bare) > LINE:
        raise Wrong(f"a message of {len(bare) // 100}00 characters: {bare[:60]}")
    if "Traceback" in err:
        raise Wrong("a traceback")
    return bare


def _first_reason(case: Case, err: str) -> str:
    for argument in case.argv:
        err = err.replace(argument, "") if len(argument) > 20 else err
    lines = [line for line in err.split("\n") if line.strip()]
    for line in lines:
        if len(line) > 3 * LINE:
            raise Wrong(f"a reason of {len(line) // 100}00 characters")
    return lines[0].rpartition(".")[2] if lines else ""


def _check_answers(printed: str, form: str) -> None:
    """That every answer has finite probabilities that sum to 1, or none and a reason."""
    if form == "table":
        if " nan " in printed or " inf " in printed:
            raise Wrong("a table with NaN or infinity")
        return
    if form == "jsonl":
        rows = [json.loads(line, parse_constant=_no_constant) for line in printed.split("\n") if line]
        found = [(list(row["probabilities"].values()), row.get("reason")) for row in rows]
    else:
        table = list(csv.DictReader(io.StringIO(printed, newline="")))
        found = [([float(v) for k, v in row.items() if k.startswith("p_") and v], row["reason"]) for row in table]
    if not found:
        raise Wrong("no answer at all")
    for values, reason in found:
        if not values and not reason:
            raise Wrong("an answer without probabilities and without a reason")
        if values and not (all(map(math.isfinite, values)) and abs(sum(values) - 1) < 1e-6):
            raise Wrong("probabilities that do not sum to 1")


def _no_constant(word: str) -> float:
    raise Wrong(f"JSON with {word}")


# -- children


def child(connection: Connection, folder: str, seed: int, log: str) -> None:
    """Do what is asked, (kind, number) by (kind, number), until None comes."""
    sink = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)  # what libraries written in C print
    os.dup2(sink, 2)
    resource.setrlimit(resource.RLIMIT_DATA, (DATA_GIB * 2**30,) * 2)
    prepare_process()
    material = Material(Path(folder))
    while (asked := connection.recv()) is not None:
        connection.send(_memory() if asked == "memory" else run_case(*asked, seed, material))


def prepare_process() -> None:
    """A process in which cases run: no network, no Ray, one thread, the checkpoint for recordings loaded once."""
    os.environ.update(HF_HUB_OFFLINE="1", COLUMNS="200", TERM="dumb")
    signal.signal(signal.SIGALRM, _up)
    import logging

    import torch
    import typer

    from ser_ray import prepare
    from ser_ray.models import checkpoint
    from ser_ray.runtime import cluster
    from ser_ray.schema import UserError

    torch.set_num_threads(1)
    logging.getLogger("transformers").setLevel(logging.CRITICAL)
    load = checkpoint.load
    kept = cache(lambda directory: load(directory))

    def load_once(directory: Path, device: Any = "cpu", backbone: Any = None, *others: Any) -> Any:
        shared = Path(directory).parent.name == "checkpoints" and backbone is None
        return kept(directory) if shared else load(directory, device, backbone, *others)

    def no_ray(*arguments: Any, **options: Any) -> None:
        raise UserError(OTHER_VERBS)

    typer.main.get_command = cache(typer.main.get_command)  # a fifth of the time of a case
    os.fsync = lambda file: None
    checkpoint.load = load_once
    cluster.connect = no_ray
    prepare._with_ray = lambda task, chunks, work, console: (task(chunk, **work) for chunk in chunks)


def _up(*_: object) -> None:
    raise Hang


def _memory() -> int:
    """Resident bytes, after what can be given back was."""
    import pyarrow as pa

    gc.collect()
    pa.default_memory_pool().release_unused()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@dataclass
class Tally:
    """What one run has found; shared by the threads that each talk to a child."""

    ended: dict[str, dict[str, Counter[str]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(Counter)))
    """Kind -> `_group` of mutations -> outcome -> count."""
    messages: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    slowest: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    findings: list[tuple[str, int, Ended]] = field(default_factory=list)
    growth: dict[str, list[tuple[int, int]]] = field(default_factory=lambda: defaultdict(list))
    """Kind -> for every child: cases between the two readings, and bytes that came to it."""
    minutes: float = math.inf
    """What all cases may take; a kind gets its share by its number of cases, and what earlier ones have left."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, kind: str, number: int, one: Ended) -> None:
        """One more case."""
        with self.lock:
            self.ended[kind][_group(one.mutation)][one.outcome] += 1
            self.slowest[kind] = max(self.slowest[kind], one.seconds)
            if one.outcome in ("refused", "answered in part"):
                self.messages[kind][_shape(one.what)] += 1
            if one.outcome == "FINDING":
                self.findings.append((kind, number, one))
                print(f"FINDING {kind} {number} ({one.mutation}): {one.what}", file=sys.stderr, flush=True)


def _shape(message: str) -> str:
    """A message without what varies in it, roughly: the words that are letters alone."""
    words = [word.strip("(),.;:'\"") for word in message.split()]
    return " ".join(word for word in words if word.isalpha() and word.isascii() and len(word) < 20)[:80]


class Worker(threading.Thread):
    """Gives cases to one child after the other: a new one where one has died."""

    def __init__(self, cases: list[tuple[str, int]], folder: Path, seed: int, tally: Tally) -> None:
        super().__init__()
        self.cases, self.folder, self.seed, self.tally = cases, folder, seed, tally
        self.child: Any = None
        self.code: int | None = None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        log = str(self.folder / "stderr.log")
        self.child = context.Process(target=child, args=(other, str(self.folder), self.seed, log), daemon=True)
        self.child.start()
        other.close()

    def _ask(self, asked: Any) -> Any:
        """The child's answer; None if it died or did not answer in time."""
        if self.child is None:
            self._start()
        try:
            self.connection.send(asked)
            if self.connection.poll(2 * SECONDS + 60):
                return self.connection.recv()
        except (EOFError, OSError):
            pass
        self.child.join(1)
        self.child.kill()
        self.child.join()
        self.code, self.child = self.child.exitcode, None
        return None

    def run(self) -> None:
        """All of its cases, kind by kind."""
        by_kind: dict[str, list[int]] = defaultdict(list)
        for kind, number in self.cases:
            by_kind[kind].append(number)
        started, before = time.monotonic(), 0
        for kind, numbers in by_kind.items():
            before += len(numbers)
            until = started + 60 * self.tally.minutes * before / len(self.cases)
            first = (len(numbers) // 10, 0) if len(numbers) >= 10 else None
            for done, number in enumerate(numbers):
                if time.monotonic() > until:
                    numbers = numbers[:done]
                    break
                if first and done == len(numbers) // 10:
                    first = (done, self._ask("memory") or 0)
                one = self._ask((kind, number))
                if one is None:
                    one = Ended("(died)", "FINDING", f"the process died or hung (exit code {self.code})")
                    first = None
                self.tally.add(kind, number, one)
            if first and first[1] and (memory := self._ask("memory")):
                self.tally.growth[kind].append((len(numbers) - first[0], memory - first[1]))
        if self.child is not None:
            self.connection.send(None)
            self.child.join(30)


def fuzz(tally: Tally, counts: dict[str, int], seed: int, workers: int, folder: Path) -> None:
    """Run all cases."""
    Material(folder)  # once, before there are several who need it
    threads = []
    for worker in range(workers):
        cases = [(kind, number) for kind, count in counts.items() for number in range(worker, count, workers)]
        threads.append(Worker(cases, folder, seed, tally))
    for thread in threads:
        thread.start()
    total = sum(counts.values())
    while any(thread.is_alive() for thread in threads):
        threads[0].join(30) if threads[0].is_alive() else time.sleep(2)
        done = sum(count for kind in tally.ended.values() for one in kind.values() for count in one.values())
        print(f"{done} of {total} cases, {len(tally.findings)} findings", file=sys.stderr, flush=True)


def write_findings(tally: Tally, seed: int, folder: Path) -> None:
    """A file for each finding, with the command that shows it again."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind, number, one in tally.findings:
        command = f"python tests/benchmarks/fuzz.py --seed {seed} --only {kind}:{number}"
        text = f"{one.what}\nmutation: {one.mutation}\nagain: {command}\n\n{one.detail}\n"
        (folder / f"{kind}-{seed}-{number}.txt").write_text(text, encoding="utf-8", errors="backslashreplace")


def page(tally: Tally, command: str, seconds: float, workers: int) -> str:
    """The result as Markdown."""
    lines = ["# Damaged and odd files and names", "", "```", command, "```", ""]
    total = sum(n for kind in tally.ended.values() for one in kind.values() for n in one.values())
    lines += [
        f"{total:,} cases in {seconds / 60:.0f} minutes on {os.cpu_count()} cores ({platform.machine()}), in {workers} "
        "processes; other work ran beside it. Right is: the command does its",
        "work, or says in one line what is wrong, and prints nothing that a terminal obeys. Anything else is a",
        f"finding: another exception, {SECONDS} s without an end, a process that dies, a message of more than {LINE}",
        "characters, probabilities that are not finite or do not sum to 1. Growth: a child's resident memory after its",
        "last case of a kind, beyond that after the first tenth.",
        "",
        f"| kind | {' | '.join(COLUMNS)} |",
        f"|---|{'---|' * len(COLUMNS)}",
    ]
    for kind, mutations in tally.ended.items():
        sums: Counter[str] = sum(mutations.values(), Counter())
        cells = [f"{sums[outcome]:,}" for outcome in ("done", "answered in part", "refused", "FINDING")]
        cases, grown = (
            (sum(column) for column in zip(*tally.growth[kind], strict=True)) if tally.growth[kind] else (0, 0)
        )
        rate = f"{grown / 2**20 / cases * 1000:+.1f}" if cases else ""
        lines.append(
            f"| {kind} | {sums.total():,} | {' | '.join(cells)} | {len(tally.messages[kind]):,} | "
            f"{tally.slowest[kind]:.1f} | {rate} |"
        )
    lines += ["", *ABOUT]
    for kind, mutations in tally.ended.items():
        lines += [
            "",
            f"## {kind}",
            "",
            "| what was changed | done | in part | refused | findings |",
            "|---|---|---|---|---|",
        ]
        for mutation, outcomes in sorted(mutations.items()):
            cells = [str(outcomes[outcome] or "") for outcome in ("done", "answered in part", "refused", "FINDING")]
            lines.append(f"| {mutation} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _group(mutation: str) -> str:
    """What was changed, without how: a row of the table.

    >>> _group("csv: bytes: cut"), _group("WAV of 1 Hz")
    ('csv', 'WAV')
    """
    return mutation.partition(":")[0].partition(" of ")[0].partition(" in ")[0]


def main(arguments: list[str]) -> int:
    """Print the table as Markdown; returns 1 if there is a finding."""
    parser = argparse.ArgumentParser()
    for kind in KINDS:
        parser.add_argument(f"--{kind}", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=math.inf, help="end after them, with what has been done")
    parser.add_argument("--scratch", type=Path, help="where the cases' files are written, best in memory")
    parser.add_argument("--findings", type=Path, default=Path("fuzz-findings"))
    parser.add_argument("--only", default="", help="KIND:NUMBER: this case alone, in this process")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=given.scratch) as name:
        folder = Path(name).resolve()
        if given.only:
            kind, _, number = given.only.partition(":")
            prepare_process()
            one = run_case(kind, int(number), given.seed, Material(folder))
            print(f"{one.outcome}: {one.what}\nmutation: {one.mutation}\n{one.detail}")
            return one.outcome == "FINDING"
        started = time.monotonic()
        counts = {kind: getattr(given, kind) for kind in KINDS if getattr(given, kind)}
        tally = Tally(minutes=given.minutes)
        fuzz(tally, counts, given.seed, given.workers, folder)
    write_findings(tally, given.seed, given.findings)
    command = f"python tests/benchmarks/fuzz.py {' '.join(arguments)} > results/benchmarks/fuzz.md"
    print(page(tally, command, time.monotonic() - started, given.workers), end="")
    return bool(tally.findings)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""What a GPU reaches, within eight minutes: large backbones, each method, beside Trainer and PEFT; whole searches.

    python tests/benchmarks/gpu.py --rows gpu.jsonl --ravdess DIR --whisper DIR > results/benchmarks/gpu.md
    python tests/benchmarks/gpu.py --rows gpu.jsonl --page > results/benchmarks/gpu.md    # of rows that are there
    python tests/benchmarks/gpu.py --rows /tmp/rows.jsonl --tiny --device cpu             # tries the script itself

No network. Backbones have random weights in the shapes of wav2vec2-large and WavLM-large (24 blocks, 1024 wide) and
Whisper large-v3's encoder (32 blocks, 1280 wide, 128 mel bands); utterances are noise of 1 to 6 s, in memory. Our side
is `training.loop.fit` fed by `runtime.feed`, as trials run it; the other side is trainer.py. Each job is a process with
its own time limit, in order of what its rows are worth, and each row is a line of --rows as soon as it is measured: a
machine that is taken away, a process that hangs or a GPU that fails costs the rows that were not there yet.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[2]
CELLS: Final = Path(__file__).with_name("gpu_cells.py")
Row = dict[str, Any]

SWITCHES: Final = {
    "equal lengths, with a mask": "what a mask costs where no utterance is padded; torch's varlen attention, which "
    "would spare it for all batches, is worth building if this row is a tenth slower than the next",
    "equal lengths": "the same without the mask, as batches of equal lengths are computed",
    "compile": "experiment.compile, torch.compile of the blocks: on by default if it makes LoRA at 120 s a tenth "
    "faster or more",
}
"""What is decided by these rows, of LoRA in batches of 120 s. Compiling comes last: it may take minutes."""


@dataclass(frozen=True)
class Job:
    """One process, and the seconds it may take; cells of gpu_cells.py, or a command whose own time is the row."""

    name: str
    limit_s: float
    cells: list[Row] = field(default_factory=list)
    command: list[str] = field(default_factory=list)


EACH: Final = (("lora", 120), ("full", 120), ("qlora", 120), ("frozen", 120))


def cells(family: str, *which: tuple[str, int] | tuple[str, int, str]) -> list[Row]:
    """Cells of one family: a method, seconds of a batch, and maybe a switch."""
    found = []
    for one in which:
        method, seconds, switch = one if len(one) == 3 else (*one, "")
        found.append({"family": family, "method": method, "seconds": seconds, "switch": switch})
    return found


def against(family: str, *methods: str) -> list[Row]:
    """The same by Trainer and PEFT."""
    return [{"way": "trainer", "family": family, "method": method, "seconds": 120} for method in methods]


def jobs(arguments: argparse.Namespace, scratch: Path) -> list[Job]:
    """All of them, the most valuable first."""
    auto, alone = (
        ([], [])
        if not (arguments.ravdess and arguments.whisper)
        else (
            [search(name, "ravdess_whisper.yaml", scratch, 110, *ravdess(arguments), *own)]
            for name, own in (("RAVDESS", []), ("RAVDESS, a GPU each", ["resources.gpus_per_worker=1"]))
        )
    )
    return [
        Job("whisper", 110, [{"way": "matrix"}, *cells("whisper", *EACH)]),
        Job("wavlm", 70, cells("wavlm", *EACH)),
        *auto,
        Job("wav2vec2", 70, cells("wav2vec2", *EACH)),
        Job("switches", 90, cells("whisper", *(("lora", 120, name) for name in SWITCHES))),
        Job("Trainer, whisper", 70, against("whisper", "lora", "full")),
        Job("Trainer, wav2vec2", 60, against("wav2vec2", "lora")),
        Job("batches", 70, cells("whisper", ("lora", 480), ("lora", 30), ("qlora", 480), ("full", 480), ("full", 30))),
        search("the demo", "demo.yaml", scratch, 100),
        first_step(scratch),
        *alone,
        Job("Trainer, others", 70, [*against("wavlm", "lora"), *against("whisper", "qlora")]),
        Job("other batches", 70, [*cells("wavlm", ("lora", 480), ("lora", 30)), *cells("wav2vec2", ("lora", 480))]),
    ]


def search(name: str, space: str, scratch: Path, limit_s: float, *overrides: str) -> Job:
    """A whole search of four trials, from the command to its report."""
    slug = "".join(letter if letter.isalnum() else "-" for letter in name)
    own = [
        f"experiment.name={slug}",
        f"storage.results={scratch / 'results'}",
        f"storage.cache={scratch / 'cache'}",
        "tune.trials=4",
    ]
    return Job(name, limit_s, command=["-m", "ser_ray.tune", f"search_spaces/{space}", *own, *overrides])


def ravdess(arguments: argparse.Namespace) -> list[str]:
    """Where its corpus and backbone are."""
    return [f"experiment.corpora.ravdess={arguments.ravdess}", f"experiment.backbone={arguments.whisper}"]


def first_step(scratch: Path) -> Job:
    """`ser-ray train` of the demo's experiment in one process, over data that the demo has prepared before, which ends
    after its first step of training."""
    command = ["-c", _FIRST_STEP, "train", "search_spaces/demo.yaml", "resources.workers=0", "experiment.name=first"]
    own = [
        "experiment.head.init=random",
        "experiment.head.speaker=none",  # a pass over train before the first step
        "storage.prefix_gb=0",
        f"storage.results={scratch / 'results'}",
        f"storage.cache={scratch / 'cache'}",
    ]
    return Job("the first step of the demo", 60, command=[*command, *own])


_FIRST_STEP: Final = """
import os, sys
from ser_ray.training import step
taken = step.apply
def apply(*arguments):
    taken(*arguments)
    import torch
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    os._exit(0)
step.apply = apply
from ser_ray.__main__ import main
sys.exit(main(sys.argv[1:]) or 1)
"""


def run(job: Job, rows: Path, limit_s: float, arguments: argparse.Namespace) -> None:
    """Run a job to its end or its limit; its rows are then in the file, and one that says so if it did not end well."""
    command = job.command or [
        str(CELLS),
        str(rows),
        json.dumps(job.cells),
        arguments.device,
        "tiny" if arguments.tiny else "large",
    ]
    environment = {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}", "PYTHONUNBUFFERED": "1"}
    started = time.perf_counter()
    log = rows.with_suffix(".log")
    with log.open("ab") as output:
        output.write(f"\n== {job.name}\n".encode())
        output.flush()
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=os.environ | environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(limit_s)
            failed = f"exit code {code}" if code else ""
        except subprocess.TimeoutExpired:
            failed = f"not done in {limit_s:.0f} s"
        finally:
            _end(process)  # also where this script is ended: nothing of it may stay on the GPU
    took = round(time.perf_counter() - started, 1)
    if job.command or failed:
        found = {"failed": failed} if failed else outcome(job)
        add_row(rows, {"job": job.name, "took_s": took} | found)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask it to end, so that a search ends its Ray; then end it with all that it started."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def outcome(job: Job) -> Row:
    """What a search did, from its own files; nothing of another command."""
    if "ser_ray.tune" not in job.command:
        return {}
    settings = dict(text.partition("=")[::2] for text in job.command if "=" in text)
    directory = Path(settings["storage.results"]) / settings["experiment.name"]
    with (directory / "trials.csv").open(encoding="utf-8", newline="") as file:
        trials = list(csv.DictReader(file))
    plan = json.loads((directory / "plan.json").read_text(encoding="utf-8"))
    done = sum(trial["status"] in ("finished", "stopped") for trial in trials)
    return {"trials": len(trials), "done": done, "sharing": plan["allocation"].get("sharing", "")}


def add_row(rows: Path, row: Row) -> None:
    """Append a line, and see it on the disk."""
    with rows.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_rows(rows: Path) -> list[Row]:
    """All rows that were measured; a line that was cut off is left out."""
    found = []
    for line in rows.read_text(encoding="utf-8").splitlines() if rows.is_file() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def page(given: list[str], rows: list[Row]) -> str:
    """The rows as Markdown."""
    about = next((row for row in rows if row.get("job") == "machine"), {})
    peak = next((row["flops_per_s"] for row in rows if "flops_per_s" in row), None)
    measured = (
        f"the {peak / 1e12:.3g} TFLOP/s of a product of two square matrices" if peak else "a rate that is missing"
    )
    lines = [
        f"# {'Large backbones on a GPU' if about.get('gpu') else 'A trial of the script: no figures'}",
        "",
        f"```\n{' '.join(['python', 'tests/benchmarks/gpu.py', *given])}\n```",
        "",
        f"{about.get('gpu') or about.get('processor')}, {about.get('cores')} cores; {about.get('versions')}. "
        "Random weights; noise of 1 to 6 s. The first epoch is not timed; of Trainer, the first two steps.",
        f"Share: operations (counted in the epoch that is not timed, padding included) over seconds, of {measured} in "
        "the same run. A larger share is not more speed: Trainer pads Whisper's input to 30 s, and computes on it.",
        "",
        "| backbone | method | batch, s | way | utterances/s | a step, ms | peak memory, GiB | share | took, s |",
        "|---|---|---|---|---|---|---|---|---|",
        *(_line(row, rows, peak) for row in rows if "family" in row),
        "",
        "| whole command | seconds | trials done | how trials share the GPU |",
        "|---|---|---|---|",
        *(_command(row) for row in rows if "job" in row and row["job"] != "machine"),
        "",
        "What these rows decide:",
        "",
        *(f"- {name}: {what}." for name, what in SWITCHES.items()),
    ]
    return "\n".join(lines)


def _line(row: Row, rows: list[Row], peak: float | None) -> str:
    way = (
        "Trainer + PEFT"
        if row.get("way") == "trainer"
        else f"ser_ray{', ' * bool(row.get('switch'))}{row.get('switch', '')}"
    )
    start = f"| {row['family']} | {row['method']} | {row['seconds']} | {way} | "
    if "failed" in row:
        return f"{start}{row['failed']} | | | | {row['took_s']} |"
    flops = row["flops_per_utterance"] or next(
        (other.get("flops_per_utterance") for other in rows if _same_work(row, other)), None
    )
    share = f"{flops * row['utterances_per_s'] / peak:.2g}" if flops and peak else ""
    figures = f"{row['utterances_per_s']:.1f} | {row['step_ms']:.0f} | {row['memory_gib']:.2f} | {share}"
    return f"{start}{figures} | {row['took_s']} |"


def _same_work(row: Row, other: Row) -> bool:
    """Whether another row's operations are those of this one, of which none could be counted."""
    same = all(row[key] == other.get(key) for key in ("family", "method", "seconds"))
    return same and other.get("way") is None and not other.get("switch")


def _command(row: Row) -> str:
    trials = f"{row['done']} of {row['trials']}" if "trials" in row else ""
    return f"| {row['job']} | {row['took_s']} | {row.get('failed') or trials} | {row.get('sharing', '')} |"


def machine() -> Row:
    """What the figures are of; asked in a process of its own, which gives the GPU back."""
    script = (
        "import torch, transformers, peft; gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else ''; "
        "names = ', '.join(f'{library.__name__} {library.__version__}' for library in (torch, transformers, peft)); "
        "print(gpu, names, sep='|')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    gpu, _, versions = done.stdout.strip().splitlines()[-1].partition("|")
    processor = platform.processor() or platform.machine()
    return {"job": "machine", "gpu": gpu, "versions": versions, "cores": os.cpu_count(), "processor": processor}


def main(given: list[str]) -> None:
    """Measure what fits into the minutes, then print the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--only", nargs="+", default=[], help="jobs by their names")
    parser.add_argument("--ravdess", help="the corpus")
    parser.add_argument("--whisper", help="a directory with a Whisper encoder")
    parser.add_argument("--page", action="store_true", help="measure nothing")
    arguments = parser.parse_args(given)
    arguments.rows = arguments.rows.resolve()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))
    ends = time.monotonic() + 60 * arguments.minutes
    if not arguments.page:
        add_row(arguments.rows, machine())
        with tempfile.TemporaryDirectory() as scratch:
            for job in jobs(arguments, Path(scratch)):
                left = ends - time.monotonic()
                if (arguments.only and job.name not in arguments.only) or left < 15:
                    continue
                # A trial of the script may be on a slow machine.
                run(job, arguments.rows, left if arguments.tiny else min(job.limit_s, left), arguments)
    print(page(given, read_rows(arguments.rows)))


if __name__ == "__main__":
    main(sys.argv[1:])

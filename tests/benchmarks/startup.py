"""Seconds that no epoch is made of: from a command to its first optimiser step, and what every trial of a search costs.

    python tests/benchmarks/startup.py > results/benchmarks/startup.md

A tiny corpus and the embedded tiny backbone, so that what is seen is the fixed part. The same search runs as
``ser-ray tune`` does it, and as Ray's documentation has it: every trial a TorchTrainer with processes of its own, on a
plain ``ray.init``. Where a command's seconds go is read from
notes that every process of it leaves as it calls what `WATCHED` names: a ``sitecustomize`` on PYTHONPATH calls `watch`,
so nothing in the package knows of it.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

ROUNDS = 2
TRIALS = 4
"""Of one search; its last is not timed, as nothing starts after it."""
NOTES = "STARTUP_NOTES"
"""The variable that names the file of notes; where it is not set nothing is watched."""

WATCHED = {
    "ser_ray.runtime.cluster": ("connect",),
    "ser_ray.prepare": ("prepare",),
    "ser_ray.runtime.plan": ("make",),
    "ser_ray.runtime.feed": ("load_resident",),
    "ser_ray.train": ("main",),
    "ser_ray.runtime.results_folder": ("audit_task", "open_results"),
    "ser_ray.runtime.trial": ("fit_here", "run_trial", "_work"),
    "ser_ray.tune": ("main", "_check_backbones"),
    "ser_ray.runtime.watch": ("Watch.on_trial_start",),
    "ser_ray.models.classifier": ("build",),
    "ser_ray.training.loop": ("fit",),
    "ser_ray.training.step": ("add_gradients",),
}
STAGES = {
    "> main": "imports of the command",
    "< _check_backbones": "backbones loaded once, to see that they are there",
    "< connect": "Ray",
    "< prepare": "prepared speech found",
    "< audit_task": "audit",
    "< open_results": "results folder, provenance",
    "< make": "frozen prefix planned",
    "< load_resident": "speech in the object store",
    "> run_trial": "process of the trial",
    "> _work": "processes of the worker",
    "> build": "imports where training runs",
    "< build": "model",
    "> add_gradients": "first batch",
    "< add_gradients": "first step",
}
"""A note -> what ends with it. What lies between two notes is counted to the later one."""
COMMANDS = {"train, workers=0": ("train", "resources.workers=0"), "train": ("train",), "tune": ("tune",)}
KINDS = {
    "ours": "ser-ray: the worker is Tune's process, which is used again",
    "defaults": "Ray's defaults: a TorchTrainer with processes of its own",
}


def watch() -> None:
    """Note the start of this process, and from now on every call of what `WATCHED` names."""
    stat = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    uptime = float(Path("/proc/uptime").read_text(encoding="utf-8").split()[0])
    _note("process", time.time() - uptime + int(stat[19]) / os.sysconf("SC_CLK_TCK"))
    sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    """Wraps the functions of a watched module when it has been loaded, before anybody can import them from it."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> Any:
        spec = importlib.machinery.PathFinder.find_spec(name, path) if name in WATCHED else None
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            for function in WATCHED[name]:
                *parents, last = function.split(".")
                holder = functools.reduce(getattr, parents, module)
                setattr(holder, last, _noted(last, getattr(holder, last)))

        setattr(spec.loader, "exec_module", exec_module)  # noqa: B010 (a method, to mypy)
        return spec


def _noted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(*arguments: Any, **options: Any) -> Any:
        _note(f"> {name}", time.time())
        try:
            return function(*arguments, **options)
        finally:
            _note(f"< {name}", time.time())

    return run


def _note(what: str, when: float) -> None:
    with Path(os.environ[NOTES]).open("a", encoding="utf-8") as file:
        file.write(f"{when:.3f}\t{what}\n")


class Memory(threading.Thread):
    """The largest sum of a process's and its descendants' proportional memory while it runs, in GiB."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid, self.peak = pid, 0.0

    def run(self) -> None:
        import psutil

        root = psutil.Process(self.pid)
        while root.is_running() and root.status() != psutil.STATUS_ZOMBIE:
            total = 0
            for process in [root, *root.children(recursive=True)]:
                try:
                    total += process.memory_full_info().pss
                except psutil.Error:  # gone meanwhile
                    continue
            self.peak = max(self.peak, total / 2**30)
            time.sleep(0.5)


Notes = list[tuple[float, str]]


def run(command: Sequence[str], scratch: Path, measure_memory: bool = False) -> tuple[Notes, float]:
    """The notes of a command, in order of time, and with ``measure_memory`` its peak in GiB: which slows it."""
    hook = scratch / "hook"
    hook.mkdir(exist_ok=True)
    (hook / "sitecustomize.py").write_text(
        f"import os\nif {NOTES!r} in os.environ:\n    import startup\n    startup.watch()\n"
    )
    path = os.pathsep.join([str(hook), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    with tempfile.NamedTemporaryFile(dir=scratch, suffix=".notes") as notes, (scratch / "log").open("a") as log:
        environment = os.environ | {NOTES: notes.name, "PYTHONPATH": path.rstrip(os.pathsep)}
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        memory = Memory(process.pid)
        if measure_memory:
            memory.start()
        if process.wait() != 0:
            raise RuntimeError(f"{' '.join(command)}:\n{(scratch / 'log').read_text(encoding='utf-8')}")
        lines = [line.split("\t") for line in Path(notes.name).read_text(encoding="utf-8").splitlines()]
    return sorted((float(when), what) for when, what in lines), memory.peak


def stages(notes: Notes) -> dict[str, float]:
    """Seconds by stage of `STAGES`, from the start of the command to the end of its first step."""
    previous, seconds = notes[0][0], defaultdict[str, float](float)
    for note in sorted(STAGES, key=lambda note: next((when for when, what in notes if what == note), float("inf"))):
        found = next((when for when, what in notes if what == note), None)
        if found is not None:
            seconds[STAGES[note]], previous = found - previous, found
    return seconds


def search(kind: str, space_file: str, *overrides: str) -> None:
    """One search of `TRIALS` trials, one after the other, on the Ray that ``kind`` starts."""
    import ray
    from rich.console import Console

    from ser_ray import config, tune
    from ser_ray.runtime import cluster, paths, tuner
    from ser_ray.runtime.allocation import DATA_CPUS
    from ser_ray.runtime.results_folder import open_results
    from ser_ray.train import make_plan

    if kind == "ours":
        cluster.connect()
    else:
        os.environ["RAY_GCS_SERVER_PORT"] = str(cluster._free_port())  # as ours: other Rays may run on this machine
        ray.init("local", num_cpus=len(os.sched_getaffinity(0)) + DATA_CPUS)
        import startup

        configure = tuner.tune.TuneConfig
        setattr(tuner, "run_trial", startup.nested)  # noqa: B010 (three names of another module, to mypy)
        setattr(tuner, "_resources", lambda allocation: {"cpu": 0.01})  # noqa: B010
        setattr(tuner.tune, "TuneConfig", lambda **s: configure(**s | {"reuse_actors": False}))  # noqa: B010
    space = paths.resolve_paths(config.load(space_file, overrides))
    planned, task = make_plan(space, Console(), space.tune.trials)
    open_results(space, planned, {}, [])
    tune.search(planned, task, Console())


def nested(point: dict[str, Any], plan: Any, kind: str, speech: Any) -> None:
    """One trial as `run_trial` trains one of several workers: a TorchTrainer with a controller."""
    from ray.tune.integration.ray_train import TuneReportCallback
    from rich.console import Console

    from ser_ray.runtime.trial import fit_on_ray, open_trial

    trial_dir = plan.directory(kind) / point["trial_id"]
    with open_trial(plan, plan.space.trial(point["values"]), trial_dir, Console(quiet=True)) as trial:
        fit_on_ray(trial, speech, [TuneReportCallback()])


def fixed_seconds(notes: Notes, results: Path) -> list[float]:
    """Of every trial but the last: from its start to the start of the next, without the seconds of its epochs."""
    starts = [when for when, what in notes if what == "> on_trial_start"]
    histories = sorted(results.glob("trials/*/history.jsonl"), key=lambda path: path.stat().st_mtime)
    epochs = [sum(json.loads(line)["seconds"] for line in path.read_text().splitlines()) for path in histories]
    assert len(starts) == len(epochs) == TRIALS, (len(starts), len(epochs))
    return [end - start - own for start, end, own in zip(starts, starts[1:], epochs, strict=False)]


def write_space(scratch: Path) -> Path:
    """A search over one trivial trial: 16 utterances to train on, two epochs."""
    import numpy as np
    import soundfile
    import yaml

    rng = np.random.default_rng(0)
    for actor in ("01", "02", "03", "04", "05", "06"):
        for emotion in ("03", "04", "05", "06"):  # in RAVDESS's code: happy, sad, angry, fearful
            for statement in ("01", "02"):
                path = scratch / "ravdess" / f"Actor_{actor}" / f"03-01-{emotion}-01-{statement}-01-{actor}.wav"
                path.parent.mkdir(parents=True, exist_ok=True)
                soundfile.write(path, 0.1 * rng.standard_normal(16_000), 16_000)
    space = {
        "experiment": {
            "name": "startup",
            "corpora": {"ravdess": str(scratch / "ravdess")},
            "emotions": ["angry", "fear", "happy", "sad"],
            "protocol": {"scheme": "speaker_kfold", "folds": 3},
            "backbone": "embedded/tiny-whisper",
            "adapter": {"method": "full"},
            "batch_seconds": 8,
            "epochs": 2,
        },
        "search": {"optimizer.lr": {"loguniform": [1.0e-4, 1.0e-3]}},
        "tune": {"trials": TRIALS, "scheduler": "none", "finalists": 1, "concurrency": 1},
        "storage": {"results": str(scratch / "results"), "cache": str(scratch / "cache")},
    }
    path = scratch / "space.yaml"
    path.write_text(yaml.safe_dump(space), encoding="utf-8")
    return path


def main(scratch: Path) -> None:
    """Print the tables as Markdown."""
    space = write_space(scratch)
    python = [sys.executable, "-m"]
    run([*python, "ser_ray.prepare", str(space)], scratch)
    commands = {
        name: [*python, f"ser_ray.{verb}", str(space), *overrides, "tune.trials=1"]
        for name, (verb, *overrides) in COMMANDS.items()
    } | {kind: [sys.executable, __file__, kind, str(space)] for kind in KINDS}
    runs: dict[str, list[Notes]] = defaultdict(list)
    fixed: dict[str, list[list[float]]] = defaultdict(list)
    peaks: dict[str, float] = {}
    loads = []
    for number in range(ROUNDS + 1):  # the last is for memory alone
        for name, command in commands.items():
            own = f"{name.replace('=', '').replace(', ', '-')}-{number}"
            loads.append(os.getloadavg()[0])
            notes, peak = run([*command, f"experiment.name={own}"], scratch, number == ROUNDS)
            if number == ROUNDS:
                peaks[name] = peak
            elif name in KINDS:
                fixed[name].append(fixed_seconds(notes, scratch / "results" / own))
            else:
                runs[name].append(notes)
            print(own, fixed.get(name) or stages(notes), file=sys.stderr)
    print_tables({name: [stages(notes) for notes in every] for name, every in runs.items()}, fixed, peaks, loads)


def print_tables(
    found: dict[str, list[dict[str, float]]],
    fixed: dict[str, list[list[float]]],
    peaks: dict[str, float],
    loads: list[float],
) -> None:
    """Medians, and for trials the range."""
    print("# Start-up and fixed cost\n\n```\npython tests/benchmarks/startup.py > results/benchmarks/startup.md\n```\n")
    print(
        f"{os.cpu_count()} cores; 16 utterances of 1 s to train on, 2 epochs of `embedded/tiny-whisper`; medians of\n"
        f"{ROUNDS} rounds, all ways in turn. When a run began the load average was {min(loads):.1f}\n"
        f"to {max(loads):.1f}, {statistics.median(loads):.1f} as a median; compare within a table only.\n"
        "Memory: proportional set size of a command and its descendants (Ray included), sampled twice a second in\n"
        "another round.\n"
    )
    print("## Fixed seconds of a trial\n")
    print(
        "From the start of one trial to that of the next, without the seconds of its epochs. The same `tune.search`,\n"
        "one trial at a time.\n"
    )
    print("| a trial is | the first, seconds | those that follow | trials | peak memory, GiB |\n|---|---|---|---|---|")
    for kind, every in fixed.items():
        parts = [own[0] for own in every], [seconds for own in every for seconds in own[1:]]
        shown = " | ".join(f"{statistics.median(p):.1f} ({min(p):.1f} to {max(p):.1f})" for p in parts)
        print(f"| {KINDS[kind]} | {shown} | {sum(map(len, parts))} | {peaks[kind]:.2f} |")
    print("\n## From the command to the end of the first optimiser step, seconds\n")
    print("The speech is prepared already, the files of the packages have been read before.\n")
    print(f"| | {' | '.join(f'`{name}`' for name in found)} |\n|---|{'---|' * len(found)}")
    for stage in STAGES.values():
        print(f"| {stage} | {cells(every and [run.get(stage) for run in every] for every in found.values())} |")
    totals = ([sum(run.values()) for run in every] for every in found.values())
    print(f"| **together** | {cells(totals)} |")
    print(f"| peak memory of the command, GiB | {' | '.join(f'{peaks[name]:.2f}' for name in found)} |")


def cells(every: Iterable[list[Any]]) -> str:
    """Medians, empty where a command has no such stage."""
    return " | ".join("" if None in seconds else f"{statistics.median(seconds):.1f}" for seconds in every)


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in KINDS:
        search(*sys.argv[1:])
    else:
        with tempfile.TemporaryDirectory() as directory:
            main(Path(directory))

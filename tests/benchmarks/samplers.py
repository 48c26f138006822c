"""TPE with ASHA, random search and grid on the embedded demo at equal budget: best dev UAR against epochs spent.

    python tests/benchmarks/samplers.py results/benchmarks

First every configuration of a pool is trained to its last epoch, once, on the demo's own data: all that could be
tried. Then each method searches that pool from its table of learning curves, with the classes that `ser-ray tune` uses
(`OptunaSearcher` and `ReplayingASHA` of `ser_ray.runtime.searchers`), two trials at once, from several seeds; an epoch
costs one. So all methods meet the same trials, and several seeds can be afforded. The table is kept beside the result:
the command continues it.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import json
import statistics
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
from matplotlib.figure import Figure
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from ser_ray import config, disk
from ser_ray.config import SearchSpace
from ser_ray.evaluation import folder
from ser_ray.runtime import paths
from ser_ray.runtime.searchers import OptunaSearcher, ReplayingASHA
from ser_ray.trials import points
from ser_ray.trials.records import Trials

SEEDS: Final = 20
BUDGET: Final = 90
"""Epochs: fifteen whole trials."""
RATES: Final = [round(float(rate), 6) for rate in np.geomspace(1e-4, 1e-2, 5)]
METHODS: Final = {
    "TPE + ASHA": {"sampler": "tpe", "scheduler": "asha"},
    "random": {"sampler": "random", "scheduler": "none"},
    "random + ASHA": {"sampler": "random", "scheduler": "asha"},
    "grid": {"sampler": "grid", "scheduler": "none"},
}


def pool_space(**settings: Any) -> SearchSpace:
    """The demo's data and backbones, but from a random head, full training beside QLoRA, and rates as a list: so that
    there is something to find, and from seed to seed the same."""
    values = config.to_dict(config.load(config.default_space()))
    values["experiment"]["head"] |= {"init": "random", "pooling": "attentive", "speaker": "none"}
    values["experiment"]["optimizer"]["head_lr"] = 2e-3
    ranks = values["search"]["adapter.rank"] | {"when": {"adapter.method": ["qlora"]}}
    values["search"] = {
        "backbone": values["search"]["backbone"],
        "adapter.method": {"choice": ["qlora", "full"]},
        "adapter.rank": ranks,
        "optimizer.lr": {"choice": RATES},
    }
    values["tune"] = {"trials": 1000, "grace": 2} | settings
    values["experiment"]["epochs"] = values["experiment"]["patience"] = 6
    return SearchSpace.model_validate(values)


def train_one(point: dict[str, Any]) -> list[dict[str, Any]]:
    """The history of one configuration, trained in this process on one thread."""
    import torch
    from rich.console import Console

    from ser_ray.runtime.trial import fit_here, open_trial
    from ser_ray.train import make_plan

    torch.set_num_threads(1)
    space = paths.resolve_paths(pool_space().model_copy(update={"resources": config.Resources(workers=0)}))
    console = Console(quiet=True)
    with tempfile.TemporaryDirectory() as directory:
        storage = space.storage.model_copy(update={"results": directory})
        alone = {"experiment": space.trial(point), "search": {}, "storage": storage}
        planned, _ = make_plan(space.model_copy(update=alone), console)
        trial_dir = planned.directory() / "one"
        with open_trial(planned, planned.space.experiment, trial_dir, console) as trial:
            fit_here(trial)
        return folder.trial_history(trial_dir)


def learn_pool(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Configuration -> history, for the whole pool; two at a time, kept as they come."""
    known: dict[str, list[dict[str, Any]]] = disk.read_json(path) if path.is_file() else {}
    pool = points.grid(pool_space().search, 2, seed=0)
    missing = [point for point in pool if json.dumps(point) not in known]
    with concurrent.futures.ProcessPoolExecutor(2) as executor:
        tasks = {executor.submit(train_one, point): point for point in missing}
        for done in concurrent.futures.as_completed(tasks):
            if done.exception():
                executor.shutdown(cancel_futures=True)  # or the error shows when all the others are trained, and lost
            known[json.dumps(tasks[done])] = done.result()
            disk.write_json(path, known)
            print(f"{len(known)} of {len(pool)}", file=sys.stderr)
    return known


def search(method: str, seed: int, pool: dict[str, list[dict[str, Any]]], directory: Path) -> list[float]:
    """Best dev UAR after every epoch spent."""
    space = pool_space(seed=seed, **METHODS[method])
    trials = Trials(directory, space.search)
    searcher = OptunaSearcher(space, trials)
    scheduler = FIFOScheduler() if METHODS[method]["scheduler"] == "none" else ReplayingASHA(space, trials)
    best: list[float] = [0.0]
    running: list[tuple[Any, list[dict[str, Any]]]] = []
    numbers = itertools.count()
    while len(best) <= BUDGET:
        while len(running) < 2:
            name = f"t{next(numbers)}"
            handed = searcher.suggest(name)
            if handed in (None, Searcher.FINISHED):
                break
            trial = SimpleNamespace(trial_id=name, config=handed)
            trials.start(handed["trial_id"])
            scheduler.on_trial_add(None, trial)
            running.append((trial, list(pool[json.dumps(handed["values"])])))
        if not running:
            break
        trial, left = running.pop(0)
        name, record = trial.config["trial_id"], left.pop(0)
        folder.append_history(directory / "trials" / name, record)
        trials.update(name)
        best.append(max(best[-1], record["dev_uar"]))
        searcher.on_trial_result(trial.trial_id, record)
        decision = scheduler.on_trial_result(None, trial, record)
        if left and decision != TrialScheduler.STOP:
            running.append((trial, left))
            continue
        scheduler.on_trial_complete(None, trial, record)
        searcher.on_trial_complete(trial.trial_id, record)
        trials.update(name, status="stopped" if left else "finished")
    return best[1:]


def draw(curves: dict[str, list[list[float]]], most: float) -> Figure:
    """Mean over seeds, the middle half of them shaded."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for method, every in curves.items():
        values = np.array(every)
        epochs = np.arange(1, values.shape[1] + 1)
        style = "-" if "ASHA" not in method else (0, (5, 3 + 2 * ("TPE" in method)))  # two lines lie upon each other
        (line,) = axes.plot(epochs, values.mean(0), label=method, ls=style)
        low, high = np.quantile(values, (0.25, 0.75), axis=0)
        axes.fill_between(epochs, low, high, color=line.get_color(), alpha=0.1, lw=0)
    axes.axhline(most, color="#9aa3ad", lw=1, ls="--", label="best of the pool")
    axes.set(xlabel="epochs spent", ylabel="best dev UAR so far", ylim=(most - 0.3, most + 0.02))
    axes.legend(frameon=False, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def main(out: Path) -> None:
    """Write samplers.json (the pool), samplers.png, samplers.md."""
    pool = learn_pool(out / "samplers.json")
    most = max(record["dev_uar"] for history in pool.values() for record in history)
    curves: dict[str, list[list[float]]] = {}
    for method in METHODS:
        for seed in range(SEEDS):
            with tempfile.TemporaryDirectory() as directory:
                found = search(method, seed, pool, Path(directory))
            found += [found[-1]] * (BUDGET - len(found))
            curves.setdefault(method, []).append(found)
    draw(curves, most).savefig(out / "samplers.png", dpi=160)
    marks = [15, 30, 60, BUDGET]
    lines = [
        "# Samplers at equal budget",
        "",
        "```",
        "python tests/benchmarks/samplers.py results/benchmarks",
        "```",
        "",
        f"The embedded demo from a random head: {len(pool)} configurations of backbone, method, rank and",
        f"rate ({len(RATES)} of them), each trained for {pool_space().experiment.epochs} epochs once;",
        f"{SEEDS} seeds of each search, two trials at once.",
        "Best dev UAR after so many epochs: mean over seeds [lowest, highest].",
        "",
        f"| | {' | '.join(f'{count} epochs' for count in marks)} | epochs to 0.02 below the best: median, searches |",
        f"|---|{'---|' * (len(marks) + 1)}",
    ]
    for method, every in curves.items():
        at = [[curve[count - 1] for curve in every] for count in marks]
        cells = [f"{statistics.mean(v):.3f} [{min(v):.3f}, {max(v):.3f}]" for v in at]
        reached = [next((i for i, v in enumerate(curve, 1) if v >= most - 0.02), None) for curve in every]
        within = sorted(count for count in reached if count)
        middle = [*within, *[BUDGET + 1] * SEEDS][SEEDS // 2]
        shown = f"{middle if middle <= BUDGET else f'over {BUDGET}'}, {len(within)} of {SEEDS}"
        lines.append(f"| {method} | {' | '.join(cells)} | {shown} |")
    lines += ["", f"Best of the pool: {most:.3f}.", "", "![best dev UAR against epochs spent](samplers.png)"]
    disk.write_text(out / "samplers.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

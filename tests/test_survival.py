"""A search whose processes are killed at random moments, beside one that nobody disturbs: the same trials, none twice.

Victims are the driver, the training worker, an evaluation actor and one that makes a cache. Trials are those of
`stub_trainable`; ``pytest tests/test_survival.py --slow --write-survival`` trains models in the same search, and
writes what it counted to results/benchmarks/survival.md.
"""

from __future__ import annotations

import collections
import csv
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import stub_trainable
from test_verbs import results_of, write_space

from ser_ray.evaluation import folder


@dataclass(frozen=True)
class Size:
    """How large the search is, and how often something of it is killed."""

    trials: int
    kills: int
    drivers: int
    """Of the kills, those of the driver: every time Ray is started anew."""
    rare: Mapping[str, int]
    """Kinds that live for seconds only: killed as soon as they are seen, so often."""


SMALL = Size(trials=5, kills=6, drivers=2, rare={"evaluation actor": 1, "cache actor": 1})
PUBLISHED = Size(trials=16, kills=20, drivers=5, rare={"evaluation actor": 3, "cache actor": 2})
VICTIMS = {  # as Ray names the processes
    "driver": "",
    "training worker": "ImplicitFunc",
    "evaluation actor": "Scorer",
    "cache actor": "Extractor",
}
EPOCH_S = 0.4
"""What an epoch takes where nothing is trained."""
EPOCHS = range(3)
"""So many are trained between a kill, or the start of trials, and the next,"""
PAUSE_S = (0.0, 1.0)
"""and so long is waited then: from within an epoch to within the start of another trial."""
SEARCH = (
    "tune.concurrency=1",  # so that the order of trials, and with it what the sampler knows, is the same
    "tune.scheduler=none",
    "tune.finalists=2",
    "experiment.epochs=5",
    "experiment.patience=5",
    "storage.prefix_gb=1",
)


@pytest.fixture
def trainable(untrained, request) -> dict[str, str]:
    """The variables that name what a trial does; none where models are trained."""
    return {} if request.config.getoption("--write-survival") else stub_trainable.environment(untrained, EPOCH_S)


def start(space: Path, name: str, size: Size, trainable: dict[str, str]) -> subprocess.Popen[bytes]:
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | trainable
    log = (space.parent / f"{name}.log").open("ab")
    cache = f"storage.cache={space.parent / name}-cache"
    own = [f"experiment.name={name}", f"tune.trials={size.trials}", cache]
    command = [sys.executable, "-m", "ser_ray.tune", str(space), *own, *SEARCH]
    return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def victims(driver: int) -> dict[str, list[psutil.Process]]:
    """Kind -> living processes of this search, idle ones left out."""
    found: dict[str, list[psutil.Process]] = {"driver": [psutil.Process(driver)]}
    for process in psutil.Process(driver).children(recursive=True):
        try:
            title = " ".join(process.cmdline())
        except psutil.Error:  # gone meanwhile
            continue
        for kind, word in VICTIMS.items():
            if word and title.startswith("ray::") and word in title:
                found.setdefault(kind, []).append(process)
    return found


def rare(size: Size, found: dict[str, list[psutil.Process]], killed: collections.Counter[str]) -> list[str]:
    """Of the kinds that live for seconds, those that are there and have not been killed often enough."""
    return [kind for kind, most in size.rare.items() if kind in found and killed[kind] < most]


def wait_for_victims(
    space: Path,
    name: str,
    driver: subprocess.Popen[bytes],
    rng: random.Random,
    searches: int,
    size: Size,
    killed: collections.Counter[str],
    at_last_kill: int,
) -> None:
    """Until the trials of this session have begun, and a while more; or a rare victim is there, or the search over.

    ``searches``: those that the log told of before this session.
    """
    while driver.poll() is None and begun(space, name) == searches:
        if rare(size, victims(driver.pid), killed):
            return
        time.sleep(0.1)
    more, pause = trained(space, name) + rng.choice(EPOCHS), rng.uniform(*PAUSE_S)
    more = max(more, at_last_kill + 1)  # a trial that dies often without an epoch between is given up, as it should be
    reached = None
    while driver.poll() is None and not rare(size, victims(driver.pid), killed):
        if reached is None and trained(space, name) >= more:
            reached = time.monotonic()
        if reached is not None and time.monotonic() > reached + pause:
            return
        time.sleep(0.1)


def begun(space: Path, name: str) -> int:
    """Sessions that came as far as the trials."""
    return (space.parent / f"{name}.log").read_text().count("searching ")


def trained(space: Path, name: str) -> int:
    """Epochs in all, also those that were trained again."""
    histories = (results_of(space, name) / "trials").glob("*/history.jsonl")
    return sum(len(path.read_text().splitlines()) for path in histories)


def disturb(space: Path, name: str, seed: int, size: Size, trainable: dict[str, str]) -> collections.Counter[str]:
    """Run the search to its end, killing until ``size.kills`` is reached; returns how often which kind."""
    rng, killed, at_last_kill = random.Random(seed), collections.Counter[str](), -1
    driver, sessions, searches = start(space, name, size, trainable), 1, 0
    while True:
        wait_for_victims(space, name, driver, rng, searches, size, killed, at_last_kill)
        if driver.poll() is None:
            found = victims(driver.pid)
            seldom = rare(size, found, killed)
            often = [kind for kind in found if kind not in size.rare] if killed.total() < size.kills else []
            if killed["driver"] >= size.drivers:
                often = [kind for kind in often if kind != "driver"]
            # The kind that has been killed least: the driver is always there, the others come and go.
            kind = seldom[0] if seldom else min(often, key=lambda one: (killed[one], rng.random()), default=None)
            if kind is not None:
                try:
                    rng.choice(found[kind]).kill()
                except psutil.NoSuchProcess:
                    continue
                killed[kind] += 1
                at_last_kill = trained(space, name)
                if kind == "driver":
                    driver.wait(60)
        if driver.poll() == 0:
            return killed
        if driver.poll() is not None:
            searches = begun(space, name)
            driver, sessions = start(space, name, size, trainable), sessions + 1
            assert sessions < 2 * size.kills, (space.parent / f"{name}.log").read_text()[-3000:]


def rows(results: Path) -> dict[str, dict[str, str]]:
    return {row["trial_id"]: row for row in csv.DictReader((results / "trials.csv").open())}


def lines(results: Path, trial_id: str) -> list[dict]:
    """All epochs that were ever trained, the repeated ones too."""
    path = results / "trials" / trial_id / "history.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.ray
@pytest.mark.slow
def test_a_search_that_is_killed_again_and_again_ends_like_one_that_is_not(
    tiny_corpus, tiny_cache, tmp_path, trainable, request
):
    size = PUBLISHED if request.config.getoption("--write-survival") else SMALL
    space = write_space(tmp_path, tiny_corpus)
    for name in ("unbroken", "broken"):  # each makes its own prefix
        shutil.copytree(tiny_cache, tmp_path / f"{name}-cache")
    assert start(space, "unbroken", size, trainable).wait(1200) == 0, (tmp_path / "unbroken.log").read_text()[-3000:]
    killed = disturb(space, "broken", 0, size, trainable)
    unbroken, broken = results_of(space, "unbroken"), results_of(space, "broken")
    log = (tmp_path / "broken.log").read_text()
    assert killed.total() >= size.kills, f"the search was over after {killed}"
    assert all(killed[kind] for kind in VICTIMS), killed
    before, after = rows(unbroken), rows(broken)
    assert before.keys() == after.keys()
    assert {row["status"] for row in (*before.values(), *after.values())} == {"finished"}, log[-3000:]
    repeated = 0
    for trial_id, row in before.items():
        same = [key for key in row if key.startswith(("adapter.", "optimizer.", "epochs"))]
        assert {key: row[key] for key in same} == {key: after[trial_id][key] for key in same}, trial_id
        # The loop takes the steps that the unbroken one takes; sums of floats may differ in their last digits.
        off = 1e-9 if trainable else 0.07
        assert float(after[trial_id]["dev_uar"]) == pytest.approx(float(row["dev_uar"]), abs=off)
        epochs = [line["epoch"] for line in lines(broken, trial_id)]
        assert sorted(set(epochs)) == [line["epoch"] for line in lines(unbroken, trial_id)]
        repeated += len(epochs) - len(set(epochs))
    assert repeated == 0  # only what had no whole checkpoint yet is trained again, and that has no line
    for tried in folder.read_trials(broken / "trials"):
        assert (broken / after[tried.trial_id]["checkpoint"] / "head.safetensors").is_file()
        assert float(after[tried.trial_id]["dev_uar"]) == tried.best["dev_uar"]
    for name in ("best/head.safetensors", "evaluation/test.json", "evaluation/predictions.parquet", "report.html"):
        assert (broken / name).is_file(), name
    openings = json.loads((broken / "evaluation/test_openings.json").read_text())
    assert len(openings) <= 1 + killed["driver"] + killed["evaluation actor"]
    if request.config.getoption("--write-survival"):
        write_page(killed, before, after, repeated, len(openings), broken)


def write_page(killed, before, after, repeated: int, openings: int, broken: Path) -> None:
    """results/benchmarks/survival.md."""
    epochs = sum(int(row["epochs"]) for row in after.values())
    seconds = [sum(float(row["seconds"]) for row in found.values()) for found in (before, after)]
    sessions = len(json.loads((broken / "sessions.json").read_text()))
    gap = max(abs(float(after[i]["dev_uar"]) - float(before[i]["dev_uar"])) for i in before)
    text = [
        "# A search that is killed",
        "",
        "```",
        "pytest tests/test_survival.py --slow --write-survival",
        "```",
        "",
        f"The same search of {len(before)} trials of 5 epochs, once left alone, once with kill -9 at random moments "
        f"(seed 0; {EPOCHS[0]} to {EPOCHS[-1]} epochs and up to {PAUSE_S[1]:g} s apart).",
        "",
        "| killed | times |",
        "|---|---|",
        *(f"| {kind} | {killed[kind]} |" for kind in VICTIMS),
        f"| together | {killed.total()} |",
        "",
        "| | |",
        "|---|---|",
        f"| trials finished, unbroken and killed | {len(before)} and {len(after)}, the same points |",
        f"| epochs, and how many of them were trained twice | {epochs}, {repeated} |",
        f"| largest difference of a trial's best dev UAR | {gap:.4f} |",
        f"| commands that came as far as the trials | {sessions} |",
        f"| seconds of all trials, unbroken and killed | {seconds[0]:.0f} and {seconds[1]:.0f} |",
        f"| times the test set was opened | {openings} |",
    ]
    page = Path(__file__).parents[1] / "results" / "benchmarks" / "survival.md"
    page.write_text("\n".join(text) + "\n", encoding="utf-8")

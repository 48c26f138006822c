"""What tests share: a small learnable corpus, one local Ray cluster for the whole session, and which tests to skip."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import settings

settings.register_profile("busy", deadline=None)  # no time is asserted, neither by Hypothesis
settings.load_profile("busy")

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

TINY_ACTORS = 6
TINY_RATES = (48_000, 24_414, 22_050, 16_000)
TINY_EMOTIONS = {  # RAVDESS's code: pitch [Hz], syllables per second
    "01": (120, 2.0),  # neutral
    "02": (100, 1.0),  # calm
    "03": (260, 4.0),  # happy
    "04": (140, 1.5),  # sad
    "05": (320, 6.0),  # angry
    "06": (400, 5.0),  # fearful
    "07": (180, 3.0),  # disgust
    "08": (500, 3.5),  # surprised
}


# Of a script's background, SIGINT is ignored, and would be by every process that a test starts and interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run tests that take minutes")
    parser.addoption("--write-survival", action="store_true", help="write results/benchmarks/survival.md")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    import scheduling

    return scheduling.Files(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="takes minutes; run with --slow"))
        if item.get_closest_marker("corpus") and not SHARED_DATA.is_dir():
            item.add_marker(pytest.mark.skip(reason=f"no real speech at {SHARED_DATA}"))
        if item.get_closest_marker("gpu") and not _has_gpu():
            item.add_marker(pytest.mark.skip(reason="no GPU"))
    # Files with most of the long tests first: short ones are left for the end, and all processes end together.
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real speech, for tests marked ``corpus``."""
    return SHARED_DATA


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 recordings under RAVDESS's names: 6 actors x 8 emotions x 2 statements, about 1 s, at four sampling rates.

    An emotion is a pitch and a speed, an actor a factor on both, in a little noise: learnable, and not by level alone.
    """
    directory = tmp_path_factory.mktemp("tiny") / "ravdess"
    rng = np.random.default_rng(0)
    for actor in range(1, TINY_ACTORS + 1):
        folder = directory / f"Actor_{actor:02d}"
        folder.mkdir(parents=True)
        for emotion in TINY_EMOTIONS:
            for statement in ("01", "02"):
                rate = TINY_RATES[actor % len(TINY_RATES)]
                path = folder / f"03-01-{emotion}-01-{statement}-01-{actor:02d}.wav"
                soundfile.write(path, _voice(emotion, actor, rate, rng), rate, subtype="PCM_16")
    return directory


def _voice(emotion: str, actor: int, rate: int, rng: np.random.Generator) -> np.ndarray:
    pitch, speed = TINY_EMOTIONS[emotion]
    pitch *= 1 + 0.02 * actor
    seconds = rng.uniform(0.8, 1.2)
    time = np.arange(int(seconds * rate)) / rate
    harmonics = sum(np.sin(2 * np.pi * pitch * k * time + rng.uniform(0, 6)) / k for k in range(1, 6))
    syllables = 0.6 + 0.4 * np.sin(2 * np.pi * speed * time)
    voiced = 0.2 * harmonics * syllables + 0.003 * rng.standard_normal(len(time))
    silence = np.zeros(int(0.2 * rate))
    return np.concatenate([silence, voiced, silence])


@pytest.fixture(scope="session")
def tiny_cache(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``ser-ray prepare`` makes of the tiny corpus, to be copied to where a test has its cache."""
    from rich.console import Console

    from ser_ray.config import SearchSpace
    from ser_ray.prepare import prepare

    directory = tmp_path_factory.mktemp("prepared")
    experiment = {"name": "tiny", "corpora": {"ravdess": str(tiny_corpus)}, "backbone": "embedded/tiny-whisper"}
    space = SearchSpace.model_validate({"experiment": experiment, "storage": {"cache": str(directory)}})
    prepare(space, use_ray=False, console=Console(file=io.StringIO()))
    return directory


@pytest.fixture(scope="session")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `stub_trainable` keeps its checkpoints, for all searches of the session."""
    return tmp_path_factory.mktemp("untrained")


@pytest.fixture
def nothing_is_trained(ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Searches of this test, on the session's Ray, are of `stub_trainable`."""
    import stub_trainable

    monkeypatch.setenv("SER_RAY_TRAINABLE", stub_trainable.TRAINABLE)


@pytest.fixture(scope="session")
def backbones_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that holds one tiny backbone of every variant, by its name."""
    from backbone_fixtures import VARIANTS, write_backbone

    directory = tmp_path_factory.mktemp("backbones")
    for variant in VARIANTS:
        write_backbone(variant, directory / variant)
    return directory


@pytest.fixture
def add(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[dict[str, str], str, str], None]]:
    """Adds a pooling, head or loss: writes its one file, where it is called ``Added``, and names it in the table."""
    monkeypatch.syspath_prepend(tmp_path)
    modules = []

    def added(table: dict[str, str], name: str, source: str) -> None:
        modules.append(f"added_{name}")
        (tmp_path / f"{modules[-1]}.py").write_text(source)
        monkeypatch.setitem(table, name, f"{modules[-1]}:Added")

    yield added
    for module in modules:
        sys.modules.pop(module, None)


@pytest.fixture(scope="session")
def ray_cluster(untrained: Path) -> Iterator[None]:
    """The session's one local Ray, whose processes find what `stub_trainable` needs."""
    import ray
    import stub_trainable

    from ser_ray.runtime import cluster

    os.environ.update(stub_trainable.settings(untrained))
    cluster.connect()
    yield
    ray.shutdown()


@pytest.fixture
def full_cluster(ray_cluster: None) -> Iterator[Callable[[], None]]:
    """The session's Ray while other work holds all of its CPUs; returns what ends that work."""
    import ray

    from ser_ray.runtime import cluster

    @ray.remote
    class Holder:
        """Holds what it was given until it is killed."""

    def held() -> Any:
        found = Holder.options(num_cpus=ray.cluster_resources()["CPU"]).remote()
        ray.get(found.__ray_ready__.remote(), timeout=120)
        return found

    try:
        holder = held()
    except ray.exceptions.GetTimeoutError:
        # Ray 2.60 loses a message now and then, and this process then hears of no actor any more (results/LOG.md).
        cluster.leave()
        cluster.connect()
        holder = held()
    yield lambda: ray.kill(holder)
    ray.kill(holder)

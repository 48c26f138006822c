"""Would several adapters in one process, on one copy of the frozen weights and one stream of batches, be faster?

    python tests/benchmarks/packed.py RAVDESS WHISPER > results/benchmarks/packed.md

Two LoRA trials (ranks 4 and 8, their own rates) of the same steps on the same utterances, in three ways in turn: as a
search runs them (two processes, one thread each), one after the other on two threads, and packed: every batch is given
to both models before the next, frozen tensors shared. Packed and one after the other give equal weights.
"""

from __future__ import annotations

import multiprocessing
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from ser_ray import config
from ser_ray.config import Experiment
from ser_ray.models.classifier import EmotionClassifier, build
from ser_ray.speech import order, stream
from ser_ray.training import loop, step

ROUNDS: Final = 3
UTTERANCES: Final = 96
POINTS: Final = ({"adapter.rank": 4, "optimizer.lr": 1e-4}, {"adapter.rank": 8, "optimizer.lr": 5e-4})


class Trained:
    """A model with all that a step needs."""

    def __init__(self, experiment: Experiment) -> None:
        torch.manual_seed(experiment.seed)
        self.experiment = experiment
        self.model: EmotionClassifier = build(experiment).train()
        self.optimizer = loop.make_optimizer(self.model)
        self.scaler = torch.amp.GradScaler("cpu", enabled=False)
        self.weights_K = torch.ones(len(experiment.emotions))

    def step(self, batch: stream.Batch, number: int) -> None:
        """One optimiser step, its dropout drawn by the number, whoever else steps in between."""
        torch.manual_seed(number)
        step.add_gradients(self.model, batch, self.weights_K, 1 / len(batch), self.scaler, self.experiment, last=True)
        step.apply(self.optimizer, self.scaler, self.experiment, 1.0)
        self.optimizer.zero_grad(set_to_none=True)

    def share(self, other: Trained) -> None:
        """Take the frozen tensors of another model in place of own copies."""
        theirs = dict(other.model.named_parameters())
        for name, own in self.model.named_parameters():
            if not own.requires_grad:
                own.data = theirs[name].data

    def learned(self) -> list[torch.Tensor]:
        """The weights that were trained."""
        return [p.detach().clone() for p in self.model.parameters() if p.requires_grad]


def batches(table: pa.Table, experiment: Experiment) -> list[stream.Batch]:
    """An epoch's batches, the same for all."""
    windows = order.epoch(table, experiment.batch_seconds, (0, 0))
    return [batch for packed in windows for batch in stream.batches(table, packed)]


def alone(values: dict[str, Any], path: str, threads: int, begin: Any, end: Any) -> None:
    """A process with one trial: ready, then an epoch, then its memory."""
    torch.set_num_threads(threads)
    experiment = Experiment.model_validate(values)
    trained = Trained(experiment)
    epoch = batches(pq.read_table(path), experiment)
    trained.step(epoch[0], -1)  # as a warm-up
    begin.wait()
    for number, batch in enumerate(epoch):
        trained.step(batch, number)
    end.put(psutil.Process().memory_full_info().uss / 2**20)


def two_processes(experiments: list[Experiment], path: str) -> tuple[float, float]:
    """Seconds for both, and the sum of their own memory in MB."""
    context = multiprocessing.get_context("spawn")
    begin, end = context.Barrier(len(experiments) + 1), context.Queue()
    given = [(config.to_dict(experiment), path, 1, begin, end) for experiment in experiments]
    processes = [context.Process(target=alone, args=arguments) for arguments in given]
    for process in processes:
        process.start()
    begin.wait()
    started = time.perf_counter()
    memory = sum(end.get() for _ in processes)
    seconds = time.perf_counter() - started
    for process in processes:
        process.join()
    return seconds, memory


def one_process(experiments: list[Experiment], path: str, packed: bool) -> tuple[float, float, list[torch.Tensor]]:
    """Seconds, MB, and the weights at the end, on two threads; ``packed``: batch by batch in turns."""
    torch.set_num_threads(2)
    every = [Trained(experiment) for experiment in experiments]
    if packed:
        for trained in every[1:]:
            trained.share(every[0])
    epoch = batches(pq.read_table(path), experiments[0])
    started = time.perf_counter()
    if packed:
        for number, batch in enumerate(epoch):
            for trained in every:
                trained.step(batch, number)
    else:
        for trained in every:
            for number, batch in enumerate(epoch):
                trained.step(batch, number)
    seconds = time.perf_counter() - started
    memory = psutil.Process().memory_full_info().uss / 2**20
    return seconds, memory, [tensor for trained in every for tensor in trained.learned()]


def in_a_process(experiments: list[Experiment], path: str, packed: bool) -> tuple[float, float, list[torch.Tensor]]:
    """The same in a fresh process, so that memory is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        seconds, memory, weights = pool.apply(_plain, (experiments, path, packed))
    return seconds, memory, [torch.from_numpy(array) for array in weights]


def _plain(experiments: list[Experiment], path: str, packed: bool) -> tuple[float, float, list[Any]]:
    seconds, memory, weights = one_process(experiments, path, packed)
    return seconds, memory, [tensor.numpy() for tensor in weights]


def main(corpus: Path, backbone: Path) -> None:
    """Print the table."""
    from speed import Bench, _rows

    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(corpus.resolve(), backbone.resolve(), Path(scratch))
        space = bench.space("experiment.class_weights=none", "experiment.batch_seconds=20")
        task = bench.task(space.experiment)
        path = str(Path(scratch) / "train.parquet")
        pq.write_table(_rows(task, "train", UTTERANCES), path)
        experiments = [space.trial(point) for point in POINTS]
        found: dict[str, list[tuple[float, float]]] = {"two processes": [], "one after the other": [], "packed": []}
        for _ in range(ROUNDS):
            found["two processes"].append(two_processes(experiments, path))
            plain = in_a_process(experiments, path, packed=False)
            packed = in_a_process(experiments, path, packed=True)
            found["one after the other"].append(plain[:2])
            found["packed"].append(packed[:2])
            gap = max(float((a - b).abs().max()) for a, b in zip(plain[2], packed[2], strict=True))
            print(found, gap, file=sys.stderr)
    about = (__doc__ or "").split("\n\n")
    print(f"# Packed trials\n\n```\n{about[1].strip()}\n```\n")
    print(
        f"{about[2]}\n{UTTERANCES} utterances of RAVDESS, whisper-tiny.en's encoder, one epoch without start-up;\n"
        f"{ROUNDS} rounds, medians; torch {torch.__version__}, fp32.\n"
    )
    print("| way | utterances/s, both trials | lowest to highest | MB of their own |\n|---|---|---|---|")
    for name, runs in found.items():
        rates = [len(POINTS) * UTTERANCES / seconds for seconds, _ in runs]
        memory = statistics.median(memory for _, memory in runs)
        print(f"| {name} | {statistics.median(rates):.2f} | {min(rates):.2f} to {max(rates):.2f} | {memory:.0f} |")
    print(f"\nLargest difference of a weight between packed and one after the other: {gap:g}.")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

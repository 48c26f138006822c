"""Two processes with uneven numbers of batches: they end together, with the same weights and the same figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from backbone_fixtures import experiment, tone_batches
from safetensors.torch import load_file, save_file
from torch import nn

from ser_ray.config import Experiment
from ser_ray.models.classifier import build
from ser_ray.schema import UserError
from ser_ray.training import loop

TRAIN, DEV = tone_batches(24, 3, batch=4, seed=1, noisiness=2.0), tone_batches(15, 3, batch=5, seed=2, noisiness=2.0)
SHARES = {"uneven": ([0, 1, 2, 3], [4, 5]), "even": ([0, 1], [2, 3])}
"""Which train batches a rank is given."""


def _described(backbone: str, init: str) -> Experiment:
    head = {"init": init, "dropout": 0.0}
    optimizer = {"lr": 1e-3, "accumulate": 2}
    return experiment(backbone, head=head, optimizer=optimizer, adapter={"dropout": 0.0}, epochs=2)


def _fit(backbone: str, out: Path, name: str, rank: int, dev: list[int], init: str) -> None:
    model, records = build(_described(backbone, init)), []
    consumed: list[int] = []

    def train(epoch: int) -> Any:
        for index in SHARES[name][rank]:
            consumed.append(index)
            yield TRAIN[index]

    data = loop.Data(train, lambda: [DEV[i] for i in dev], 2, (8, 8, 8))
    loop.fit(model, data, lambda record, save: records.append(dict(record)))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, out / f"{name}_{rank}.safetensors")
    (out / f"{name}_{rank}.json").write_text(json.dumps({"records": records, "consumed": consumed}))


def _spoiled(backbone: str, out: Path, rank: int) -> None:
    """One process's loss is not a number: both must stop, or one would wait for ever."""
    batch = TRAIN[0]
    if rank == 1:
        batch = batch.__class__(batch.utterance_ids, batch.inputs * torch.nan, batch.lengths_B, batch.labels_B)
    data = loop.Data(lambda epoch: [batch], lambda: DEV, 1, (8, 8, 8))
    try:
        loop.fit(build(_described(backbone, "random")), data, lambda record, save: None)
    except UserError as error:
        (out / f"error_{rank}.txt").write_text(str(error))


def _worker(rank: int, backbone: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}/rendezvous", rank=rank, world_size=2)
    _fit(backbone, Path(out), "uneven", rank, [[0, 2], [1]][rank], "random")
    _fit(backbone, Path(out), "even", rank, [[0], []][rank], "probe")
    _spoiled(backbone, Path(out), rank)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ran(backbones_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What both processes wrote."""
    out = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(_worker, (str(backbones_dir / "whisper"), str(out)), nprocs=2)
    return out


def _results(ran: Path, name: str, rank: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    return load_file(ran / f"{name}_{rank}.safetensors"), json.loads((ran / f"{name}_{rank}.json").read_text())


@pytest.mark.parametrize("name", ["uneven", "even"])
def test_both_end_with_the_same_weights_and_figures(ran: Path, name: str) -> None:
    (first, told), (second, other) = (_results(ran, name, rank) for rank in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    for mine, theirs in zip(told["records"], other["records"], strict=True):
        shared = [key for key in mine if key.startswith("dev_") or key in ("epoch", "train_loss", "best_epoch")]
        assert {key: mine[key] for key in shared} == {key: theirs[key] for key in shared}


def test_the_surplus_is_read_to_its_end(ran: Path) -> None:
    """Ray Data's split waits for every reader."""
    assert _results(ran, "uneven", 0)[1]["consumed"] == [0, 1, 2, 3] * 2


@pytest.mark.parametrize(("name", "init", "dev"), [("uneven", "random", DEV), ("even", "probe", DEV[:1])])
def test_dev_figures_are_those_of_the_whole_dev_set(
    ran: Path, backbones_dir: Path, name: str, init: str, dev: list[Any]
) -> None:
    weights, told = _results(ran, name, 0)
    described = _described(str(backbones_dir / "whisper"), init)
    model = build(described)
    model.load_state_dict(weights)
    criterion = nn.CrossEntropyLoss(weight=loop.class_weights(described, (8, 8, 8)))
    alone = loop.evaluate(model, dev, criterion)
    assert {key: told["records"][-1][key] for key in alone} == pytest.approx(alone, abs=1e-6)


def test_two_processes_take_the_steps_of_one_with_both_batches(ran: Path, backbones_dir: Path) -> None:
    """Gradients are averaged: two batches accumulated here, four there, give the same steps."""
    described = _described(str(backbones_dir / "whisper"), "probe")
    described = described.model_copy(update={"optimizer": described.optimizer.model_copy(update={"accumulate": 4})})
    model = build(described)
    order = [TRAIN[i] for pair in zip(*SHARES["even"], strict=True) for i in pair]
    data = loop.Data(lambda epoch: order, lambda: DEV[:1], 4, (8, 8, 8))
    loop.fit(model, data, lambda record, save: None)
    weights, _ = _results(ran, "even", 0)
    start = build(described).state_dict()
    for name, found in model.state_dict().items():
        # Adam makes a whole step of a gradient that is rounding alone: one weight in a hundred may differ.
        apart = (found - weights[name]).abs()
        assert float((apart > 2e-4).float().mean()) <= 0.01, name
        assert apart.norm() <= 0.15 * (found - start[name]).norm() + 1e-6, name


def test_a_loss_that_diverges_in_one_stops_both(ran: Path) -> None:
    messages = [(ran / f"error_{rank}.txt").read_text() for rank in range(2)]
    assert all("loss is nan" in message for message in messages)

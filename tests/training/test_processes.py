"""Two processes with ragged batches, not equally many: the steps of one process, and none waits for ever."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from backbone_fixtures import data_of, experiment, noise_batch, tone_batches
from safetensors.torch import load_file, save_file
from torch import nn

from ser_ray.config import Experiment
from ser_ray.models import wavlm
from ser_ray.models.classifier import EmotionClassifier, build
from ser_ray.schema import UserError
from ser_ray.speech.stream import Batch
from ser_ray.training import loop, step

DEV = tone_batches(15, 3, batch=5, seed=2, noisiness=2.0)
TONES = tone_batches(24, 3, batch=4, seed=1, noisiness=2.0)
SPLITS = {"ragged": (5, 2), "uneven": (5, 1), "even": (4, 2), "one batch": (1, 2), "voices": (5, 2)}
"""Batches an epoch, and how many of each process a step takes at most. Of ragged, the two have two and one in the first
step; of uneven, one has none in the second and in the third; of one batch, one has none at all. Voices: as ragged, with
what is known of the speakers."""
WEIGHTS = torch.tensor([9.0, 1.0, 3.0])
VARIANTS = ("whisper", "wavlm-layer")
"""Whose gradients are compared; in WavLM all blocks share the position bias of the first."""
OWN = ([0, 2, 4], [1, 3])
"""Of the batches of one step, those of either process."""


def _train(name: str) -> list[Batch]:
    """Batches of unequal size."""
    found = TONES[: SPLITS[name][0]]
    return found if name == "even" else [_first(batch, 1 + 3 * (n % 2)) for n, batch in enumerate(found)]


def _first(batch: Batch, count: int) -> Batch:
    return Batch(batch.utterance_ids[:count], batch.inputs[:count], batch.lengths_B[:count], batch.labels_B[:count])


SPEAKERS = {f"synthetic/{n}": f"synthetic/{n % 5}" for n in range(24)}


def _described(backbone: str, init: str = "random", accumulate: int = 2, name: str = "") -> Experiment:
    head = {"init": init, "dropout": 0.0, "speaker": "standardize" if name == "voices" else "none"}
    optimizer = {"lr": 1e-3, "accumulate": accumulate}
    return experiment(backbone, head=head, optimizer=optimizer, adapter={"dropout": 0.0}, epochs=2)


def _still(described: Experiment) -> EmotionClassifier:
    """Without any dropout, also that of the backbone's own configuration."""
    model = build(described)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, wavlm.Attention):
            module.dropout = 0.0
    return model


def _fit(backbone: str, out: Path, name: str, rank: int, init: str, dev: list[Batch]) -> None:
    accumulate = SPLITS[name][1]
    model, records = _still(_described(backbone, init, accumulate, name)), []
    data = replace(data_of(lambda epoch: _train(name), dev, accumulate, rank, 2), speakers=SPEAKERS)
    loop.fit(model, data, lambda record, save: records.append(dict(record)))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, out / f"{name}_{rank}.safetensors")
    (out / f"{name}_{rank}.json").write_text(json.dumps(records))


def _step_batches() -> list[Batch]:
    """Five, of 1 to 4 utterances, of other lengths each."""
    seconds = ((0.3,), (0.8, 0.5), (0.4, 0.6, 0.35, 0.5), (0.7,), (0.5, 0.3))
    return [noise_batch(lengths, seed=seed) for seed, lengths in enumerate(seconds)]


def _gradients(backbone: str, out: Path, rank: int) -> None:
    described, batches = _described(backbone), _step_batches()
    model = _still(described)
    trained, scaler = step.distribute(model), torch.amp.GradScaler("cpu", enabled=False)
    share = 1 / float(sum(WEIGHTS[batch.labels_B].sum() for batch in batches))
    for number in OWN[rank]:
        last = number == OWN[rank][-1]
        step.add_gradients(trained, batches[number], WEIGHTS, share, scaler, described, last)
    found = {name: p.grad.contiguous() for name, p in model.named_parameters() if p.grad is not None}
    save_file(found, out / f"gradients_{Path(backbone).name}_{rank}.safetensors")


def _spoiled(backbone: str, out: Path, rank: int) -> None:
    """The loss of a batch that one process has is not a number: both must stop, or one would wait for ever."""
    batches = [TONES[0], replace(TONES[1], inputs=TONES[1].inputs * torch.nan)]
    try:
        described = _described(backbone, accumulate=1)
        loop.fit(build(described), data_of(lambda epoch: batches, DEV, 1, rank, 2), lambda record, save: None)
    except UserError as error:
        (out / f"error_{rank}.txt").write_text(str(error))


def _worker(rank: int, backbone: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}/rendezvous", rank=rank, world_size=2)
    _fit(backbone, Path(out), "ragged", rank, "random", DEV)
    _fit(backbone, Path(out), "uneven", rank, "random", DEV)
    _fit(backbone, Path(out), "even", rank, "probe", DEV[:1])
    _fit(backbone, Path(out), "one batch", rank, "random", DEV)
    _fit(backbone, Path(out), "voices", rank, "probe", DEV)
    for variant in VARIANTS:
        _gradients(str(Path(backbone).parent / variant), Path(out), rank)
    _spoiled(backbone, Path(out), rank)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ran(backbones_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What both processes wrote."""
    out = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(_worker, (str(backbones_dir / "whisper"), str(out)), nprocs=2)
    return out


def _results(ran: Path, name: str, rank: int) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    return load_file(ran / f"{name}_{rank}.safetensors"), json.loads((ran / f"{name}_{rank}.json").read_text())


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_gradient_is_that_of_a_plain_loop_over_utterances(ran: Path, backbones_dir: Path, variant: str) -> None:
    model, batches = _still(_described(str(backbones_dir / variant))), _step_batches()
    held = float(sum(WEIGHTS[batch.labels_B].sum() for batch in batches))
    for batch in batches:
        for row, length in enumerate(batch.lengths_B.tolist()):
            scores = model(batch.inputs[row : row + 1, :length], batch.lengths_B[row : row + 1])
            label = batch.labels_B[row : row + 1]
            (WEIGHTS[label[0]] * nn.functional.cross_entropy(scores, label) / held).backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for rank in range(2):
        found = load_file(ran / f"gradients_{variant}_{rank}.safetensors")
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize("name", SPLITS)
def test_both_end_with_the_same_weights_and_figures(ran: Path, name: str) -> None:
    (first, told), (second, other) = (_results(ran, name, rank) for rank in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    for mine, theirs in zip(told, other, strict=True):
        shared = [key for key in mine if key.startswith("dev_") or key in ("epoch", "train_loss", "lr", "best_epoch")]
        assert {key: mine[key] for key in shared} == {key: theirs[key] for key in shared}
    assert told[-1]["lr"] == 0, "the planned steps are the taken ones"


@pytest.mark.parametrize(("name", "init", "dev"), [("ragged", "random", DEV), ("even", "probe", DEV[:1])])
def test_dev_figures_are_those_of_the_whole_dev_set(
    ran: Path, backbones_dir: Path, name: str, init: str, dev: list[Batch]
) -> None:
    weights, told = _results(ran, name, 0)
    described = _described(str(backbones_dir / "whisper"), init)
    model = build(described)
    model.load_state_dict(weights)
    counts = np.bincount(np.concatenate([batch.labels_B for batch in _train(name)]), minlength=3)
    alone = loop.evaluate(
        model, dev, loop.class_weights(described, tuple(counts.tolist())), torch.from_numpy(counts > 0)
    )
    assert {key: told[-1][key] for key in alone} == pytest.approx(alone, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "init", "dev"),
    [
        *((name, "random", DEV) for name in ("ragged", "uneven", "one batch")),
        *(("even", "probe", DEV[:1]), ("voices", "probe", DEV)),
    ],
)
def test_two_processes_take_the_steps_of_one(
    ran: Path, backbones_dir: Path, name: str, init: str, dev: list[Batch]
) -> None:
    """Twice as many batches accumulated in one as in each of two."""
    together = 2 * SPLITS[name][1]
    described = _described(str(backbones_dir / "whisper"), init, together, name)
    model, records = _still(described), []
    data = replace(data_of(lambda epoch: _train(name), dev, together), speakers=SPEAKERS)
    loop.fit(model, data, lambda record, save: records.append(record))
    weights, told = _results(ran, name, 0)
    for mine, theirs in zip(records, told, strict=True):
        assert mine["dev_loss"] == pytest.approx(theirs["dev_loss"], abs=1e-4)
        if mine["train_loss"] is not None:
            assert mine["train_loss"] == pytest.approx(theirs["train_loss"], abs=1e-4)
    start = build(described).state_dict()
    for key, found in model.state_dict().items():
        # Adam makes a whole step of a gradient that is rounding alone: one weight in a hundred may differ.
        apart = (found - weights[key]).abs()
        assert float((apart > 2e-4).float().mean()) <= 0.01, key
        assert apart.norm() <= 0.15 * (found - start[key]).norm() + 1e-6, key


def test_a_loss_that_diverges_in_one_stops_both(ran: Path) -> None:
    messages = [(ran / f"error_{rank}.txt").read_text() for rank in range(2)]
    assert all("loss is nan" in message for message in messages)

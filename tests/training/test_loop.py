"""The training loop: it learns, resumes to the same numbers, stops in time, and says what it did."""

from __future__ import annotations

import json
import math
import platform
import resource
import threading
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from backbone_fixtures import experiment, logits, tone_batches, with_sections
from sklearn.metrics import accuracy_score, balanced_accuracy_score, cohen_kappa_score, f1_score
from torch import nn

from ser_ray.config import Experiment
from ser_ray.models import checkpoint
from ser_ray.models.classifier import EmotionClassifier, build
from ser_ray.schema import UserError
from ser_ray.speech.stream import Batch
from ser_ray.training import loop

TRAIN, DEV = tone_batches(24, 3, seed=1), tone_batches(12, 3, seed=2)
HISTORY = {
    "epoch",
    "train_loss",
    "dev_loss",
    "dev_uar",
    "dev_accuracy",
    "dev_macro_f1",
    "dev_kappa",
    "lr",
    "seconds",
    "utterances_per_s",
    "input_wait",
    "peak_memory_mb",
    "best_dev_uar",
    "best_epoch",
}
MEASURED = {"seconds", "utterances_per_s", "input_wait", "peak_memory_mb"}
"""What no two runs share."""


@pytest.fixture
def tiny(backbones_dir: Path) -> Experiment:
    """Learns to tell the tones of `TRAIN` apart in a few epochs."""
    return experiment(
        backbones_dir / "whisper",
        adapter={"rank": 4, "dropout": 0.1},
        optimizer={"lr": 3e-3, "head_lr": 5e-2},
        epochs=4,
        patience=10,
    )


def _data(train: Iterable[Batch] = TRAIN, dev: Iterable[Batch] = DEV, counts: tuple[int, ...] = (8, 8, 8)) -> loop.Data:
    batches = list(train)

    def epoch_order(epoch: int) -> list[Batch]:
        return [batches[i] for i in np.random.default_rng(epoch).permutation(len(batches))]

    return loop.Data(epoch_order, lambda: dev, len(batches), counts)


def _run(
    described: Experiment,
    data: loop.Data | None = None,
    keep: Path | None = None,
    resume_from: Path | None = None,
    stop_after: int | None = None,
    metric: str = "dev_uar",
) -> tuple[EmotionClassifier, list[dict[str, Any]]]:
    """Fit; checkpoints go to ``keep/<epoch>``; ``stop_after`` kills the run as its machine might."""
    model, records = build(described), []

    class Killed(Exception):  # noqa: N818
        pass

    def on_epoch(record: loop.Record, save: loop.Save) -> None:
        records.append(dict(record))
        if keep is not None:
            save(keep / str(record["epoch"]))
        if record["epoch"] == stop_after:
            raise Killed

    if stop_after is None:
        loop.fit(model, data or _data(), on_epoch, metric, resume_from)
    else:
        with pytest.raises(Killed):
            loop.fit(model, data or _data(), on_epoch, metric, resume_from)
    return model, records


def _told(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key not in MEASURED} for record in records]


# -- it learns


@pytest.mark.parametrize("method", ["frozen", "lora", "qlora", "full"])
def test_tones_are_learned(tiny: Experiment, method: str) -> None:
    _, records = _run(with_sections(tiny, adapter={"method": method, "rank": 4}, epochs=8))
    assert max(record["dev_uar"] for record in records) > 0.9
    assert records[-1]["train_loss"] < 0.5 * records[0]["train_loss"]


def test_records_hold_the_whole_history_and_are_json(tiny: Experiment) -> None:
    _, records = _run(with_sections(tiny, epochs=2))
    assert [record["epoch"] for record in records] == [1, 2]
    for record in records:
        assert record.keys() >= HISTORY
        assert json.loads(json.dumps(record, allow_nan=False)) == record
        assert 0 <= record["input_wait"] <= 1
    assert [record["last"] for record in records] == [False, True]


def test_dev_figures_are_those_of_scikit_learn(tiny: Experiment) -> None:
    model, records = _run(with_sections(tiny, epochs=1))
    labels = torch.cat([batch.labels_B for batch in DEV]).numpy()
    scores = torch.cat([logits(model, batch) for batch in DEV])
    guesses = scores.argmax(-1).numpy()
    expected = {
        "dev_uar": balanced_accuracy_score(labels, guesses),
        "dev_accuracy": accuracy_score(labels, guesses),
        "dev_macro_f1": f1_score(labels, guesses, labels=range(3), average="macro", zero_division=0),
        "dev_kappa": cohen_kappa_score(labels, guesses),
        "dev_loss": float(nn.functional.cross_entropy(scores, torch.from_numpy(labels))),
    }
    assert {key: records[0][key] for key in expected} == pytest.approx(expected, abs=1e-5)


def test_the_same_seed_gives_the_same_run(tiny: Experiment) -> None:
    described = with_sections(tiny, epochs=1)
    (first, first_records), (second, second_records) = _run(described), _run(described)
    assert _told(first_records) == _told(second_records)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    other = _run(with_sections(described, seed=1))[1]
    assert other[0]["train_loss"] != first_records[0]["train_loss"]


# -- it resumes


@pytest.mark.parametrize("init", ["random", "probe"])
@pytest.mark.parametrize("method", ["frozen", "lora", "qlora", "full"])
def test_a_resumed_run_is_the_unbroken_one(tiny: Experiment, tmp_path: Path, method: str, init: str) -> None:
    described = with_sections(
        tiny,
        adapter={"method": method, "rank": 4, "dropout": 0.2},
        head={"dropout": 0.2, "init": init},
        optimizer={"lr": 1e-3, "accumulate": 2},
    )
    data = _data(TRAIN[:3], DEV)  # three batches: the second step of an epoch has one batch
    whole, records = _run(described, data)
    _, before = _run(described, data, tmp_path, stop_after=2)
    resumed, after = _run(described, data, resume_from=tmp_path / "2")
    assert [record["epoch"] for record in after] == [3, 4]
    assert _told(before + after) == _told(records)
    for (name, expected), found in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(expected, found), name


def test_a_checkpoint_of_the_loop_loads_as_the_model_of_that_epoch(tiny: Experiment, tmp_path: Path) -> None:
    model, records = _run(with_sections(tiny, epochs=1), keep=tmp_path)
    assert torch.equal(logits(checkpoint.load(tmp_path / "1"), DEV[0]), logits(model, DEV[0]))
    assert json.loads((tmp_path / "1" / "metrics.json").read_text())["dev_uar"] == records[0]["dev_uar"]


def test_a_finished_run_that_is_resumed_only_says_its_last_epoch_again(tiny: Experiment, tmp_path: Path) -> None:
    described = with_sections(tiny, epochs=1)
    _run(described, keep=tmp_path)
    again = _run(described, resume_from=tmp_path / "1")[1]
    assert again == [json.loads((tmp_path / "1" / "metrics.json").read_text())]
    assert again[0]["last"] is True


# -- it stops


def test_patience_counts_epochs_without_a_better_figure(tiny: Experiment) -> None:
    """With rates of next to nothing no epoch is better than the first."""
    described = with_sections(tiny, optimizer={"lr": 1e-12, "head_lr": 1e-12}, epochs=9, patience=2)
    _, records = _run(described)
    assert [record["epoch"] for record in records] == [1, 2, 3]
    assert [record["last"] for record in records] == [False, False, True]
    assert all(record["best_epoch"] == 1 for record in records)
    assert all(record["best_dev_uar"] == records[0]["dev_uar"] for record in records)


@pytest.mark.parametrize("metric", ["dev_uar", "dev_kappa"])
def test_the_best_so_far_is_reported(tiny: Experiment, metric: str) -> None:
    _, records = _run(tiny, metric=metric)
    for index, record in enumerate(records):
        so_far = [r[metric] for r in records[: index + 1]]
        assert record[f"best_{metric}"] == max(so_far)
        assert record["best_epoch"] == 1 + so_far.index(max(so_far))


@pytest.mark.filterwarnings("ignore:Detected call of")
def test_a_loss_that_is_not_finite_names_the_rate(tiny: Experiment) -> None:
    spoiled = replace(TRAIN[0], inputs=torch.full_like(TRAIN[0].inputs, math.nan))
    with pytest.raises(UserError, match=r"epoch 1: .*loss is nan.*optimizer\.lr") as caught:
        _run(tiny, _data([*TRAIN[1:], spoiled]))
    assert "\n" not in str(caught.value)


def test_an_epoch_without_batches_is_refused(tiny: Experiment) -> None:
    with pytest.raises(UserError, match="no training batch"):
        _run(tiny, _data([]))


def test_a_bypassed_adapter_stops_the_run(backbones_dir: Path) -> None:
    described = experiment(backbones_dir / "wavlm-layer", adapter={"targets": ("v_proj",)})
    with pytest.raises(UserError, match="v_proj got no gradient in the first step"):
        _run(described, _data(TRAIN[:1], DEV[:1]))


# -- it weighs and rounds


def test_rare_emotions_weigh_more_in_a_fit(tiny: Experiment) -> None:
    described = with_sections(tiny, epochs=1)
    even, uneven = (_run(described, _data(counts=counts))[1][0] for counts in ((8, 8, 8), (1, 5, 30)))
    unweighted = _run(with_sections(described, class_weights="none"), _data(counts=(1, 5, 30)))[1][0]
    assert even["train_loss"] == unweighted["train_loss"]
    assert uneven["train_loss"] != pytest.approx(even["train_loss"], rel=1e-3)
    assert uneven["dev_loss"] != pytest.approx(even["dev_loss"], rel=1e-3)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_gives_finite_steps(tiny: Experiment, precision: str) -> None:
    model, records = _run(with_sections(tiny, precision=precision, epochs=1))
    assert math.isfinite(records[0]["train_loss"])
    assert all(p.dtype == torch.float32 and torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_what_a_trial_in_a_thread_has_freed_goes_back() -> None:
    kept = []

    def trial() -> None:
        blocks = [bytearray(100_000) for _ in range(3000)]  # small ones, which glibc does not map one by one
        kept.append(bytearray(100_000))  # behind them: or the end of the arena would be given back by itself
        del blocks

    def resident() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6

    thread = threading.Thread(target=trial)
    thread.start()
    thread.join()
    before = resident()
    loop.forget_peak()
    assert before - resident() > 200

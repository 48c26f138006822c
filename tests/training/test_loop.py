"""The training loop: it learns, resumes to the same numbers, stops in time, and says what it did."""

from __future__ import annotations

import itertools
import json
import math
import platform
import resource
import threading
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from backbone_fixtures import data_of, experiment, logits, tone_batches, with_sections
from sklearn.metrics import accuracy_score, balanced_accuracy_score, cohen_kappa_score, f1_score
from sklearn.utils.class_weight import compute_class_weight
from torch import nn

from ser_ray.config import Experiment
from ser_ray.models import checkpoint
from ser_ray.models.classifier import EmotionClassifier, build
from ser_ray.schema import UserError
from ser_ray.speech.stream import Batch
from ser_ray.training import loop, step

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


def _data(train: Iterable[Batch] = TRAIN, dev: Sequence[Batch] = DEV, accumulate: int = 1) -> loop.Data:
    batches = list(train)

    def epoch_order(epoch: int) -> list[Batch]:
        return [batches[i] for i in np.random.default_rng(epoch).permutation(len(batches))]

    return data_of(epoch_order, dev, accumulate)


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
@pytest.mark.parametrize(
    ("method", "variant"),
    [
        *((method, "plain") for method in ("frozen", "lora", "qlora", "full")),
        *(("lora", variant) for variant in ("rslora", "dora", "pissa", "loraplus")),
        *(("qlora", variant) for variant in ("dora", "loftq")),
    ],
)
def test_a_resumed_run_is_the_unbroken_one(
    tiny: Experiment, tmp_path: Path, method: str, variant: str, init: str
) -> None:
    described = with_sections(
        tiny,
        adapter={"method": method, "variant": variant, "rank": 4, "dropout": 0.2},
        head={"dropout": 0.2, "init": init},
        optimizer={"lr": 1e-3, "accumulate": 2},
    )
    data = _data(TRAIN[:3], DEV, accumulate=2)  # three batches: the second step of an epoch has one batch
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


def test_a_bypassed_adapter_stops_the_run(backbones_dir: Path) -> None:
    model = build(experiment(backbones_dir / "wavlm-layer", adapter={"targets": ("v_proj",)}))
    for layer in model.backbone.layers():
        projection = layer.attention.v_proj
        projection.forward = projection.base_layer.forward  # as where an encoder takes the weights for itself
    with pytest.raises(UserError, match="v_proj got no gradient in the first step"):
        loop.fit(model, _data(TRAIN[:1], DEV[:1]), lambda record, save: None)


# -- it weighs and rounds


def test_the_losses_are_those_of_plain_loops_over_utterances(tiny: Experiment) -> None:
    """With rates of next to nothing the model of every step is the untrained one."""
    described = with_sections(
        tiny,
        adapter={"dropout": 0.0},
        head={"dropout": 0.0},
        optimizer={"lr": 1e-12, "head_lr": 1e-12, "accumulate": 2},
        epochs=1,
    )
    train, dev = _ragged(TRAIN), _ragged(DEV)
    model, (record,) = _run(described, _data(train, dev, accumulate=2))
    label_N = np.concatenate([batch.labels_B for batch in train])
    weights_K = compute_class_weight("balanced", classes=np.arange(3), y=label_N)
    assert max(weights_K) > 1.5 * min(weights_K)
    for name, batches in (("train_loss", train), ("dev_loss", dev)):
        scores_NK = torch.cat([logits(model, one) for batch in batches for one in _apart(batch)])
        labels_N = torch.cat([batch.labels_B for batch in batches])
        expected = nn.functional.cross_entropy(scores_NK, labels_N, weight=torch.tensor(weights_K).float())
        assert record[name] == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("accumulate", [1, 2, 100])
def test_an_utterance_weighs_the_same_in_an_epoch_however_it_is_cut_into_steps(
    tiny: Experiment, accumulate: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one batch a step and batches of one utterance too, where class weights once canceled."""
    described = with_sections(
        tiny,
        adapter={"dropout": 0.0},
        head={"dropout": 0.0},
        optimizer={"lr": 1e-12, "head_lr": 1e-12, "accumulate": accumulate},
        epochs=1,
    )
    train, model = _ragged(TRAIN), build(described)
    label_N = torch.cat([batch.labels_B for batch in train])
    weights_K = torch.tensor(compute_class_weight("balanced", classes=np.arange(3), y=label_N.numpy())).float()
    for one in (one for batch in train for one in _apart(batch)):
        loss = nn.functional.cross_entropy(model(one.inputs, one.lengths_B), one.labels_B)
        (weights_K[one.labels_B[0]] * loss / weights_K[label_N].sum()).backward()
    expected = [p.grad for p in model.parameters() if p.grad is not None]
    seen: list[list[torch.Tensor]] = []
    take = step.apply

    def watched(optimizer: torch.optim.Optimizer, *rest: Any) -> None:
        seen.append([p.grad.clone() for group in optimizer.param_groups for p in group["params"]])
        take(optimizer, *rest)

    monkeypatch.setattr(step, "apply", watched)
    fitted, _ = _run(described, _data(train, DEV, accumulate))
    assert len(seen) == -(-len(train) // accumulate)
    in_order = {
        id(p): n for n, p in enumerate(q for g in loop.make_optimizer(fitted).param_groups for q in g["params"])
    }
    found = [
        sum(grads[in_order[id(p)]] for grads in seen) / len(seen) for p in fitted.parameters() if id(p) in in_order
    ]
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-3)


def _ragged(batches: Sequence[Batch]) -> list[Batch]:
    """The same utterances but for some of label 1, in batches of unequal size."""
    ones = [
        one for batch in batches for one in _apart(batch) if int(one.labels_B) != 1 or len(one.utterance_ids[0]) > 11
    ]
    cuts = [0, 1, 2, 7, 9, len(ones)]
    return [_joined(ones[first:last]) for first, last in itertools.pairwise(cuts) if ones[first:last]]


def _apart(batch: Batch) -> list[Batch]:
    return [
        Batch((i,), batch.inputs[n : n + 1, :length], batch.lengths_B[n : n + 1], batch.labels_B[n : n + 1])
        for n, (i, length) in enumerate(zip(batch.utterance_ids, batch.lengths_B.tolist(), strict=True))
    ]


def _joined(ones: Sequence[Batch]) -> Batch:
    inputs = nn.utils.rnn.pad_sequence([one.inputs[0] for one in ones], batch_first=True)
    lengths_B, labels_B = (torch.cat([getattr(one, name) for one in ones]) for name in ("lengths_B", "labels_B"))
    return Batch(tuple(i for one in ones for i in one.utterance_ids), inputs, lengths_B, labels_B)


def test_the_planned_steps_are_the_taken_ones(tiny: Experiment) -> None:
    """Epochs of unequal numbers of batches, whose last step is smaller: the rate falls to zero with the last of all."""
    sizes = {1: 3, 2: 4, 3: 2, 4: 3}
    described = with_sections(tiny, optimizer={"lr": 1e-3, "accumulate": 2, "warmup": 0.0})
    _, records = _run(described, data_of(lambda epoch: TRAIN[: sizes.get(epoch, 1)], DEV, 2))
    taken = np.cumsum([2, 2, 1, 2])
    assert [record["lr"] for record in records] == pytest.approx([1e-3 * (1 - step / 7) for step in taken])


def test_another_batch_than_the_planned_one_is_noticed(tiny: Experiment) -> None:
    planned = _data()
    data = replace(planned, train=lambda epoch: [*TRAIN[:1], *_ragged(TRAIN)])
    with pytest.raises(AssertionError, match="epoch 1: batch 1 is not the planned one"):
        _run(tiny, data)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_gives_finite_steps(tiny: Experiment, precision: str) -> None:
    model, records = _run(with_sections(tiny, precision=precision, epochs=1))
    assert math.isfinite(records[0]["train_loss"])
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


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


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 1)])
def test_a_run_that_goes_on_with_other_steps_takes_the_rates_of_its_new_schedule(
    tiny: Experiment, tmp_path: Path, before: int, after: int
) -> None:
    """More workers, or half of the batch, take another number of steps an epoch; the rate ends at 0 all the same."""
    batches = [*TRAIN[:3], *TRAIN[:3]]

    def described(accumulate: int) -> Experiment:
        return with_sections(tiny, epochs=4, optimizer={"lr": 1e-3, "accumulate": accumulate, "warmup": 0.0})

    _run(described(before), _data(batches, DEV, accumulate=before), tmp_path, stop_after=2)
    _, records = _run(described(after), _data(batches, DEV, accumulate=after), resume_from=tmp_path / "2")
    whole = _run(described(after), _data(batches, DEV, accumulate=after))[1]
    assert [record["lr"] for record in records] == [record["lr"] for record in whole[2:]]
    assert records[0]["lr"] > 0
    assert records[-1]["lr"] == 0


def test_an_emotion_that_train_lacks_is_neither_answered_nor_counted(tiny: Experiment) -> None:
    """As between corpora that do not have it in common: dev is measured as test is."""
    model = build(tiny)
    dev = [replace(batch, labels_B=batch.labels_B.clamp(max=1)) for batch in DEV]
    answers = np.concatenate([logits(model, batch).numpy() for batch in dev])
    assert (answers.argmax(-1) == 2).any(), "an untrained head answers with all of them"
    labels, trained_K = torch.cat([batch.labels_B for batch in dev]).numpy(), torch.tensor([True, True, False])
    found = loop.evaluate(model, dev, torch.ones(3), trained_K)
    expected = f1_score(labels, answers[:, :2].argmax(-1), labels=[0, 1], average="macro", zero_division=0)
    assert found["dev_macro_f1"] == pytest.approx(expected)


@pytest.mark.parametrize(
    "change", [{"epoch": "1"}, {"epoch": -1}, {"best": None}, {"scaler": []}, {"best_epoch": True}]
)
def test_counters_that_are_none_are_refused(tiny: Experiment, tmp_path: Path, change: dict[str, object]) -> None:
    _run(tiny.model_copy(update={"epochs": 1}), keep=tmp_path)
    (state,) = tmp_path.rglob("state.json")
    state.write_text(json.dumps(json.loads(state.read_text()) | change))
    with pytest.raises(UserError, match="not the state of a training"):
        _run(tiny.model_copy(update={"epochs": 2}), resume_from=state.parent.parent)

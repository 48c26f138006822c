"""The loss of a student against scipy's divergence, torch's cross-entropy and plain loops; and its teacher's file."""

from __future__ import annotations

import copy
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.stats
import torch
from backbone_fixtures import data_of, experiment, noise_batch, tone_batches
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import nn

from ser_ray.models.classifier import build
from ser_ray.schema import UserError
from ser_ray.training import loop, step
from ser_ray.training.losses.distillation import distillation
from ser_ray.training.teacher import Teacher

EMOTIONS = ("angry", "fear", "sad")
LOGITS = arrays(np.float64, (5, 3), elements=st.floats(-20, 20))


def write_answers(path, ids, probabilities_NK, emotions=EMOTIONS):
    columns = {f"p_{emotion}": probabilities_NK[:, k] for k, emotion in enumerate(emotions)}
    pq.write_table(pa.table({"utterance_id": list(ids)} | columns), path)
    return str(path)


def softmax(logits, temperature=1.0):
    powers = np.exp(np.asarray(logits, np.float64) / temperature)
    return powers / powers.sum(-1, keepdims=True)


@given(student_BK=LOGITS, teacher_BK=LOGITS, temperature=st.floats(1, 10))
def test_the_loss_is_the_divergence_of_softened_probabilities(student_BK, teacher_BK, temperature):
    """scipy's, of the teacher's own logits divided by T: the loss has only its probabilities."""
    found_B = distillation(torch.from_numpy(student_BK), torch.from_numpy(softmax(teacher_BK)), temperature)
    soft, own = softmax(teacher_BK, temperature), softmax(student_BK, temperature)
    expected_B = temperature**2 * np.array([scipy.stats.entropy(q, p) for q, p in zip(soft, own, strict=True)])
    np.testing.assert_allclose(found_B.numpy(), expected_B, rtol=1e-6, atol=1e-9)


@given(logits_BK=LOGITS)
def test_of_certain_teachers_the_gradient_is_that_of_cross_entropy(logits_BK):
    labels_B = torch.tensor([0, 1, 2, 1, 0])
    ours, theirs = (torch.from_numpy(logits_BK).float().requires_grad_() for _ in range(2))
    distillation(ours, nn.functional.one_hot(labels_B, 3).float(), 1.0).sum().backward()
    nn.functional.cross_entropy(theirs, labels_B, reduction="sum").backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("certainty", [-200.0, 0.0, 200.0])
def test_the_loss_is_finite_however_certain_both_are(certainty):
    logits_BK = torch.tensor([[certainty, 0.0, 0.0]], requires_grad=True)
    loss_B = distillation(logits_BK, torch.tensor([[0.0, 1.0, 0.0]]), 2.0)
    loss_B.sum().backward()
    assert torch.isfinite(loss_B).all()
    assert torch.isfinite(logits_BK.grad).all()


@pytest.fixture
def taught(tmp_path, backbones_dir):
    """An experiment with a teacher that answers utterances 0, 1 and 2; and its answers."""
    answers_NK = softmax(np.random.default_rng(0).normal(size=(3, 3)))
    path = write_answers(tmp_path / "answers.parquet", ["2", "0", "1"], answers_NK[[2, 0, 1]])

    def described(**distil):
        settings = {"answers": path, "teacher": "big-0123"} | distil
        return experiment(backbones_dir / "whisper", EMOTIONS, adapter={"method": "full"}, distil=settings)

    return described, answers_NK


def test_a_batch_has_the_loss_on_the_teacher_and_on_its_labels(taught):
    """Against a loop; utterance 1 has no label."""
    described, answers_NK = taught
    settings = described(unlabelled=["more"], temperature=3.0, label_weight=0.25)
    teacher = Teacher.read(settings, {"0": "a", "1": "more", "2": "a"})
    logits_BK = np.random.default_rng(1).normal(size=(2, 3)).astype(np.float32)
    labels_B = torch.tensor([2, 0])
    found_B = teacher.loss(["1", "0"])(torch.from_numpy(logits_BK), labels_B)
    for place, (utterance, weight) in enumerate([(1, 0.0), (0, 0.25)]):
        soft = answers_NK[utterance] ** (1 / 3) / (answers_NK[utterance] ** (1 / 3)).sum()
        divergence = sum(q * math.log(q / p) for q, p in zip(soft, softmax(logits_BK[place], 3.0), strict=True))
        on_label = -math.log(softmax(logits_BK[place])[labels_B[place]])
        assert float(found_B[place]) == pytest.approx(9 * divergence + weight * on_label, rel=1e-4)


def test_gradients_of_a_certain_teacher_alone_are_those_of_plain_training(backbones_dir, tmp_path):
    """One-hot answers, temperature 1 and no weight on labels: every weight of the model has the same gradient."""
    plain = experiment(backbones_dir / "whisper", EMOTIONS, adapter={"method": "full"})
    batch = noise_batch()
    one_hot = np.eye(3)[batch.labels_B.numpy()]
    path = write_answers(tmp_path / "answers.parquet", batch.utterance_ids, one_hot)
    distil = {"answers": path, "temperature": 1.0, "label_weight": 0.0}
    settings = experiment(backbones_dir / "whisper", EMOTIONS, adapter={"method": "full"}, distil=distil)
    teacher = Teacher.read(settings, dict.fromkeys(batch.utterance_ids, "a"))
    one = build(plain).eval()  # without dropout
    other = copy.deepcopy(one)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    wrong = batch.labels_B.roll(1)
    assert not torch.equal(wrong, batch.labels_B)
    step.add_gradients(one, batch, torch.ones(3), 1.0, scaler, plain, last=True)
    without_labels = type(batch)(batch.utterance_ids, batch.inputs, batch.lengths_B, wrong, batch.padded)
    loss = teacher.loss(batch.utterance_ids)
    step.add_gradients(other, without_labels, torch.ones(3), 1.0, scaler, settings, last=True, loss_of=loss)
    compared = 0
    for expected, found in zip(one.parameters(), other.parameters(), strict=True):
        if expected.grad is not None:
            torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-6)
            compared += 1
    assert compared > 10


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"answers": "/nowhere/a.parquet"}, "/nowhere/a.parquet is missing; run ser-ray distil again"),
        ({}, "has no answer to 1 utterances of train, such as 7"),
    ],
)
def test_answers_that_do_not_fit_are_an_error_in_one_line(taught, change, said):
    described, _ = taught
    with pytest.raises(UserError, match=said):
        Teacher.read(described(**change), dict.fromkeys(["0", "7"], "a"))


def test_answers_about_other_emotions_are_an_error_in_one_line(taught, backbones_dir):
    described, _ = taught
    settings = described()
    other = settings.model_copy(update={"emotions": ("angry", "happy", "sad")})
    with pytest.raises(UserError, match="is about other emotions than angry, happy, sad"):
        Teacher.read(other, {"0": "a"})


def test_without_answers_there_is_no_teacher(backbones_dir):
    assert Teacher.read(experiment(backbones_dir / "whisper", EMOTIONS), {}) is None


def test_training_follows_the_teacher_and_not_the_labels(backbones_dir, tmp_path):
    """With no weight on the labels, a student of a teacher that swaps two emotions swaps them on dev."""
    batches = tone_batches(18, 3, noisiness=0.01)
    ids = [utterance_id for batch in batches for utterance_id in batch.utterance_ids]
    labels = np.concatenate([batch.labels_B.numpy() for batch in batches])
    answers_NK = np.eye(3)[(labels + 1) % 3]
    path = write_answers(tmp_path / "answers.parquet", ids, answers_NK)
    settings = experiment(
        backbones_dir / "whisper",
        EMOTIONS,
        adapter={"method": "full"},
        optimizer={"lr": 3e-3, "head_lr": 1e-2},
        epochs=6,
        patience=6,
        distil={"answers": path, "label_weight": 0.0, "temperature": 1.0},
    )
    teacher = Teacher.read(settings, dict.fromkeys(ids, "a"))
    model, records = build(settings), []
    data = data_of(lambda epoch: batches, batches)
    taught = loop.Data(data.train, data.dev, data.counts, teacher=teacher)
    loop.fit(model, taught, lambda record, save: records.append(record))
    assert records[-1]["train_loss"] < records[0]["train_loss"]
    found = {}
    for batch, logits_BK in loop.predict_batches(model, batches):
        found |= dict(zip(batch.utterance_ids, logits_BK.argmax(-1).tolist(), strict=True))
    agree = np.mean([found[i] == (label + 1) % 3 for i, label in zip(ids, labels.tolist(), strict=True)])
    assert agree > 0.9

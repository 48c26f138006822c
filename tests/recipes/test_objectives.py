"""Every objective against a plain loop, and its gradient to the backbone."""

import pytest
import torch

from recipes.embedded import material
from recipes.embedded.objectives import MELS_A_FRAME, NUM_MELS, WEIGHTS, Objectives, total
from ser_ray.models import backbones
from ser_ray.models.logmel import LogMel

WIDTH = 16


@pytest.fixture(scope="module")
def batch(spoken):
    return next(material.batches(spoken, seed=0, size=4, steps=range(1)))


@pytest.fixture
def states(batch):
    """Three states of every frame, and the mask."""
    torch.manual_seed(0)
    frames = batch.phones_BF.shape[1]
    hiddens = [torch.randn(4, frames, WIDTH, requires_grad=True) for _ in range(3)]
    return hiddens, batch.phones_BF != material.NO_FRAME


def loss_of(name, states, batch):
    torch.manual_seed(1)
    heads = Objectives([name], WIDTH)
    return heads.heads[name], heads(*states, batch)[name]


def own_frames(batch):
    return [
        (row, frame) for row, length in enumerate(batch.lengths_B) for frame in range(int(length) // material.FRAME)
    ]


def test_phones_are_the_cross_entropy_of_every_frame(states, batch):
    head, loss = loss_of("phones", states, batch)
    each = [
        -torch.log_softmax(head(states[0][-1][row, frame]), 0)[batch.phones_BF[row, frame]]
        for row, frame in own_frames(batch)
    ]
    assert float(loss) == pytest.approx(float(torch.stack(each).mean()), rel=1e-4)


def test_contour(states, batch):
    head, loss = loss_of("contour", states, batch)
    pitch, voicing, energy = [], [], []
    for row, frame in own_frames(batch):
        told, target = head(states[0][-2][row, frame]), batch.contour_BFC[row, frame]
        if target[1]:
            pitch.append(abs(told[0] - target[0]))
        voicing.append(torch.nn.functional.softplus(-told[1] if target[1] else told[1]))
        energy.append(abs(told[2] - target[2]))
    expected = sum(float(torch.stack(part).mean()) for part in (pitch, voicing, energy))
    assert float(loss) == pytest.approx(expected, rel=1e-4)


def test_mel_is_that_of_the_clean_speech(states, batch):
    head, loss = loss_of("mel", states, batch)
    mel_BMX, _ = LogMel(NUM_MELS)(batch.clean_BT, batch.lengths_B)
    each = []
    for row, frame in own_frames(batch):
        told = head(states[0][-2][row, frame]).reshape(MELS_A_FRAME, NUM_MELS)
        each += [
            (told[half] - mel_BMX[row, :, MELS_A_FRAME * frame + half]).abs().mean() for half in range(MELS_A_FRAME)
        ]
    assert float(loss) == pytest.approx(float(torch.stack(each).mean()), rel=1e-4)


def test_manner_and_language_are_told_from_the_frames_of_an_utterance(states, batch):
    hiddens, _ = states
    for name in ("manner", "language"):
        head, loss = loss_of(name, states, batch)
        told = []
        for row, length in enumerate(batch.lengths_B):
            own_FD = hiddens[-2][row, : int(length) // material.FRAME]
            pooled = torch.cat([own_FD.mean(0), (own_FD.var(0, unbiased=False) + 1e-6).sqrt()])
            told.append(head(pooled))
        if name == "language":
            expected = torch.nn.functional.cross_entropy(torch.stack(told), batch.languages_B)
        else:
            expected = torch.nn.functional.smooth_l1_loss(torch.stack(told), batch.numbers_BN)
        assert float(loss) == pytest.approx(float(expected), rel=1e-4)


def test_the_sum_is_weighted(states, batch):
    losses = Objectives(list(WEIGHTS), WIDTH)(*states, batch)
    assert list(losses) == list(WEIGHTS)
    assert float(total(losses)) == pytest.approx(sum(WEIGHTS[name] * float(loss) for name, loss in losses.items()))


@pytest.mark.parametrize("family", ["tiny-whisper", "tiny-wav2vec2"])
@pytest.mark.parametrize("name", list(WEIGHTS))
def test_every_objective_teaches_the_backbone(batch, family, name):
    backbone = backbones.untrained(f"embedded/{family}")
    hiddens, mask_BF = backbone(batch.waveform_BT, batch.lengths_B)
    assert batch.phones_BF.shape[1] - mask_BF.shape[1] in (0, 1)
    losses = Objectives([name], backbone.width)(hiddens, mask_BF, batch)
    losses[name].backward()
    assert all(float(p.grad.abs().sum()) > 0 for p in backbone.layers()[0].parameters() if p.grad is not None)
    assert sum(p.grad is not None for p in backbone.parameters()) > 10

"""Batches: the same for a seed and step whoever makes them, with targets that fit what is heard."""

import numpy as np
import pytest
import torch

from recipes.embedded import channel, material
from recipes.embedded.speech import PHONES, Speech


@pytest.fixture(scope="module")
def batch(spoken):
    return next(material.batches(spoken, seed=3, size=12, steps=range(4, 5)))


def equal(one, other):
    return all(
        torch.equal(first, second) for first, second in zip(vars(one).values(), vars(other).values(), strict=True)
    )


def test_a_step_is_the_same_whoever_makes_it(spoken, batch):
    here = list(material.batches(spoken, 3, 12, range(4, 7)))
    apart = list(material.batches(spoken, 3, 12, range(4, 7), workers=2))
    assert all(equal(one, other) for one, other in zip(here, apart, strict=True))
    assert equal(here[0], batch)
    assert not equal(here[2], batch)
    assert not equal(next(material.batches(spoken, 4, 12, range(4, 5))), batch)


def test_shapes(batch):
    frames = batch.phones_BF.shape[1]
    assert batch.waveform_BT.shape == batch.clean_BT.shape == (12, frames * material.FRAME)
    assert batch.contour_BFC.shape == (12, frames, len(material.CONTOUR))
    assert batch.numbers_BN.shape == (12, len(material.NUMBERS))
    assert int(batch.lengths_B.max()) == frames * material.FRAME <= material.SECONDS[0] * 16_000
    for row, length in enumerate(batch.lengths_B.tolist()):
        assert length % material.FRAME == 0
        assert not batch.waveform_BT[row, length:].any()
        assert (batch.phones_BF[row, length // material.FRAME :] == material.NO_FRAME).all()
        assert (batch.phones_BF[row, : length // material.FRAME] >= 0).all()


def test_odd_steps_have_half_as_many_and_longer_ones(spoken, batch):
    odd = next(material.batches(spoken, seed=3, size=12, steps=range(5, 6)))
    assert len(odd.lengths_B) == 6
    assert int(batch.lengths_B.max()) < int(odd.lengths_B.max()) <= material.SECONDS[1] * 16_000


def test_the_phone_of_a_frame_is_the_last_that_began(spoken):
    utterance = Speech(spoken)[0]
    first, last = 7, min(60, len(utterance.f0_F))
    dry_T = utterance.waveform_T[first * material.FRAME : last * material.FRAME]
    rendered = channel.render(dry_T, np.random.default_rng(0))
    _, _, phones_F, contour_FC, _, _ = material._targets(utterance, slice(first, last), rendered)
    for frame in range(first, last):
        begun = [p for p, start in zip(utterance.phones, utterance.phone_frames, strict=True) if start <= frame]
        assert phones_F[frame - first] == begun[-1]
        f0 = utterance.f0_F[frame]
        assert contour_FC[frame - first, 1] == (f0 > 0)
        assert contour_FC[frame - first, 0] == pytest.approx(np.log2(f0 / material.MIDDLE) if f0 else 0, abs=1e-5)


def test_numbers_are_about_standard(spoken):
    """Over many draws: what the heads are to tell has about mean 0 and deviation 1."""
    drawn = torch.cat([one.numbers_BN for one in material.batches(spoken, 0, 16, range(40))])
    # Ten utterances have ten voices: what the channel draws is held tighter than what the voices are.
    for place, name in enumerate(material.NUMBERS):
        tight = name in channel.MANNER
        assert abs(float(drawn[:, place].mean())) < (0.5 if tight else 2), name
        assert 0.1 < float(drawn[:, place].std()) < (1.6 if tight else 3), name


def test_every_phone_has_a_name(batch):
    assert int(batch.phones_BF.max()) < len(PHONES)

"""The narrator: any language, times of phones, and nothing of what was said before."""

# ruff: noqa: RUF001 (letters of IPA look like others)

import numpy as np
import pytest

from ser_ray.corpora import espeak
from ser_ray.schema import UserError

LANGUAGES = ("en-us", "de", "fr", "pl", "tr", "fi", "sw", "hu")


def voice(language, low=100, high=140, rate=170):
    return espeak.Voice(language, low, high, rate, (100,) * 9)


@pytest.fixture(scope="module")
def said():
    """Language: the same three made-up words."""
    with espeak.narrator() as narrate:
        return {language: narrate("Banana kilometa, sutope!", voice(language), 1) for language in LANGUAGES}


def test_the_phones_of_a_word_come_in_order():
    with espeak.narrator() as narrate:
        waveform, phones = narrate("Banana.", voice("en-us"), 1)
    names = [name.strip("ˈˌː") for _, name in phones if name]
    assert names == ["b", "ɐ", "n", "æ", "n", "ə"]
    times = [start for start, name in phones if name]
    assert times == sorted(times)
    assert len(set(times)) == len(times)
    assert 0 <= times[0] < times[-1] < len(waveform) / espeak.RATE


def test_phones_begin_when_they_are_heard():
    """The hiss of an s is where it is said to be, and not in the vowel after it."""
    with espeak.narrator() as narrate:
        waveform, phones = narrate("See.", voice("en-us", rate=120), 1)
    (hiss, first), (vowel, second) = [phone for phone in phones if phone[1]][:2]
    assert (first, second.strip("ˈ")) == ("s", "iː")

    def crossings(start, end):
        part = waveform[round(start * espeak.RATE) : round(end * espeak.RATE)]
        return np.mean(np.diff(np.signbit(part)) != 0)

    assert crossings(hiss + 0.02, vowel - 0.02) > 3 * crossings(vowel + 0.05, vowel + 0.15)


@pytest.mark.parametrize("language", LANGUAGES)
def test_languages_are_spoken(said, language):
    waveform, phones = said[language]
    assert 1 < len(waveform) / espeak.RATE < 5
    assert 0.05 < np.abs(waveform).max() < 0.8
    assert sum(bool(name) for _, name in phones) >= 15
    assert [start for start, _ in phones] == sorted(start for start, _ in phones)


def test_languages_differ(said):
    assert len({waveform.tobytes() for waveform, _ in said.values()}) == len(LANGUAGES)
    assert len({tuple(name for _, name in phones) for _, phones in said.values()}) >= len(LANGUAGES) - 1


def test_what_was_said_before_is_not_heard(said):
    """Nor a loud, high voice, of which a gain control would have had to take back something."""
    with espeak.narrator() as narrate:
        loud, _ = narrate("I!", voice("en-gb-x-rp", 400, 700, 90), 3)
        assert np.abs(loud).max() < 0.9
        again = {language: narrate("Banana kilometa, sutope!", voice(language), 1) for language in LANGUAGES[::-1]}
    for language, (waveform, phones) in said.items():
        assert again[language][0].tobytes() == waveform.tobytes()
        assert again[language][1] == phones


def test_the_synthesiser_says_the_same_louder():
    plan = ("Give me the water.", voice("en-us"), 5)
    with espeak.synthesiser() as speak:
        alone = speak(*plan)
    with espeak.narrator() as narrate:
        narrated, _ = narrate(*plan)
    assert len(alone) == len(narrated)
    assert np.corrcoef(alone, narrated)[0, 1] > 0.99
    assert np.abs(alone).max() > 1.5 * np.abs(narrated).max()


def test_an_unknown_language_is_one_line():
    with espeak.narrator() as narrate, pytest.raises(UserError, match=r"does not start from .* with voice xx; "):
        narrate("Hello.", voice("xx"), 1)

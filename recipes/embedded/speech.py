"""Synthetic speech to pre-train the embedded backbones on, so that no one's data or weights are in the repository.

espeak-ng reads random sentences of everyday words, in fifteen languages and many accents of English. Speakers differ in
vocal tract, pitch, pitch range and rate; every utterance deviates far from its speaker in the last three, so that any
effect of an emotion on them is covered, without the rules of the synthetic corpus. The synthetic corpus's sentences
cannot occur: every one has words that `LEXICON` lacks. Its speakers do not occur either: they have other seeds.

The targets are stored with the waveforms: pitch, phones, and the numbers of the voice.

A corpus is a directory of parts, safetensors files with these arrays, N utterances each:

``samples`` int16, 16 kHz, utterances concatenated, number i from ``starts[i]`` to ``starts[i + 1]``;
``f0`` float32, Hz, 0 where unvoiced, 50 frames a second, frame f about sample 320 f + 160, split by ``f0_starts``;
``phones`` int16, indices into `PHONES`, and ``phone_frames`` int32, their first frames, split by ``phone_starts``;
``numbers`` float32 (N, 6), columns `NUMBERS`.
"""

# ruff: noqa: RUF001 (letters of IPA and Turkish look like others)

from __future__ import annotations

import math
import multiprocessing
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import scipy.fft
import soxr
from safetensors import safe_open
from safetensors.numpy import save_file

from ser_ray.corpora.espeak import ACCENTS, RATE, Narrate, Phones, Voice, narrator
from ser_ray.corpora.synthetic import SENTENCES
from ser_ray.disk import read_json, replacing, write_json
from ser_ray.models.pretraining import voice_key, words
from ser_ray.schema import SAMPLING_RATE, UserError

VERSION: Final = 1
"""Raised when the audio or its targets change; part of the settings by which a directory is recognised."""
SETTINGS: Final = "settings.json"
FRAMES: Final = 50
"""Per second."""
SECONDS: Final = (1.0, 8.0)
"""Length of an utterance; shorter ones are padded with silence, longer ones are cut."""
PER_PART: Final = 300
"""Utterances."""
MEAN_SECONDS: Final = 3.0
"""Of an utterance, measured; so a part is a quarter of an hour."""
SPEAKERS: Final = 600
NUMBERS: Final = ("pitch", "range", "rate", "tract", "language", "speaker")
"""Of an utterance: log2 of the middle pitch in Hz, semitones, log2 of words per minute, mean of the formants in percent
of a standard man's, index into `LANGUAGES`, number below `SPEAKERS`."""

LEXICON: Final = {
    "en": (
        "the a my your his this that some no and or but if when because with from for near under after before is "
        "are was can will want know see think go come give take make eat drink sleep laugh run wait listen buy "
        "find hear water bread milk house garden street mother father child friend dog bird tree river sun night "
        "day year weather music question answer money city train church measure voice finger apple orange village "
        "mountain happy cold warm young old small great quiet quick strange yellow green blue never always perhaps "
        "today here there much please thank yes how who why what joy thing judge usual good boy true pure"
    ),
    "de": (
        "der die das ein und aber nicht ich du wir haben sein gehen kommen sprechen Wasser Brot Haus Straße Mädchen "
        "Junge Zeit heute schön grün müde über Bücher Käse Zug Pferd Sonne Nacht jetzt vielleicht Freund Küche hören"
    ),
    "fr": (
        "le la un une et mais pas je tu nous avec dans bon vin blanc pain eau maison rue jour nuit soleil enfant ami "
        "montagne deux neuf huit oui jamais toujours bonjour merci chien oiseau jeune vieux rouge manger dormir parler"
    ),
    "es": (
        "el la un una y pero no yo tú con agua pan casa calle noche día niño niña amigo perro gato queso zapato gente "
        "cielo lluvia verde rojo joven viejo hablar comer dormir llamar siempre nunca mañana gracias año guitarra"
    ),
    "it": (
        "il la un una e ma non io tu con acqua pane casa strada notte giorno ragazzo amico cane gatto pizza scuola "
        "bagno cielo pioggia verde giovane vecchio parlare mangiare dormire sempre mai grazie famiglia zucchero oggi"
    ),
    "pt-br": (
        "o a um uma e mas não eu você com água pão casa rua noite dia menino irmã amigo cachorro gato queijo cidade "
        "gente chuva verde jovem velho falar comer dormir sempre nunca amanhã obrigado mãe coração muito filho"
    ),
    "nl": (
        "de het een en maar niet ik jij wij met water brood huis straat nacht dag jongen meisje vriend hond kaas tijd "
        "goed mooi vrouw deur school groen oud praten eten slapen altijd nooit morgen bedankt uit zee vogel geluk"
    ),
    "pl": (
        "i ale nie ja ty my z woda chleb dom ulica noc dzień chłopiec siostra przyjaciel pies kot ser szkoła życie "
        "część ręka źle zielony młody stary mówić jeść spać zawsze nigdy jutro dziękuję wąż rzeka góra miasto"
    ),
    "tr": (
        "ve ama değil ben sen biz ile su ekmek ev sokak gece gün çocuk kız arkadaş köpek kedi peynir okul güzel dağ "
        "ışık köy yeşil genç yaşlı konuşmak yemek uyumak her zaman hiç yarın teşekkür deniz kuş büyük küçük"
    ),
    "sv": (
        "och men inte jag du vi med vatten bröd hus gata natt dag pojke flicka vän hund katt ost skola sjö kött barn "
        "grön ung gammal tala äta sova alltid aldrig imorgon tack fågel sol träd stjärna köpa hjärta"
    ),
    "fi": (
        "ja mutta ei minä sinä me kanssa vesi leipä talo katu yö päivä poika tyttö ystävä koira kissa juusto koulu "
        "hyvä äiti huone vihreä nuori vanha puhua syödä nukkua aina huomenna kiitos lintu aurinko puu järvi"
    ),
    "id": (
        "dan tetapi tidak saya kamu kami dengan air roti rumah jalan malam hari anak teman anjing kucing keju sekolah "
        "nyamuk cinta hijau muda tua bicara makan tidur selalu besok terima kasih burung matahari pohon sungai bunga"
    ),
    "ro": (
        "și dar nu eu tu noi cu apă pâine casă stradă noapte zi băiat fată prieten câine pisică brânză școală țară "
        "verde tânăr bătrân vorbi mânca dormi mereu niciodată mâine mulțumesc pasăre soare copac râu ceai"
    ),
    "cs": (
        "a ale ne já ty my s voda chléb dům ulice noc den kluk holka přítel pes kočka sýr škola řeka žena dítě zelený "
        "mladý starý mluvit jíst spát vždy nikdy zítra děkuji pták slunce strom hora město těžký"
    ),
    "hu": (
        "és de nem én te mi víz kenyér ház utca éjszaka nap fiú lány barát kutya macska sajt iskola gyerek szép hosszú "
        "zöld fiatal öreg beszél eszik alszik mindig soha holnap köszönöm madár fa folyó hegy város nyár"
    ),
}
"""Language -> common words, collected for this project."""
LANGUAGES: Final = tuple(LEXICON)
ENGLISH: Final = (*ACCENTS, "en-029", "en-gb-x-gbcwmd")
"""Accents, as espeak-ng names them."""

PHONES: Final = (
    *("pause", "other"),
    *("a", "ɐ", "ɑ", "ɒ", "æ", "ʌ", "e", "ɛ", "ə", "ɚ", "ɜ", "i", "ɪ", "ɨ", "y", "ʏ", "ø", "œ", "o", "ɔ", "u", "ʊ"),
    *("ʉ", "ɯ", "ɵ", "aɪ", "aʊ", "eɪ", "oʊ", "əʊ", "ɔɪ"),
    *("p", "b", "t", "d", "k", "ɡ", "c", "ɟ", "m", "n", "ɲ", "ŋ", "f", "v", "θ", "ð", "s", "z", "ʃ", "ʒ", "ɕ", "ʑ"),
    *("ç", "ʝ", "x", "ɣ", "ʁ", "h", "β", "r", "ɾ", "ɹ", "l", "ɫ", "ʎ", "j", "ɥ", "w", "ʍ", "ʋ", "tʃ", "dʒ", "ts"),
    *("dz", "tɕ", "dʑ"),
)
"""Classes of sounds, in IPA without length, stress and diacritics; other diphthongs count as their first sound."""


@dataclass(frozen=True)
class Spoken:
    """An utterance of T samples, F = T // 320 frames and P phones."""

    waveform_T: np.ndarray
    """float32 in [-1, 1], 16 kHz."""
    f0_F: np.ndarray
    """float32, Hz; 0 where unvoiced."""
    phones: np.ndarray
    """(P,) int64, indices into `PHONES`."""
    phone_frames: np.ndarray
    """(P,) int64, the frames they begin in, ascending; the first is 0."""
    numbers: dict[str, float]
    """Keys are `NUMBERS`."""


@dataclass(frozen=True)
class Speaker:
    """A made-up person."""

    number: int
    language: str
    accent: str
    pitch: float
    """Hz."""
    range: float
    """Semitones."""
    rate: float
    """Words per minute."""
    formants: tuple[float, ...]


def make(
    directory: Path,
    hours: float,
    seed: int = 0,
    workers: int = 1,
    on_progress: Callable[[int, int], None] | None = None,
    per_part: int = PER_PART,
) -> None:
    """Speak about ``hours`` into ``directory``, in one or more whole parts, by ``workers`` processes; 120 MB an hour.

    A part's bytes depend on the seed, ``per_part`` and its number alone. Existing parts stay, so an interrupted call
    can be continued, and a later one can ask for more hours. ``on_progress`` gets the parts done and the total.

    Raises UserError where the directory was made with other settings.
    """
    parts = count_parts(hours, per_part)
    settings = {"version": VERSION, "seed": seed, "per_part": per_part}
    _claim(directory, settings, parts)
    missing = [number for number in range(parts) if not _part(directory, number).is_file()]
    make_part = partial(_make_part, directory, seed, per_part)
    if workers == 1 or len(missing) < 2:
        _count(map(make_part, missing), parts - len(missing), parts, on_progress)
        return
    with multiprocessing.get_context("spawn").Pool(min(workers, len(missing))) as pool:
        _count(pool.imap_unordered(make_part, missing), parts - len(missing), parts, on_progress)


def count_parts(hours: float, per_part: int = PER_PART) -> int:
    """The number of parts that `make` generates for so many hours.

    >>> count_parts(8)
    32
    """
    return max(1, round(hours * 3600 / (per_part * MEAN_SECONDS)))


def sentences(seed: int, count: int) -> list[str]:
    """The texts of the first ``count`` utterances; those of part p begin at number ``p * per_part``."""
    return [_draw(seed, number).text for number in range(count)]


def can_say(sentence: str) -> bool:
    """Whether the lexicon of one language has all words of a sentence, so that it could be drawn.

    >>> can_say("The dog was happy."), can_say("The letter is lying on the table.")
    (True, False)
    """
    return any(set(words(sentence)) <= lexicon for lexicon in map(set, lexicon_words().values()))


def lexicon_words() -> dict[str, list[str]]:
    """Language -> every word of its lexicon, in order."""
    return {language: sorted(set(words(lexicon))) for language, lexicon in LEXICON.items()}


def pretrained_on(seed: int) -> dict[str, Any]:
    """What `ser_ray.models.pretraining` asks of an embedded backbone: its lexicons and its speakers."""
    keys = [voice_key(draw_speaker(seed, number).formants) for number in range(SPEAKERS)]
    return {"words": lexicon_words(), "speakers": keys}


def shared_with_demo(sentences: list[str]) -> list[str]:
    """The sentences of the synthetic corpus that occur in these, whatever their case, spaces and punctuation.

    >>> shared_with_demo(["Well: there are four  books, on the lower shelf!"])
    ['There are four books on the lower shelf.']
    """
    said = [f" {' '.join(words(sentence))} " for sentence in sentences]
    return [sentence for sentence in SENTENCES if any(f" {' '.join(words(sentence))} " in one for one in said)]


class Speech:
    """The utterances of a directory that `make` has finished, in order; memory-mapped, so they take little RAM.

    ``parts``: use only the first so many parts. Raises UserError where the directory has no speech, or lacks parts.
    """

    def __init__(self, directory: Path, parts: int | None = None) -> None:
        if not (directory / SETTINGS).is_file():
            raise UserError(f"{directory}: no speech was made there")
        made = read_json(directory / SETTINGS)["parts"]
        paths = [_part(directory, number) for number in range(made if parts is None else min(parts, made))]
        if lost := [path.name for path in paths if not path.is_file()]:
            raise UserError(f"{directory}: {lost[0]} is missing; make the speech again to add it")
        self._files = [safe_open(path, framework="numpy") for path in paths]
        self._samples = [file.get_slice("samples") for file in self._files]
        self._tables = [{key: file.get_tensor(key) for key in _TABLES} for file in self._files]
        self._ends = np.cumsum([len(table["numbers"]) for table in self._tables])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Spoken:
        if not 0 <= index < len(self):
            raise IndexError(f"utterance {index} of {len(self)}")
        part = int(np.searchsorted(self._ends, index, side="right"))
        table = self._tables[part]
        row = index - int(self._ends[part]) + len(table["numbers"])
        start, end = (int(edge) for edge in table["starts"][row : row + 2])
        frames = slice(*table["f0_starts"][row : row + 2])
        phones = slice(*table["phone_starts"][row : row + 2])
        return Spoken(
            waveform_T=self._samples[part][start:end].astype(np.float32) / 32768,
            f0_F=table["f0"][frames],
            phones=table["phones"][phones].astype(np.int64),
            phone_frames=table["phone_frames"][phones].astype(np.int64),
            numbers=dict(zip(NUMBERS, table["numbers"][row].tolist(), strict=True)),
        )


def draw_speaker(seed: int, number: int) -> Speaker:
    """Speaker ``number``, below `SPEAKERS`."""
    # NumPy treats [a, b] as [a, b, 0, 0]; the last 1 keeps the seed apart from the synthetic corpus's and `_draw`'s.
    rng = np.random.default_rng([seed, number, 0, 1])
    language = "en" if number % 2 == 0 else LANGUAGES[1 + number // 2 % (len(LANGUAGES) - 1)]
    small = rng.random()  # small people tend to have short tracts and high voices
    tract = 80 + 50 * (0.5 * small + 0.5 * rng.random())
    return Speaker(
        number=number,
        language=language,
        accent=str(rng.choice(ENGLISH)) if language == "en" else language,
        pitch=70 * (330 / 70) ** (0.6 * small + 0.4 * rng.random()),
        range=float(np.clip(5 * 2 ** rng.normal(0, 0.5), 1, 16)),
        rate=float(np.clip(175 * 2 ** rng.normal(0, 0.25), 110, 270)),
        formants=tuple((tract * rng.normal(1, 0.04, size=9)).tolist()),
    )


# -- below: how it is done

_TABLES: Final = ("starts", "f0", "f0_starts", "phones", "phone_frames", "phone_starts", "numbers")
_SILENCE: Final = 0.0005
"""Of full scale; espeak-ng's pauses are digital silence."""
_F0_RATE: Final = 8000
_F0_WINDOW: Final = 320
"""Samples at `_F0_RATE`: 40 ms."""
_DIGRAPHS: Final = frozenset(name for name in PHONES[2:] if len(name) == 2)
_PLACES: Final = {name: place for place, name in enumerate(PHONES)}


@dataclass(frozen=True)
class _Plan:
    """An utterance before it is synthesised."""

    text: str
    voice: Voice
    numbers: tuple[float, ...]
    seed: int
    silence: tuple[float, float]
    """Seconds before and after the speech."""


def _claim(directory: Path, settings: dict[str, int], parts: int) -> None:
    path = directory / SETTINGS
    known = read_json(path) if path.is_file() else settings | {"parts": 0}
    before = known.pop("parts")
    if known != settings:
        raise UserError(f"{directory}: holds speech of other settings ({known}, not {settings}); use another directory")
    if parts > before:
        write_json(path, settings | {"parts": parts})


def _part(directory: Path, number: int) -> Path:
    return directory / f"part-{number:04}.safetensors"


def _count(done: Iterator[None], before: int, total: int, on_progress: Callable[[int, int], None] | None) -> None:
    for number, _ in enumerate(done, start=before + 1):
        if on_progress is not None:
            on_progress(number, total)


def _make_part(directory: Path, seed: int, per_part: int, number: int) -> None:
    plans = [_draw(seed, number * per_part + row) for row in range(per_part)]
    with narrator() as narrate:
        spoken = [_utter(plan, narrate) for plan in plans]
    samples, f0, phones, phone_frames = zip(*spoken, strict=True)
    arrays = {
        "samples": np.concatenate(samples),
        "starts": _starts(samples),
        "f0": np.concatenate(f0),
        "f0_starts": _starts(f0),
        "phones": np.concatenate(phones),
        "phone_frames": np.concatenate(phone_frames),
        "phone_starts": _starts(phones),
        "numbers": np.array([plan.numbers for plan in plans], np.float32),
    }
    with replacing(_part(directory, number)) as aside:
        save_file(arrays, aside)


def _starts(pieces: tuple[np.ndarray, ...]) -> np.ndarray:
    return np.cumsum([0, *map(len, pieces)], dtype=np.int64)


def _draw(seed: int, number: int) -> _Plan:
    rng = np.random.default_rng([seed, number, 0, 2, 1])  # no other seed has five words
    speaker = draw_speaker(seed, int(rng.integers(SPEAKERS)))
    pitch = float(np.clip(speaker.pitch * 2 ** (rng.normal(0, 4) / 12), 62, 480))
    spread = float(np.clip(speaker.range * 2 ** rng.normal(0, 1), 0.2, 20))
    rate = float(np.clip(speaker.rate * 2 ** rng.normal(0, 0.35), 90, 320))
    low, high = pitch * 2 ** (-spread / 24), pitch * 2 ** (spread / 24)
    language = LANGUAGES.index(speaker.language)
    numbers = (math.log2(pitch), spread, math.log2(rate), float(np.mean(speaker.formants)), language, speaker.number)
    return _Plan(
        text=_sentence(speaker.language, rate, rng),
        voice=Voice(speaker.accent, low, high, rate, speaker.formants),
        numbers=numbers,
        seed=int(rng.integers(1, 2**31)),
        silence=tuple(rng.uniform(0.05, 0.3, size=2).tolist()),
    )


def _sentence(language: str, rate: float, rng: np.random.Generator) -> str:
    """3 to 12 words, as many as are spoken in about 1.5 to 7 seconds; commas after one word in ten."""
    fewest, most = math.ceil(1.5 * rate / 60), math.floor(7 * rate / 60)
    count = int(np.clip(rng.integers(3, 13), fewest, most))
    spoken = [str(word) + ("," if rng.random() < 0.1 else "") for word in rng.choice(LEXICON[language].split(), count)]
    text = " ".join(spoken).rstrip(",")
    return text[0].upper() + text[1:] + str(rng.choice([".", "?", "!"], p=[0.6, 0.25, 0.15]))


def _utter(plan: _Plan, narrate: Narrate) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Samples, f0, phones and their frames, as a part stores them."""
    spoken, phones = narrate(plan.text, plan.voice, plan.seed)
    loud = np.flatnonzero(np.abs(spoken) > _SILENCE)
    first, last = int(loud[0]), int(loud[-1]) + 1
    before, after = (round(seconds * RATE) for seconds in plan.silence)
    trimmed = np.pad(spoken[first:last], (before, after))
    trimmed = np.pad(trimmed, (0, max(0, round(SECONDS[0] * RATE) - len(trimmed))))[: round(SECONDS[1] * RATE)]
    waveform_T = soxr.resample(trimmed, RATE, SAMPLING_RATE)
    samples_T = np.round(np.clip(waveform_T, -1, 32767 / 32768) * 32768).astype(np.int16)
    frames = len(samples_T) * FRAMES // SAMPLING_RATE
    places, starts = _classes(phones, (before - first) / RATE, frames)
    f0_F = _f0(soxr.resample(trimmed, RATE, _F0_RATE), frames, plan.voice.low * 0.8, plan.voice.high * 1.5)
    return samples_T, f0_F, places, starts


def _classes(phones: Phones, shift: float, frames: int) -> tuple[np.ndarray, np.ndarray]:
    """(P,) int16 indices into `PHONES`, (P,) int32 first frames; starts with a pause, omits pauses below two frames."""
    kept = [(0, "")]
    for start, name in phones:
        frame = max(0, math.floor((start + shift) * FRAMES))
        if name.startswith(("(", "ʲ")) or frame >= frames:  # "(en)" is a change of language; ʲ is no separate sound
            continue
        if kept[-1][1] == "" and frame - kept[-1][0] < 2 and len(kept) > 1:
            kept.pop()
        if name or kept[-1][1]:
            kept.append((frame, name))
    starts, names = zip(*kept, strict=True)
    return np.array([_class(name) for name in names], np.int16), np.array(starts, np.int32)


def _class(name: str) -> int:
    """The index into `PHONES` of a phone that espeak-ng calls ``name``.

    >>> [PHONES[_class(name)] for name in ("ˈaɪ", "ɔ̃", "uː", "tʃ", "yø", "", "§")]
    ['aɪ', 'ɔ', 'u', 'tʃ', 'y', 'pause', 'other']
    """
    if not name:
        return _PLACES["pause"]
    # ç is a letter of its own; õ is an o with a diacritic.
    letters = [sign if sign in _PLACES else unicodedata.normalize("NFD", sign)[0] for sign in name]
    bare = "".join(sign for sign in letters if unicodedata.category(sign) == "Ll")
    return _PLACES.get(bare[:2] if bare[:2] in _DIGRAPHS else bare[:1], _PLACES["other"])


def _f0(waveform_T: np.ndarray, frames: int, low: float, high: float) -> np.ndarray:
    """(F,) float32 Hz between ``low`` and ``high``, 0 where unvoiced, of dry speech at 8 kHz, by cross-correlation.

    After Talkin (1995), A robust algorithm for pitch tracking, in Speech Coding and Synthesis: the shortest lag whose
    normalised correlation comes close to the largest. Frames are voiced that correlate by more than 0.5 and are at most
    40 dB below the loudest. Nothing is tracked over time: the speech is dry, of one voice of roughly known pitch.
    """
    shortest, longest = math.floor(_F0_RATE / high), math.ceil(_F0_RATE / low) + 1
    hop, span = _F0_RATE // FRAMES, _F0_WINDOW + longest
    padded = np.pad(waveform_T, (span // 2 - hop // 2, span))
    frames_FS = np.lib.stride_tricks.sliding_window_view(padded, span)[: frames * hop : hop]
    energy_FL, correlation_FL = (array_FL[:, shortest - 1 :] for array_FL in _correlation(frames_FS))
    inner_FL = correlation_FL[:, 1:-1]
    peaks_FL = (inner_FL >= correlation_FL[:, :-2]) & (inner_FL > correlation_FL[:, 2:]) & (inner_FL > 0.5)
    largest_F = np.where(peaks_FL, inner_FL, 0).max(axis=1)
    peaks_FL &= inner_FL > 0.85 * largest_F[:, None]
    lag_F = peaks_FL.argmax(axis=1) + 1
    voiced_F = (largest_F > 0) & (energy_FL[:, 0] > 1e-4 * energy_FL[:, 0].max())
    return np.where(voiced_F, _F0_RATE / (shortest - 1 + _refined(correlation_FL, lag_F)), 0).astype(np.float32)


def _correlation(frames_FS: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For windows at the lags L of a frame: (F, L) energy, (F, L) correlation with the first window, in [-1, 1]."""
    size = scipy.fft.next_fast_len(frames_FS.shape[1] + _F0_WINDOW, real=True)
    spectrum_FW = scipy.fft.rfft(frames_FS[:, :_F0_WINDOW], size).conj() * scipy.fft.rfft(frames_FS, size)
    lags = frames_FS.shape[1] - _F0_WINDOW + 1
    products_FL = scipy.fft.irfft(spectrum_FW, size)[:, :lags]
    sums = np.cumsum(np.pad(frames_FS**2, ((0, 0), (1, 0))), axis=1)
    energy_FL = np.maximum(sums[:, _F0_WINDOW:] - sums[:, :lags], 0)
    return energy_FL, products_FL / (np.sqrt(energy_FL[:, :1] * energy_FL) + 1e-6)


def _refined(correlation_FL: np.ndarray, lag_F: np.ndarray) -> np.ndarray:
    """(F,) the lag at the top of the parabola through a peak and its neighbours."""
    rows = np.arange(len(lag_F))
    left, top, right = (correlation_FL[rows, lag_F + step] for step in (-1, 0, 1))
    bend = left - 2 * top + right
    return lag_F + np.where(bend < 0, (left - right) / np.where(bend < 0, 2 * bend, 1), 0)

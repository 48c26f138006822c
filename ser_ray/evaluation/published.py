"""Published metrics of models and of human listeners, from papers, each with its protocol.

Metrics of another split or over other emotions are not comparable: `matching` returns only those that a run may be
compared with, and notes for each what still differs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

_SIX: Final = frozenset({"angry", "disgust", "fear", "happy", "neutral", "sad"})
_SEVEN: Final = _SIX | {"surprised"}
_EIGHT: Final = _SEVEN | {"calm"}


@dataclass(frozen=True)
class Published:
    """Metrics (0 to 1) of one model or of human listeners, and what they were measured on.

    ``protocol``: the fields of `ser_ray.config.Protocol` that a run must match; empty for people, who were not trained.
    ``leaky``: whether train and test shared speakers; None if nothing was trained.
    """

    corpus: str
    protocol: Mapping[str, str]
    emotions: frozenset[str]
    leaky: bool | None
    name: str
    uar: float | None
    accuracy: float | None
    source: str
    note: str


_EMOBOX: Final = "Ma et al. 2024, EmoBox, arXiv 2406.07162, table 4"
_CREMA_D: Final = "Cao et al. 2014, CREMA-D, doi 10.1109/TAFFC.2014.2336244"


def _emobox(
    corpus: str,
    protocol: Mapping[str, str],
    emotions: frozenset[str],
    leaky: bool,
    note: str,
    metrics: Mapping[str, tuple[float, float | None]],
) -> tuple[Published, ...]:
    """One column of the EmoBox table; ``metrics``: encoder -> (UAR, accuracy), there called UA and WA."""
    return tuple(
        Published(corpus, protocol, emotions, leaky, f"{encoder}, frozen, MLP head", *both, _EMOBOX, note)
        for encoder, both in metrics.items()
    )


ROWS: Final = (
    *_emobox(
        "ravdess",
        {"scheme": "given_folds", "given": "emobox"},
        _EIGHT,
        False,
        "mean over the six folds; a single fold is several points higher or lower",
        {
            "wav2vec2-base": (0.543, 0.554),
            "HuBERT-base": (0.654, 0.662),
            "HuBERT-large": (0.700, 0.703),
            "WavLM-large": (0.720, 0.722),
            "Whisper-large-v3": (0.753, 0.759),
        },
    ),
    *_emobox(
        "crema_d",
        {"scheme": "random"},
        _SIX,
        True,
        "another split, also with every speaker in both train and test",
        {
            "wav2vec2-base": (0.620, 0.619),
            "HuBERT-base": (0.711, 0.710),
            "HuBERT-large": (0.738, 0.736),
            "WavLM-large": (0.745, 0.743),
            "Whisper-large-v3": (0.768, 0.765),
        },
    ),
    *_emobox(
        "tess",
        {"scheme": "random"},
        _SEVEN,
        True,
        "another split, also with both speakers in both train and test",
        {
            "wav2vec2-base": (0.979, None),
            "HuBERT-base": (0.996, None),
            "HuBERT-large": (0.999, None),
            "WavLM-large": (0.998, None),
            "Whisper-large-v3": (1.000, None),
        },
    ),
    Published(
        "crema_d",
        {},
        _SIX,
        None,
        "people, one listener, voice alone",
        None,
        0.409,
        f"{_CREMA_D}, abstract",
        "of the intended emotion, over all utterances, not this test split",
    ),
    Published(
        "crema_d",
        {},
        _SIX,
        None,
        "people, majority of the listeners, voice alone",
        None,
        0.446,
        "counted from the votes that CREMA-D publishes",
        "of the intended emotion, over all utterances, not this test split",
    ),
)
"""All results that are reliable enough to quote, in the order in which they are shown."""


def matching(
    corpora: Iterable[str], protocol: Mapping[str, Any], emotions: Iterable[str], leaky: bool
) -> list[dict[str, Any]]:
    """The published and human metrics that a run on one corpus may be compared with.

    Args:
        corpora: those of the experiment; for several together nothing is published.
        protocol: the fields of `ser_ray.config.Protocol`, as an evaluation record holds them; others are ignored.
        emotions: those of the experiment, after merging.
        leaky: whether its train and test share speakers or recordings.

    Returns:
        One dict per result: name, uar, accuracy (0 to 1, or None if not published), source, note.

    >>> rows = matching(["crema_d"], {"scheme": "speaker_kfold"}, _SIX, leaky=False)
    >>> [(row["name"], row["accuracy"]) for row in rows][0]
    ('people, one listener, voice alone', 0.409)
    >>> matching(["crema_d", "ravdess"], {"scheme": "speaker_kfold"}, _SIX, leaky=False)
    []
    """
    corpora, emotions = set(corpora), set(emotions)
    return [
        {key: getattr(row, key) for key in ("name", "uar", "accuracy", "source", "note")}
        for row in ROWS
        if corpora == {row.corpus}
        and emotions == row.emotions
        and all(protocol.get(key) == value for key, value in row.protocol.items())
        and row.leaky in (None, leaky)
    ]

"""The project from Python: what ``import ser_ray`` gives. Neither torch nor Ray is loaded before it is needed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ser_ray.disk import expanded, resolved
from ser_ray.schema import UserError

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    import pyarrow as pa

    from ser_ray.evaluation.results import Results
    from ser_ray.models.classifier import EmotionClassifier
    from ser_ray.models.ensemble import Ensemble
    from ser_ray.models.voice_file import SavedVoice
    from ser_ray.training.inference import Answer, Source

    Recordings = str | Path | np.ndarray | Sequence[str | Path | np.ndarray]


@dataclass(frozen=True)
class Rows:
    """A small table: iterate over its rows as dictionaries, or take it as Arrow or pandas."""

    table: pa.Table

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.table.to_pylist())

    @property
    def columns(self) -> list[str]:
        """The names of its columns."""
        return list(self.table.column_names)

    def to_arrow(self) -> pa.Table:
        """As a pyarrow.Table."""
        return self.table

    def to_pandas(self) -> pd.DataFrame:
        """As a pandas.DataFrame."""
        return self.table.to_pandas()


class Model:
    """A trained checkpoint, or an ensemble of several; `load` makes it."""

    def __init__(self, classifier: EmotionClassifier | Ensemble) -> None:
        self.classifier = classifier
        """The torch module, in evaluation mode; for an ensemble, `ser_ray.models.ensemble.Ensemble`: its ``members``
        are torch modules."""

    @property
    def emotions(self) -> tuple[str, ...]:
        """The classes, in the order of the model's outputs."""
        return self.classifier.experiment.emotions

    def predict(
        self,
        recordings: Recordings,
        sampling_rate: int | None = None,
        voice: SpeakerVoice | str | Path | None = None,
        speakers: Sequence[str | None] | None = None,
        sets: bool = False,
    ) -> Rows:
        """The emotion of each recording, and the probability of each.

        ``recordings``: paths of files, or of folders that are searched for audio, or arrays (T,) of float in [-1, 1] or
        signed integers, with their ``sampling_rate`` in Hz; one of them, or several. They are resampled and trimmed as
        the training data were. Columns: path (null for an array), start and end (null for all of a recording), emotion,
        a ``p_EMOTION`` for each, and reason: why a recording could not be used (then the others are null).

        A recording longer than ``audio.max_seconds`` has a row for each of its equal windows, with start and end in
        seconds, and then one for all of it, their mean.

        For a model with ``head.speaker``, ``voice`` is what is known of the one speaker of all recordings: of `enrol`,
        or a file. Or ``speakers`` names that of each recording, None where it is not known: each is then answered with
        all others of its speaker, never itself. An answer that uses either says nothing about unknown speakers.

        With ``sets`` a column ``set`` holds the emotions of which one is the true one in 90 % of the cases, the most
        probable first. It is measured on recordings of speakers of whom nothing is known, not on windows.

        Raises UserError if no path exists, for folders without audio alone, and arrays without a sampling rate; for a
        voice of another checkpoint, for a model that does not use what is known of a speaker, and for ``sets`` of one
        that has no threshold.
        """
        import pyarrow as pa

        from ser_ray.evaluation.predictions import PROBABILITY
        from ser_ray.training.inference import answer_columns, threshold_of

        least = threshold_of(self.classifier, "predict") if sets else None
        answers = self._answers(_sources(recordings, sampling_rate), voice, speakers)
        columns = answer_columns(self.emotions, sets)
        numbers = {"start", "end", *(PROBABILITY + emotion for emotion in self.emotions)}
        types = {name: pa.float64() if name in numbers else pa.string() for name in columns}
        types |= {"set": pa.list_(pa.string())} if sets else {}
        return Rows(pa.Table.from_pylist([answer.row(self.emotions, least) for answer in answers], pa.schema(types)))

    def enrol(self, recordings: Recordings, sampling_rate: int | None = None, name: str = "") -> SpeakerVoice:
        """What recordings without labels say of their one speaker, for `predict`.

        Arguments and errors: as `predict`; also if none can be used, and for a model without ``head.speaker``.
        """
        from ser_ray.models import voice_file
        from ser_ray.training.enrolment import enrol

        voice_file.check_uses_voices(self.classifier, "enrol")
        voice, unusable, _ = enrol(self.classifier, _sources(recordings, sampling_rate))
        made = voice_file.saved(self.classifier, voice, name)
        if not made.recordings:
            raise UserError(f"no recording could be used{f': {unusable[0].reason}' if unusable else ''}")
        return SpeakerVoice(made)

    def _answers(
        self, sources: list[Source], voice: SpeakerVoice | str | Path | None, speakers: Sequence[str | None] | None
    ) -> Iterator[Answer]:
        from ser_ray.models import voice_file
        from ser_ray.schema import unknown_speaker
        from ser_ray.training.enrolment import predict_each_other
        from ser_ray.training.inference import predict

        if voice is None and speakers is None:
            return predict(self.classifier, sources)
        voice_file.check_uses_voices(self.classifier, "predict")
        if speakers is None:
            saved = (
                voice.saved if isinstance(voice, SpeakerVoice) else voice_file.read(Path(str(voice)), self.classifier)
            )
            voice_file.check_is_of(saved, self.classifier, "voice")
            return predict(self.classifier, sources, saved.voice)
        if voice is not None:
            raise UserError("voice and speakers: give one of them")
        if len(speakers) != len(sources):
            raise UserError(f"{len(speakers)} speakers for {len(sources)} recordings; name one for each")
        named = [f"given/{s}" if s else unknown_speaker("given", str(n)) for n, s in enumerate(speakers)]
        return predict_each_other(self.classifier, sources, named)

    def embed(self, recordings: Recordings, sampling_rate: int | None = None) -> np.ndarray:
        """The pooled vector of each recording: (N, P) float32, NaN where it is not usable. It is what the classifier
        sees, before what is known of the speaker is subtracted, if anything is. That of a recording longer than
        ``audio.max_seconds`` is the mean over the windows that `predict` cuts it into.

        Arguments and errors: as `predict`.
        """
        from ser_ray.training.inference import embed

        return embed(self.classifier, _sources(recordings, sampling_rate))


@dataclass(frozen=True)
class SpeakerVoice:
    """What a model knows of a speaker by recordings without labels: numbers, no audio. `Model.enrol` makes it."""

    saved: SavedVoice = field(repr=False)

    def __str__(self) -> str:
        return str(self.saved)

    @property
    def name(self) -> str:
        """Who it is."""
        return self.saved.name

    @property
    def recordings(self) -> int:
        """How many recordings it is made of; a long one counts once for each of its windows."""
        return self.saved.recordings

    def save(self, path: str | Path) -> None:
        """Write it to a file, for `Model.predict` and ``ser-ray predict --voice``."""
        from ser_ray.models import voice_file

        voice_file.write(self.saved, Path(path))


@dataclass(frozen=True)
class SearchResults:
    """A results folder as tables; `read_results` reads it, `search` makes it. What is not there yet is empty."""

    folder: Path
    content: Results = field(repr=False, compare=False)
    """All that the folder holds, as it was written."""

    @property
    def best(self) -> Path:
        """The chosen checkpoint, for `load`."""
        return self.folder / "best"

    @cached_property
    def metrics(self) -> Rows:
        """A row for test, dev and each baseline: name, then each headline metric and the limits of its 95 % interval,
        ``uar_low`` and ``uar_high``, which are null where there is no interval."""
        import pyarrow as pa

        from ser_ray.evaluation.metrics import HEADLINE

        rows = []
        for name, found in self.content.metrics.items():
            row: dict[str, Any] = {"name": name}
            for metric in HEADLINE:
                low, high = (found.get("ci95") or {}).get(metric) or (None, None)
                row |= {metric: found.get(metric), f"{metric}_low": low, f"{metric}_high": high}
            rows.append(row)
        limits = [f"{metric}{end}" for metric in HEADLINE for end in ("", "_low", "_high")]
        schema = pa.schema([("name", pa.string()), *((column, pa.float64()) for column in limits)])
        return Rows(pa.Table.from_pylist(rows, schema))

    @cached_property
    def trials(self) -> Rows:
        """The rows of trials.csv, best first; numbers are numbers, and empty cells null."""
        return _typed(self.content.trials)

    @cached_property
    def epochs(self) -> Rows:
        """A row for each epoch of each trial: trial_id, then the fields of its history."""
        import pyarrow as pa

        rows = [{"trial_id": i} | epoch for i, epochs in self.content.histories.items() for epoch in epochs]
        fields = dict.fromkeys(name for row in rows for name in row)  # a probe's epoch has fewer than others
        return Rows(pa.table({name: pa.array([row.get(name) for row in rows]) for name in fields}))

    def predictions(self, split: str = "test") -> Rows:
        """A row for each utterance of ``dev`` or ``test``: utterance_id, corpus, speaker, emotion, predicted, and a
        ``p_EMOTION`` for each. Raises UserError for a split that has not been predicted."""
        import pyarrow as pa

        known = self.content.predictions
        if split not in known:
            raise UserError(f"{self.folder}: no predictions of {split}; there are {', '.join(known) or 'none'}")
        columns = known[split].columns(split)
        del columns["split"]  # the same in every row
        return Rows(pa.table(columns))


def load(checkpoint: str | Path, device: str | None = None, backbone: str | Path | None = None) -> Model:
    """The model of a checkpoint directory, such as ``results/demo/best``, which may be an ensemble.

    ``device``: such as ``cpu`` or ``cuda:1``; by default the GPU where there is one. ``backbone``: where the
    checkpoint's backbone is now, if that has moved. Raises UserError if the directory is not a complete checkpoint, or
    its backbone cannot be found.
    """
    from ser_ray.models.ensemble import load
    from ser_ray.models.precision import choose_device

    return Model(load(checkpoint, device or choose_device(), backbone))


def read_results(results_dir: str | Path) -> SearchResults:
    """A results folder as tables. Raises UserError if it is not one."""
    from ser_ray.evaluation import results

    folder = resolved(results_dir)
    return SearchResults(folder, results.read_results(folder))


def search(space: str | Path, **overrides: Any) -> SearchResults:
    """Run a search as ``ser-ray tune`` does, or what is left of one.

    ``space``: a YAML file, or the name of a built-in space (`ser-ray spaces`). ``overrides``: keys of it, with two
    underscores for each dot, such as ``tune__trials=4``, or by ``**{"tune.trials": 4}``. Prints its progress.

    Raises UserError for what does not fit.
    """
    from ser_ray import report, tune

    path, given = _given(space, overrides)
    return read_results(tune.run(tune.load_space(path, given), report.terminal(), ["tune", str(path), *given]))


def prepare_data(space: str | Path, **overrides: Any) -> list[Path]:
    """Prepare every corpus of a space as ``ser-ray prepare`` does; returns the directories of shards, one a corpus.

    Arguments and errors: as `search`; the space may leave out its backbone.
    """
    from ser_ray import config, prepare
    from ser_ray.runtime import paths

    read = paths.resolve_paths(config.load(*_given(space, overrides), needs_backbone=False))
    return prepare.prepare(read, use_ray=read.resources.workers > 0)


def audit_data(space: str | Path, **overrides: Any) -> dict[str, Any]:
    """Audit the splits of a space as ``ser-ray audit`` does; returns the content of audit.json: ``leaky``, ``findings``
    (level, what, detail, groups), ``splits``, ``advice``, what to set, ``to_exclude`` and ``excluded``.

    Arguments and errors: as `search`; the space may leave out its backbone.
    """
    from ser_ray import audit, config
    from ser_ray.runtime import paths
    from ser_ray.terminal import PlainConsole

    read = paths.resolve_paths(config.load(*_given(space, overrides), needs_backbone=False))
    return audit.run(read, PlainConsole())


# -- below: how it is done


def _given(space: str | Path, overrides: Mapping[str, Any]) -> tuple[Path, list[str]]:
    """The file of a space and its overrides, as a command line gives them."""
    from ser_ray import config

    built_in = config.built_in_spaces()
    path = built_in[str(space)] if str(space) in built_in and not Path(space).is_file() else Path(space)
    return path, [f"{key.replace('__', '.')}={_yaml(value)}" for key, value in overrides.items()]


def _yaml(value: Any) -> str:
    """A value as JSON, which is YAML; paths are text, and numbers of numpy are numbers."""
    return json.dumps(value, default=lambda one: str(one) if isinstance(one, Path) else one.item(), ensure_ascii=False)


def _sources(recordings: Recordings, sampling_rate: int | None) -> list[Source]:
    import numpy as np

    from ser_ray.corpora.files import find_audio

    alone = isinstance(recordings, str | Path | np.ndarray) or not isinstance(recordings, Sequence)
    several: Sequence[Any] = [recordings] if alone else recordings  # type: ignore[assignment]
    if all(isinstance(recording, str | Path) for recording in several):
        return [*find_audio([expanded(recording) for recording in several])]
    sources: list[Source] = []
    for recording in several:
        if isinstance(recording, str | Path):
            sources += find_audio([expanded(recording)])
        elif not isinstance(recording, np.ndarray):
            raise UserError(f"a recording is a path or a numpy array (T,), not {type(recording).__name__}")
        elif sampling_rate is None:
            raise UserError("sampling_rate is missing: give that of the arrays, in Hz")
        else:
            sources.append((recording, sampling_rate))
    return sources


def _typed(rows: Sequence[Mapping[str, str]]) -> Rows:
    """Columns of text, or of numbers where every cell that is not empty is one."""
    import pyarrow as pa

    from ser_ray.evaluation.results import as_number

    columns: dict[str, pa.Array] = {}
    for name in rows[0] if rows else ():
        cells = [row.get(name) or None for row in rows]
        numbers = [as_number(cell) for cell in cells]
        text = [cell for cell, number in zip(cells, numbers, strict=True) if cell is not None and number is None]
        is_number = not text and name != "trial_id" and any(number is not None for number in numbers)
        columns[name] = pa.array(numbers, pa.float64()) if is_number else pa.array(cells, pa.string())
    return Rows(pa.table(columns))

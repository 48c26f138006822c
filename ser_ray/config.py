"""The configuration: one YAML file describes an experiment and the search space around it.

Only this module reads YAML. ``load`` turns a file and ``key=value`` overrides into a frozen `SearchSpace`, or raises a
one-line `UserError` that names the field. The docstring of each field gives the reason for its default.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from ser_ray.errors import UserError
from ser_ray.schema import EMOTIONS


def _as_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


M = TypeVar("M", bound=BaseModel)
Words = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]


class Section(BaseModel):
    """A section of the configuration: immutable, rejects unknown keys, does not convert types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Audio(Section):
    """Which recordings are usable, and how they are cut. Part of the fingerprint of prepared data."""

    min_seconds: float = Field(0.3, gt=0, le=30)
    """Shorter recordings are rejected: they hold less than a syllable, and fewer frames than a backbone's receptive
    field needs."""
    max_seconds: float = Field(30.0, gt=0, le=30)
    """Whisper has position embeddings for at most 30 s. `too_long` says what happens to longer recordings."""
    too_long: Literal["reject", "split"] = "reject"
    """reject: leave the recording out. split: cut it into equal windows of at most `max_seconds`, each an utterance of
    the same speaker and emotion. Not the default: the label of a minute of speech may not hold for each part of it."""
    trim_db: float | None = Field(40.0, gt=0)
    """Leading and trailing parts that are this many dB below the peak are cut (RAVDESS recordings begin and end with
    about 1 s of silence, a third of the audio). null: no trimming."""


class Protocol(Section):
    """How utterances are split into train, dev and test; see `ser_ray.protocols.folds`."""

    scheme: Literal[
        "speaker_kfold",
        "given_folds",
        "leave_one_speaker_out",
        "leave_one_corpus_out",
        "cross_corpus",
        "official",
        "random",
    ] = "speaker_kfold"
    """The default is speaker-disjoint: speakers shared between splits inflate every metric. ``official``: the split in
    the column ``split`` of a corpus table. Results of ``random`` are stamped LEAKY."""
    folds: int = Field(5, ge=2)
    """Number of folds of ``speaker_kfold`` and ``random``: test is fold `fold`, dev the next one. Where the scheme
    defines only test, the other speakers of each corpus form this many balanced groups, and dev is one of them."""
    fold: int = Field(0, ge=0)
    """Number of the test fold, from 0; for ``leave_one_speaker_out``, of the test speaker in order of name."""
    dev_after: int = Field(1, ge=1)
    """Dev is the fold this many places after the test fold, cyclically. Where the scheme defines only test, dev is the
    group of other speakers with this number; where it defines dev too, this has no effect. See `Tune.rotate_dev`."""
    given: Annotated[str | tuple[Words, ...] | None, BeforeValidator(_as_tuple)] = None
    """For ``given_folds``: ``emobox`` (RAVDESS's published folds), a list of speakers such as ``ravdess/01`` for each
    fold, or a CSV file with the columns speaker and fold (numbers from 0)."""
    held_out: str | None = None
    """For ``leave_one_corpus_out`` and ``cross_corpus``: the test corpus."""
    train_on: Words | None = None
    """For ``cross_corpus``: the training corpora. Only emotions that occur both in them and in `held_out` are used."""
    seed: int = Field(0, ge=0)
    """Seed of the assignment to folds; separate from the training seed, which therefore does not change the folds."""

    @model_validator(mode="after")
    def _complete(self) -> Protocol:
        if self.scheme == "given_folds" and self.given is None:
            raise ValueError("scheme given_folds needs protocol.given: emobox, lists of speakers, or a .csv file")
        if self.scheme in ("leave_one_corpus_out", "cross_corpus") and self.held_out is None:
            raise ValueError(f"scheme {self.scheme} needs protocol.held_out: the corpus to test on")
        if self.scheme == "cross_corpus" and not self.train_on:
            raise ValueError("scheme cross_corpus needs protocol.train_on: the corpora to train on")
        if self.train_on and self.held_out in self.train_on:
            raise ValueError(f"protocol.train_on names {self.held_out!r}, which is held out")
        if self.scheme in ("speaker_kfold", "random") and self.fold >= self.folds:
            raise ValueError(f"protocol.fold is {self.fold}, but the folds are 0 to {self.folds - 1}")
        return self


class Adapter(Section):
    """How the backbone is adapted."""

    method: Literal["frozen", "lora", "qlora", "full"] = "lora"
    """frozen: only the head is trained. lora: low-rank updates. qlora: LoRA on NF4 weights (double quantisation). full:
    all weights are trained."""
    rank: int = Field(8, ge=1, le=512)
    """Rank of the low-rank update. In LoRA's paper (arXiv 2106.09685, table 6) more than 8 brings no gain."""
    alpha: float = Field(16.0, gt=0)
    """The update is scaled by alpha / rank. The default is twice the default rank, as is usual."""
    dropout: float = Field(0.05, ge=0, lt=1)
    """Dropout on the input of the low-rank update. The default is the QLoRA paper's value for small models."""
    first_layer: int = Field(0, ge=0)
    """Layers below this one stay frozen: they get no LoRA update, and ``full`` does not train them."""
    targets: Words | None = None
    """Names of the linear layers that get a LoRA update. null: all of attention and feed-forward (QLoRA paper,
    section 4: all layers are needed to match full fine-tuning); for WavLM only those of feed-forward."""


class Head(Section):
    """From hidden states to emotions: layer mix -> masked pooling -> classifier."""

    layer_mix: Literal["weighted", "concat", "last"] = "weighted"
    """weighted: a trainable weighted sum of all layers (SUPERB, arXiv 2105.01051): the middle ones carry most about
    emotion. concat: all layers are pooled and concatenated, so that the classifier can use each. last: the last one."""
    pooling: Literal["mean", "statistics", "attentive"] = "attentive"
    """Over real frames only, without padding. statistics: mean and standard deviation. attentive: the same with
    trainable frame weights (Okabe et al. 2018, arXiv 1803.10963), which are uniform at the start."""
    hidden: int = Field(0, ge=0, le=8192)
    """Width of the classifier's hidden layer. 0: a linear classifier, which can be fitted to a thousand utterances."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Dropout on the pooled vector, and on the hidden layer if there is one."""
    init: Literal["random", "probe"] = "random"
    """probe: start from logistic regression on the frozen backbone's best layer (``concat``: on all layers), then
    fine-tune (arXiv 2202.10054: fine-tuning with a random head distorts good features)."""

    @model_validator(mode="after")
    def _probe_is_linear(self) -> Head:
        if self.init == "probe" and self.hidden:
            raise ValueError("head.init: probe needs a linear head: set head.hidden to 0")
        if self.init == "probe" and self.layer_mix == "last":
            raise ValueError("head.init: probe needs all layers: set head.layer_mix to weighted or concat")
        return self


class Augment(Section):
    """Seeded augmentation of training recordings; dev and test are never augmented. All off by default: what helps
    depends on the corpus, and level and speed can be part of an emotion."""

    gain_db: float = Field(0.0, ge=0, le=40)
    """The level changes by up to this many dB up or down: microphones and distances differ."""
    noise_snr_db: Annotated[tuple[float, float] | None, BeforeValidator(_as_tuple)] = None
    """[low, high]: adds white noise at a signal-to-noise ratio between these two, in dB."""
    speed: float = Field(0.0, ge=0, le=0.3)
    """Plays a recording slower by this share, unchanged, or faster by it, a third of the time each (Ko et al. 2015:
    0.1). This shifts the pitch too, which carries emotion."""
    crop_seconds: float | None = Field(None, gt=0)
    """Trains on a random crop of at most this length."""
    channel_mask: float = Field(0.0, ge=0, le=0.5)
    """SpecAugment (arXiv 1904.08779) on log-mel bands, or on the output channels of wav2vec2's convolutions: two masks,
    each of up to this share of them."""
    time_mask: float = Field(0.0, ge=0, le=0.5)
    """The same along time: two masks, each of up to this share of an utterance."""

    @model_validator(mode="after")
    def _range(self) -> Augment:
        if self.noise_snr_db is not None and self.noise_snr_db[0] > self.noise_snr_db[1]:
            raise ValueError("noise_snr_db is [low, high], but the first value is above the second")
        return self


class Optimizer(Section):
    """AdamW with linear warm-up and linear decay to zero."""

    lr: float = Field(1.0e-4, gt=0, le=1)
    """Peak learning rate of the backbone (adapters, or all weights)."""
    head_lr: float = Field(1.0e-3, gt=0, le=1)
    """Peak learning rate of the head, which is trained from scratch and needs larger steps."""
    weight_decay: float = Field(0.01, ge=0, le=1)
    """AdamW's default; not applied to biases, norms and layer-mix weights."""
    warmup: float = Field(0.1, ge=0, lt=1)
    """Share of all steps over which the learning rate rises; until then Adam's second moment is noisy."""
    clip: float = Field(1.0, gt=0)
    """Maximum gradient norm."""
    accumulate: int = Field(1, ge=1)
    """Gradient accumulation: a step is up to this many batches of each worker, for a large batch on a small GPU. The
    batches of an epoch are divided evenly among its steps."""


class Experiment(Section):
    """The complete configuration of one trial: data, split, model, optimisation."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the results folder, below `Storage.results`."""
    corpora: dict[str, str | None]
    """Corpus -> its directory; ``synthetic`` needs none. A corpus that is not built in needs a name of its own and a
    .csv or .parquet file that lists its recordings; `ser_ray.corpora.table` describes the columns."""
    labels: dict[str, dict[str, str]] = {}
    """For a corpus in a table, the emotions that values of its column emotion stand for: ``{mine: {ang: angry}}``. A
    value that is not listed must be the name of an emotion."""
    label: Literal["intended", "perceived"] = "intended"
    """intended: the emotion that the speaker meant to express. perceived: the one that most listeners heard, where a
    corpus has listener ratings (CREMA-D: by voice alone, this is the intended one for less than half of it). perceived
    leaves out utterances with a tie among listeners. Utterances without ratings keep the intended emotion, and the
    audit counts them."""
    emotions: Words = EMOTIONS[:7]
    """The classes, in order; utterances of other emotions are dropped, unless merged."""
    merge: dict[str, str] = {}
    """Emotion -> the one that it is relabelled to: ``{calm: neutral}``."""
    audio: Audio = Audio()
    protocol: Protocol = Protocol()
    backbone: str
    """Hugging Face hub id, local directory, or an embedded backbone (``embedded/tiny-whisper``,
    ``embedded/tiny-wav2vec2``)."""
    adapter: Adapter = Adapter()
    head: Head = Head()
    augment: Augment = Augment()
    optimizer: Optimizer = Optimizer()
    batch_seconds: float = Field(60.0, gt=0)
    """Largest batch of one worker, in seconds of audio including padding: bounds memory whatever the lengths."""
    epochs: int = Field(10, ge=1)
    """Maximum number of epochs. It may be raised under the same name: trials that ended with their last epoch then
    continue from its checkpoint. The learning rate depends on the step and on the total number of steps, so the added
    epochs are trained at the rates of the longer schedule. These are above the (nearly) zero at which the shorter one
    ended, and the earlier epochs were trained at lower rates than in a run that has the longer schedule from the
    start."""
    patience: int = Field(4, ge=1)
    """Early stopping: training ends after this many epochs without a better `Tune.metric`."""
    class_weights: Literal["balanced", "none"] = "balanced"
    """balanced: loss weights inverse to an emotion's frequency in train, since UAR weighs emotions equally."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 on GPUs that support it, fp16 on older ones, fp32 on a CPU."""
    recompute: bool = False
    """Gradient checkpointing: a third more time for a fraction of the memory. For models that do not fit otherwise."""
    seed: int = Field(0, ge=0)
    """Seed of initial weights, dropout, augmentation and the order of batches."""

    @model_validator(mode="after")
    def _names_exist(self) -> Experiment:
        if not self.corpora:
            raise ValueError("corpora is empty: name at least one, such as synthetic")
        if len(set(self.emotions)) != len(self.emotions) or len(self.emotions) < 2:
            raise ValueError("emotions must be at least two different names")
        for emotion in (*self.emotions, *self.merge):
            if emotion not in EMOTIONS:
                raise ValueError(f"{emotion!r} is not an emotion; they are {', '.join(EMOTIONS)}")
        if strange := sorted(self.labels.keys() - self.corpora.keys()):
            raise ValueError(f"labels: {strange[0]!r} is not among the corpora")
        for source, target in self.merge.items():
            if target not in self.emotions:
                raise ValueError(f"merge: {source}: {target!r} is not among the experiment's emotions")
            if source in self.emotions:
                raise ValueError(f"merge: {source!r} is also in emotions; remove it from one of them")
        return self

    def halved(self) -> Experiment:
        """The same with half of `batch_seconds` and twice `accumulate`: less memory, and a step has the same
        utterances, except for some at its end."""
        optimizer = self.optimizer.model_copy(update={"accumulate": 2 * self.optimizer.accumulate})
        return self.model_copy(update={"batch_seconds": self.batch_seconds / 2, "optimizer": optimizer})


THE_SAME_FOR_ALL = frozenset(
    {"name", "corpora", "labels", "label", "emotions", "merge", "audio", "protocol"},
)
"""Fields of `Experiment` that define the data and their split: they cannot be searched."""


class Distribution(Section):
    """The values of one searched key: exactly one of choice, uniform, loguniform, randint."""

    choice: Annotated[tuple[Any, ...] | None, BeforeValidator(_as_tuple)] = None
    uniform: Annotated[tuple[float, float] | None, BeforeValidator(_as_tuple)] = None
    loguniform: Annotated[tuple[float, float] | None, BeforeValidator(_as_tuple)] = None
    randint: Annotated[tuple[int, int] | None, BeforeValidator(_as_tuple)] = None
    """Both ends included."""
    when: dict[str, Annotated[tuple[Any, ...], BeforeValidator(_as_tuple)]] = {}
    """Conditions: the key is searched only in trials where every key listed here has one of the given values, such as
    ``when: {adapter.method: [lora, qlora]}``."""

    @model_validator(mode="after")
    def _one_kind(self) -> Distribution:
        kinds = [k for k in ("choice", "uniform", "loguniform", "randint") if getattr(self, k) is not None]
        if len(kinds) != 1:
            raise ValueError("give exactly one of choice, uniform, loguniform, randint")
        if self.choice is not None and not self.choice:
            raise ValueError("choice is empty")
        for low, high in (r for r in (self.uniform, self.loguniform, self.randint) if r is not None):
            if low >= high:
                raise ValueError(f"the lower bound {low} is not below the upper bound {high}")
            if self.loguniform is not None and low <= 0:
                raise ValueError("loguniform needs a lower bound above 0")
        return self

    def examples(self) -> tuple[Any, ...]:
        """The values that are validated: all choices, or both ends of a range."""
        ends = self.uniform or self.loguniform or self.randint
        return self.choice if self.choice is not None else tuple(ends or ())


class Tune(Section):
    """How the space is searched."""

    trials: int = Field(12, ge=1)
    """Total number of trials; ``tune.trials=+20`` on the command line adds to a finished search."""
    hours: float | None = Field(None, gt=0)
    """No trial starts after this many hours of searching in total (continuations included); null: no limit."""
    gpu_hours: float | None = Field(None, gt=0)
    """No trial starts after trials have held GPUs for this many GPU-hours in total; null: no limit."""
    metric: Literal["dev_uar", "dev_accuracy", "dev_macro_f1", "dev_kappa"] = "dev_uar"
    """The metric on dev by which trials are compared and stopped."""
    also: Annotated[
        tuple[Literal["seconds_per_epoch", "peak_memory_mb", "trainable_parameters"], ...], BeforeValidator(_as_tuple)
    ] = ()
    """Costs that the sampler minimises as well: it then searches for the Pareto front, which the report shows. The
    metric alone decides which trial wins."""
    sampler: Literal["tpe", "random", "grid"] = "tpe"
    """tpe: a model of the trials so far (multivariate; arXiv 2304.11127). random and grid are for comparison."""
    grid_points: int = Field(3, ge=2)
    """Number of values that a grid takes from each range."""
    warm_start: Words = ()
    """Results folders of earlier searches, whose trials the sampler learns from; they do not count towards `trials`."""
    scheduler: Literal["asha", "none"] = "asha"
    """asha stops the worse half of the trials early."""
    grace: int = Field(2, ge=1)
    """Epochs before a trial may be stopped."""
    seed: int = Field(0, ge=0)
    """Seed of the sampler, and of the order of a grid."""
    concurrency: int | None = Field(None, ge=1)
    """Number of trials that run at once; null: as many as fit on the cluster."""
    finalists: int = Field(3, ge=1)
    """How many of the best trials are finalists. Evaluation actors score their checkpoints in full, on dev."""
    final_folds: Annotated[tuple[int, ...] | Literal["all"] | None, BeforeValidator(_as_tuple)] = None
    """Folds on which the finalists are trained again. The mean over the folds selects the winner on dev and is reported
    on test. null: only the experiment's own fold, with the checkpoint from the search."""
    final_seeds: int = Field(1, ge=1)
    """Number of seeds with which each finalist is trained: the experiment's seed and those that follow. On test, the
    ensemble that averages their probabilities is scored as well."""
    rotate_dev: bool = False
    """With each further seed, dev is the next fold (`Protocol.dev_after`). More speakers then decide between the
    finalists, and every speaker outside of test is trained on with at least one seed."""
    first: Annotated[tuple[dict[str, Any], ...], BeforeValidator(_as_tuple)] = ()
    """Points to try before the sampler chooses any: searched key -> value; keys left out are sampled."""
    log: Annotated[tuple[Literal["tensorboard", "mlflow"], ...], BeforeValidator(_as_tuple)] = ()
    """Where the epochs are logged as well: results/NAME/tensorboard, results/NAME/mlflow.db."""

    @model_validator(mode="after")
    def _rotates_over_seeds(self) -> Tune:
        if self.rotate_dev and self.final_seeds == 1:
            raise ValueError("rotate_dev changes dev with each further seed; set final_seeds to 2 or more")
        return self

    @model_validator(mode="after")
    def _grid_is_complete(self) -> Tune:
        if self.sampler == "grid" and self.first:
            raise ValueError("first: a grid defines all points itself; remove tune.first, or use sampler: tpe")
        return self


class Resources(Section):
    """The resources of one trial."""

    workers: int = Field(1, ge=0)
    """Data-parallel processes per trial. In a search, 1 trains in Tune's own process; several add twenty seconds to a
    trial. 0 trains in this process, without Ray, for a debugger (train only)."""
    cpus_per_worker: float | Literal["auto"] = "auto"
    """auto: 1 without a GPU (many small trials beat one trial on many threads), 4 with a GPU."""
    gpus_per_worker: float | Literal["auto"] = "auto"
    """auto: 1 if the cluster has a GPU, else 0. 0.25 puts four trials on one GPU."""
    data: Literal["auto", "resident", "streamed"] = "auto"
    """resident: a trial's data stay in Ray's object store between epochs. streamed: every epoch reads them from the
    files. auto: resident if they take at most 30 % of the store; else dev alone is, if it takes no more than that."""

    @model_validator(mode="after")
    def _can_be_given(self) -> Resources:
        if self.cpus_per_worker != "auto" and self.cpus_per_worker <= 0:
            raise ValueError(f"cpus_per_worker is {self.cpus_per_worker:g}; give more than 0, or auto")
        gpus = 0.0 if self.gpus_per_worker == "auto" else self.gpus_per_worker
        if gpus < 0 or (gpus > 1 and gpus != int(gpus)):
            raise ValueError(f"gpus_per_worker is {gpus:g}; give a fraction of one GPU, or a whole number of GPUs")
        return self


class Storage(Section):
    """Where files are written."""

    results: str = "results"
    """Directory of the results folders."""
    cache: str = "~/.cache/ser_ray"
    """Directory of prepared data and cached features; on a cluster, a path that every node can reach."""
    prefix_gb: float = Field(50.0, ge=0)
    """Maximum size of the feature cache below `cache`, in GB. It holds what the frozen part of a model computes, which
    trials read in place of the waveforms; 0: no cache. An hour of speech takes 0.14 GB per layer of whisper-tiny and
    0.46 GB per layer of whisper-large."""


class SearchSpace(Section):
    """The content of a YAML file: experiment, search space, search settings, resources, storage."""

    experiment: Experiment
    search: dict[str, Distribution] = {}
    tune: Tune = Tune()
    resources: Resources = Resources()
    storage: Storage = Storage()

    @model_validator(mode="after")
    def _search_fits(self) -> SearchSpace:
        for key, distribution in self.search.items():
            if key.split(".")[0] in THE_SAME_FOR_ALL:
                raise ValueError(f"search: {key}: all trials use the same data, to be comparable; remove this key")
            for condition in distribution.when:
                if condition not in self.search:
                    raise ValueError(f"search: {key}: when names {condition!r}, which is not searched")
                if list(self.search).index(condition) > list(self.search).index(key):
                    raise ValueError(f"search: {key} depends on {condition!r}: list {condition!r} first")
            for value in distribution.examples():
                try:
                    self.trial({key: value})
                except UserError as error:
                    raise ValueError(f"search: {error}") from None
        for point in self.tune.first:
            if unknown := [key for key in point if key not in self.search]:
                raise ValueError(f"tune.first: {unknown[0]!r} is not a searched key")
            self.trial(point)
        return self

    def trial(self, values: Mapping[str, Any]) -> Experiment:
        """The experiment of one trial: the base experiment with dotted keys replaced.

        Raises UserError if a key does not exist or a value is invalid.
        """
        return _validate(Experiment, _with_values(to_dict(self.experiment), values))

    def most_epochs(self) -> int:
        """The largest number of epochs that a trial can have."""
        searched = self.search["epochs"].examples() if "epochs" in self.search else ()
        return int(max(searched or (self.experiment.epochs,)))

    def backbones(self) -> list[str]:
        """Every backbone that a trial can have, once."""
        searched = self.search["backbone"].examples() if "backbone" in self.search else ()
        return list(dict.fromkeys(searched or (self.experiment.backbone,)))

    def results_dir(self) -> Path:
        """``<storage.results>/<name>``, absolute."""
        return Path(self.storage.results).expanduser().resolve() / self.experiment.name

    def cache_dir(self) -> Path:
        """``storage.cache``, absolute."""
        return Path(self.storage.cache).expanduser().resolve()


def load(path: str | Path, overrides: Iterable[str] = ()) -> SearchSpace:
    """Read a search space from YAML and apply ``key=value`` overrides.

    An override of a searched key fixes it: the key is removed from the search and from ``tune.first`` (points that
    become equal are tried once). Keys that are searched only with other values of it are removed too.

    Raises UserError, in one line, for a file that is missing or not YAML, and for every unknown key or invalid value.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a YAML search space, such as search_spaces/demo.yaml")
    try:
        content = _read_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a mapping with the key experiment")
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise UserError(f"{override!r}: overrides are written key=value, such as experiment.epochs=3")
        value = _parse_value(override, text)
        if key.startswith("experiment.") and isinstance(content.get("search"), dict):
            _fix_searched_key(content, key.removeprefix("experiment."), value)
        content = _with_values(content, {key: value}, known=False)
    return _validate(SearchSpace, content, where=f"{path}: ")


def to_dict(model: BaseModel) -> dict[str, Any]:
    """The model as plain JSON types, as it would be written to YAML."""
    return model.model_dump(mode="json")


def dump(model: BaseModel) -> str:
    """The model as YAML that `load` (or `load_experiment`) reads back to an equal one."""
    return yaml.dump(to_dict(model), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def load_experiment(path: str | Path) -> Experiment:
    """Read the ``experiment.yaml`` of a checkpoint."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; a checkpoint directory holds experiment.yaml")
    return _validate(Experiment, _read_yaml(path.read_text(encoding="utf-8")), where=f"{path}: ")


def fingerprint(*parts: object) -> str:
    """Twelve hex digits that identify content; equal content gives equal digits.

    >>> fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    True
    """
    plain = [to_dict(part) if isinstance(part, BaseModel) else part for part in parts]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:12]


def default_space() -> Path:
    """The embedded demo: beside the package in a checkout, inside it in an installed wheel."""
    package = Path(__file__).parent
    for candidate in (package.parent / "search_spaces" / "demo.yaml", package / "search_spaces" / "demo.yaml"):
        if candidate.is_file():
            return candidate
    raise UserError("search_spaces/demo.yaml is not installed; name a search space")


MAY_CHANGE = (
    "tune.trials",
    "tune.hours",
    "tune.gpu_hours",
    "tune.concurrency",
    "tune.log",
    "resources.",
    "storage.prefix_gb",
    "experiment.epochs",
)
"""Keys that may change when a search is continued: they set its budget, resources and logs, not what a trial is. The
epochs may only grow (`refused`)."""


def differences(old: SearchSpace, new: SearchSpace) -> list[str]:
    """The dotted keys in which two spaces differ, as ``key: old -> new``."""
    before, after = _flatten(to_dict(old)), _flatten(to_dict(new))
    return [
        f"{key}: {before.get(key)!r} -> {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def refused(old: SearchSpace, new: SearchSpace) -> list[str]:
    """The `differences` that do not let ``new`` continue a search that was started as ``old``."""
    refusals = [change for change in differences(old, new) if not change.startswith(MAY_CHANGE)]
    if new.experiment.epochs < old.experiment.epochs:
        refusals.append(f"experiment.epochs: {old.experiment.epochs} -> {new.experiment.epochs}, which may only grow")
    return refusals


# -- below: how it is done


class _Loader(yaml.SafeLoader):
    """YAML with less surprising scalars: 1e-5 is a number, 03 and 08 are strings, no and off are strings."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if not tag.endswith((":bool", ":float", ":int", ":timestamp"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_SCALARS = {
    "tag:yaml.org,2002:bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "tag:yaml.org,2002:int": (r"[-+]?(?:0|[1-9][0-9]*)", "-+0123456789"),
    "tag:yaml.org,2002:float": (
        r"[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(?:inf|Inf|nan|NaN))",
        "-+.0123456789",
    ),
}
for _tag, (_pattern, _first) in _SCALARS.items():
    _Loader.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$"), list(_first))


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads: the same rules decide which strings need quotes."""


_Dumper.yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def _read_yaml(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)


def _parse_value(override: str, text: str) -> Any:
    try:
        return _read_yaml(text)
    except yaml.YAMLError:
        raise UserError(f"{override!r}: the value is not readable as YAML; quote it") from None


def _fix_searched_key(content: dict[str, Any], key: str, value: object) -> None:
    """Remove ``key`` from the search. A key with a condition on it loses the condition if ``value`` meets it, and is
    removed too if not."""
    search = content["search"]
    search.pop(key, None)
    tune = content.get("tune")
    points = tune.get("first") if isinstance(tune, dict) else None
    if isinstance(points, list):  # anything else is left for validation to reject
        for point in points:
            if isinstance(point, dict):
                point.pop(key, None)
        points[:] = [point for number, point in enumerate(points) if point and point not in points[:number]]
    for name in [name for name, distribution in search.items() if _depends_on(distribution, key)]:
        if value not in search[name]["when"].pop(key):
            _fix_searched_key(content, name, None)


def _depends_on(distribution: object, key: str) -> bool:
    """Whether its ``when`` names that key; a malformed condition is left for validation to reject."""
    when = distribution.get("when") if isinstance(distribution, dict) else None
    return isinstance(when, dict) and isinstance(when.get(key), list)


def _with_values(content: dict[str, Any], values: Mapping[str, Any], known: bool = True) -> dict[str, Any]:
    """A copy of nested ``content`` with dotted keys set; with ``known``, only keys that exist already."""
    content = json.loads(json.dumps(content))
    for dotted, value in values.items():
        node = content
        *parents, last = _split_key(dotted)
        for part in parents:
            child = node.get(part) if known else node.setdefault(part, {})
            if child is None and not known:
                child = node[part] = {}
            if not isinstance(child, dict):
                raise UserError(f"{dotted}: no such field{_hint(part, node)}")
            node = child
        if known and last not in node:
            raise UserError(f"{dotted}: no such field{_hint(last, node)}")
        node[last] = value
    return content


def _split_key(dotted: str) -> list[str]:
    """``search.adapter.rank`` is the key ``adapter.rank`` of the search, not a field three levels deep."""
    head, dot, rest = dotted.partition(".")
    return [head, rest] if head == "search" and dot else dotted.split(".")


def _validate(model: type[M], content: object, where: str = "") -> M:
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise UserError(where + _one_line(error, model)) from None


def _one_line(error: ValidationError, model: type[BaseModel]) -> str:
    first = error.errors()[0]
    location = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "unknown key" + _hint(str(first["loc"][-1]), _fields_at(model, first["loc"][:-1]))
    elif first["type"] == "missing":
        message = "this key is required"
    elif first["type"] != "value_error":
        message = f"{message[0].lower()}{message[1:]}, not {first['input']!r}"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{location}: {message}{more}" if location else f"{message}{more}"


def _fields_at(model: type[BaseModel], path: tuple[int | str, ...]) -> Iterable[str]:
    fields: Any = model
    for part in path:
        info = getattr(fields, "model_fields", {}).get(part)
        fields = info.annotation if info is not None else None
    return getattr(fields, "model_fields", {})


def _hint(word: str, known: Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; known: {', '.join(sorted(known))}" if known else ""


def _flatten(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, dict) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat

"""The configuration: one YAML file describes an experiment and the space that is searched around it.

This is the only reader of YAML. ``load`` turns a file and ``key=value`` overrides into a frozen `SearchSpace`, or
raises a `UserError` whose one line names the field. Every default has its reason beside it.
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

from ser_ray.schema import EMOTIONS, UserError


def _as_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


M = TypeVar("M", bound=BaseModel)
Words = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]


class Section(BaseModel):
    """A part of the configuration: frozen, unknown keys refused, no silent conversion of types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Audio(Section):
    """What counts as a usable recording. Part of the fingerprint of prepared data."""

    min_seconds: float = Field(0.3, gt=0, le=30)
    """Shorter ones hold less than a syllable, and fewer frames than a backbone's receptive field needs."""
    max_seconds: float = Field(30.0, gt=0, le=30)
    """Whisper has positions for 30 s and no more; `too_long` says what becomes of longer recordings."""
    too_long: Literal["reject", "split"] = "reject"
    """split: into equal windows of at most `max_seconds`, each an utterance of the same speaker and emotion. Not by
    default: an emotion given to a minute of speech need not hold in each of its parts."""
    trim_db: float | None = Field(40.0, gt=0)
    """Leading and trailing parts this far below the peak are cut (RAVDESS begins and ends with about 1 s of
    silence, a third of its audio); null keeps them."""


class Protocol(Section):
    """Who is trained on and who is tested on; see `ser_ray.protocols.folds`."""

    scheme: Literal[
        "speaker_kfold",
        "given_folds",
        "leave_one_speaker_out",
        "leave_one_corpus_out",
        "cross_corpus",
        "official",
        "random",
    ] = "speaker_kfold"
    """Speaker-disjoint by default: speakers shared between splits inflate every figure. ``official``: the split that
    a table's column says. ``random`` is stamped LEAKY."""
    folds: int = Field(5, ge=2)
    """Number of folds of ``speaker_kfold`` and ``random``: test is fold `fold`, dev the next one. Where only test is
    given by the scheme, dev is one of so many balanced groups of the other speakers."""
    fold: int = Field(0, ge=0)
    """Which fold is tested, from 0; for ``leave_one_speaker_out`` which speaker, in order of name."""
    dev_after: int = Field(1, ge=1)
    """Dev is the fold so many places after the tested one, cyclically; where only test is given by the scheme, that
    group of the other speakers; where dev is given too, it stays. `Tune.rotate_dev` moves it."""
    given: Annotated[str | tuple[Words, ...] | None, BeforeValidator(_as_tuple)] = None
    """For ``given_folds``: ``emobox`` (RAVDESS's published folds), lists of speakers such as ``ravdess/01``, or a CSV
    file with the columns speaker and fold (numbers from 0)."""
    held_out: str | None = None
    """For ``leave_one_corpus_out`` and ``cross_corpus``: the corpus that is tested on."""
    train_on: Words | None = None
    """For ``cross_corpus``: the corpora that are trained on. Only emotions that both sides have are used."""
    seed: int = Field(0, ge=0)
    """Of the assignment of speakers to folds; apart from the training seed, so that folds stay put."""

    @model_validator(mode="after")
    def _complete(self) -> Protocol:
        if self.scheme == "given_folds" and self.given is None:
            raise ValueError("scheme given_folds needs protocol.given: emobox, or lists of speakers")
        if self.scheme in ("leave_one_corpus_out", "cross_corpus") and self.held_out is None:
            raise ValueError(f"scheme {self.scheme} needs protocol.held_out: the corpus to test on")
        if self.scheme == "cross_corpus" and not self.train_on:
            raise ValueError("scheme cross_corpus needs protocol.train_on: the corpora to train on")
        if self.train_on and self.held_out in self.train_on:
            raise ValueError(f"protocol.train_on names {self.held_out!r}, which is held out")
        if self.scheme in ("speaker_kfold", "random") and self.fold >= self.folds:
            raise ValueError(f"protocol.fold is {self.fold}, but folds count from 0 to {self.folds - 1}")
        return self


class Adapter(Section):
    """How the backbone is adapted."""

    method: Literal["frozen", "lora", "qlora", "full"] = "lora"
    """frozen: only the head learns; lora; qlora: LoRA over NF4 weights (double quantisation); full: all weights."""
    rank: int = Field(8, ge=1, le=512)
    """Of the low-rank update. 8 is where LoRA's paper (arXiv 2106.09685, table 6) stops gaining."""
    alpha: float = Field(16.0, gt=0)
    """The update is scaled by alpha / rank; twice the default rank, as is usual."""
    dropout: float = Field(0.05, ge=0, lt=1)
    """On the input of the low-rank update; the QLoRA paper's value for small models."""
    first_layer: int = Field(0, ge=0)
    """Layers below this one stay frozen (their weights are not adapted, nor trained under ``full``)."""
    targets: Words | None = None
    """Names of the linear layers that get a LoRA update; null: all of attention and feed-forward (QLoRA paper,
    section 4: all layers are needed to match full fine-tuning), for WavLM the feed-forward ones only."""


class Head(Section):
    """From hidden states to emotions: layer mix -> masked pooling -> classifier."""

    layer_mix: Literal["weighted", "concat", "last"] = "weighted"
    """weighted: a learned sum of all layers (SUPERB, arXiv 2105.01051): emotion lives in the middle ones. concat: all
    layers pooled and put side by side, so that the classifier takes from each what it holds."""
    pooling: Literal["mean", "statistics", "attentive"] = "attentive"
    """Over real frames only. statistics: mean and standard deviation; attentive: the same under learned weights
    (Okabe et al. 2018, arXiv 1803.10963), which begin uniform."""
    hidden: int = Field(0, ge=0, le=8192)
    """Width of a hidden layer; 0 for a linear classifier, which a thousand utterances can fit."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """On the pooled vector."""
    init: Literal["random", "probe"] = "random"
    """probe: start from logistic regression on the frozen backbone's best layer, then fine-tune
    (arXiv 2202.10054: fine-tuning under a random head distorts good features)."""

    @model_validator(mode="after")
    def _probe_is_linear(self) -> Head:
        if self.init == "probe" and self.hidden:
            raise ValueError("head.init: probe needs a linear head: set head.hidden to 0")
        if self.init == "probe" and self.layer_mix == "last":
            raise ValueError("head.init: probe needs all layers: set head.layer_mix to weighted or concat")
        return self


class Augment(Section):
    """Variation of training speech, seeded; dev and test are never varied. All off by default: what pays depends on the
    corpus, and a level or a speed can be part of an emotion."""

    gain_db: float = Field(0.0, ge=0, le=40)
    """Level, up to so many dB up or down: microphones and distances differ."""
    noise_snr_db: Annotated[tuple[float, float] | None, BeforeValidator(_as_tuple)] = None
    """White noise at a signal-to-noise ratio between these two, in dB."""
    speed: float = Field(0.0, ge=0, le=0.3)
    """Played slower, as it is, or faster by this share, each a third of the time (Ko et al. 2015, 0.1); moves the pitch
    too, which carries emotion."""
    crop_seconds: float | None = Field(None, gt=0)
    """A stretch of at most this length, anywhere in the utterance."""
    channel_mask: float = Field(0.0, ge=0, le=0.5)
    """SpecAugment (arXiv 1904.08779) on log-mel bands, or on the channels that wav2vec2's convolutions give: two masks
    of up to this share."""
    time_mask: float = Field(0.0, ge=0, le=0.5)
    """The same along time: two masks of up to this share of an utterance."""

    @model_validator(mode="after")
    def _range(self) -> Augment:
        if self.noise_snr_db is not None and self.noise_snr_db[0] > self.noise_snr_db[1]:
            raise ValueError("noise_snr_db is [low, high]: the first is above the second")
        return self


class Optimizer(Section):
    """AdamW with linear warm-up and linear decay to zero."""

    lr: float = Field(1.0e-4, gt=0, le=1)
    """Of the backbone's part (adapters, or all weights)."""
    head_lr: float = Field(1.0e-3, gt=0, le=1)
    """Of the head, which starts from nothing and needs larger steps."""
    weight_decay: float = Field(0.01, ge=0, le=1)
    """AdamW's own default; not on biases, norms and layer-mix weights."""
    warmup: float = Field(0.1, ge=0, lt=1)
    """Share of all steps over which the rate rises; Adam's second moment is noise before that."""
    clip: float = Field(1.0, gt=0)
    """Largest gradient norm."""
    accumulate: int = Field(1, ge=1)
    """Up to so many batches of each worker are one step: a large batch on a small GPU. The steps of an epoch share its
    batches evenly."""


class Experiment(Section):
    """One trial, complete: data, split, model, optimisation."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """The folder under `Storage.results`."""
    corpora: dict[str, str | None]
    """Corpus: its directory. ``synthetic`` needs none. Under any other name a .csv or .parquet file that lists
    recordings, as `ser_ray.corpora.table` says."""
    labels: dict[str, dict[str, str]] = {}
    """For a corpus in a table: the word that stands in its column emotion, and the emotion that it means. A word that
    is not here must be an emotion already."""
    label: Literal["intended", "perceived"] = "intended"
    """What the speaker intended, or what most listeners heard where a corpus knows it (CREMA-D): by voice alone most
    listeners heard the intended one for less than half of it. An utterance whose listeners were undecided is left out;
    one that nobody was asked about keeps the intended emotion, which the audit counts."""
    emotions: Words = EMOTIONS[:7]
    """The labels, in order; utterances of other emotions are dropped, unless merged."""
    merge: dict[str, str] = {}
    """Emotion: the one it counts as, such as calm: neutral."""
    audio: Audio = Audio()
    protocol: Protocol = Protocol()
    backbone: str
    """Hub id, local directory, or an embedded name (``embedded/tiny-whisper``, ``embedded/tiny-wav2vec2``)."""
    adapter: Adapter = Adapter()
    head: Head = Head()
    augment: Augment = Augment()
    optimizer: Optimizer = Optimizer()
    batch_seconds: float = Field(60.0, gt=0)
    """Padded seconds of audio a batch of one worker: a bound on memory, whatever the lengths."""
    epochs: int = Field(10, ge=1)
    """At most. It may grow under the same name: trials that ended with their last epoch then go on from its checkpoint.
    The learning rate is a function of the step and of all steps, so the further epochs are trained at the rate that the
    longer schedule has there: it is above the (nearly) zero that the shorter one ended with, and the epochs before were
    trained at lower rates than a run of so many epochs from the start would have had."""
    patience: int = Field(4, ge=1)
    """Epochs without a better dev UAR after which training stops."""
    class_weights: Literal["balanced", "none"] = "balanced"
    """balanced: loss weights inverse to an emotion's frequency in train, as UAR counts emotions equally."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 where the GPU has it, fp16 on older ones, fp32 on a CPU."""
    recompute: bool = False
    """Gradient checkpointing: a third more time for a fraction of the memory. Where a model does not fit otherwise."""
    seed: int = Field(0, ge=0)
    """Of initial weights, dropout and the order of batches."""

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
                raise ValueError(f"merge: {source!r} is among the experiment's emotions; list it in one place")
        return self

    def halved(self) -> Experiment:
        """The same with half of the batch, and twice as many of them in a step: less memory, and a step holds the same
        utterances, but for those that end it."""
        optimizer = self.optimizer.model_copy(update={"accumulate": 2 * self.optimizer.accumulate})
        return self.model_copy(update={"batch_seconds": self.batch_seconds / 2, "optimizer": optimizer})


THE_SAME_FOR_ALL = frozenset(
    {"name", "corpora", "labels", "label", "emotions", "merge", "audio", "protocol"},
)
"""Fields of `Experiment` that say what is learned from and tested on: they are not searched."""


class Distribution(Section):
    """Where one searched key takes its values from: exactly one of choice, uniform, loguniform, randint."""

    choice: Annotated[tuple[Any, ...] | None, BeforeValidator(_as_tuple)] = None
    uniform: Annotated[tuple[float, float] | None, BeforeValidator(_as_tuple)] = None
    loguniform: Annotated[tuple[float, float] | None, BeforeValidator(_as_tuple)] = None
    randint: Annotated[tuple[int, int] | None, BeforeValidator(_as_tuple)] = None
    """Both ends included."""
    when: dict[str, Annotated[tuple[Any, ...], BeforeValidator(_as_tuple)]] = {}
    """Searched only where every key here has one of these values: ``when: {adapter.method: [lora, qlora]}``."""

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
        """Values that every part of the experiment must accept: all choices, or both ends."""
        ends = self.uniform or self.loguniform or self.randint
        return self.choice if self.choice is not None else tuple(ends or ())


class Tune(Section):
    """How the space is searched."""

    trials: int = Field(12, ge=1)
    """How many in all; ``tune.trials=+20`` on the command line adds to a finished search."""
    hours: float | None = Field(None, gt=0)
    """No trial begins after so many hours of searching in all (continuations included); null: no limit."""
    gpu_hours: float | None = Field(None, gt=0)
    """No trial begins after the trials have held GPUs for so long; null: no limit."""
    metric: Literal["dev_uar", "dev_accuracy", "dev_macro_f1", "dev_kappa"] = "dev_uar"
    """What trials are compared by; always on dev."""
    also: Annotated[
        tuple[Literal["seconds_per_epoch", "peak_memory_mb", "trainable_parameters"], ...], BeforeValidator(_as_tuple)
    ] = ()
    """Costs that the sampler keeps low as well: it then looks for the whole front, which the report shows. The metric
    alone chooses the winner."""
    sampler: Literal["tpe", "random", "grid"] = "tpe"
    """tpe: a model of what was tried (multivariate; arXiv 2304.11127). random and grid are for comparison."""
    grid_points: int = Field(3, ge=2)
    """Values that a grid takes from each range."""
    warm_start: Words = ()
    """Results folders of earlier searches, whose trials the sampler learns from; they do not count as trials."""
    scheduler: Literal["asha", "none"] = "asha"
    """asha stops the worse half of the trials early."""
    grace: int = Field(2, ge=1)
    """Epochs before a trial may be stopped."""
    seed: int = Field(0, ge=0)
    concurrency: int | None = Field(None, ge=1)
    """Trials at once; null: as many as fit the cluster."""
    finalists: int = Field(3, ge=1)
    """The best trials by dev, whose checkpoints the evaluation actors score in full."""
    final_folds: Annotated[tuple[int, ...] | Literal["all"] | None, BeforeValidator(_as_tuple)] = None
    """Folds over which finalists are trained again; the mean over them chooses, and is what test gives. null: the
    experiment's own fold, from the checkpoint that the search left."""
    final_seeds: int = Field(1, ge=1)
    """Seeds with which each is trained: the experiment's, and those that follow. The mean of their probabilities is
    one more figure of test."""
    rotate_dev: bool = False
    """With every further seed dev is the next fold (`Protocol.dev_after`): a finalist is judged by more speakers, and
    none of those beside the tested ones is left out of training by all seeds."""
    first: Annotated[tuple[dict[str, Any], ...], BeforeValidator(_as_tuple)] = ()
    """Points tried before the sampler chooses: searched key -> value; keys left out are sampled."""

    log: Annotated[tuple[Literal["tensorboard", "mlflow"], ...], BeforeValidator(_as_tuple)] = ()
    """Where epochs are logged beside the results folder: results/NAME/tensorboard, results/NAME/mlflow.db."""

    @model_validator(mode="after")
    def _rotates_over_seeds(self) -> Tune:
        if self.rotate_dev and self.final_seeds == 1:
            raise ValueError("rotate_dev: every further seed takes another dev; set final_seeds to 2 or more")
        return self

    @model_validator(mode="after")
    def _grid_is_complete(self) -> Tune:
        if self.sampler == "grid" and self.first:
            raise ValueError("first: a grid lays out all points itself; remove tune.first, or use sampler: tpe")
        return self


class Resources(Section):
    """What one trial takes."""

    workers: int = Field(1, ge=0)
    """Data-parallel processes a trial: in a search one is Tune's own, several take a trial twenty seconds more; 0 runs
    in this process, without Ray, for a debugger (train only)."""
    cpus_per_worker: float | Literal["auto"] = "auto"
    """auto: 1 without a GPU (many small trials beat one trial on many threads), 4 with one."""
    gpus_per_worker: float | Literal["auto"] = "auto"
    """auto: 1 where the cluster has a GPU, else 0; 0.25 puts four trials on one."""
    data: Literal["auto", "resident", "streamed"] = "auto"
    """Between epochs: resident in the object store, or read from the shards again; auto: resident where a trial's data
    take less than a third of the store, or else its dev where that does."""

    @model_validator(mode="after")
    def _can_be_given(self) -> Resources:
        if self.cpus_per_worker != "auto" and self.cpus_per_worker <= 0:
            raise ValueError(f"cpus_per_worker is {self.cpus_per_worker:g}; give more than 0, or auto")
        gpus = 0.0 if self.gpus_per_worker == "auto" else self.gpus_per_worker
        if gpus < 0 or (gpus > 1 and gpus != int(gpus)):
            raise ValueError(f"gpus_per_worker is {gpus:g}; Ray gives a share of one GPU, or whole GPUs")
        return self


class Storage(Section):
    """Where things are written."""

    results: str = "results"
    cache: str = "~/.cache/ser_ray"
    """Prepared data; on a cluster a path that every node sees."""
    prefix_gb: float = Field(50.0, ge=0)
    """What the frozen part of a model computes is kept below `cache`, up to so much in all, and trials read it in place
    of the speech; 0: never. An hour of speech takes 0.14 GB a layer of whisper-tiny, 0.46 GB of whisper-large."""


class SearchSpace(Section):
    """A whole YAML file: the experiment, what is searched around it, how, with what, and where to."""

    experiment: Experiment
    search: dict[str, Distribution] = {}
    tune: Tune = Tune()
    resources: Resources = Resources()
    storage: Storage = Storage()

    @model_validator(mode="after")
    def _search_fits(self) -> SearchSpace:
        for key, distribution in self.search.items():
            if key.split(".")[0] in THE_SAME_FOR_ALL:
                raise ValueError(f"search: {key}: the data are the same for all trials, or they could not be compared")
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
        """The experiment of one trial: the base with dotted keys replaced.

        Raises UserError where a key does not exist or a value does not fit.
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

    An override of a key that is searched fixes it: the key leaves the search, and ``tune.first`` (points that are then
    alike are tried once); so do keys that are searched only with other values of it.

    Raises UserError, in one line, for a file that is missing or no YAML, and for every key or value that does not fit.
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
    """Twelve hex digits that name what something was made from; equal content gives equal digits.

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
"""Keys that may differ when a search is continued: they say how much is tried and where, not what a trial is. Epochs
may only grow (`refused`)."""


def differences(old: SearchSpace, new: SearchSpace) -> list[str]:
    """The dotted keys in which two spaces differ, as ``key: old -> new``."""
    before, after = _flatten(to_dict(old)), _flatten(to_dict(new))
    return [
        f"{key}: {before.get(key)!r} -> {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def refused(old: SearchSpace, new: SearchSpace) -> list[str]:
    """Of their `differences`, those with which ``new`` does not continue what ``old`` began."""
    found = [change for change in differences(old, new) if not change.startswith(MAY_CHANGE)]
    if new.experiment.epochs < old.experiment.epochs:
        found.append(f"experiment.epochs: {old.experiment.epochs} -> {new.experiment.epochs}, which may only grow")
    return found


# -- below: how it is done


class _Loader(yaml.SafeLoader):
    """YAML as people mean it: 1e-5 is a number, 03 and 08 are strings, no and off are strings."""


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
    """Search ``key`` no more. What depends on it is searched always, or where ``value`` is none of its, never."""
    search = content["search"]
    search.pop(key, None)
    tune = content.get("tune")
    points = tune.get("first") if isinstance(tune, dict) else None
    if isinstance(points, list):  # what is none is left for the validation to refuse
        for point in points:
            if isinstance(point, dict):
                point.pop(key, None)
        points[:] = [point for number, point in enumerate(points) if point and point not in points[:number]]
    for name in [name for name, distribution in search.items() if _depends_on(distribution, key)]:
        if value not in search[name]["when"].pop(key):
            _fix_searched_key(content, name, None)


def _depends_on(distribution: object, key: str) -> bool:
    """Whether its ``when`` names that key; what is no condition is left for the validation to refuse."""
    when = distribution.get("when") if isinstance(distribution, dict) else None
    return isinstance(when, dict) and isinstance(when.get(key), list)


def _with_values(content: dict[str, Any], values: Mapping[str, Any], known: bool = True) -> dict[str, Any]:
    """A copy of nested ``content`` with dotted keys set; with ``known``, only ones that are there already."""
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
    """``search.adapter.rank`` names the key ``adapter.rank`` of the search, not a field three deep."""
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

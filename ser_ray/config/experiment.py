"""What one experiment is: data, protocol, model and training. The docstring of each field gives the reason for its
default; ``ser-ray config KEY`` shows it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from ser_ray.config.choices import HEADS, LOSSES, POOLINGS, NameIn
from ser_ray.schema import EMOTIONS


def as_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


Words = Annotated[tuple[str, ...], BeforeValidator(as_tuple)]


class Section(BaseModel):
    """A section of the configuration: immutable, rejects unknown keys, does not convert types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


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
    given: Annotated[str | tuple[Words, ...] | None, BeforeValidator(as_tuple)] = None
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

    kind: Annotated[str, NameIn(HEADS)] = "pooled"
    """pooled: layer mix, pooling and classifier, as the other keys of this section say; no other kind is built in."""
    layer_mix: Literal["weighted", "concat", "last"] = "weighted"
    """weighted: a trainable weighted sum of all layers (SUPERB, arXiv 2105.01051): the middle ones carry most about
    emotion. concat: all layers are pooled and concatenated, so that the classifier can use each. last: the last one."""
    pooling: Annotated[str, NameIn(POOLINGS)] = "attentive"
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
    noise_snr_db: Annotated[tuple[float, float] | None, BeforeValidator(as_tuple)] = None
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
    loss: Annotated[str, NameIn(LOSSES)] = "cross_entropy"
    """The loss of an utterance in training, before its class weight. cross_entropy: the usual one. focal: smaller for
    utterances that are classified well already (Lin et al. 2017, arXiv 1708.02002). ``dev_loss`` is cross-entropy
    whatever is trained, so that trials with different losses can be compared."""
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

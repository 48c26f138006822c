"""What one experiment is: data, protocol, model and training. The docstring of each field gives the reason for its
default; ``ser-ray config KEY`` shows it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from ser_ray.config.adapter import Adapter
from ser_ray.config.choices import HEADS, LOSSES, POOLINGS, NameIn
from ser_ray.config.distil import Distil
from ser_ray.config.enrolment import Enrolment
from ser_ray.config.section import NO_UNIT, Section, Unit, Word, Words, as_tuple, with_word_keys
from ser_ray.config.validation import Problem, hint, refuse, to_dict
from ser_ray.config.words import named, own_words
from ser_ray.schema import EMOTIONS

EXCLUDABLE: Final = ("duplicates", "mislabelled")
"""What `Experiment.exclude` can name beside a file."""


def _listed(value: object) -> object:
    """One word as a list of one."""
    return (value,) if isinstance(value, str) else as_tuple(value)


class Audio(Section):
    """Which recordings are usable, and how they are cut. Part of the fingerprint of prepared data."""

    min_seconds: Annotated[float, Unit("s")] = Field(0.3, gt=0, le=30)
    """Shorter recordings are rejected: they hold less than a syllable, and fewer frames than a backbone's receptive
    field needs."""
    max_seconds: Annotated[float, Unit("s")] = Field(30.0, gt=0, le=30)
    """Whisper has position embeddings for at most 30 s. `too_long` says what happens to longer recordings."""
    too_long: Literal["reject", "split"] = "reject"
    """reject: leave the recording out. split: cut it into equal windows of at most `max_seconds`, each an utterance of
    the same speaker and emotion. Not the default: the label of a minute of speech may not hold for each part of it."""
    trim_db: Annotated[float | None, Unit("dB")] = Field(40.0, gt=0)
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
    folds: Annotated[int, Unit("folds")] = Field(5, ge=2)
    """Number of folds of ``speaker_kfold`` and ``random``: test is fold `fold`, dev the next one. Where the scheme
    defines only test, the other speakers of each corpus form this many balanced groups, and dev is one of them."""
    fold: Annotated[int, NO_UNIT] = Field(0, ge=0)
    """Number of the test fold, from 0; for ``leave_one_speaker_out``, of the test speaker in order of name."""
    dev_after: Annotated[int, Unit("folds")] = Field(1, ge=1)
    """Dev is the fold this many places after the test fold, cyclically. Where the scheme defines only test, dev is the
    group of other speakers with this number; where it defines dev too, this has no effect. See `Tune.rotate_dev`."""
    given: Annotated[str | tuple[Words, ...] | None, BeforeValidator(as_tuple)] = None
    """For ``given_folds``: ``emobox`` (RAVDESS's published folds), a list of speakers such as ``ravdess/01`` for each
    fold, or a CSV file with the columns speaker and fold (numbers from 0)."""
    held_out: str | None = None
    """For ``leave_one_corpus_out`` and ``cross_corpus``: the test corpus."""
    train_on: Words | None = None
    """For ``cross_corpus``: the training corpora. Only emotions that occur both in them and in `held_out` are used."""
    seed: Annotated[int, NO_UNIT] = Field(0, ge=0)
    """Seed of the assignment to folds; separate from the training seed, which therefore does not change the folds."""

    enrolment: Enrolment = Enrolment()

    @field_validator("fold")
    @classmethod
    def _fold_exists(cls, fold: int, info: ValidationInfo) -> int:
        folds = info.data.get("folds")
        if info.data.get("scheme") in ("speaker_kfold", "random") and folds is not None and fold >= folds:
            raise ValueError(f"the folds are 0 to {folds - 1}, not {fold}")
        return fold

    @field_validator("train_on")
    @classmethod
    def _not_held_out(cls, train_on: tuple[str, ...] | None, info: ValidationInfo) -> tuple[str, ...] | None:
        held_out = info.data.get("held_out")
        refuse(((n,), f"{name!r} is held out") for n, name in enumerate(train_on or ()) if name == held_out)
        return train_on

    @model_validator(mode="after")
    def _complete(self) -> Protocol:
        # Once all other keys fit: one that is misspelled would be said to be missing as well.
        needed = {
            "given_folds": {"given": "emobox, lists of speakers, or a .csv file"},
            "leave_one_corpus_out": {"held_out": "the corpus to test on"},
            "cross_corpus": {"held_out": "the corpus to test on", "train_on": "the corpora to train on"},
        }.get(self.scheme, {})
        refuse(
            (("scheme",), f"{self.scheme} needs protocol.{name}: {what}")
            for name, what in needed.items()
            if not getattr(self, name)
        )
        return self

    def split(self) -> dict[str, Any]:
        """The keys that decide how utterances are split, as plain types."""
        return {key: value for key, value in to_dict(self).items() if key != "enrolment"}


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
    hidden: Annotated[int, Unit("features")] = Field(0, ge=0, le=8192)
    """Width of the classifier's hidden layer. 0: a linear classifier, which can be fitted to a thousand utterances."""
    dropout: Annotated[float, Unit("share of the features")] = Field(0.1, ge=0, lt=1)
    """Dropout on the pooled vector, and on the hidden layer if there is one."""
    init: Literal["random", "probe"] = "random"
    """probe: start from logistic regression on the frozen backbone's best layer (``concat``: on all layers), then
    fine-tune (arXiv 2202.10054: fine-tuning with a random head distorts good features)."""
    probe_c: Annotated[float, NO_UNIT] = Field(0.01, gt=0, le=1000)
    """Inverse regularisation C of that logistic regression: as chosen for about a thousand standardised features and
    as many utterances. All layers side by side (``concat``) are several thousand features, and ask for less: 0.003."""
    speaker: Literal["none", "center", "standardize"] = "none"
    """What is known of a speaker from recordings without labels. none: nothing is used, as a metric is comparable with
    published ones only for speakers of whom nothing is known. center: their mean is subtracted from the pooled vector.
    standardize: it is then divided by their deviation. Trained with a random number of recordings, so one model serves
    any number, also none. `Protocol.enrolment` measures what they are worth."""
    speaker_shrinkage: Annotated[float, Unit("recordings")] = Field(2.0, gt=0, le=1000)
    """A speaker's mean over k recordings counts as if so many further ones, of an average speaker of train, were known:
    (sum + s m) / (k + s). With 2 a single recording, which has an emotion of its own, moves the mean by a third. Near 0
    the mean of one recording is that recording; 0 is refused, as nothing would be left at k = 0."""

    @field_validator("init")
    @classmethod
    def _probe_is_linear(cls, init: str, info: ValidationInfo) -> str:
        needed = {
            "a linear head: set head.hidden to 0": info.data.get("hidden"),
            "all layers: set head.layer_mix to weighted or concat": info.data.get("layer_mix") == "last",
        }
        refuse(((), f"probe needs {what}") for what, lacks in needed.items() if init == "probe" and lacks)
        return init


class Augment(Section):
    """Seeded augmentation of training recordings; dev and test are never augmented. All off by default: what helps
    depends on the corpus, and level and speed can be part of an emotion."""

    gain_db: Annotated[float, Unit("dB")] = Field(0.0, ge=0, le=40)
    """The level changes by up to this many dB up or down: microphones and distances differ."""
    noise_snr_db: Annotated[tuple[float, float] | None, BeforeValidator(as_tuple), Unit("dB")] = None
    """[low, high]: adds white noise at a signal-to-noise ratio between these two, in dB."""
    speed: Annotated[float, Unit("share of the speed")] = Field(0.0, ge=0, le=0.3)
    """Plays a recording slower by this share, unchanged, or faster by it, a third of the time each (Ko et al. 2015:
    0.1). This shifts the pitch too, which carries emotion."""
    crop_seconds: Annotated[float | None, Unit("s")] = Field(None, gt=0)
    """Trains on a random crop of at most this length."""
    channel_mask: Annotated[float, Unit("share of the channels")] = Field(0.0, ge=0, le=0.5)
    """SpecAugment (arXiv 1904.08779) on log-mel bands, or on the output channels of wav2vec2's convolutions: two masks,
    each of up to this share of them."""
    time_mask: Annotated[float, Unit("share of the frames")] = Field(0.0, ge=0, le=0.5)
    """The same along time: two masks, each of up to this share of an utterance."""

    @field_validator("noise_snr_db")
    @classmethod
    def _low_is_first(cls, ends: tuple[float, float] | None) -> tuple[float, float] | None:
        if ends is not None and ends[0] > ends[1]:
            raise ValueError("this is [low, high], but the first value is above the second")
        return ends


class Optimizer(Section):
    """AdamW with linear warm-up and linear decay to zero."""

    lr: Annotated[float, NO_UNIT] = Field(1.0e-4, gt=0, le=1)
    """Peak learning rate of the backbone (adapters, or all weights)."""
    head_lr: Annotated[float, NO_UNIT] = Field(1.0e-3, gt=0, le=1)
    """Peak learning rate of the head, which is trained from scratch and needs larger steps."""
    weight_decay: Annotated[float, NO_UNIT] = Field(0.01, ge=0, le=1)
    """AdamW's default; not applied to biases, norms and layer-mix weights."""
    warmup: Annotated[float, Unit("share of the steps")] = Field(0.1, ge=0, lt=1)
    """Share of all steps over which the learning rate rises; until then Adam's second moment is noisy."""
    clip: Annotated[float, NO_UNIT] = Field(1.0, gt=0)
    """Maximum gradient norm."""
    accumulate: Annotated[int, Unit("batches")] = Field(1, ge=1)
    """Gradient accumulation: a step is up to this many batches of each worker, for a large batch on a small GPU. The
    batches of an epoch are divided evenly among its steps."""


class Experiment(Section):
    """The complete configuration of one trial: data, split, model, optimisation."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the results folder, below `Storage.results`."""
    corpora: Annotated[dict[str, str | None], BeforeValidator(with_word_keys)]
    """Corpus -> its directory; ``synthetic`` needs none. A corpus that is not built in needs a name of its own and a
    .csv, .tsv or .parquet file that lists its recordings; `ser_ray.corpora.table` describes the columns."""
    labels: Annotated[
        dict[str, Annotated[dict[str, Word], BeforeValidator(with_word_keys)]], BeforeValidator(with_word_keys)
    ] = Field(default_factory=dict)
    """For a corpus in a table, the emotions that values of its column emotion stand for: ``{mine: {wut: angry, 0:
    neutral}}``. Case and common synonyms need none (anger, ANG: angry; `ser_ray.config.words`); any other value is an
    emotion of its own, and so is a synonym that is mapped to itself (``{joy: joy}``)."""
    label: Literal["intended", "perceived"] = "intended"
    """intended: the emotion that the speaker meant to express. perceived: the one that most listeners heard, where a
    corpus has listener ratings (CREMA-D: by voice alone, this is the intended one for less than half of it). perceived
    leaves out utterances with a tie among listeners. Utterances without ratings keep the intended emotion, and the
    audit counts them."""
    emotions: Annotated[tuple[Word, ...], BeforeValidator(as_tuple)] = EMOTIONS[:7]
    """The classes, in order; any word may be one. Utterances of other emotions are dropped, unless merged. Where this
    key is not given, those of the default that no utterance has are left out."""
    merge: Annotated[dict[str, Word], BeforeValidator(with_word_keys)] = Field(default_factory=dict)
    """Emotion -> the one that it is relabelled to: ``{calm: neutral}``."""
    exclude: Annotated[tuple[str, ...], BeforeValidator(_listed)] = ()
    """Utterances that are left out of train, dev and test; the audit and the report count them. ``duplicates``: of
    utterances that are one recording all but the first by id. ``mislabelled``: all that are one recording under several
    emotions. A CSV file: those in its column utterance_id, as ``audit.csv`` lists them; if it has a column exclude,
    only rows that say ``yes`` there. Nothing by default: a corpus is used as it was published, and its metrics are
    then comparable with published ones."""
    audio: Audio = Audio()
    protocol: Protocol = Protocol()
    backbone: str
    """Hugging Face hub id, local directory, or an embedded backbone (``embedded/tiny-whisper``,
    ``embedded/tiny-wav2vec2``)."""
    adapter: Adapter = Adapter()
    head: Head = Head()
    augment: Augment = Augment()
    optimizer: Optimizer = Optimizer()
    batch_seconds: Annotated[float, Unit("s")] = Field(60.0, gt=0)
    """Largest batch of one worker, in seconds of audio including padding: bounds memory whatever the lengths."""
    epochs: Annotated[int, Unit("epochs")] = Field(10, ge=1)
    """Maximum number of epochs. It may be raised under the same name: trials that ended with their last epoch then
    continue from its checkpoint. The learning rate depends on the step and on the total number of steps, so the added
    epochs are trained at the rates of the longer schedule. These are above the (nearly) zero at which the shorter one
    ended, and the earlier epochs were trained at lower rates than in a run that has the longer schedule from the
    start."""
    patience: Annotated[int, Unit("epochs")] = Field(4, ge=1)
    """Early stopping: training ends after this many epochs without a better `Tune.metric`."""
    class_weights: Literal["balanced", "none"] = "balanced"
    """balanced: loss weights inverse to an emotion's frequency in train, since UAR weighs emotions equally."""
    loss: Annotated[str, NameIn(LOSSES)] = "cross_entropy"
    """The loss of an utterance in training, before its class weight. cross_entropy: the usual one. focal: smaller for
    utterances that are classified well already (Lin et al. 2017, arXiv 1708.02002). ``dev_loss`` is cross-entropy
    whatever is trained, so that trials with different losses can be compared."""
    distil: Distil = Distil()
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 on GPUs that support it, fp16 on older ones, fp32 on a CPU."""
    recompute: bool = False
    """Gradient checkpointing: a third more time for a fraction of the memory. For models that do not fit otherwise."""
    compile: bool = False
    """torch.compile of the backbone's blocks in training: fewer and larger kernels, but the first step waits for the
    compiler, which keeps what it made on disk. Needs a C++ compiler. Off by default: whether it gains anything has not
    been measured on a GPU."""
    seed: Annotated[int, NO_UNIT] = Field(0, ge=0)
    """Seed of initial weights, dropout, augmentation and the order of batches."""

    @field_validator("corpora")
    @classmethod
    def _not_empty(cls, corpora: dict[str, str | None]) -> dict[str, str | None]:
        if not corpora:
            raise ValueError("it is empty; name at least one corpus, such as synthetic")
        refuse(((name,), _NAME_RULE) for name in corpora if not _NAME.fullmatch(name) or len(name) > _LONGEST_NAME)
        return corpora

    @field_validator("labels")
    @classmethod
    def _labels_fit(cls, labels: dict[str, dict[str, str]], info: ValidationInfo) -> dict[str, dict[str, str]]:
        refuse(_problems_of_labels(labels, info.data.get("corpora")))
        apart = own_words(labels)
        return {name: {w: named(e, apart) for w, e in meanings.items()} for name, meanings in labels.items()}

    @field_validator("emotions")
    @classmethod
    def _emotions_differ(cls, emotions: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        apart = own_words(info.data.get("labels", {}))
        classes = tuple(named(word, apart) for word in emotions)
        refuse(_problems_of_emotions(emotions, classes))
        return classes

    @field_validator("merge")
    @classmethod
    def _merge_fits(cls, merge: dict[str, str], info: ValidationInfo) -> dict[str, str]:
        apart = own_words(info.data.get("labels", {}))
        merge = {named(source, apart): named(target, apart) for source, target in merge.items()}
        refuse(_problems_of_merge(merge, info.data.get("emotions")))
        return merge

    @field_validator("exclude")
    @classmethod
    def _exclude_is_known(cls, exclude: tuple[str, ...]) -> tuple[str, ...]:
        refuse(
            (
                (number,),
                f"{what!r} is neither a .csv file nor one of {', '.join(EXCLUDABLE)}{hint(what, EXCLUDABLE, '')}",
            )
            for number, what in enumerate(exclude)
            if what not in EXCLUDABLE and not what.endswith(".csv")
        )
        return exclude

    @field_validator("protocol")
    @classmethod
    def _enrolled_are_known(cls, protocol: Protocol, info: ValidationInfo) -> Protocol:
        which, emotions = protocol.enrolment.which, info.data.get("emotions", ())
        refuse(
            (("enrolment", "which", n), f"{emotion!r} is not among the experiment's emotions{hint(emotion, emotions)}")
            for n, emotion in enumerate(which if which != "any" and emotions else ())
            if emotion not in emotions
        )
        return protocol

    def over(self, emotions: tuple[str, ...]) -> Experiment:
        """The same over some of its emotions: those that its data have. What is merged into others has no data either,
        and is left out of `merge`."""
        merge = {source: target for source, target in self.merge.items() if target in emotions}
        return self.model_copy(update={"emotions": emotions, "merge": merge})

    def halved(self) -> Experiment:
        """The same with half of `batch_seconds` and twice `accumulate`: less memory, and a step has the same
        utterances, except for some at its end."""
        optimizer = self.optimizer.model_copy(update={"accumulate": 2 * self.optimizer.accumulate})
        return self.model_copy(update={"batch_seconds": self.batch_seconds / 2, "optimizer": optimizer})


# -- below: how it is done

_NAME = re.compile(r"\w[\w .()+-]*")
_LONGEST_NAME: Final = 100
"""Bytes of a file's name are 255 at most, and a letter may be two or three of them."""
_NAME_RULE = (
    "the name of a corpus becomes that of a folder: letters, digits and any of _ . - + ( ), at most "
    f"{_LONGEST_NAME}, the first a letter or digit"
)


def _problems_of_labels(labels: dict[str, dict[str, str]], corpora: dict[str, str | None] | None) -> Iterator[Problem]:
    """``corpora``: those of the experiment, or None where they do not fit themselves."""
    for name, meanings in labels.items():
        if corpora is not None and name not in corpora:
            yield (name,), f"{name!r} is not among the corpora{hint(name, corpora)}"
        for label, emotion in meanings.items():
            if not emotion:
                yield (name, label), "the emotion is empty; name one"


def _problems_of_emotions(words: tuple[str, ...], emotions: tuple[str, ...]) -> Iterator[Problem]:
    """``emotions``: what the ``words`` stand for."""
    if len(emotions) < 2:
        yield (), "name at least two emotions"
    for number, (word, emotion) in enumerate(zip(words, emotions, strict=True)):
        if not emotion:
            yield (number,), "the emotion is empty; name one"
        elif emotion in emotions[:number]:
            other = words[emotions.index(emotion)]
            yield (number,), f"{word!r} is named twice" + (f", first as {other!r}" if other != word else "")


def _problems_of_merge(merge: dict[str, str], emotions: tuple[str, ...] | None) -> Iterator[Problem]:
    """``emotions``: those of the experiment, or None where they do not fit themselves."""
    for source, target in merge.items():
        if emotions is None:
            continue
        if source in emotions:
            yield (source,), f"{source!r} is also in emotions; remove it from one of them"
        if target not in emotions:
            yield (source,), f"{target!r} is not among the experiment's emotions{hint(target, emotions)}"

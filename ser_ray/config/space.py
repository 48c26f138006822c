"""A whole YAML file: an experiment, what is searched around it, how, with what resources, and where results go."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from ser_ray.config.experiment import Experiment, Section, Words, as_tuple
from ser_ray.config.validation import to_dict, validated, with_values
from ser_ray.schema import UserError

THE_SAME_FOR_ALL = frozenset(
    {"name", "corpora", "labels", "label", "emotions", "merge", "audio", "protocol"},
)
"""Fields of `Experiment` that define the data and their split: they cannot be searched."""


class Distribution(Section):
    """The values of one searched key: exactly one of choice, uniform, loguniform, randint."""

    choice: Annotated[tuple[Any, ...] | None, BeforeValidator(as_tuple)] = None
    uniform: Annotated[tuple[float, float] | None, BeforeValidator(as_tuple)] = None
    loguniform: Annotated[tuple[float, float] | None, BeforeValidator(as_tuple)] = None
    randint: Annotated[tuple[int, int] | None, BeforeValidator(as_tuple)] = None
    """Both ends included."""
    when: dict[str, Annotated[tuple[Any, ...], BeforeValidator(as_tuple)]] = Field(default_factory=dict)
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
        tuple[Literal["seconds_per_epoch", "peak_memory_mb", "trainable_parameters"], ...], BeforeValidator(as_tuple)
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
    final_folds: Annotated[tuple[int, ...] | Literal["all"] | None, BeforeValidator(as_tuple)] = None
    """Folds on which the finalists are trained again. The mean over the folds selects the winner on dev and is reported
    on test. null: only the experiment's own fold, with the checkpoint from the search."""
    final_seeds: int = Field(1, ge=1)
    """Number of seeds with which each finalist is trained: the experiment's seed and those that follow. On test, the
    ensemble that averages their probabilities is scored as well."""
    rotate_dev: bool = False
    """With each further seed, dev is the next fold (`Protocol.dev_after`). More speakers then decide between the
    finalists, and every speaker outside of test is trained on with at least one seed."""
    first: Annotated[tuple[dict[str, Any], ...], BeforeValidator(as_tuple)] = ()
    """Points to try before the sampler chooses any: searched key -> value; keys left out are sampled."""
    log: Annotated[tuple[Literal["tensorboard", "mlflow"], ...], BeforeValidator(as_tuple)] = ()
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
    """auto: 1 without a GPU (many small trials beat one trial on many threads); with GPUs an even share of the node's
    cores for each, at most 4."""
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
    """Maximum size of the feature cache below `cache`, in GB, also when several searches fill it at once. It holds what
    the frozen part of a model computes, which trials read in place of the waveforms; 0: no cache. An hour of speech
    takes 0.14 GB per layer of whisper-tiny and 0.46 GB per layer of whisper-large."""


class SearchSpace(Section):
    """The content of a YAML file: experiment, search space, search settings, resources, storage."""

    experiment: Experiment
    search: dict[str, Distribution] = Field(default_factory=dict)
    """Dotted key of the experiment, such as adapter.rank: one of choice, uniform, loguniform or randint, and ``when``
    it is searched. What is not searched is the same for all trials."""
    tune: Tune = Tune()
    resources: Resources = Resources()
    storage: Storage = Storage()

    @model_validator(mode="after")
    def _search_fits(self) -> SearchSpace:
        problems = [problem for key in self.search for problem in self._problems_of(key)]
        for point in self.tune.first:
            if unknown := [key for key in point if key not in self.search]:
                problems.append(f"tune.first: {unknown[0]!r} is not a searched key")
            elif not problems:
                self.trial(point)
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _problems_of(self, key: str) -> Iterator[str]:
        """What is wrong with a searched key."""
        distribution, order = self.search[key], list(self.search)
        if key.split(".")[0] in THE_SAME_FOR_ALL:
            yield f"search: {key}: all trials use the same data, to be comparable; remove this key"
            return
        for condition in distribution.when:
            if condition not in order:
                yield f"search: {key}: when names {condition!r}, which is not searched"
            elif order.index(condition) > order.index(key):
                yield f"search: {key} depends on {condition!r}: list {condition!r} first"
        for value in distribution.examples():
            try:
                self.trial({key: value})
            except UserError as error:
                yield f"search: {error}"
                return

    def trial(self, values: Mapping[str, Any]) -> Experiment:
        """The experiment of one trial: the base experiment with dotted keys replaced.

        Raises UserError if a key does not exist or a value is invalid.
        """
        return validated(Experiment, with_values(to_dict(self.experiment), values))

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

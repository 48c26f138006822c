"""A whole YAML file: an experiment, what is searched around it, how, with what resources, and where results go."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import to_jsonable_python

from ser_ray.config.experiment import Experiment
from ser_ray.config.search import Distribution, search_problems
from ser_ray.config.section import NO_UNIT, Section, Unit, Words, as_tuple
from ser_ray.config.validation import ProblemsError, problems_of, refuse, to_dict, validated, with_values
from ser_ray.disk import resolved


class Tune(Section):
    """How the space is searched."""

    trials: Annotated[int, Unit("trials")] = Field(12, ge=1)
    """Total number of trials; ``tune.trials=+20`` on the command line adds to a finished search."""
    hours: Annotated[float | None, Unit("h")] = Field(None, gt=0)
    """No trial starts after this many hours of searching in total (continuations included); null: no limit."""
    gpu_hours: Annotated[float | None, Unit("GPU-h")] = Field(None, gt=0)
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
    grid_points: Annotated[int, Unit("values")] = Field(3, ge=2)
    """Number of values that a grid takes from each range."""
    warm_start: Words = ()
    """Results folders of earlier searches, whose trials the sampler learns from; they do not count towards `trials`."""
    scheduler: Literal["asha", "none"] = "asha"
    """asha stops the worse half of the trials early."""
    grace: Annotated[int, Unit("epochs")] = Field(2, ge=1)
    """Epochs before a trial may be stopped."""
    seed: Annotated[int, NO_UNIT] = Field(0, ge=0)
    """Seed of the sampler, and of the order of a grid."""
    concurrency: Annotated[int | None, Unit("trials")] = Field(None, ge=1)
    """Number of trials that run at once; null: as many as fit on the cluster."""
    finalists: Annotated[int, Unit("trials")] = Field(3, ge=1)
    """How many of the best trials are finalists. Evaluation actors score their checkpoints in full, on dev."""
    final_folds: Annotated[tuple[int, ...] | Literal["all"] | None, BeforeValidator(as_tuple), NO_UNIT] = None
    """Folds on which the finalists are trained again. The mean over the folds selects the winner on dev and is reported
    on test. null: only the experiment's own fold, with the checkpoint from the search."""
    final_seeds: Annotated[int, Unit("seeds")] = Field(1, ge=1)
    """Number of seeds with which each finalist is trained: the experiment's seed and those that follow. On test, the
    ensemble that averages their probabilities is scored as well."""
    rotate_dev: bool = False
    """With each further seed, dev is the next fold (`Protocol.dev_after`). More speakers then decide between the
    finalists, and every speaker outside of test is trained on with at least one seed."""
    ensemble: Annotated[int, Unit("models")] = Field(0, ge=0, le=100)
    """How many models an ensemble may have: the finalists' runs of one fold, chosen on dev alone, the same one more
    than once if that is best (Caruana et al. 2004). It is used where it beats the best single model on dev speakers
    that did not choose it. 0: none, since each member takes the time and the memory of a model at prediction. 1: no
    more than one, which may have the mean weights of all seeds of a configuration (Wortsman et al. 2022, arXiv
    2203.05482). With more than one, have several `finalists` or `final_seeds` to choose among."""
    first: Annotated[tuple[dict[str, Any], ...], BeforeValidator(as_tuple)] = ()
    """Points to try before the sampler chooses any: searched key -> value; keys left out are sampled."""
    log: Annotated[tuple[Literal["tensorboard", "mlflow"], ...], BeforeValidator(as_tuple)] = ()
    """Where the epochs are logged as well: results/NAME/tensorboard, results/NAME/mlflow.db."""

    @field_validator("rotate_dev")
    @classmethod
    def _rotates_over_seeds(cls, rotate_dev: bool, info: ValidationInfo) -> bool:
        if rotate_dev and info.data.get("final_seeds") == 1:
            raise ValueError("dev changes with each further seed: set tune.final_seeds to 2 or more")
        return rotate_dev

    @field_validator("first")
    @classmethod
    def _grid_is_complete(cls, first: tuple[dict[str, Any], ...], info: ValidationInfo) -> tuple[dict[str, Any], ...]:
        if first and info.data.get("sampler") == "grid":
            raise ValueError("a grid defines all points itself; remove tune.first, or use sampler: tpe")
        return first


class Resources(Section):
    """The resources of one trial."""

    workers: Annotated[int, Unit("processes")] = Field(1, ge=0)
    """Data-parallel processes per trial. In a search, 1 trains in Tune's own process; several add twenty seconds to a
    trial. 0 trains in this process, without Ray, for a debugger (train only)."""
    cpus_per_worker: Annotated[float | Literal["auto"], Unit("CPUs")] = "auto"
    """auto: 1 without a GPU (many small trials beat one trial on many threads); with GPUs an even share of the node's
    cores for each, at most 4."""
    gpus_per_worker: Annotated[float | Literal["auto"], Unit("GPUs")] = "auto"
    """auto: 0 without a GPU, with GPUs 1. But where there are several trials of one worker for each GPU, up to four
    share it if they take at most half of its memory, which is measured on a step when the plan is made: the card is
    idle between the kernels of a small model. 0.25 always puts four trials on one GPU."""
    data: Literal["auto", "resident", "streamed"] = "auto"
    """resident: a trial's data stay in Ray's object store between epochs. streamed: every epoch reads them from the
    files. auto: resident if they take at most 30 % of the store; else dev alone is, if it takes no more than that."""

    @field_validator("cpus_per_worker")
    @classmethod
    def _some_cpus(cls, cpus: float | str) -> float | str:
        if not isinstance(cpus, str) and not cpus > 0:
            raise ValueError(f"give more than 0, or auto, not {cpus:g}")
        return cpus

    @field_validator("gpus_per_worker")
    @classmethod
    def _a_share_or_whole_gpus(cls, gpus: float | str) -> float | str:
        if not isinstance(gpus, str) and not (0 <= gpus <= 1 or (gpus > 1 and gpus % 1 == 0)):
            raise ValueError(f"give a fraction of one GPU, or a whole number of GPUs, not {gpus:g}")
        return gpus


class Storage(Section):
    """Where files are written."""

    results: str = "results"
    """Directory of the results folders."""
    cache: str = "~/.cache/ser_ray"
    """Directory of prepared data and cached features; on a cluster, a path that every node can reach."""
    prefix_gb: Annotated[float, Unit("GB")] = Field(50.0, ge=0)
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

    @model_validator(mode="wrap")
    @classmethod
    def _fits_together(cls, content: Any, handler: ModelWrapValidatorHandler[SearchSpace]) -> SearchSpace:
        """Each section by itself, and whether what is searched fits the experiment: all problems at once."""
        plain = to_jsonable_python(content, fallback=str)
        across = list(search_problems(plain)) if isinstance(plain, dict) else []
        try:
            space = handler(content)
        except ValidationError as error:
            raise ProblemsError([*problems_of(error, cls, content), *across]) from None
        refuse(across)
        return space

    def trial(self, values: Mapping[str, Any]) -> Experiment:
        """The experiment of one trial: the base experiment with dotted keys replaced.

        Raises UserError if a key does not exist or a value is invalid.
        """
        return validated(Experiment, with_values(to_dict(self.experiment), values))

    def over(self, emotions: tuple[str, ...]) -> SearchSpace:
        """The same space over the emotions of its data; see `Experiment.over`."""
        return self.model_copy(update={"experiment": self.experiment.over(emotions)})

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
        return resolved(self.storage.results) / self.experiment.name

    def cache_dir(self) -> Path:
        """``storage.cache``, absolute."""
        return resolved(self.storage.cache)

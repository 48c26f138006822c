"""The mean weights of several checkpoints: one model out of the seeds of a configuration, at no cost at prediction.

Wortsman et al. 2022, "Model soups" (arXiv 2203.05482). Whether the mean of weights is a good model is for dev to say:
heads that start from random weights of different seeds have little in common, those that start from the same probe
have.

The mean of low-rank updates is an update of a higher rank: of (B1 A1 + B2 A2) / 2 the A's stand one above the other and
the B's side by side. So it is exact, and not the product of the means of A and B, which belong together by seed.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import save_file

from ser_ray import config
from ser_ray.config import Experiment
from ser_ray.disk import write_json, write_text
from ser_ray.models.weights import read_object, read_tensors

VARIANTS: Final = ("plain", "rslora", "loraplus", "loftq")
"""Of LoRA, whose saved updates can be added: dora has lengths of rows besides, and pissa saves a difference."""
MOST_RANK: Final = 512
"""The highest that `config.Adapter` accepts."""


def can_average(experiment: Experiment, count: int) -> bool:
    """Whether `average` works for so many checkpoints of an experiment."""
    adapter = experiment.adapter
    return adapter.method in ("frozen", "full") or (adapter.variant in VARIANTS and count * adapter.rank <= MOST_RANK)


def average(sources: Sequence[Path], target: Path) -> None:
    """Write the checkpoint of the mean weights of ``sources``, checkpoints of one configuration, to ``target``."""
    first = sources[0]
    experiment = config.load_experiment(first / "experiment.yaml")
    assert can_average(experiment, len(sources)), experiment.adapter
    aside = target.with_name(f".{target.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    shutil.copytree(first, aside, ignore=shutil.ignore_patterns("training", ".*"))
    _write_mean([source / "head.safetensors" for source in sources], aside / "head.safetensors")
    if experiment.adapter.method == "full":
        for path in sorted((aside / "backbone").glob("*.safetensors")):  # a large model has several
            _write_mean([source / "backbone" / path.name for source in sources], path)
    elif experiment.adapter.method in ("lora", "qlora"):
        experiment = _write_updates(sources, aside, experiment)
    write_text(aside / "experiment.yaml", config.dump(experiment))
    write_json(aside / "metrics.json", {"mean_of": [str(Path(*source.parts[-3:])) for source in sources]})
    shutil.rmtree(target, ignore_errors=True)
    aside.rename(target)


# -- below: how it is done


def _write_mean(paths: Sequence[Path], target: Path) -> None:
    each = [read_tensors(path) for path in paths]
    mean = {
        name: torch.stack([own[name].float() for own in each]).mean(0).to(tensor.dtype).contiguous()
        for name, tensor in each[0].items()
    }
    _save(mean, target)


def _write_updates(sources: Sequence[Path], directory: Path, experiment: Experiment) -> Experiment:
    """Write the mean of the low-rank updates; returns the experiment with their rank."""
    each = [read_tensors(source / "adapter" / "adapter_model.safetensors") for source in sources]
    joined = {}
    for name in each[0]:
        assert ".lora_A." in name or ".lora_B." in name, name
        joined[name] = torch.cat([own[name] for own in each], 0 if ".lora_A." in name else 1).contiguous()
    _save(joined, directory / "adapter" / "adapter_model.safetensors")
    adapter, count = experiment.adapter, len(sources)
    # The scale is alpha / rank, and by the higher rank already that of the mean; of rslora it is alpha / root of rank.
    alpha = adapter.alpha / count**0.5 if adapter.variant == "rslora" else adapter.alpha
    path = directory / "adapter" / "adapter_config.json"
    write_json(path, read_object(path) | {"r": count * adapter.rank, "lora_alpha": alpha})
    grown = adapter.model_copy(update={"rank": count * adapter.rank, "alpha": alpha})
    return experiment.model_copy(update={"adapter": grown})


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Over a file of the same kind, readable by who may read the others."""
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)

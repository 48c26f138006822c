"""What must hold of a pooling, head or loss that is added in one file and named in one line (the fixture ``add``)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from backbone_fixtures import cached, data_of, logits, noise_batch, tone_batches

from ser_ray import config
from ser_ray.config import Experiment
from ser_ray.models import checkpoint
from ser_ray.models.classifier import EmotionClassifier, build
from ser_ray.schema import UserError
from ser_ray.training import loop


def config_accepts(folder: Path, name: str, add: Callable[[], None], **sections: object) -> None:
    """A YAML file with these sections of the experiment is accepted once ``name`` is added, and not before."""
    path = folder / "space.yaml"
    described = {"name": "x", "corpora": {"synthetic": None}, "backbone": "b"} | sections
    path.write_text(yaml.safe_dump({"experiment": described}))
    with pytest.raises(UserError, match=f"unknown value '{name}'; known: "):
        config.load(path)
    add()
    written = config.dump(config.load(path).experiment)
    assert config.to_dict(Experiment.model_validate(config.read_yaml(written))) == config.read_yaml(written)


def trains_and_is_saved(described: Experiment, folder: Path) -> EmotionClassifier:
    """It trains for its epochs, from waveforms and from cached features; a checkpoint gives its logits, and so does a
    cache. Returns what the checkpoint holds."""
    model, batch = build(described), noise_batch((0.5, 0.83, 0.61))
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    train, dev = tone_batches(12, 3), tone_batches(6, 3, seed=1)
    loop.fit(model, data_of(lambda epoch: train, dev), lambda record, save: save(folder / "checkpoint"))
    assert any(not torch.equal(p, start[name]) for name, p in model.named_parameters() if name in start)
    expected_BK = logits(model, batch)
    loaded = checkpoint.load(folder / "checkpoint")
    torch.testing.assert_close(logits(loaded, batch), expected_BK, rtol=0, atol=0)
    of_cache = [cached(model, one) for one in (batch, *train, *dev)]
    torch.testing.assert_close(logits(model, of_cache[0]), expected_BK, rtol=5e-3, atol=5e-3)
    train, dev = of_cache[1 : 1 + len(train)], of_cache[1 + len(train) :]
    loop.fit(model, data_of(lambda epoch: train, dev), lambda record, save: None)
    return loaded

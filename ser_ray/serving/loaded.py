"""Checkpoints in memory: loaded when they are asked for, the least recently used one dropped for another, and weights
that several of them share, such as those of one frozen backbone, held once."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Final

import torch

from ser_ray.models import checkpoint
from ser_ray.models.classifier import EmotionClassifier

SMALLEST: Final = 4096
"""Values of a tensor from which it is worth a look whether it is there already."""


class LoadedModels:
    """At most ``most`` of the checkpoints ``paths`` (name -> directory)."""

    def __init__(self, paths: Mapping[str, str], most: int, device: torch.device | str = "cpu") -> None:
        self.paths, self.most, self.device = paths, most, device
        self.models: OrderedDict[str, EmotionClassifier] = OrderedDict()
        self.tensors: dict[str, dict[str, torch.Tensor]] = {}
        """Name -> the large tensors of that model by their content."""

    def get(self, name: str) -> EmotionClassifier:
        """The model of that name. Raises UserError where its checkpoint cannot be loaded any more."""
        if name not in self.models:
            while len(self.models) >= self.most:
                dropped, _ = self.models.popitem(last=False)
                del self.tensors[dropped]
            model = checkpoint.load(self.paths[name], self.device)
            self._share(name, model)
            self.models[name] = model
        self.models.move_to_end(name)
        return self.models[name]

    def _share(self, name: str, model: EmotionClassifier) -> None:
        """Let the model have, of the tensors in memory, those that equal its own."""
        known = {digest: tensor for own in self.tensors.values() for digest, tensor in own.items()}
        for tensor in _tensors(model):
            tensor.data = known.setdefault(_digest(tensor), tensor.data)
        self.tensors[name] = {_digest(tensor): tensor.data for tensor in _tensors(model)}


# -- below: how it is done


def _tensors(model: EmotionClassifier) -> Iterator[torch.Tensor]:
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.numel() >= SMALLEST and type(tensor) in (torch.Tensor, torch.nn.Parameter):  # not those in 4 bits
            yield tensor


def _digest(tensor: torch.Tensor) -> str:
    about = f"{tensor.dtype} {tuple(tensor.shape)} {tensor.device} "
    content = tensor.detach().contiguous().flatten().view(torch.uint8).cpu().numpy()
    return about + hashlib.blake2b(content.data, digest_size=16).hexdigest()

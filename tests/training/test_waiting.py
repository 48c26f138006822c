"""A step of training asks no tensor for its values: on a GPU the host would wait for all that it has launched.

Counted on a CPU, in every family, with every method, and in two processes: the calls by which Python reads a tensor,
those that make one from Python's numbers (a copy to a GPU from memory that is not page-locked), and the operations
whose shape depends on values.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from backbone_fixtures import VARIANTS, experiment, tone_batches
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ser_ray.config import Experiment
from ser_ray.models.classifier import build
from ser_ray.models.precision import compute_dtype
from ser_ray.training import loop, step

READS = {"item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__contains__"}
MAKES = {"tensor", "as_tensor", "from_numpy"}
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique_dim", "_unique2"}
METHODS = ("frozen", "lora", "qlora", "full")
MASKS = {"channel_mask": 0.3, "time_mask": 0.3}


class Calls(TorchFunctionMode):
    """What Python asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, function: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        if name in READS | MAKES:
            self.found.append(name)
        return function(*args, **(kwargs or {}))


class Operations(TorchDispatchMode):
    """What torch does, whoever asked."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in WAITS or by_mask:
            self.found.append(name)
        return function(*args, **(kwargs or {}))


def waits(settings: Experiment, steps: int = 1) -> list[str]:
    """The calls and operations of some steps, from the second on, that would make the host wait for a GPU."""
    model = build(settings)
    trained = step.distribute(model)
    # Fused, as on a GPU: the one of a CPU reads the number of its steps.
    groups = [{k: v for k, v in g.items() if k != "fused"} for g in loop.make_optimizer(model).param_groups]
    optimizer = torch.optim.AdamW(groups, fused=True)
    scaler = torch.amp.GradScaler("cpu", enabled=compute_dtype(settings.precision, "cpu") is torch.float16)
    weights_K = torch.tensor([9.0, 1.0, 3.0])
    model.train()
    found: list[str] = []
    for number, batch in enumerate(tone_batches(6 * (steps + 1), 3)):
        with Calls() as calls, Operations() as operations:
            for last in (False, True):
                step.add_gradients(trained, batch, weights_K, 1 / 20, scaler, settings, last)
            step.apply(optimizer, scaler, settings, 1.0)
            optimizer.zero_grad(set_to_none=True)
        found += [*calls.found, *operations.found] if number else []
    return found


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_asks_no_tensor_for_its_values(backbones_dir: Path, variant: str, method: str) -> None:
    assert waits(experiment(backbones_dir / variant, adapter={"method": method, "rank": 2}, augment=MASKS)) == []


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_nor_with_a_scaled_loss(backbones_dir: Path, precision: str) -> None:
    assert waits(experiment(backbones_dir / "whisper", precision=precision, augment=MASKS)) == []


def test_nor_with_another_head_loss_and_with_recomputed_activations(backbones_dir: Path) -> None:
    head = {"pooling": "statistics", "layer_mix": "concat", "hidden": 8}
    assert waits(experiment(backbones_dir / "whisper", head=head, loss="focal", recompute=True)) == []


def _worker(rank: int, backbone: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}/rendezvous", rank=rank, world_size=2)
    for method in METHODS:
        found = waits(experiment(backbone, adapter={"method": method, "rank": 2}, augment=MASKS))
        Path(out, f"{method}_{rank}.txt").write_text(" ".join(found))
    dist.destroy_process_group()


@pytest.mark.slow
def test_nor_in_two_processes(backbones_dir: Path, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_worker, (str(backbones_dir / "whisper"), str(tmp_path)), nprocs=2)
    said = {path.name: path.read_text() for path in tmp_path.glob("*.txt")}
    assert said == {f"{method}_{rank}.txt": "" for method in METHODS for rank in range(2)}


@pytest.mark.parametrize(
    "asks",
    [
        lambda values: values.tolist(),
        lambda values: int(values.max()),
        lambda values: bool((values > 0).any()),
        lambda values: values[values > 0],
        lambda values: (values > 0).nonzero(),
        lambda values: values + torch.tensor([1.0, 2.0]),
        lambda values: torch.nn.functional.one_hot(values.long()),
    ],
)
def test_what_asks_is_counted(asks: Callable[[torch.Tensor], object]) -> None:
    with Calls() as calls, Operations() as operations:
        asks(torch.rand(2))
    assert calls.found + operations.found

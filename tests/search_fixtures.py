"""A search space and epochs as they are in a history, for tests of what is tried and how it is told."""

from __future__ import annotations

from ser_ray.config import SearchSpace
from ser_ray.evaluation import folder

MANY_KEYS = {
    "adapter.method": {"choice": ["frozen", "lora", "qlora"]},
    "adapter.rank": {"choice": [4, 8], "when": {"adapter.method": ["lora", "qlora"]}},
    "adapter.targets": {"choice": [["q_proj"], ["q_proj", "v_proj"]], "when": {"adapter.method": ["lora"]}},
    "optimizer.lr": {"loguniform": [1e-5, 1e-3]},
    "head.dropout": {"uniform": [0.0, 0.5]},
    "epochs": {"randint": [2, 4]},
}


def space(search: dict, **tune) -> SearchSpace:
    experiment = {"name": "x", "corpora": {"synthetic": None}, "backbone": "embedded/tiny-whisper"}
    return SearchSpace.model_validate({"experiment": experiment, "search": search, "tune": tune})


SEARCH = {
    "adapter.method": {"choice": ["frozen", "lora"]},
    "adapter.rank": {"choice": [4, 8], "when": {"adapter.method": ["lora"]}},
    "optimizer.lr": {"loguniform": [1e-5, 1e-3]},
}


def record(epoch: int, uar: float, best: float, seconds: float = 2.0) -> folder.Record:
    return {
        "epoch": epoch,
        "train_loss": 1.0,
        "seconds": seconds,
        "peak_memory_mb": 100.0 + epoch,
        "trainable_parameters": 1000,
        "dev_uar": uar,
        "dev_accuracy": uar,
        "dev_macro_f1": uar,
        "dev_kappa": uar,
        "best_dev_uar": best,
        "best_epoch": 1 if best > uar else epoch,
        "last": False,
    }

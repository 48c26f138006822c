"""Counts the kernels that torch launches, by what reaches its dispatcher: on a GPU each costs time of its own."""

from __future__ import annotations

from collections import Counter
from typing import Any, Final

from torch.utils._python_dispatch import TorchDispatchMode

RESERVING: Final = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "_unsafe_view")


class Kernels(TorchDispatchMode):
    """What is dispatched within it, by name, without views and without what only reserves memory."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = operation.__name__.partition(".")[0]
        if not operation.is_view and name not in RESERVING:
            self.names[name] += 1
        return operation(*args, **(kwargs or {}))

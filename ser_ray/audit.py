"""Audit a split before a GPU is used: ``ser-ray audit SPACE.yaml [key=value ...]``.

Prepares missing corpora, splits them by the protocol and reports leakage between splits and problems with the data:
shared speakers, identical recordings, versions of one recording, absent emotions. The same audit runs before every
training. Writes ``audit.json`` and, as a table, ``audit.csv`` to the results folder, unless a search is there, which
has its own.
"""

from __future__ import annotations

if __name__ == "__main__":
    import sys

    from ser_ray.__main__ import main as command

    sys.exit(command(["audit", *sys.argv[1:]]))

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Column, Table

from ser_ray import config, prepare
from ser_ray.config import SearchSpace
from ser_ray.protocols.task import load_task
from ser_ray.runtime import paths
from ser_ray.runtime.results_folder import audited, print_audit, write_audit
from ser_ray.schema import UserError
from ser_ray.terminal import PlainConsole


def run(space: SearchSpace, console: Console) -> dict[str, Any]:
    """Audit every fold that a search space trains, print, write and return the result of `results_folder.audited`."""
    shard_dirs = prepare.prepare(space, use_ray=space.resources.workers > 0, console=console)
    task = load_task(space.experiment, shard_dirs)
    if task.absent:
        console.print(task.absent)
    result = audited(space, task, console, shard_dirs)
    console.print(f"split: {task.fold.description}")
    console.print(_sizes(result["splits"]))
    print_audit(result, console)
    if target := _write(space, result):
        console.print(f"written to {target}; all findings as a table: {target.with_suffix('.csv')}")
    return result


def main(path: Path, overrides: list[str]) -> int:
    """``ser-ray audit``. Raises UserError for a finding that makes training pointless."""
    space = paths.resolve_paths(config.load(path, overrides, needs_backbone=False))
    for finding in run(space, PlainConsole())["findings"]:
        if finding["level"] == "error":
            raise UserError(f"{finding['what']}: {finding['detail']}")
    return 0


# -- below: how it is done


def _write(space: SearchSpace, result: dict[str, Any]) -> Path | None:
    target = space.results_dir() / "audit.json"
    if (target.parent / "search.yaml").is_file():
        return None
    try:
        write_audit(space, result)
    except OSError as error:
        raise UserError(f"storage.results: cannot write {target}: {error.strerror}") from None
    return target


def _sizes(splits: Mapping[str, Mapping[str, Any]]) -> Table:
    """One column per split, one row per size or emotion: seven emotions do not fit side by side."""
    table = Table("", *(Column(split, justify="right") for split in splits), box=box.SIMPLE_HEAD)
    parts = list(splits.values())
    table.add_row("speakers", *(str(part["speakers"]) for part in parts))
    table.add_row("minutes", *(f"{part['minutes']:.1f}" for part in parts))
    table.add_row("utterances", *(str(part["utterances"]) for part in parts))
    for emotion in parts[0]["emotions"]:
        table.add_row(f"  {emotion}", *(str(part["emotions"][emotion]) for part in parts))
    return table

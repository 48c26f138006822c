"""The audit of a split, before a GPU is used: ``ser-ray audit SPACE.yaml [key=value ...]``.

Prepares what is missing, splits it by the protocol and shows what crosses the splits or is wrong with the data: shared
speakers, identical recordings, versions of one take, emotions that are absent. The same audit comes before every
training. Writes ``audit.json`` to the results folder, unless a search lives there, which has its own.
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

from ser_ray import cluster, config, disk, prepare
from ser_ray.assets.pretraining_overlap import pretraining_overlap
from ser_ray.config import SearchSpace
from ser_ray.protocols.leakage import audit_search
from ser_ray.protocols.task import load_task
from ser_ray.schema import UserError
from ser_ray.speech.fingerprint import same_recordings_in

STYLES = {"error": "bold red", "leak": "bold red", "note": "dim"}


def run(space: SearchSpace, console: Console) -> dict[str, Any]:
    """Audit every fold that a space trains, show and write it; returns what `leakage.audit` does."""
    shard_dirs = prepare.prepare(space, use_ray=space.resources.workers > 0, console=console)
    task = load_task(space.experiment, shard_dirs)
    with console.status("fingerprints of the audio"):
        known = pretraining_overlap(space.backbones(), space.experiment.corpora)
        result = audit_search(space, task, same_recordings_in(shard_dirs), known)
    console.print(task.fold.description, markup=False)
    console.print(_sizes(result["splits"]))
    if folds := result.get("folds"):
        console.print(f"audited: {len(folds)} folds that are trained, {', '.join(folds)}", markup=False)
    for finding in result["findings"]:
        line = f"{finding['level']:5}  {finding['what']}: {finding['detail']}"
        console.print(line, style=STYLES[finding["level"]], markup=False)
    console.print("LEAKY: figures made from this split are too high" if result["leaky"] else "no leak found")
    if target := _write(space, result):
        console.print(f"written to {target}", markup=False)
    return result


def main(arguments: list[str]) -> int:
    """``ser-ray audit SPACE.yaml [key=value ...]``. Raises UserError for a finding that makes training pointless."""
    if not arguments:
        raise UserError("name a search space, such as search_spaces/demo.yaml")
    space = cluster.resolve_paths(config.load(arguments[0], arguments[1:]))
    for finding in run(space, Console(highlight=False, soft_wrap=True))["findings"]:
        if finding["level"] == "error":
            raise UserError(f"{finding['what']}: {finding['detail']}")
    return 0


# -- below: how it is done


def _write(space: SearchSpace, result: dict[str, Any]) -> Path | None:
    target = space.results_dir() / "audit.json"
    if (target.parent / "search.yaml").is_file():
        return None
    try:
        disk.write_json(target, result)
    except OSError as error:
        raise UserError(f"storage.results: cannot write {target}: {error.strerror}") from None
    return target


def _sizes(splits: Mapping[str, Mapping[str, Any]]) -> Table:
    """A column a split, a row a size or an emotion: seven emotions do not fit beside each other."""
    table = Table("", *(Column(split, justify="right") for split in splits), box=box.SIMPLE_HEAD)
    parts = list(splits.values())
    table.add_row("speakers", *(str(part["speakers"]) for part in parts))
    table.add_row("minutes", *(f"{part['minutes']:.1f}" for part in parts))
    table.add_row("utterances", *(str(part["utterances"]) for part in parts))
    for emotion in parts[0]["emotions"]:
        table.add_row(f"  {emotion}", *(str(part["emotions"][emotion]) for part in parts))
    return table

"""Run a search again with the same settings, and report by how much the metrics differ.

    python -m ser_ray.rerun RESULTS_DIR [key=value ...]

First it checks that the data are the same, by the fingerprints of the prepared corpora; after the run it reports which
packages, code or hardware differ. The new results are beside the old ones, as ``<name>-rerun``; the old ones are not
changed. With one worker on the same machine a trial takes the same steps. A search with several trials at once may
receive their results in another order, and then tries other points.
"""

if __name__ == "__main__":
    import sys

    from ser_ray.__main__ import main as command

    sys.exit(command(["rerun", *sys.argv[1:]]))

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ser_ray import config, disk, prepare, report, tune
from ser_ray.config import SearchSpace
from ser_ray.evaluation import folder
from ser_ray.evaluation.metrics import HEADLINE
from ser_ray.runtime import cluster, paths, provenance
from ser_ray.schema import UserError
from ser_ray.train import train

WHERE = ("version", "git", "python", "gpus", "host")
"""Keys of provenance.json that may explain a difference, besides the packages."""


def main(results_dir: Path, overrides: list[str]) -> int:
    """``ser-ray rerun``; ``overrides`` such as ``storage.results=DIR`` or another name."""
    old = disk.resolved(results_dir)
    space = again(old, overrides)
    console = report.terminal()
    before = disk.read_json(old / "provenance.json")
    argv = ["rerun", str(results_dir), *overrides]
    if before["argv"][0] != "train" or space.resources.workers:
        cluster.connect(space)
    _check_data(space, before, console)
    alone = before["argv"][0] == "train"
    new = train(space, console, argv) if alone else tune.run(space, console, argv)
    for line in surroundings(before, disk.read_json(new / "provenance.json")):
        console.print(f"differs: {line}", style="yellow")
    rows = list(compare(old, new))
    disk.write_json(new / "rerun.json", {"of": str(old), "argv": argv, "metrics": [dict(row) for row in rows]})
    console.print(_table(rows))
    largest = max((abs(row["difference"]) for row in rows if row["difference"] is not None), default=0.0)
    console.print("all metrics are the same" if largest == 0 else f"largest difference: {largest:.3g}")
    return 0


def again(old: Path, overrides: list[str]) -> SearchSpace:
    """The search space of a results folder under the name ``<name>-rerun``."""
    if not (old / "search.yaml").is_file() or not (old / "provenance.json").is_file():
        raise UserError(f"{old}: not a results folder (no search.yaml or provenance.json in it); give results/<name>")
    name = config.load(old / "search.yaml").experiment.name
    beside = [f"experiment.name={name}-rerun", f"storage.results={old.parent}"]
    return paths.resolve_paths(config.load(old / "search.yaml", [*beside, *overrides]))


def surroundings(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    """What differs in code, packages and hardware, as lines."""
    for key in WHERE:
        if old.get(key) != new.get(key):
            yield f"{key}: {old.get(key)} -> {new.get(key)}"
    for name in sorted(old["packages"].keys() | new["packages"].keys()):
        if old["packages"].get(name) != new["packages"].get(name):
            yield f"{name}: {old['packages'].get(name)} -> {new['packages'].get(name)}"


def compare(old: Path, new: Path) -> Iterator[dict[str, Any]]:
    """The old and the new value and their difference: of each trial's best dev UAR, and of the dev and test metrics."""
    trials = ({trial.trial_id: trial for trial in folder.read_trials(path / "trials")} for path in (old, new))
    before, after = trials
    for trial_id in sorted(before.keys() | after.keys()):
        pair = (before.get(trial_id), after.get(trial_id))
        same = None not in pair and pair[0].values == pair[1].values  # type: ignore[union-attr]
        name = f"trial {trial_id}" + ("" if same else " (other values)")
        yield _row(name, *(trial.best.get("dev_uar") if trial else None for trial in pair))
    for split in ("dev", "test"):
        files = [path / "evaluation" / f"{split}.json" for path in (old, new)]
        if all(path.is_file() for path in files):
            first, second = map(disk.read_json, files)
            for name in HEADLINE:
                yield _row(f"{split} {name}", first[name], second[name])


# -- below: how it is done


def _row(name: str, then: float | None, now: float | None) -> dict[str, Any]:
    difference = None if then is None or now is None else now - then
    return {"metric": name, "then": then, "now": now, "difference": difference}


def _check_data(space: SearchSpace, before: dict[str, Any], console: Console) -> None:
    shard_dirs = prepare.prepare(space, use_ray=space.resources.workers > 0, console=console)
    prepared = {data["corpus"]: data["fingerprint"] for data in provenance.provenance(space, shard_dirs, [])["data"]}
    for data in before["data"]:
        if prepared.get(data["corpus"]) != data["fingerprint"]:
            raise UserError(
                f"the data of {data['corpus']} are not those of that run (fingerprint {data['fingerprint']} then, "
                f"{prepared.get(data['corpus'])} now): set experiment.corpora.{data['corpus']}=DIR to the same files"
            )
    console.print(f"the data are the same: {', '.join(prepared)}")


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("", "then", "now", "difference"):
        table.add_column(name, justify="left" if name == "" else "right")
    for row in rows:
        cells = [f"{row[name]:.4f}" if row[name] is not None else "-" for name in ("then", "now")]
        difference = "-" if row["difference"] is None else f"{row['difference']:+.4f}"
        table.add_row(row["metric"], *cells, difference)
    return table

"""Run a search again as it was, and say by how much the figures differ.

    python -m ser_ray.rerun RESULTS_DIR [key=value ...]

First it is checked that the data are the same (by the fingerprints of what was prepared) and said which packages, code
or hardware differ. The new results lie beside the old ones, as ``<name>-rerun``; the old ones stay as they are. With
one worker on the same machine a trial takes the same steps; a search with several trials at once may learn of them in
another order, and then tries other points.
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

from ser_ray import cluster, config, disk, prepare, report, tune
from ser_ray.config import SearchSpace
from ser_ray.evaluation import folder
from ser_ray.evaluation.metrics import HEADLINE
from ser_ray.schema import UserError
from ser_ray.train import train

WHERE = ("version", "git", "python", "gpus", "host")
"""What of provenance.json may explain a difference, beside the packages."""


def main(arguments: list[str]) -> int:
    """``ser-ray rerun RESULTS_DIR [key=value ...]``; overrides such as ``storage.results=DIR`` or another name."""
    if not arguments:
        raise UserError("name one results folder, such as results/demo")
    old = Path(arguments[0]).resolve()
    space = again(old, arguments[1:])
    console = report.terminal()
    provenance = disk.read_json(old / "provenance.json")
    argv = ["rerun", *arguments]
    if provenance["argv"][0] != "train" or space.resources.workers:
        cluster.connect(space)
    _check_data(space, provenance, console)
    alone = provenance["argv"][0] == "train"
    new = train(space, console, argv) if alone else tune.run(space, console, argv)
    for line in surroundings(provenance, disk.read_json(new / "provenance.json")):
        console.print(f"differs: {line}", style="yellow")
    rows = list(compare(old, new))
    disk.write_json(new / "rerun.json", {"of": str(old), "argv": argv, "figures": [dict(row) for row in rows]})
    console.print(_table(rows))
    largest = max((abs(row["difference"]) for row in rows if row["difference"] is not None), default=0.0)
    console.print("all figures are the same" if largest == 0 else f"largest difference: {largest:.3g}")
    return 0


def again(old: Path, overrides: list[str]) -> SearchSpace:
    """The space of a results folder under the name ``<name>-rerun``."""
    if not (old / "search.yaml").is_file() or not (old / "provenance.json").is_file():
        raise UserError(f"{old}: no results folder (it holds no search.yaml or provenance.json); give results/<name>")
    name = config.load(old / "search.yaml").experiment.name
    beside = [f"experiment.name={name}-rerun", f"storage.results={old.parent}"]
    return cluster.resolve_paths(config.load(old / "search.yaml", [*beside, *overrides]))


def surroundings(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    """What differs in code, packages and hardware, as lines."""
    for key in WHERE:
        if old.get(key) != new.get(key):
            yield f"{key}: {old.get(key)} -> {new.get(key)}"
    for name in sorted(old["packages"].keys() | new["packages"].keys()):
        if old["packages"].get(name) != new["packages"].get(name):
            yield f"{name}: {old['packages'].get(name)} -> {new['packages'].get(name)}"


def compare(old: Path, new: Path) -> Iterator[dict[str, Any]]:
    """Then, now and the difference: of every trial's best dev UAR, and of the figures of dev and test."""
    trials = ({tried.trial_id: tried for tried in folder.read_trials(path / "trials")} for path in (old, new))
    before, after = trials
    for trial_id in sorted(before.keys() | after.keys()):
        found = (before.get(trial_id), after.get(trial_id))
        same = None not in found and found[0].values == found[1].values  # type: ignore[union-attr]
        name = f"trial {trial_id}" + ("" if same else " (other values)")
        yield _row(name, *(tried.best.get("dev_uar") if tried else None for tried in found))
    for split in ("dev", "test"):
        paths = [path / "evaluation" / f"{split}.json" for path in (old, new)]
        if all(path.is_file() for path in paths):
            first, second = map(disk.read_json, paths)
            for name in HEADLINE:
                yield _row(f"{split} {name}", first[name], second[name])


# -- below: how it is done


def _row(name: str, then: float | None, now: float | None) -> dict[str, Any]:
    difference = None if then is None or now is None else now - then
    return {"figure": name, "then": then, "now": now, "difference": difference}


def _check_data(space: SearchSpace, provenance: dict[str, Any], console: Console) -> None:
    shard_dirs = prepare.prepare(space, use_ray=space.resources.workers > 0, console=console)
    found = {data["corpus"]: data["fingerprint"] for data in cluster.provenance(space, shard_dirs, [])["data"]}
    for data in provenance["data"]:
        if found.get(data["corpus"]) != data["fingerprint"]:
            raise UserError(
                f"the data of {data['corpus']} are not those of that run (fingerprint {data['fingerprint']} then, "
                f"{found.get(data['corpus'])} now): name the same files by experiment.corpora.{data['corpus']}=DIR"
            )
    console.print(f"the data are the same: {', '.join(found)}")


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("", "then", "now", "difference"):
        table.add_column(name, justify="left" if name == "" else "right")
    for row in rows:
        cells = [f"{row[name]:.4f}" if row[name] is not None else "-" for name in ("then", "now")]
        difference = "-" if row["difference"] is None else f"{row['difference']:+.4f}"
        table.add_row(row["figure"], *cells, difference)
    return table

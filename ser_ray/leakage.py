"""The leakage gap: how much a metric rises when the test speakers, or the test corpus, are part of training.

    python -m ser_ray.leakage SPACE.yaml [key=value ...]

One configuration is trained and tested under the random split, under speaker-disjoint folds and, with more than one
corpus, with each corpus held out. Under each scheme every utterance is tested once, by a model that did not train on
it, so the schemes differ only in which speakers the model was trained on. It takes two or three times
``protocol.folds`` trials; the same command continues an interrupted run.
"""

if __name__ == "__main__":
    import sys

    from ser_ray.__main__ import main as command

    sys.exit(command(["leakage", *sys.argv[1:]]))

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from ser_ray import config, disk
from ser_ray.config import Protocol, SearchSpace
from ser_ray.evaluate import evaluate
from ser_ray.evaluation.gaps import corrected, gap_records
from ser_ray.evaluation.intervals import bootstrap_ci95
from ser_ray.evaluation.metrics import confusion, headline
from ser_ray.evaluation.predictions import Predictions, pooled
from ser_ray.evaluation.summary import read_predictions
from ser_ray.runtime import cluster, paths
from ser_ray.schema import UserError
from ser_ray.terminal import PlainConsole
from ser_ray.train import train

DISJOINT = "speaker_kfold"
"""What the other schemes are compared with."""
FILE = "leakage.json"
METRICS = ("accuracy", "uar", "macro_f1")


def main(path: Path, overrides: list[str]) -> int:
    """``ser-ray leakage``: the runs that are missing, and the comparison."""
    space = paths.resolve_paths(config.load(path, overrides))
    argv = ["leakage", str(path), *overrides]
    console = PlainConsole()
    cluster.connect(space)
    home = space.results_dir()
    predictions: dict[str, list[Predictions]] = {}
    plan = list(schemes(space))
    for number, (name, protocol) in enumerate(plan, start=1):
        console.print(f"{number} of {len(plan)}: {name}", style="bold")
        tested = _test(space, home, name, protocol, console, argv)
        predictions.setdefault(protocol.scheme, []).append(tested)
    answer = compare({scheme: pool(parts) for scheme, parts in predictions.items()})
    disk.write_json(home / FILE, {"argv": argv, "runs": len(plan), **answer})
    console.print(_table(answer))
    console.print(f"in {home / FILE}")
    return 0


def schemes(space: SearchSpace) -> Iterator[tuple[str, Protocol]]:
    """Every run that the comparison needs: a name and a protocol."""
    own = space.experiment.protocol
    shared = {"folds": own.folds, "seed": own.seed}
    for scheme in ("random", DISJOINT):
        for fold in range(own.folds):
            yield f"{scheme}-{fold}", Protocol.model_validate({"scheme": scheme, "fold": fold} | shared)
    if len(space.experiment.corpora) > 1:
        for corpus in space.experiment.corpora:
            held_out = {"scheme": "leave_one_corpus_out", "held_out": corpus}
            yield f"without-{corpus}", Protocol.model_validate(held_out | shared)


def pool(parts: list[Predictions]) -> Predictions:
    """The test predictions of all folds as one, in order of utterance id."""
    together = pooled(parts)
    assert len(set(together.utterance_ids)) == len(together), "an utterance was tested twice"
    return together.at(sorted(range(len(together)), key=together.utterance_ids.__getitem__))


def compare(predictions: dict[str, Predictions]) -> dict[str, Any]:
    """Metrics of every scheme, and their gap to the speaker-disjoint one, pooled and per corpus, with 95 % intervals;
    p is corrected over all of them (``p_holm``).

    Raises UserError where a corpus has one speaker, who can be in one split only.
    """
    disjoint = predictions[DISJOINT]
    emotions = len(disjoint.emotions)
    answer: dict[str, Any] = {"schemes": {}, "gaps": {}}
    for scheme, found in predictions.items():
        assert found.utterance_ids == disjoint.utterance_ids, "the schemes tested different utterances"
        answer["schemes"][scheme], answer["gaps"][scheme] = {}, {}
        corpora = sorted(set(found.corpora))
        for group in ("all", *corpora) if len(corpora) > 1 else ("all",):
            rows = np.array([group in ("all", corpus) for corpus in found.corpora])
            speakers = [speaker for speaker, chosen in zip(found.speakers, rows, strict=True) if chosen]
            if len(set(speakers)) < 2:
                raise UserError(f"{group}: one speaker; no split of that corpus is speaker-disjoint")
            labels, guesses, base = found.labels[rows], found.predicted[rows], disjoint.predicted[rows]
            metrics = headline(confusion(labels, guesses, emotions))
            limits, _ = bootstrap_ci95(labels, guesses, speakers, emotions)
            answer["schemes"][scheme][group] = {"n": len(labels)} | {
                name: {"value": float(metrics[name]), "ci95": list(limits[name])} for name in METRICS
            }
            answer["gaps"][scheme][group] = gap_records(labels, guesses, base, speakers, emotions)
    groups = [(scheme, group) for scheme in predictions if scheme != DISJOINT for group in answer["gaps"][scheme]]
    for (scheme, group), gaps in zip(groups, corrected(answer["gaps"][s][g] for s, g in groups), strict=True):
        answer["gaps"][scheme][group] = gaps
    for by_group in answer["gaps"].values():
        for group, gaps in by_group.items():
            by_group[group] = {
                name: {"value": gap.pop("difference")} | gap for name, gap in gaps.items() if name in METRICS
            }
    return answer


# -- below: how it is done


def _test(
    space: SearchSpace, home: Path, name: str, protocol: Protocol, console: Console, argv: list[str]
) -> Predictions:
    experiment = space.experiment.model_copy(update={"name": name, "protocol": protocol})
    storage = space.storage.model_copy(update={"results": str(home)})
    run = space.model_copy(update={"experiment": experiment, "storage": storage, "search": {}})
    directory = home / name
    if not (directory / "evaluation" / "test.json").is_file():
        train(run, console, argv)
        evaluate(directory, run, console, argv)
    return read_predictions(directory / "evaluation" / "predictions.parquet")["test"]


def _table(answer: dict[str, Any]) -> Table:
    table = Table("tested on", "split", *METRICS, "uar above speaker-disjoint", title="leakage gap")
    for scheme, groups in answer["schemes"].items():
        for group, metrics in groups.items():
            gap = answer["gaps"][scheme][group]["uar"]
            cells = [f"{metrics[f]['value']:.3f} [{_limits(metrics[f])}]" for f in METRICS]
            above = "" if scheme == DISJOINT else f"{gap['value']:+.3f} [{_limits(gap, '+')}]"
            table.add_row(f"{group} ({metrics['n']})", scheme, *cells, above)
    return table


def _limits(figure: dict[str, Any], sign: str = "") -> str:
    return ", ".join(f"{limit:{sign}.3f}" for limit in figure["ci95"] or ()) or "cannot be tested"

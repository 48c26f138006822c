"""HTML pages of one search, or of several side by side. Templates: ``ser_ray/templates``; every value is escaped."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import jinja2
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from ser_ray.evaluation import comparison, ensemble, mistakes, plots, trial_plots
from ser_ray.evaluation.calibration import abstention, reliability, sentences
from ser_ray.evaluation.card import what_chose
from ser_ray.evaluation.exports import BEST
from ser_ray.evaluation.folder import COSTS, DEV_METRICS
from ser_ray.evaluation.gaps import limits
from ser_ray.evaluation.layout import ENSEMBLE
from ser_ray.evaluation.metrics import HEADLINE
from ser_ray.evaluation.predictions import Predictions
from ser_ray.evaluation.results import Results, as_number
from ser_ray.evaluation.verdicts import NAMES, brief_p, limits_of, signed, verdicts
from ser_ray.schema import UserError

TITLES: Final = NAMES | {
    "f1": "F1",
    "trial_id": "trial",
    "seconds": "time",
    "best_epoch": "best epoch",
    "dev_uar": "dev UAR",
    "dev_accuracy": "dev accuracy",
    "dev_macro_f1": "dev macro F1",
    "dev_kappa": "dev kappa",
    "peak_memory_mb": "memory [MB]",
    "trainable_parameters": "trainable",
    "seconds_per_epoch": "s per epoch",
}
"""The title of a key in tables; a key without an entry is shown by its own name."""


@dataclass(frozen=True)
class Part:
    """A plot of a page: the matplotlib figure, to save as a file, and its SVG in the page's colours."""

    figure: Figure
    svg: Markup


def search_page(results: Results, parts: Mapping[str, Part], importances: Any, audio: bool) -> str:
    """The page of one search.

    Args:
        results: the content of its folder.
        parts: from `search_parts`.
        importances: of the searched keys, from `ser_ray.trials.importance`, or None.
        audio: whether to embed the recordings of the most confident mistakes.
    """
    split = "test" if results.test else "dev"
    detail = results.test or results.dev
    predictions = results.predictions.get(split)
    doubtful = mistakes.most_confident(predictions) if predictions is not None else []
    recordings, silent = _recordings(results, doubtful) if audio and doubtful else ({}, "")
    protocol = detail.get("protocol") or results.space.experiment.protocol.split()
    return (
        _environment()
        .get_template("search.html")
        .render(
            results=results,
            detail=detail,
            detail_of=split,
            drawn={name: part.svg for name, part in parts.items()},
            verdicts=verdicts(results),
            chose=what_chose(results.test, results.metric) if results.test else "",
            published=results.test.get("published", ()),
            columns=trial_columns(results),
            counts=trial_counts(results),
            finalists=results.choice.get("finalists", ()),
            dev_metrics=DEV_METRICS,
            metric=results.space.tune.metric,
            importances=importances,
            front=_front(results),
            calibration=reliability(predictions) if predictions is not None else None,
            calibrated=sentences(results.calibration),
            combined=ensemble.sentences(results.ensemble, NAMES[results.metric]),
            answered=abstention(predictions)[3::4] if predictions is not None else [],
            enrolment=enrolment_curves(results),
            tries=commands(results),
            mistakes=doubtful,
            wrong=int((predictions.predicted != predictions.labels).sum()) if predictions is not None else 0,
            recordings=recordings,
            silent=silent,
            protocol={key: value for key, value in protocol.items() if value is not None},
            command=shlex.join(["ser-ray", *results.provenance["argv"]]) if results.provenance else "",
            again=shlex.join(["ser-ray", "rerun", str(Path(results.space.storage.results) / results.folder.name)]),
        )
    )


def search_parts(results: Results) -> dict[str, Part]:
    """The plots that there are data for, of: test, dev, curves, parallel, cost, enrolment, reliability,
    abstention."""
    metric, winner = results.space.tune.metric, results.leader.get("trial_id")
    parts = {}
    for split, summary in (("test", results.test), ("dev", results.dev)):
        if summary:
            title = f"{split}: {summary['n']} utterances"
            figure = plots.plot_confusion(np.array(summary["confusion"]), summary["labels"], title)
            parts[split] = _part(figure, f"confusion matrix {split}")
    if any(results.histories.values()):
        parts["curves"] = _part(plots.plot_learning_curves(results.histories, winner, metric), "learning curves")
    rows = _with_numbers(results.trials, [metric])
    if len(rows) > 1 and any(row.get(key) for row in rows for key in results.space.search):
        figure = trial_plots.plot_parallel(rows, results.space.search, metric, winner)
        parts["parallel"] = _part(figure, "parallel coordinates of the trials")
    spent = _costs(results)
    rows = _with_numbers(results.trials, [metric, *spent])
    if len(rows) > 1 and spent:
        parts["cost"] = _part(trial_plots.plot_cost(rows, spent, _front(results), metric), "cost of the trials")
    if curves := enrolment_curves(results):
        parts["enrolment"] = _part(
            plots.plot_enrolment(curves, results.metric), "what recordings of a speaker are worth"
        )
    predictions = results.predictions.get("test" if results.test else "dev")
    if predictions is not None:
        parts["reliability"] = _part(_plot_reliability(predictions), "reliability diagram")
        figure = plots.plot_abstention(abstention(predictions), f"{len(predictions)} utterances")
        parts["abstention"] = _part(figure, "metrics of the surest answers")
    return parts


def enrolment_curves(results: Results) -> dict[str, Sequence[Mapping[str, Any]]]:
    """Split -> the rows of its curve of `ser_ray.evaluation.enrolment`; empty for a model that knows no speakers."""
    return {split: results.enrolment[split] for split in ("test", "dev") if results.enrolment.get(split)}


def commands(results: Results) -> list[tuple[str, str]]:
    """What can be done with the best checkpoint of a search: a sentence and a command for each, to be given in the
    folder in which the report is made. Empty while there is no such checkpoint."""
    best = results.folder / BEST
    if not best.is_dir():
        return []
    path, here = str(best), Path.cwd()
    if best.is_relative_to(here):
        path = str(best.relative_to(here))

    def command(*words: str) -> str:
        return shlex.join(["ser-ray", *words])

    found = [("The emotion of a recording:", command("predict", path, "call.wav"))]
    if results.calibration:
        said = "With each answer a set that holds the true emotion in 90 % of the cases:"
        found.append((said, command("predict", path, "call.wav", "--sets")))
    if results.enrolment:
        enrolled = command("enrol", path, "anna", "--output", "anna.json")
        known = command("predict", path, "call.wav", "--voice", "anna.json")
        found.append(("A speaker made known by a folder of recordings without labels:", f"{enrolled} && {known}"))
    if (best / ENSEMBLE).is_file():  # which neither a server nor a page has
        said = "All of its models as one graph, for programs without ser_ray:"
        return [*found, (said, command("export", path, "--to", "onnx"))]
    return [
        *found,
        ("A server, and a page in the browser at http://127.0.0.1:8000:", command("serve", path)),
        (
            "A page that answers by itself, without a server (where onnxruntime-web is not in package/dist, the "
            "command says how to get it):",
            command("export", path, "--to", "page", "--ort", "package/dist"),
        ),
    ]


def comparison_page(searches: Sequence[Results]) -> str:
    """The page of several searches side by side."""
    named = dict(zip(comparison.labels(searches), searches, strict=True))
    searched = dict.fromkeys(key for r in searches for key in r.space.search)
    winners = [{"trial_id": named_leader(r), **r.leaders_config(searched)} if r.leader else {} for r in searches]
    histories = {name: r.histories.get(r.leader.get("trial_id", ""), []) for name, r in named.items()}
    tested = {
        name: (r.answer["uar"], r.test.get("ci95", {}).get("uar")) for name, r in named.items() if "uar" in r.answer
    }
    drawn = {}
    if tested:
        drawn["intervals"] = _part(plots.plot_intervals(tested, "test UAR"), "test metrics with intervals").svg
    metrics = {r.space.tune.metric for r in searches}
    if any(histories.values()):
        metric = metrics.pop() if len(metrics) == 1 else "dev_uar"
        drawn["winners"] = _part(plots.plot_winners(histories, metric), "learning curves of the winners").svg
    costs = {name: comparison.costs(r) for name, r in named.items()}
    return (
        _environment()
        .get_template("comparison.html")
        .render(
            searches=named,
            stamped=[name for name, r in named.items() if r.leaky],
            gaps=comparison.gaps(searches),
            differing=comparison.differing(searches),
            winners=winners,
            winner_keys=list(dict.fromkeys(key for row in winners for key in row)),
            costs=costs,
            cost_keys=list(dict.fromkeys(key for row in costs.values() for key in row)),
            cost_titles={"trials": "trials", "seconds": "time of all trials"},
            drawn=drawn,
        )
    )


def show(key: str, value: object) -> str:
    """A value as a table shows it: metrics with three decimals, durations in hours and minutes, a dash if empty.

    >>> show("dev_uar", "0.71249"), show("optimizer.lr", "0.000312987"), show("seconds", "4000"), show("epochs", "")
    ('0.712', '0.000313', '1 h 07 min', '-')
    """
    if value is None or value == "":
        return "-"
    number = as_number(value)
    if number is None or key in ("trial_id", "status"):  # an id of digits is not a number
        return str(value)
    if key.removeprefix("dev_") in (*HEADLINE, "precision", "recall", "f1", "ece", "probability", "coverage"):
        return f"{number:.3f}"
    if key == "seconds":
        hours, minutes = divmod(round(number / 60), 60)
        return f"{hours} h {minutes:02} min" if hours else f"{number / 60:.1f} min"
    return f"{number:,.0f}" if number >= 1000 or (number >= 1 and number == int(number)) else f"{number:.3g}"


def interval(summary: Mapping[str, Any], name: str) -> str:
    """The 95 % interval of a metric as text; empty if there is none."""
    limits = (summary.get("ci95") or {}).get(name)
    return f"[{limits[0]:.3f}, {limits[1]:.3f}]" if limits else ""


def named_leader(results: Results) -> str:
    """The leader's id, and if nothing of its backbone was trained, that it is the probe."""
    trial_id: str = results.leader["trial_id"]
    if results.ensemble.get("used") and results.test:
        return f"an ensemble; the best single model is trial {trial_id}"
    return f"{trial_id}, {results.probe}" if results.probe else trial_id


def interval_units(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The unit of the intervals of each row of metrics: speakers, utterances, or empty if it has no intervals."""
    return {title: row.get("ci95_unit", "") if row.get("ci95") else "" for title, row in rows.items()}


def trial_columns(results: Results) -> list[str]:
    """The columns of trials.csv that a table of trials shows."""
    columns = ["trial_id", "status", "epochs", "seconds", *results.space.search, "best_epoch", *DEV_METRICS, *COSTS]
    present = set().union(*results.trials)
    return [column for column in columns if column in present]


def trial_counts(results: Results) -> str:
    """The number of trials, in total and by status."""
    total = f"{len(results.trials)} trial{'s' if len(results.trials) != 1 else ''}"
    counts = Counter(row.get("status", "unknown") for row in results.trials)
    return total + "".join(f", {many} {status}" for status, many in counts.most_common())


# -- below: how it is done


def _part(figure: Figure, name: str) -> Part:
    return Part(figure, Markup(plots.to_svg(figure, name)))  # noqa: S704 - matplotlib escapes


def _with_numbers(rows: Sequence[dict[str, str]], keys: Sequence[str]) -> list[dict[str, str]]:
    return [row for row in rows if all(as_number(row.get(key)) is not None for key in keys)]


def _costs(results: Results) -> list[str]:
    """The costs that at least one trial has; an older table may lack some."""
    return [key for key in COSTS if any(as_number(row.get(key)) is not None for row in results.trials)]


def _front(results: Results) -> list[str]:
    """The costs of the Pareto front: those that the search minimised, or the time per epoch."""
    known = _costs(results)
    return [key for key in results.space.tune.also or COSTS[:1] if key in known] or known[:1]


def _plot_reliability(predictions: Predictions) -> Figure:
    diagram = reliability(predictions)
    return plots.plot_reliability(diagram, f"{len(predictions)} utterances, calibration error {diagram.ece:.3f}")


def _recordings(results: Results, doubtful: Sequence[mistakes.Mistake]) -> tuple[dict[str, mistakes.Recording], str]:
    """The recordings, or none and the reason: the prepared speech may have been deleted."""
    directories = [Path(data["directory"]) for data in results.provenance.get("data", ()) if "directory" in data]
    if not directories:
        return {}, "provenance.json does not say where the prepared speech is"
    try:
        return mistakes.recordings([mistake.utterance_id for mistake in doubtful], directories), ""
    except UserError as error:
        return {}, str(error)


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parents[1] / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {
        "headline": HEADLINE,
        "titles": TITLES,
        "show": show,
        "interval": interval,
        "plain": plots.plain,
        "signed": signed,
        "limits_of": limits_of,
        "limits": limits,
        "brief_p": brief_p,
        "named_leader": named_leader,
        "interval_units": interval_units,
    }
    environment.filters["plain"] = plots.plain
    return environment

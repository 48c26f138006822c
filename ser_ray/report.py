"""Report a results folder as one page, plots and a terminal summary; or several searches side by side.

    ser-ray report results/ravdess-whisper [--no-audio]
    ser-ray report results/one results/other [--output comparison.html]

It only reads what the other commands wrote, needs neither Ray nor a GPU, and may be run at any time: for a search that
is still running, or was interrupted, it shows what there is and says what is missing. The page is a single file that
opens without a network.
"""

from __future__ import annotations

if __name__ == "__main__":  # the command line of all commands prints a UserError as one line
    import sys

    from ser_ray.__main__ import main as command

    sys.exit(command(["report", *sys.argv[1:]]))

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ser_ray.disk import resolved, write_bytes, write_text
from ser_ray.evaluation import calibration, comparison, enrolment, ensemble
from ser_ray.evaluation.card import what_chose
from ser_ray.evaluation.folder import COSTS, read_trials
from ser_ray.evaluation.gaps import limits
from ser_ray.evaluation.metrics import HEADLINE
from ser_ray.evaluation.page import (
    TITLES,
    comparison_page,
    enrolment_curves,
    interval,
    interval_units,
    named_leader,
    search_page,
    search_parts,
    show,
    trial_columns,
    trial_counts,
)
from ser_ray.evaluation.plots import to_png
from ser_ray.evaluation.results import Results, read_results
from ser_ray.evaluation.verdicts import limits_of, p_of, signed, verdicts
from ser_ray.schema import UserError
from ser_ray.terminal import PlainConsole, output_path, titled

FILES = {
    "test": "evaluation/confusion_test.png",
    "dev": "evaluation/confusion_dev.png",
    "curves": "learning_curves.png",
    "enrolment": "evaluation/enrolment.png",
}
"""Plots that are also written as files, for papers and slides."""


def build(results_dir: Path, audio: bool = True) -> Path:
    """Write ``report.html``, ``learning_curves.png``, ``evaluation/confusion_{dev,test}.png`` and, for a model with
    ``head.speaker``, ``evaluation/enrolment.png``; returns the page.

    With ``audio`` the page holds the recordings of the most confident mistakes, if the prepared speech still exists.

    Raises UserError if ``results_dir`` is not a results folder, or a file in it is broken.
    """
    results = read_results(results_dir)
    parts = search_parts(results)
    for name, file in FILES.items():
        if name in parts:
            write_bytes(results.folder / file, to_png(parts[name].figure))
    write_text(results.folder / "report.html", search_page(results, parts, _importances(results), audio))
    return results.folder / "report.html"


def compare(results_dirs: Sequence[Path], output: Path | None = None) -> Path:
    """Write a page that compares searches, by default ``comparison.html`` in their common parent folder.

    Raises UserError if one is not a results folder, or is named twice.
    """
    if len({resolved(results_dir) for results_dir in results_dirs}) < len(results_dirs):
        raise UserError("a search is named twice; name each once")
    searches = [read_results(results_dir) for results_dir in results_dirs]
    path = output or comparison.common_parent(results_dirs) / "comparison.html"
    write_text(path, comparison_page(searches))
    return path.resolve()


def print_summary(results_dir: Path, console: Console) -> None:
    """Print the trials, the chosen configuration, its metrics with intervals, and where everything is."""
    results = read_results(results_dir)
    if results.leaky:
        said = ": train and test share speakers or recordings; do not compare these metrics"
        console.print(titled("LEAKY", said, "bold red"))
    console.print(titled(results.space.experiment.name, f": {trial_counts(results)}"))
    if results.trials:
        console.print(_trials_table(results))
    if results.leader:
        console.print(titled("\nchosen" if results.choice else "\nbest so far", f": {named_leader(results)}"))
        for key, value in results.chosen_config.items():
            console.print(f"  {key}: {show(key, value)}", highlight=False)
    if results.metrics:
        console.print(_metrics_table(results))
    for sentence in verdicts(results):
        console.print(sentence)
    if not results.test:
        console.print(titled("no test metrics yet", ": the search was interrupted, or is still running", "yellow"))
    for split, rows in enrolment_curves(results).items():
        console.print(enrolment.sentence(rows, results.metric, f"{split} {TITLES[results.metric]}"))
    about = ensemble.sentences(results.ensemble, TITLES[results.metric])
    for sentence in (*about, *calibration.sentences(results.calibration)):
        console.print(sentence)
    if results.test:
        console.print(what_chose(results.test, results.metric))
    if results.openings:
        times = len(results.openings)
        said = "once" if times == 1 else f"{times} times"
        console.print(f"the test set was opened {said}", style=None if times == 1 else "red")
    for name, path in (("best checkpoint", results.folder / "best"), ("report", results.folder / "report.html")):
        if path.exists():
            console.print(f"{name}: {path!s}", soft_wrap=True, highlight=False)
    for export in results.exports:
        said = (
            f"{export.format} {export.dtype}, {export.bytes / 1e6:.1f} MB, probabilities differ by {export.largest:.1e}"
        )
        said += "" if export.current else "; of an earlier best/, export it again"
        console.print(f"export: {results.folder / export.folder!s} ({said})", soft_wrap=True, highlight=False)


def print_comparison(results_dirs: Sequence[Path], console: Console) -> None:
    """Print the test metrics of several searches with intervals, what differs, and the gaps between them."""
    searches = [read_results(results_dir) for results_dir in results_dirs]
    names = comparison.labels(searches)
    titles = ("test " + TITLES[name] for name in ("uar", "accuracy"))
    table = Table("", *titles, "95 % over", "time", "", box=SIMPLE_HEAD)
    for name, results in zip(names, searches, strict=True):
        cells = [f"{show(key, results.answer.get(key))} {interval(results.test, key)}" for key in ("uar", "accuracy")]
        stamp = Text("LEAKY" if results.leaky else "", style="bold red")
        unit, seconds = results.test.get("ci95_unit") or "-", show("seconds", comparison.costs(results)["seconds"])
        table.add_row(name, *cells, unit, seconds, stamp)
    console.print(table)
    differing = Table("", box=SIMPLE_HEAD)
    for name in names:
        differing.add_column(name, overflow="fold")
    for key, values in comparison.differing(searches).items():
        differing.add_row(key, *(value or "-" for value in values))
    if differing.row_count:
        console.print(differing)
    for gap in comparison.gaps(searches):
        said = f"no gap: {gap.no_gap_reason}"
        if gap.metrics:
            uar = gap.metrics["uar"]
            tested = f", {p_of(uar)}" if limits(uar) else ""
            said = f"{signed(uar['difference'])} points UAR {limits_of(uar)}{tested}"
        console.print(f"{gap.one} minus {gap.other}: {said}")


def main(results_dirs: list[Path], audio: bool = True, output: Path | None = None) -> int:
    """``ser-ray report``: write the page and the plots of a search, or a page that compares several; print the summary.

    ``audio``: with recordings. ``output``: the page of several, default comparison.html in their parent.
    """
    if len(results_dirs) > 1:
        page = compare(results_dirs, output and output_path(output))
        print_comparison(results_dirs, console := terminal())
        console.print(f"comparison: {page!s}", soft_wrap=True, highlight=False)
        return 0
    if output is not None:
        raise UserError("--output: the report of one search is report.html in its folder; name several to compare them")
    build(results_dirs[0], audio=audio)
    print_summary(results_dirs[0], terminal())
    return 0


def terminal() -> Console:
    """A console for summaries, 110 columns wide where the output is not a terminal, because tables need a width."""
    return PlainConsole(width=None if sys.stdout.isatty() else 110)


# -- below: how it is done


def _importances(results: Results) -> Any:
    if len(results.space.search) < 2:
        return None
    from ser_ray.trials.importance import importances  # Optuna takes a second to import

    return importances(results.space, read_trials(results.folder / "trials"))


def _trials_table(results: Results) -> Table:
    # A terminal is narrow: it shows only the metric that trials are compared by; the page shows all.
    others = {f"dev_{name}" for name in HEADLINE} - {results.space.tune.metric}
    columns = [c for c in trial_columns(results) if c not in {*others, *COSTS, "best_epoch"}]
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for column in columns:
        searched = column in results.space.search
        title = column.replace(".", ".\n") if searched else TITLES.get(column, column)
        table.add_column(title, overflow="fold", no_wrap=not searched)
    for row in results.trials:
        # The last part of a hub id or a directory distinguishes backbones.
        short = row | {"backbone": row.get("backbone", "").rsplit("/", 1)[-1]}
        cells = [show(column, short.get(column)) for column in columns]
        winner = row["trial_id"] == results.leader.get("trial_id")
        table.add_row(*([f"* {cells[0]}", *cells[1:]] if winner else cells), style="bold green" if winner else None)
    return table


def _metrics_table(results: Results) -> Table:
    units = interval_units(results.metrics)
    if len(results.metrics) > 4:  # side by side with intervals they would not fit a terminal
        table = Table("", *(TITLES[name] for name in HEADLINE), "95 % over", box=SIMPLE_HEAD, pad_edge=False)
        for title, row in results.metrics.items():
            cells = [f"{show(name, row.get(name))}\n{interval(row, name)}".strip() for name in HEADLINE]
            table.add_row(title, *cells, units[title])
        return table
    table = Table("", *results.metrics, box=SIMPLE_HEAD, pad_edge=False)  # fits 80 columns
    for name in HEADLINE:
        cells = [f"{show(name, row.get(name))} {interval(row, name)}".strip() for row in results.metrics.values()]
        table.add_row(TITLES[name], *cells)
    table.add_row("95 % over", *(unit or "-" for unit in units.values()))
    return table

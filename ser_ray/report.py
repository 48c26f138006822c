"""A results folder as one page, figures and a terminal summary.

    ser-ray report results/ravdess-whisper

It only reads what the other verbs wrote, needs neither Ray nor torch, and may be run at any time: of a search that is
still running, or was interrupted, it shows what there is and says what is missing. The page is a single file that
opens without a network.
"""

from __future__ import annotations

if __name__ == "__main__":  # one command line for all verbs: it turns a UserError into one line
    import sys

    from ser_ray.__main__ import main as command

    sys.exit(command(["report", *sys.argv[1:]]))

import argparse
import shlex
import sys
from collections import Counter
from pathlib import Path
from typing import Any, Final

import jinja2
import numpy as np
from markupsafe import Markup
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ser_ray.config import to_dict
from ser_ray.disk import write_bytes, write_text
from ser_ray.evaluation.figures import confusion_figure, learning_curves_figure, to_png, to_svg
from ser_ray.evaluation.metrics import HEADLINE
from ser_ray.evaluation.results import Results, as_number, read_results

TITLES: Final = {
    "accuracy": "accuracy",
    "uar": "UAR",
    "macro_f1": "macro F1",
    "weighted_f1": "weighted F1",
    "kappa": "kappa",
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
}
"""What a key is called in a table; one that is not here goes by its own name."""


def build(results_dir: Path) -> Path:
    """Write ``report.html``, ``learning_curves.png`` and ``evaluation/confusion_{dev,test}.png``; returns the page.

    Raises UserError where ``results_dir`` is no results folder, or a file in it is broken.
    """
    results = read_results(results_dir)
    drawn = {}
    for split, summary in (("test", results.test), ("dev", results.dev)):
        if summary:
            title = f"{split}: {summary['n']} utterances"
            figure = confusion_figure(np.array(summary["confusion"]), summary["labels"], title)
            write_bytes(results.folder / "evaluation" / f"confusion_{split}.png", to_png(figure))
            drawn[split] = Markup(to_svg(figure, f"confusion matrix {split}"))  # noqa: S704 - matplotlib escapes
    if any(results.histories.values()):
        figure = learning_curves_figure(results.histories, results.leader.get("trial_id"), results.space.tune.metric)
        write_bytes(results.folder / "learning_curves.png", to_png(figure))
        drawn["curves"] = Markup(to_svg(figure, "learning curves"))  # noqa: S704 - matplotlib escapes
    write_text(results.folder / "report.html", _page(results, drawn))
    return results.folder / "report.html"


def print_summary(results_dir: Path, console: Console) -> None:
    """Print the trials, the chosen configuration, its figures with intervals, and where everything is."""
    results = read_results(results_dir)
    if results.leaky:
        console.print("[bold red]LEAKY[/]: train and test share speakers or recordings; do not compare these figures")
    console.print(f"[bold]{escape(results.space.experiment.name)}[/]: {escape(_trial_counts(results))}")
    if results.trials:
        console.print(_trials_table(results))
    if leader := results.leader:
        console.print(f"\n[bold]{'chosen' if results.choice else 'best so far'}[/]: {escape(leader['trial_id'])}")
        for key, value in results.chosen_config.items():
            console.print(f"  {key}: {escape(show(key, value))}", highlight=False)
    if results.figures:
        console.print(_figures_table(results))
    if not results.test:
        console.print("[yellow]no test figures yet[/]: the search was interrupted, or is still running")
    if results.openings:
        times = len(results.openings)
        console.print(
            "the test set was opened once" if times == 1 else f"[red]the test set was opened {times} times[/]"
        )
    for name, path in (("best checkpoint", results.folder / "best"), ("report", results.folder / "report.html")):
        if path.exists():
            console.print(f"{name}: {escape(str(path))}", soft_wrap=True, highlight=False)


def main(arguments: list[str]) -> int:
    """``ser-ray report RESULTS_DIR``: write the page and the figures, print the summary; 0, or UserError."""
    parser = argparse.ArgumentParser(prog="ser-ray report", description="Write report.html and figures of a search.")
    parser.add_argument("results_dir", type=Path, help="the folder of one search, results/<name>")
    results_dir = parser.parse_args(arguments).results_dir
    build(results_dir)
    print_summary(results_dir, terminal())
    return 0


def terminal() -> Console:
    """A console for summaries; a log file has no width of its own, and tables need some."""
    return Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 110)


def show(key: str, value: object) -> str:
    """A value as a table shows it: figures with three decimals, durations in minutes, a dash for nothing.

    >>> show("dev_uar", "0.71249"), show("optimizer.lr", "0.000312987"), show("seconds", "4000"), show("epochs", "")
    ('0.712', '0.000313', '1 h 07 min', '-')
    """
    if value is None or value == "":
        return "-"
    number = as_number(value)
    if number is None or key in ("trial_id", "status"):  # an id of digits is no number
        return str(value)
    if key.removeprefix("dev_") in (*HEADLINE, "precision", "recall", "f1", "ece"):
        return f"{number:.3f}"
    if key == "seconds":
        hours, minutes = divmod(round(number / 60), 60)
        return f"{hours} h {minutes:02} min" if hours else f"{number / 60:.1f} min"
    return f"{number:,.0f}" if number >= 1 and number == int(number) else f"{number:.3g}"


# -- below: how it is done


def _interval(figures: dict[str, Any], name: str) -> str:
    limits = figures.get("ci95", {}).get(name)
    return f"[{limits[0]:.3f}, {limits[1]:.3f}]" if limits else ""


def _trial_columns(results: Results) -> list[str]:
    columns = ["trial_id", "status", "epochs", "seconds", *results.space.search, "best_epoch"]
    columns += ["dev_uar", "dev_accuracy", "dev_macro_f1", "dev_kappa", "peak_memory_mb", "trainable_parameters"]
    present = set().union(*results.trials)
    return [column for column in columns if column in present]


def _trial_counts(results: Results) -> str:
    total = f"{len(results.trials)} trial{'s' if len(results.trials) != 1 else ''}"
    counts = Counter(row.get("status", "unknown") for row in results.trials)
    return total + "".join(f", {many} {status}" for status, many in counts.most_common())


def _trials_table(results: Results) -> Table:
    # A terminal is narrow: of the figures only the one that trials are compared by; the page has them all.
    others = {f"dev_{name}" for name in HEADLINE} - {results.space.tune.metric}
    columns = [
        c for c in _trial_columns(results) if c not in {*others, "best_epoch", "peak_memory_mb", "trainable_parameters"}
    ]
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for column in columns:
        searched = column in results.space.search
        title = column.replace(".", ".\n") if searched else TITLES.get(column, column)
        table.add_column(escape(title), overflow="fold", no_wrap=not searched)
    for row in results.trials:
        # Of a hub id or a directory the last part tells backbones apart.
        short = row | {"backbone": row.get("backbone", "").rsplit("/", 1)[-1]}
        cells = [escape(show(column, short.get(column))) for column in columns]
        winner = row["trial_id"] == results.leader.get("trial_id")
        table.add_row(*([f"* {cells[0]}", *cells[1:]] if winner else cells), style="bold green" if winner else None)
    return table


def _figures_table(results: Results) -> Table:
    table = Table("", *map(escape, results.figures), box=SIMPLE_HEAD, pad_edge=False)  # fits 80 columns
    for name in HEADLINE:
        cells = [f"{show(name, row.get(name))} {_interval(row, name)}".strip() for row in results.figures.values()]
        table.add_row(TITLES[name], *map(escape, cells))
    return table


def _page(results: Results, drawn: dict[str, Markup]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    protocol = (results.test or results.dev).get("protocol") or to_dict(results.space.experiment.protocol)
    return environment.get_template("report_template.html").render(
        results=results,
        drawn=drawn,
        headline=HEADLINE,
        titles=TITLES,
        columns=_trial_columns(results),
        counts=_trial_counts(results),
        protocol={key: value for key, value in protocol.items() if value is not None},
        command=shlex.join(["ser-ray", *results.provenance["argv"]]) if results.provenance else "",
        show=show,
        interval=_interval,
    )

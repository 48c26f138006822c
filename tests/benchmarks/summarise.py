"""A results folder as a Markdown page for results/benchmarks/: every number read from the folder, none typed.

python tests/benchmarks/summarise.py RESULTS_DIR "the command that made it" > results/benchmarks/NAME.md
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ser_ray.evaluation.results import Results, read_results
from ser_ray.evaluation.verdicts import against_teacher

HEADLINE = ("accuracy", "uar", "macro_f1", "weighted_f1", "kappa")


def page(results: Results, command: str) -> str:
    """Headline figures, trials, per emotion and per speaker."""
    made = results.provenance
    data = ", ".join(f"{d['corpus']} ({d['utterances']} utterances, {d['hours']:.2f} h)" for d in made["data"])
    packages = ", ".join(
        f"{name} {made['packages'][name]}" for name in ("torch", "transformers", "peft", "ray", "optuna")
    )
    lines = [
        f"# {results.space.experiment.name}",
        "",
        f"```\n{command}\n```",
        "",
        f"{data}; {results.test['protocol']['description']}. "
        f"{'LEAKY. ' if results.leaky else ''}Test set opened {len(results.openings)} time(s).",
        f"Started {made['started']}, {made['seconds'] / 60:.0f} minutes, {len(made['gpus'])} GPUs; {packages}.",
        "",
        "| | " + " | ".join(HEADLINE) + " |",
        "|---|" + "---|" * len(HEADLINE),
    ]
    for name, metrics in (("test", results.test), ("dev", results.dev)):
        cells = (_with_interval(metrics, m) for m in HEADLINE)
        lines.append(f"| {name} (n = {metrics['n']}) | {' | '.join(cells)} |")
    for name, metrics in results.test["baselines"].items():
        lines.append(f"| {name} | " + " | ".join(f"{metrics[m]:.3f}" for m in HEADLINE) + " |")
    lines += ["", f"95 % intervals: bootstrap over {results.test['ci95_unit']}.", ""]
    lines += [line for sentence in against_teacher(results) for line in (sentence, "")]
    lines += _known(results)
    lines += ["## Trials", ""]
    keys = ["trial_id", "status", "epochs", *results.space.search, "best_epoch", "dev_uar", "seconds"]
    lines += ["| " + " | ".join(keys) + " |", "|---|" + "---|" * (len(keys) - 1)]
    for row in results.trials:
        chosen = "**" if row["trial_id"] == results.choice["trial_id"] else ""
        cells = [row["trial_id"], *(_short(row.get(key, "")) for key in keys[1:])]
        lines.append("| " + " | ".join(f"{chosen}{cell}{chosen}" if cell else "" for cell in cells) + " |")
    for title, group in (("emotion", "per_emotion"), ("speaker", "per_speaker")):
        rows = results.test[group]
        names = list(next(iter(rows.values())))
        lines += [
            "",
            f"## Test, per {title}",
            "",
            f"| {title} | " + " | ".join(names) + " |",
            "|---|" + "---|" * len(names),
        ]
        lines += [f"| {key} | " + " | ".join(_short(row[name]) for name in names) + " |" for key, row in rows.items()]
    return "\n".join(lines) + "\n"


def _known(results: Results) -> list[str]:
    """Test and dev by how many recordings of the speaker are known, if the chosen model uses them."""
    if not results.enrolment:
        return []
    lines = [
        "## Where a speaker is known by recordings without labels",
        "",
        "| | test UAR | dev UAR |",
        "|---|---|---|",
    ]
    for points in zip(results.enrolment["test"], results.enrolment["dev"], strict=True):
        cells = (_with_interval(metrics, "uar") for metrics in points)
        lines.append(f"| {points[0]['said']} | {' | '.join(cells)} |")
    return [*lines, ""]


def _with_interval(metrics: Mapping[str, Any], name: str) -> str:
    low, high = metrics["ci95"][name]
    return f"{metrics[name]:.3f} [{low:.3f}, {high:.3f}]"


def _short(value: object) -> str:
    """Few digits; of a directory its name alone."""
    try:
        number = float(str(value))
    except ValueError:
        text = str(value)
        return Path(text).name if Path(text).is_absolute() else text
    return f"{number:.0f}" if number == int(number) else f"{number:.3g}"


if __name__ == "__main__":
    sys.stdout.write(page(read_results(Path(sys.argv[1])), sys.argv[2]))

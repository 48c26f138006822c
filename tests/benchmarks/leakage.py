"""A leakage.json as a Markdown page for results/benchmarks/: every number read from the folder, none typed.

python tests/benchmarks/leakage.py RESULTS_DIR "the command that made it" > results/benchmarks/leakage.md
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ser_ray.disk import read_json
from ser_ray.evaluation.folder import read_trial_rows

METRICS = ("accuracy", "uar", "macro_f1")


def cell(metric: dict[str, Any], sign: str = "") -> str:
    """A metric with its interval."""
    low, high = metric["ci95"]
    return f"{metric['value']:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"


def page(home: Path, command: str) -> str:
    """The table, and what every run chose."""
    answer = read_json(home / "leakage.json")
    lines = ["# Leakage gap", "", f"```\n{command}\n```", ""]
    lines += [f"{answer['runs']} runs; under each scheme every utterance is tested once. 95 % intervals over speakers;"]
    lines += ["those of a gap are paired.", ""]
    lines += ["| tested on (n) | split | " + " | ".join(METRICS) + " | uar above speaker-disjoint |", "|---" * 6 + "|"]
    for scheme, groups in answer["schemes"].items():
        for group, metrics in groups.items():
            gap = answer["gaps"][scheme][group]["uar"]
            above = "" if gap["value"] == 0 else cell(gap, "+")
            cells = " | ".join(cell(metrics[name]) for name in METRICS)
            lines.append(f"| {group} ({metrics['n']}) | {scheme} | {cells} | {above} |")
    lines += ["", "| run | best epoch | dev UAR | test UAR |", "|---|---|---|---|"]
    for directory in sorted(path.parent for path in home.glob("*/trials.csv")):
        (row,) = read_trial_rows(directory)
        test = read_json(directory / "evaluation" / "test.json")
        lines.append(f"| {directory.name} | {row['best_epoch']} | {float(row['dev_uar']):.3f} | {test['uar']:.3f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(page(Path(sys.argv[1]), sys.argv[2]))

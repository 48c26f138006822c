"""The result of a search in sentences: what the winner beats, by how much, and whether that is significant."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from ser_ray.evaluation.gaps import Gap, limits, wins
from ser_ray.evaluation.results import THE_PROBE, Results

NAMES: Final = {
    "accuracy": "accuracy",
    "uar": "UAR",
    "macro_f1": "macro F1",
    "weighted_f1": "weighted F1",
    "kappa": "kappa",
}


def verdicts(results: Results) -> list[str]:
    """Sentences that compare the winner with baselines on test, the runner-up on dev, and published results."""
    sentences, it = [], THE_PROBE if results.probe == THE_PROBE else "it"
    for name, gaps in results.test.get("against", {}).items():
        if metric := _metric(gaps, results.metric):
            sentences.append(f"On test {it} {comparison(_with_article(name), gaps[metric], metric)}.")
    runner_up = results.choice.get("against") or {}
    if metric := _metric(runner_up.get("gap", {}), results.metric):
        name = f"the runner-up, trial {runner_up['trial_id']}"
        it = "the best single model" if results.ensemble.get("used") else it
        sentences.append(f"On dev {it} {comparison(name, runner_up['gap'][metric], metric)}.")
    sentences += [_part_of_train(name, row) for name, row in results.test.get("baselines", {}).items()]
    sentences += against_teacher(results)
    sentences.append(_averaged(results))
    sentences.append(_beside_published(results))
    return [sentence for sentence in sentences if sentence]


def against_teacher(results: Results) -> list[str]:
    """The gap of a student to its teacher, and what both cost; nothing for a model without a teacher."""
    record = results.teacher
    if not record:
        return []
    own, other = (record["costs"][name] for name in ("student", "teacher"))
    costs = (
        f"It has {_cost(own)}; its teacher has {_cost(other)} (one core of a CPU, median of {own['utterances']} "
        "utterances)."
    )
    if not (metric := _metric(record["against"], results.metric)):
        return [f"It is not compared with its teacher {record['teacher']}: {record['no_gap_reason']}.", costs]
    own_value, other_value = (record["test"][name][metric] for name in ("student", "teacher"))
    against = comparison(f"its teacher {record['teacher']}", record["against"][metric], metric)
    it = f"{THE_PROBE}, which has not seen the teacher," if results.probe == THE_PROBE else "it"
    return [f"On test {it} {against} ({own_value:.3f} and {other_value:.3f}).", costs]


def comparison(name: str, gap: Gap, metric: str) -> str:
    """Whether one beats the other: the interval must exclude 0, and p_holm, if there is one, must be below 0.05.

    >>> comparison("the runner-up", {"difference": 0.041, "ci95": [0.01, 0.072]}, "uar")
    'beats the runner-up by 4.1 points UAR [1.0, 7.2]'
    >>> comparison("the runner-up", {"difference": 0.003, "ci95": [-0.013, 0.007], "p": 0.3}, "uar")
    'does not beat the runner-up: +0.3 points UAR [-1.3, +0.7], p = 0.30'
    >>> comparison("chance", {"difference": -0.02, "ci95": [-0.03, -0.01]}, "kappa")
    'is worse than chance: -2.0 points kappa [-3.0, -1.0]'
    >>> comparison("chance", {"difference": 0.1, "ci95": None, "p": None}, "uar")
    'cannot be compared with chance: the same gap for every speaker (+10.0 points UAR) cannot be tested'
    """
    interval = limits(gap)
    if interval is None:
        points = f"{signed(gap['difference'])} points {NAMES[metric]}"
        return f"cannot be compared with {name}: the same gap for every speaker ({points}) cannot be tested"
    tested = f", {p_of(gap)}" if gap.get("p") is not None else ""
    if wins(gap) > 0:
        low, high = interval
        plain = f"[{100 * low:.1f}, {100 * high:.1f}]"
        return f"beats {name} by {100 * gap['difference']:.1f} points {NAMES[metric]} {plain}{tested}"
    verb = "is worse than" if wins(gap) < 0 else "does not beat"
    return f"{verb} {name}: {signed(gap['difference'])} points {NAMES[metric]} {limits_of(gap)}{tested}"


def p_of(gap: Gap) -> str:
    """The p-value of a gap, and if several comparisons were made, also the corrected one.

    >>> p_of({"p": 0.0123}), p_of({"p": 0.0123, "p_holm": 0.0246, "comparisons": 2})
    ('p = 0.01', 'p = 0.01, 0.02 corrected for 2 comparisons (Holm)')
    """
    if gap.get("comparisons", 1) < 2:
        return _p(gap["p"])
    return f"{_p(gap['p'])}, {_after(gap)} corrected for {gap['comparisons']} comparisons (Holm)"


def brief_p(gap: Gap) -> str:
    """The same for a cell of a table.

    >>> brief_p({"p": 0.0123}), brief_p({"p": 0.0123, "p_holm": 0.0246, "comparisons": 2})
    ('p = 0.01', 'p = 0.01; Holm 0.02')
    """
    return _p(gap["p"]) + (f"; Holm {_after(gap)}" if gap.get("comparisons", 1) > 1 else "")


def signed(share: float) -> str:
    """A difference of shares in percentage points, with its sign.

    >>> signed(0.0031), signed(-0.02), signed(-0.0001)
    ('+0.3', '-2.0', '0.0')
    """
    points = round(100 * share, 1)
    return f"{points:+.1f}" if points else "0.0"


def limits_of(gap: Gap) -> str:
    """The interval of a difference in points, or that it cannot be tested."""
    interval = limits(gap)
    return f"[{signed(interval[0])}, {signed(interval[1])}]" if interval else "cannot be tested"


# -- below: how it is done


def _p(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.01 else f"p = {p:.2f}"


def _after(gap: Gap) -> str:
    return _p(gap["p_holm"]).removeprefix("p = ")


def _metric(gaps: Mapping[str, Gap], preferred: str) -> str | None:
    """The metric to report: of those with a gap the one that trials are compared by, else UAR, else the first."""
    known = [name for name in (preferred, "uar", *gaps) if name in gaps and name in NAMES]
    return known[0] if known else None


def _with_article(name: str) -> str:
    return f"the {name}" if name.startswith("frozen") else name


def _part_of_train(name: str, row: Mapping[str, Any]) -> str:
    if "fitted_on" not in row:
        return ""
    return f"Baseline {name}: fitted on a random {row['fitted_on']} of {row['train']} train utterances, to fit memory."


def _cost(cost: Mapping[str, Any]) -> str:
    return (
        f"{cost['parameters'] / 1e6:.2f} million parameters, {cost['megabytes']:.1f} MB and "
        f"{cost['milliseconds']:.1f} ms an utterance"
    )


def _averaged(results: Results) -> str:
    metrics = results.test.get("seeds_averaged", {}).get("mean", {})
    if results.metric not in metrics:
        return ""
    folds = len({run["fold"] for run in results.runs})
    seeds = len(results.runs) // folds
    over = f", the mean over {folds} folds" if folds > 1 else ""
    return (
        f"The mean of its {seeds} seeds' probabilities gives {NAMES[results.metric]} {metrics[results.metric]:.3f} on "
        f"test{over}; a single seed gives {results.answer[results.metric]:.3f} on average."
    )


def _beside_published(results: Results) -> str:
    """The gap to the highest published metric, not tested: there are no predictions of published models."""
    known = [
        (metric, [row for row in results.test.get("published", ()) if row.get(metric) is not None])
        for metric in (results.metric, "uar", "accuracy")
        if metric in results.answer
    ]
    metric, rows = next((pair for pair in known if pair[1]), ("", []))
    if not rows:
        return ""
    row = max(rows, key=lambda one: one[metric])
    gap = round(100 * (results.answer[metric] - row[metric]), 1)
    where = f"{abs(gap):.1f} points {NAMES[metric]} {'above' if gap > 0 else 'below'}" if gap else "level with"
    note = f"; {row['note']}" if row.get("note") else ""
    highest = f", the highest of {len(rows)} published results" if len(rows) > 1 else " as published"
    return f"It is {where} {row['name']}{highest} ({row[metric]:.3f}, {row.get('source', 'no source given')}{note})."

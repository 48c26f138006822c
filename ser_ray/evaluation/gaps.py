"""Gaps between two models on the same utterances, as records of plain JSON types, corrected for multiple tests.

Several comparisons at the 5 % level find a difference too often: ten comparisons of equal models find one in four of
ten cases. Holm's step-down method keeps the probability of any false positive at 5 %, whatever the dependence between
the tests (Holm 1979, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6,
65-70).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import numpy as np

from ser_ray.evaluation.intervals import paired_gap

Gap = Mapping[str, Any]
"""difference (a share), ci95 and p (two-sided), both None if it cannot be tested; after `corrected` also p_holm and
comparisons, their number."""

LEVEL: Final = 0.05


def gap_records(
    labels: np.ndarray, one: np.ndarray, other: np.ndarray, speakers: Sequence[str], num_labels: int
) -> dict[str, dict[str, Any]]:
    """Headline metric -> its gap by `intervals.paired_gap`, with the same arguments and errors."""
    gaps = paired_gap(labels, one, other, speakers, num_labels)
    return {
        name: {
            "difference": gap.difference,
            "ci95": None if math.isnan(gap.p) else [gap.low, gap.high],
            "p": None if math.isnan(gap.p) else gap.p,
        }
        for name, gap in gaps.items()
    }


def corrected(comparisons: Iterable[Mapping[str, Gap]]) -> list[dict[str, dict[str, Any]]]:
    """The same gaps with p_holm and comparisons: per metric, over all gaps that have it and can be tested.

    >>> one, other = {"uar": {"difference": 0.1, "p": 0.01}}, {"uar": {"difference": 0.2, "p": 0.04}}
    >>> [gaps["uar"]["p_holm"] for gaps in corrected([one, other])]
    [0.02, 0.04]
    """
    records = [{name: dict(gap) for name, gap in gaps.items()} for gaps in comparisons]
    for name in dict.fromkeys(name for gaps in records for name in gaps):
        tested = [gaps[name] for gaps in records if name in gaps and gaps[name]["p"] is not None]
        for gap, p in zip(tested, holm([gap["p"] for gap in tested]), strict=True):
            gap |= {"p_holm": p, "comparisons": len(tested)}
        for gaps in records:
            if name in gaps and gaps[name]["p"] is None:
                gaps[name] |= {"p_holm": None, "comparisons": len(tested)}
    return records


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number, in the given order: the k-th smallest of m times m - k + 1, but not below
    the corrected value of a smaller one and not above 1.

    >>> holm([0.01, 0.04, 0.03, 0.005])
    [0.03, 0.06, 0.06, 0.02]
    """
    largest, adjusted = 0.0, [1.0] * len(p_values)
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, (len(p_values) - rank) * p_values[place])
        adjusted[place] = min(1.0, largest)
    return adjusted


def limits(gap: Gap) -> tuple[float, float] | None:
    """The interval of a gap; None if it cannot be tested. Older records mark that by an interval of zero width."""
    if gap.get("ci95") is None:
        return None
    low, high = gap["ci95"]
    return (low, high) if high - low > 1e-9 else None


def wins(gap: Gap) -> int:
    """1 if the first is significantly better, -1 if significantly worse, else 0. Significant: the interval excludes 0,
    and p_holm, where several comparisons were corrected for, is below 0.05."""
    interval = limits(gap)
    if interval is None or (gap.get("p_holm") or 0.0) >= LEVEL:
        return 0
    return (interval[0] > 0) - (interval[1] < 0)

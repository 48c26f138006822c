"""How far one model is ahead of another on the same utterances, as records: plain JSON types, tests corrected.

Who compares with several others at 5 % finds a difference too often: with ten that do not differ in four of ten cases.
Holm's step-down method keeps the chance of even one false alarm at 5 %, whatever the dependence between the tests
(Holm 1979, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6, 65-70).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import numpy as np

from ser_ray.evaluation.intervals import paired_gap

Gap = Mapping[str, Any]
"""difference (a share), ci95 and p (two-sided), both None where it cannot be tested; where several comparisons were
made also p_holm, and comparisons: how many."""

LEVEL: Final = 0.05


def gap_records(
    labels: np.ndarray, one: np.ndarray, other: np.ndarray, speakers: Sequence[str], num_labels: int
) -> dict[str, dict[str, Any]]:
    """Headline figure -> the gap, of `intervals.paired_gap`, whose arguments and errors these are."""
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
    """The same gaps with p_holm and comparisons: for every figure over all that are compared in it and can be tested.

    >>> one, other = {"uar": {"difference": 0.1, "p": 0.01}}, {"uar": {"difference": 0.2, "p": 0.04}}
    >>> [gaps["uar"]["p_holm"] for gaps in corrected([one, other])]
    [0.02, 0.04]
    """
    found = [{name: dict(gap) for name, gap in gaps.items()} for gaps in comparisons]
    for name in dict.fromkeys(name for gaps in found for name in gaps):
        tested = [gaps[name] for gaps in found if name in gaps and gaps[name]["p"] is not None]
        for gap, p in zip(tested, holm([gap["p"] for gap in tested]), strict=True):
            gap |= {"p_holm": p, "comparisons": len(tested)}
        for gaps in found:
            if name in gaps and gaps[name]["p"] is None:
                gaps[name] |= {"p_holm": None, "comparisons": len(tested)}
    return found


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number, in the given order: the k-th smallest of m times m - k + 1, at least what a
    smaller one became, at most 1.

    >>> holm([0.01, 0.04, 0.03, 0.005])
    [0.03, 0.06, 0.06, 0.02]
    """
    largest, found = 0.0, [1.0] * len(p_values)
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, (len(p_values) - rank) * p_values[place])
        found[place] = min(1.0, largest)
    return found


def limits(gap: Gap) -> tuple[float, float] | None:
    """The interval of a gap; None where it cannot be tested, as older records say by an interval without width."""
    if gap.get("ci95") is None:
        return None
    low, high = gap["ci95"]
    return (low, high) if high - low > 1e-9 else None


def wins(gap: Gap) -> int:
    """1 where the first is ahead, -1 where it is behind, 0 where that may be luck: the interval leaves out 0, and so it
    is after the correction for several comparisons."""
    interval = limits(gap)
    if interval is None or (gap.get("p_holm") or 0.0) >= LEVEL:
        return 0
    return (interval[0] > 0) - (interval[1] < 0)

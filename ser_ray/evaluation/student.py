"""A student beside its teacher: the gap on test, and what both cost; written by ``ser-ray distil``, read by the report.

The teacher's predictions are those of its own evaluation: nothing of test is opened for the comparison.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ser_ray.evaluation import comparison
from ser_ray.evaluation.gaps import corrected
from ser_ray.evaluation.metrics import HEADLINE
from ser_ray.evaluation.predictions import Predictions
from ser_ray.evaluation.results import Results
from ser_ray.schema import UserError


def tested(results: Results) -> Predictions:
    """The test predictions of ``best/``. If several runs were tested, it is the first of them.

    Raises UserError for a search that was not evaluated.
    """
    if not results.test or "test" not in results.predictions or not (results.folder / "best").is_dir():
        raise UserError(f"{results.folder}: it has no evaluated best/ yet; finish it with ser-ray tune or evaluate")
    return results.predictions["test"].at(range(results.runs[0]["n"]))


def record_of(student: Results, teacher: Results, costs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The content of the file, as JSON types: who the teacher is, its test metric and the student's, the paired gaps of
    student minus teacher, or why there are none, and the ``costs`` of both."""
    gap = comparison.gap(student.space.experiment.name, "its teacher", tested(student), tested(teacher))
    return {
        "teacher": student.space.experiment.distil.teacher,
        "results": str(teacher.folder),
        "test": {"student": _headline(student), "teacher": _headline(teacher)},
        "against": corrected([gap.metrics])[0] if gap.metrics else {},
        "no_gap_reason": gap.no_gap_reason,
        "costs": {name: dict(cost) for name, cost in costs.items()},
    }


# -- below: how it is done


def _headline(results: Results) -> dict[str, float]:
    run = results.runs[0]
    return {name: run[name] for name in HEADLINE}

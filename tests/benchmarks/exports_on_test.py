"""How right are a winner's exports on the test set, and its calibration?

    python tests/benchmarks/exports_on_test.py RESULTS_DIR ... --speech DIR ... > .../exports_on_test.md

Exports the winner of each search, and answers the files of its test set with the checkpoint and with each export,
every export in a fresh process without ser_ray. That is a further opening of the test set, which is recorded in the
results folder before it happens. An export that `ser-ray export` refuses, as it differs by more than the limit on dev,
is there all the same, marked. The second table is what `ser-ray tune` wrote of the calibration. Intervals are over
speakers; the largest difference is that of a probability to the checkpoint's.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np

from ser_ray import disk, export, exporting
from ser_ray.evaluation import sets
from ser_ray.evaluation.calibration import FILE
from ser_ray.evaluation.intervals import bootstrap_ci95
from ser_ray.evaluation.metrics import confusion, headline
from ser_ray.evaluation.record import record_opening
from ser_ray.exporting import Options
from ser_ray.exporting.merged import reference
from ser_ray.exporting.proof import compare
from ser_ray.exporting.recordings import data_of, labels_of
from ser_ray.protocols.task import load_task
from ser_ray.schema import SAMPLING_RATE
from ser_ray.speech.audio import load_waveform
from ser_ray.training.inference import predict as predict_recordings

PAGE: Final = "results/benchmarks/exports_on_test.md"
EXPORTS: Final = (("hf", "fp32"), ("hf", "fp16"), ("onnx", "fp32"), ("onnx", "fp16"), ("onnx", "int8"))


def main() -> int:
    """Print the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--speech", type=Path, nargs="+", required=True, help="where the corpora are")
    given = parser.parse_args()
    searches = [path.resolve() for path in given.results]
    exported = [row for path in searches for row in exports(path, given.speech)]
    names = " ".join(f"results/{path.name}" for path in searches)
    print(
        "\n".join(
            [
                "# Exports on the test set",
                "",
                "```",
                f"python tests/benchmarks/exports_on_test.py {names} --speech DIR ... > {PAGE}",
                "```",
                "",
                *(__doc__ or "").strip().split("\n\n")[2].splitlines(),
                "",
                "| search | | MB | accuracy | UAR | largest difference | the same emotion |",
                "|---|---|---|---|---|---|---|",
                *exported,
                "",
                "| search | ECE before | ECE after | sets that are to hold 90 % do so in | emotions in a set |",
                "|---|---|---|---|---|",
                *(calibrated(path) for path in searches),
                "",
                *(f"{path.name}: {reason}" for path in searches if (reason := cause(path))),
            ]
        )
    )
    return 0


def exports(results: Path, speech: Sequence[Path]) -> list[str]:
    """Rows of a table: the checkpoint, and what was exported of it."""
    best = results / "best"
    model = reference(best)
    task = load_task(model.experiment, data_of(best))
    rows = task.rows("test")
    speakers, labels = rows["speaker"].to_pylist(), labels_of(rows, task, model)
    # As files, not as prepared: the quiet ends are cut by who answers, and to cut them twice cuts more.
    whole = model.experiment.audio.model_copy(update={"trim_db": None})
    paths = [next(root / path for root in speech if (root / path).is_file()) for path in rows["path"].to_pylist()]
    waveforms = [load_waveform(path, whole) for path in paths]
    record_opening(results, "best", [Path(sys.argv[0]).name, *sys.argv[1:]])
    found = predict_recordings(model, [(waveform, SAMPLING_RATE) for waveform in waveforms])
    ours_NK = np.array([list(answer.probabilities.values()) for answer in found if answer.start is None])
    assert len(ours_NK) == rows.num_rows, "every recording of a test set can be used"

    def row(what: str, place: Path, answers_NK: np.ndarray) -> str:
        matrix = confusion(labels, answers_NK.argmax(1), answers_NK.shape[1])
        limits, _ = bootstrap_ci95(labels, answers_NK.argmax(1), speakers, answers_NK.shape[1])
        values = [f"{float(headline(matrix)[name]):.3f} {shown(limits[name])}" for name in ("accuracy", "uar")]
        apart = compare(ours_NK, answers_NK)
        last = [f"{apart.largest:.0e}", f"{apart.equal:.1%}"] if place != best else ["-", "-"]
        return "| " + " | ".join([results.name, what, f"{megabytes(place):.1f}", *values, *last]) + " |"

    made = [row("checkpoint, without its backbone", best, ours_NK)]
    with tempfile.TemporaryDirectory(prefix="ser-ray-") as scratch:
        for to, dtype in EXPORTS:
            target, form, refused = Path(scratch) / f"{to}-{dtype}", exporting.of(to), ""
            with contextlib.redirect_stdout(sys.stderr):
                if export.main(best, to, dtype, output=target):
                    refused = ", refused"
                    form.write(best, target, Options(dtype))
            theirs_NK = form.predict(target, best, waveforms, Options(dtype))
            made.append(row(f"{to} {dtype}{refused}", target, theirs_NK))
    return made


def calibrated(results: Path) -> str:
    """A row: the calibration error on test before and after, and what the sets hold."""
    record = disk.read_json(results / "evaluation" / FILE)["test"]
    errors = [f"{one['value']:.3f} {shown(one['ci95'])}" for one in (record["ece"][k] for k in ("before", "after"))]
    held = record["sets"]
    coverage = f"{held['coverage']:.1%} {shown(held['ci95'])}"
    return "| " + " | ".join([results.name, *errors, coverage, f"{held['size']:.2f}"]) + " |"


def cause(results: Path) -> str:
    """Why the coverage is not what was asked for; empty where it is."""
    record = disk.read_json(results / "evaluation" / FILE)
    return sets.gap_reason(record["dev"]["sets"], record["test"]["sets"])


def shown(limits: Sequence[float]) -> str:
    """An interval."""
    return f"[{limits[0]:.3f}, {limits[1]:.3f}]"


def megabytes(place: Path) -> float:
    """Of all files of a folder."""
    return sum(path.stat().st_size for path in place.rglob("*") if path.is_file()) / 1e6


if __name__ == "__main__":
    sys.exit(main())

"""Distil: train a small student on the probabilities of a search's winner, evaluate it, and compare the two.

    python -m ser_ray.distil RESULTS_DIR --student embedded/tiny-whisper [--speech DIR] [key=value ...]

The teacher is best/ of RESULTS_DIR. It answers the utterances of its own train set, and all recordings of the folder
DIR, which need no labels; the answers are kept below storage.cache. The student has the teacher's fold, so its dev and
test speakers are unheard by both. It is a search of one trial in a results folder of its own, RESULTS_DIR-STUDENT.
"""

from __future__ import annotations

if __name__ == "__main__":
    import sys

    from ser_ray.__main__ import main as command

    sys.exit(command(["distil", *sys.argv[1:]]))

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from rich.console import Console

from ser_ray import config, disk, prepare, report, tune
from ser_ray.config import Experiment, SearchSpace
from ser_ray.corpora.files import find_audio
from ser_ray.evaluation import student as beside_teacher
from ser_ray.evaluation.best import MEMBER
from ser_ray.evaluation.layout import ENSEMBLE
from ser_ray.evaluation.predictions import PROBABILITY
from ser_ray.evaluation.results import TEACHER, Results, read_results
from ser_ray.evaluation.verdicts import against_teacher
from ser_ray.models.classifier import build
from ser_ray.models.precision import parameters_in
from ser_ray.protocols import task as tasks
from ser_ray.protocols.task import Task, load_task, write_fold
from ser_ray.protocols.unlabelled import WORD
from ser_ray.runtime import cluster, paths
from ser_ray.runtime.answers import Answerer
from ser_ray.runtime.pool import Pool
from ser_ray.schema import UserError, shortened
from ser_ray.speech import shards

MOST_PARAMETERS: Final = 2_000_000
"""Of a student, head included: 8 MB in fp32 and 2 MB in int8, what a page or an app loads without a thought."""
MEASURED: Final = 16
"""Utterances of dev that the time is measured on, from the shortest to the longest."""
UNLABELLED: Final = "unlabelled"
"""The name of the corpus that --speech becomes."""
SAME_DATA: Final = ("labels", "label", "emotions", "merge", "exclude", "audio")
"""Fields of an experiment that a student has from its teacher, beside the fold."""
STUDENT: Final = (
    "experiment.adapter={method: full}",  # small enough to train all of it
    "experiment.head={pooling: statistics}",  # not from a probe, which could win without a teacher
    "experiment.optimizer={lr: 3.0e-4, head_lr: 1.0e-3}",  # of the backbone a third of the head's: all weights move
    "experiment.augment={}",  # the teacher answers the recording as it is
    "experiment.loss=cross_entropy",
    "experiment.batch_seconds=60",
    "experiment.epochs=30",  # a student gains from long training (Beyer et al. 2022, arXiv 2106.05237)
    "experiment.patience=8",
    "experiment.precision=auto",
    "experiment.recompute=false",
    "experiment.compile=false",
)
"""What a student is, where the command line does not say otherwise."""


@dataclass(frozen=True)
class Teacher:
    """The winner of a search."""

    results: Results
    experiment: Experiment
    """That of best/, of an ensemble the first member's: its fold and seed are those of the best trial."""
    digest: str
    """Of its weights and its experiment."""

    @property
    def best(self) -> Path:
        """Its checkpoint."""
        return self.results.folder / "best"

    @property
    def name(self) -> str:
        """For cards and reports."""
        return f"{self.experiment.name}-{self.digest}"


def main(results_dir: Path, student: str, overrides: list[str], speech: Path | None = None) -> int:
    """``ser-ray distil``: a student of the winner in ``results_dir``. ``speech``: a folder without labels, too."""
    console = report.terminal()
    teacher = read_teacher(results_dir)
    space = student_space(teacher, student, overrides)
    check_size(space.experiment)
    cluster.connect(space)
    task, shard_dirs = _same_data(teacher, space, console)
    check_unheard(teacher, task, shard_dirs)
    more = _unlabelled(space, speech, console) if speech else {}
    space = _taught(teacher, space, task, more, console)
    options = ["--student", student, *(["--speech", str(speech)] if speech else [])]
    home = tune.run(space, console, ["distil", str(results_dir), *options, *overrides])
    costs = _costs(space, {"student": home / "best", "teacher": teacher.best}, task, console)
    disk.write_json(home / TEACHER, beside_teacher.record_of(read_results(home), teacher.results, costs))
    report.build(home)
    for sentence in against_teacher(read_results(home)):
        console.print(sentence)
    return 0


def read_teacher(results_dir: Path) -> Teacher:
    """The winner of a search. Raises UserError where it was not evaluated yet."""
    results = read_results(disk.resolved(results_dir))
    beside_teacher.tested(results)
    best = results.folder / "best"
    files = [path for path in sorted(best.rglob("*")) if path.suffix == ".safetensors" or path.name in _ANSWERING]
    first = best / MEMBER.format(1) if (best / ENSEMBLE).is_file() else best
    digest = config.fingerprint([(str(path.relative_to(best)), shards.digest(path)) for path in files])
    return Teacher(results, config.load_experiment(first / "experiment.yaml"), digest)


def student_space(teacher: Teacher, student: str, overrides: Sequence[str]) -> SearchSpace:
    """The search of one trial that trains a student: the teacher's data and fold, `STUDENT`, then ``overrides``.

    Raises UserError for other data, emotions or folds than the teacher's, and where its corpora are not at hand.
    """
    theirs = config.to_dict(teacher.experiment)
    labelled = {name: path for name, path in theirs["corpora"].items() if name not in theirs["distil"]["unlabelled"]}
    given = [
        "search={}",
        f"tune={{trials: 1, metric: {teacher.results.space.tune.metric}}}",
        f"experiment.name={teacher.experiment.name}-{Path(student).name}",
        f"experiment.corpora={json.dumps(labelled)}",
        f"experiment.protocol={json.dumps(theirs['protocol'])}",
        f"experiment.seed={teacher.experiment.seed}",
        f"experiment.backbone={student}",
        "experiment.distil={}",
        f"storage.results={teacher.results.folder.parent}",
    ]
    space = config.load(teacher.results.folder / "search.yaml", [*given, *STUDENT, *overrides])
    own = config.to_dict(space.experiment)
    changed = [key for key in SAME_DATA if own[key] != theirs[key]]
    changed += ["corpora"] if own["corpora"].keys() != labelled.keys() else []
    changed += ["protocol"] if space.experiment.protocol.split() != teacher.experiment.protocol.split() else []
    if changed:
        has = shortened(json.dumps(theirs[changed[0]]), 120)
        raise UserError(f"experiment.{changed[0]}: a student has that of its teacher, {has}; leave it out")
    if space.search or space.tune.trials > 1:
        raise UserError("a student is one trial: leave out search and tune.trials")
    if space.resources.workers == 0:
        raise UserError("resources.workers: 0 trains without Ray; set resources.workers=1")
    return paths.resolve_paths(space)


def check_size(experiment: Experiment) -> None:
    """Raises UserError for a student that is larger than `MOST_PARAMETERS`."""
    count = sum(map(parameters_in, build(experiment).parameters()))
    if count > MOST_PARAMETERS:
        raise UserError(
            f"--student: {experiment.backbone} has {count / 1e6:.1f} million parameters with its head; a student has "
            f"at most {MOST_PARAMETERS / 1e6:.0f} million, such as embedded/tiny-whisper"
        )


def check_unheard(teacher: Teacher, task: Task, shard_dirs: Sequence[Path]) -> None:
    """Raises UserError unless the student is tested on what the teacher was tested on, and the teacher was trained on
    no speaker of the student's dev and test; the latter not for a fold that shares speakers and says so."""
    theirs, own = set(beside_teacher.tested(teacher.results).utterance_ids), set(task.labels("test"))
    if theirs != own:
        raise UserError(
            f"{teacher.results.folder}: the teacher was tested on {len(theirs)} utterances and the student would be on "
            f"{len(own)}, {len(theirs & own)} of them the same; run the teacher's search again on these data"
        )
    fold = Task.read(write_fold(teacher.experiment, shard_dirs, teacher.results.folder / "folds"))
    trained_on = set(fold.rows("train")["speaker"].to_pylist())
    held_out = {speaker for split in ("dev", "test") for speaker in task.rows(split)["speaker"].to_pylist()}
    if not task.leaky and (shared := sorted(trained_on & held_out)):
        raise UserError(
            f"{teacher.results.folder}: the teacher was trained on {shared[0]}, whom the student is tested on; run the "
            "teacher's search again on these data"
        )


# -- below: how it is done

_ANSWERING: Final = ("experiment.yaml", "calibration.json", ENSEMBLE)
"""Files of a checkpoint beside its weights that decide what it answers."""


def _same_data(teacher: Teacher, space: SearchSpace, console: Console) -> tuple[Task, list[Path]]:
    """The teacher's data split as its own were, and their shards."""
    folder = teacher.results.folder
    try:
        shard_dirs = prepare.prepare(space, console=console)
    except UserError as error:
        raise UserError(
            f"{folder}: the speech that the teacher was trained on is not at hand ({error.args[0]}); say where it is: "
            "experiment.corpora.NAME=DIR"
        ) from None
    before = {data["corpus"]: data["fingerprint"] for data in teacher.results.provenance["data"]}
    manifests = map(shards.read_manifest, shard_dirs)
    if changed := [one["corpus"] for one in manifests if before.get(one["corpus"]) != one["content_sha256"]]:
        raise UserError(
            f"{folder}: the data of {', '.join(changed)} are not those that the teacher was trained on; "
            "restore the files"
        )
    return load_task(space.experiment, shard_dirs), shard_dirs


def _unlabelled(space: SearchSpace, speech: Path, console: Console) -> dict[str, Path]:
    """The corpus of a folder without labels -> the table of its recordings."""
    if UNLABELLED in space.experiment.corpora:
        raise UserError(f"--speech: a corpus of the teacher is called {UNLABELLED}; leave --speech out")
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("path", "speaker", "emotion"))
    rows.writerows((disk.resolved(path), "unknown", WORD) for path in find_audio([speech]))
    table = space.cache_dir() / "corpora" / f"{UNLABELLED}-{config.fingerprint(text.getvalue())}" / "recordings.csv"
    disk.write_text(table, text.getvalue())
    return {UNLABELLED: table}


def _taught(teacher: Teacher, space: SearchSpace, task: Task, more: dict[str, Path], console: Console) -> SearchSpace:
    """The space of a student with its teacher's answers; they are computed if they are not known."""
    parts = [task.rows("train").select(tasks.COLUMNS)]
    distil = space.experiment.distil.model_copy(update={"unlabelled": tuple(more)})
    corpora = space.experiment.corpora | {name: str(table) for name, table in more.items()}
    if more:
        alone = {"corpora": {name: corpora[name] for name in more}, "distil": distil}
        experiment = space.experiment.model_copy(update=alone)
        index = shards.read_index(prepare.prepare(space.model_copy(update={"experiment": experiment}), console=console))
        parts.append(index.append_column("label", pa.array(np.zeros(index.num_rows, np.int64))).combine_chunks())
    ids = [utterance_id for rows in parts for utterance_id in rows["utterance_id"].to_pylist()]
    content = [rows["audio_sha256"].to_pylist() for rows in parts[1:]]  # train's is in the teacher's provenance
    known = config.fingerprint(ids, content, [data["fingerprint"] for data in teacher.results.provenance["data"]])
    path = space.cache_dir() / "teachers" / f"{teacher.name}-{known}.parquet"
    if path.is_file():
        console.print(f"what {teacher.name} answers is known: {path}")
    else:
        console.print(f"teacher: {teacher.name}, {teacher.experiment.backbone}; answering {len(ids)} utterances")
        _write_answers(path, teacher, space, parts, console)
    distil = distil.model_copy(update={"teacher": teacher.name, "answers": str(path)})
    return space.model_copy(
        update={"experiment": space.experiment.model_copy(update={"corpora": corpora, "distil": distil})}
    )


def _write_answers(
    path: Path, teacher: Teacher, space: SearchSpace, parts: Sequence[pa.Table], console: Console
) -> None:
    jobs = {number: _job("answers", teacher.best, rows) for number, rows in enumerate(parts)}
    found: dict[str, np.ndarray] = {}
    for answers in _run(space, jobs, "the teacher's answers", console).values():
        found |= answers
    if broken := [utterance_id for utterance_id, answer_K in found.items() if not np.isfinite(answer_K).all()]:
        raise UserError(f"{teacher.best}: what it answers to {broken[0]} is not finite; it cannot teach")
    probabilities_NK = np.stack(list(found.values()))
    columns = {PROBABILITY + emotion: probabilities_NK[:, k] for k, emotion in enumerate(teacher.experiment.emotions)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with disk.replacing(path) as aside:
        pq.write_table(pa.table({"utterance_id": list(found)} | columns), aside)


def _costs(space: SearchSpace, models: dict[str, Path], task: Task, console: Console) -> dict[str, dict[str, Any]]:
    """What each of the models costs, on the same utterances of dev; one after the other."""
    rows = task.rows("dev").sort_by("num_samples")
    places = np.unique(np.linspace(0, rows.num_rows - 1, MEASURED).round().astype(np.int64))
    chosen = rows.take(places).combine_chunks().select(tasks.COLUMNS)
    jobs = {name: _job("cost", directory, chosen) for name, directory in models.items()}
    return {name: asdict(cost) for name, cost in _run(space, jobs, "the time of an utterance", console).items()}


def _run(space: SearchSpace, jobs: dict[Any, Callable[[Any], Any]], what: str, console: Console) -> dict[Any, Any]:
    """The results of jobs of one `Answerer`."""
    worker = cluster.allocate(space, 1, console).worker
    with Pool(ray.remote(Answerer), (worker.threads, worker.gpus), 1, worker, console) as pool:
        return dict(pool.map(jobs, what))


def _job(method: str, directory: Path, rows: pa.Table) -> Callable[[Any], Any]:
    return lambda actor: getattr(actor, method).remote(str(directory), rows)

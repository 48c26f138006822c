"""Before training: the audit of what is trained, and the results folder that it goes to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ser_ray import config, disk
from ser_ray.config import SearchSpace
from ser_ray.models.pretraining import pretraining_overlap
from ser_ray.protocols import findings as audit_findings
from ser_ray.protocols.leakage import audit_search
from ser_ray.protocols.task import Task
from ser_ray.runtime import plan, provenance
from ser_ray.runtime.plan import RunPlan
from ser_ray.schema import UserError
from ser_ray.speech import shards
from ser_ray.speech.matching import same_recordings_in


def audited(space: SearchSpace, task: Task, console: Console, shard_dirs: Iterable[Path]) -> dict[str, Any]:
    """The audit of every fold that the space trains, with what only the audio and the backbones' training tell."""
    with console.status("audit: comparing the recordings"):
        known = pretraining_overlap(space.backbones(), space.experiment.corpora)
        return audit_search(space, task, same_recordings_in(shard_dirs), known)


def audit_task(space: SearchSpace, task: Task, console: Console, shard_dirs: Iterable[Path]) -> dict[str, Any]:
    """Audit every fold that the space trains and print the findings; returns the audit.

    Raises UserError for a finding that makes training pointless.
    """
    findings = audited(space, task, console, shard_dirs)
    sizes = []
    for split, part in findings["splits"].items():
        speakers = f"{part['speakers']} speaker{'s' * (part['speakers'] != 1)}"
        sizes.append(f"{split} {part['utterances']} ({speakers})")
    console.print(f"split: {task.fold.description}: {', '.join(sizes)}")
    print_audit(findings, console)
    for finding in findings["findings"]:
        if finding["level"] == "error":
            raise UserError(f"audit: {finding['what']}: {finding['detail']}")
    return findings


def print_audit(audit: Mapping[str, Any], console: Console) -> None:
    """What an audit found, and what to do about it."""
    if folds := audit.get("folds"):
        console.print(f"audit: {len(folds)} folds that are trained: {', '.join(folds)}")
    for finding in audit["findings"]:
        style = "dim" if finding["level"] == "note" else "bold red"
        console.print(f"audit {finding['level']}: {finding['what']}: {finding['detail']}", style=style)
    if audit["excluded"]:
        console.print(f"audit: excluded: {audit_findings.counted(audit['excluded'])}")
    for line in audit["advice"]:
        console.print(f"audit: to mend it: {line}")
    console.print(f"audit: {'LEAKY: metrics of this split are too high' if audit['leaky'] else 'no leak found'}")


def write_audit(space: SearchSpace, audit: Mapping[str, Any]) -> None:
    """Write ``audit.json`` and ``audit.csv`` to the results folder; not the table if `Experiment.exclude` names it, as
    the user may have edited it."""
    directory = space.results_dir()
    disk.write_json(directory / "audit.json", audit)
    if str(directory / "audit.csv") not in space.experiment.exclude:
        disk.write_text(directory / "audit.csv", audit_findings.csv_text(audit))


def open_results(space: SearchSpace, planned: RunPlan, findings: dict[str, Any], argv: list[str]) -> Path:
    """Create the results folder with search.yaml, plan.json, provenance.json, audit.json and audit.csv; an existing one
    is continued with the current plan.

    Raises UserError where the folder belongs to another configuration or other data, or cannot be written.
    """
    directory = space.results_dir()
    existing = directory / "search.yaml"
    shard_dirs = [Path(shard_dir) for shard_dir in planned.shard_dirs]
    try:
        if existing.is_file():
            before = config.load(existing)
            if refused := config.refused(before, space):
                raise UserError(
                    f"{directory} holds another search of that name, which differs in {'; '.join(refused)}; "
                    "set experiment.name, or remove the folder"
                )
            _check_data(directory, shard_dirs)
            check_excluded(directory, [utterance["utterance_id"] for utterance in findings["excluded"]])
            if config.differences(before, space):
                disk.write_text(existing, config.dump(space))
            disk.write_json(directory / plan.FILE, planned.to_dict())
            write_audit(space, findings)
            return directory
        directory.mkdir(parents=True, exist_ok=True)
        write_audit(space, findings)
        disk.write_json(directory / plan.FILE, planned.to_dict())
        disk.write_json(directory / "provenance.json", provenance.provenance(space, shard_dirs, argv))
        disk.write_text(existing, config.dump(space))
    except OSError as error:
        raise UserError(f"storage.results: cannot write to {directory}: {error.strerror}") from None
    return directory


def check_excluded(directory: Path, excluded: Iterable[str]) -> None:
    """Raises UserError if other utterances are excluded than when the search began, as where a file that
    `Experiment.exclude` names was edited since: its trials could not be compared, and test would be another set."""
    before = disk.read_json(directory / "audit.json").get("excluded", ())
    if changed := sorted({utterance["utterance_id"] for utterance in before} ^ set(excluded)):
        raise UserError(
            f"{directory}: experiment.exclude leaves out other utterances than when this search began, such as "
            f"{changed[0]}; set experiment.name to search without them, or restore the file that lists them"
        )


# -- below: how it is done


def _check_data(directory: Path, shard_dirs: Sequence[Path]) -> None:
    """Raises UserError if a corpus has other content than when the search began: its trials could not be compared."""
    before = {data["corpus"]: data["fingerprint"] for data in disk.read_json(directory / "provenance.json")["data"]}
    manifests = [shards.read_manifest(shard_dir) for shard_dir in shard_dirs]
    now = {manifest["corpus"]: manifest["content_sha256"] for manifest in manifests}
    if changed := [corpus for corpus in now if before.get(corpus) != now[corpus]]:
        raise UserError(
            f"{directory}: the data of {', '.join(changed)} have changed since this search began; set experiment.name "
            "to search over the new data, or restore the files"
        )

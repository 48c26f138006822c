"""Write a checkpoint for other programs, and prove that it answers as here.

    python -m ser_ray.export CHECKPOINT --to hf|onnx|audonnx|page|peft [--dtype fp32|fp16|int8] [--output DIR]
                             [--push USER/NAME]

CHECKPOINT is a directory such as results/demo/best. The export is loaded again by a fresh process without ser_ray, and
compared with `ser-ray predict`: on dev utterances where the results folder and its data are on this machine, else on
synthetic speech. Above the limit of `ser_ray.exporting.proof` nothing is written, and the exit code is 1. It runs
without Ray, in fp32, on the CPU.
"""

if __name__ == "__main__":
    import sys

    from ser_ray.__main__ import main as command

    sys.exit(command(["export", *sys.argv[1:]]))

import shutil
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ser_ray import __version__, disk, exporting
from ser_ray.evaluation.exports import RECORD, fingerprint
from ser_ray.evaluation.layout import ENSEMBLE
from ser_ray.exporting import Options, hub, page_format
from ser_ray.exporting.card import card
from ser_ray.exporting.merged import BASES, bases, is_quantised, reference
from ser_ray.exporting.proof import Proof, prove
from ser_ray.exporting.recordings import recordings_for
from ser_ray.models.ensemble import Model
from ser_ray.models.voice_file import digest
from ser_ray.schema import UserError
from ser_ray.terminal import PlainConsole


def main(
    directory: Path,
    to: str,
    dtype: str = "fp32",
    output: Path | None = None,
    push: str | None = None,
    backbone: str | None = None,
    ort: Path | None = None,
) -> int:
    """``ser-ray export``: the checkpoint in ``directory`` as the format ``to``; returns 1 if it does not answer as the
    checkpoint does, and then leaves nothing.

    ``output``: the new folder, by default beside the checkpoint. ``push``: where to upload it, such as anna/emotions.
    ``backbone``: where the checkpoint's backbone is now, if that has moved. ``ort``: the folder of onnxruntime-web, for
    a page.
    """
    form, directory = exporting.of(to), disk.resolved(directory)
    if dtype not in form.DTYPES:
        raise UserError(f"--dtype {dtype}: {to} is written in {' or '.join(form.DTYPES)}")
    if to not in exporting.OF_ENSEMBLES and (directory / ENSEMBLE).is_file():
        raise UserError(
            f"--to {to}: {disk.readable(directory)} is an ensemble, which is several models; use --to onnx, or export "
            f"one of them: {disk.readable(directory)}/members/01"
        )
    if to == "page":
        page_format.check_runtime(ort)
    elif ort:
        raise UserError("--ort is for --to page alone")
    target = _target(output or directory.with_name(_name(directory, to, dtype)))
    if push:
        hub.check(push)
    console = PlainConsole()
    model = reference(directory, backbone)
    form.check(model)
    recordings = recordings_for(directory, model)
    aside = target.with_name(f".{target.name[:50]}.{uuid.uuid4().hex}")
    try:
        for base in bases(model):
            shutil.rmtree(aside, ignore_errors=True)
            options = Options(dtype, backbone, base, ort)
            console.print(f"writing {to}, and comparing it with ser-ray predict on {recordings.source} ...")
            notes = form.write(directory, aside, options)
            proof = prove(form, aside, directory, model, recordings, options)
            if proof.holds:
                break
            console.print(f"not the same answers: over {BASES[base]}, {proof}", style="red")
        else:
            return 1
        about = _record(model, directory, to, options, notes, proof) | {"bytes": _size(aside)}
        text = card(form, model, directory, about, proof)
        disk.write_text(aside / "README.md", text.replace(exporting.PLACE, push or exporting.PLACE))
        disk.write_json(aside / RECORD, about)
        _put(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    console.print(f"{disk.readable(target)}: {_size(target) / 1e6:.1f} MB; {proof}")
    if push:
        console.print(f"uploaded to {hub.upload(target, push)}")
    return 0


# -- below: how it is done


def _name(directory: Path, to: str, dtype: str) -> str:
    return "-".join([directory.name, to, *([dtype] if dtype != "fp32" else [])])


def _target(output: Path) -> Path:
    """Where the export goes: a folder that is not there, or is empty, or an earlier export, which it replaces."""
    target = disk.resolved(output)
    if target.exists() and not target.is_dir():
        raise UserError(f"--output: {disk.readable(output)} is a file; name a new folder")
    if target.is_dir() and not (target / RECORD).is_file() and any(target.iterdir()):
        raise UserError(f"--output: {disk.readable(output)} holds files that are no export; name a new folder")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output: {disk.readable(target.parent)}: {error.strerror}; name another folder") from None
    return target


def _record(
    model: Model, directory: Path, to: str, options: Options, notes: Sequence[str], proof: Proof
) -> dict[str, Any]:
    if is_quantised(model):
        notes = [f"Updates that were trained over weights in 4 bits, added to {BASES[options.base]}, in fp32.", *notes]
    return {
        "format": to,
        "dtype": options.dtype,
        "version": __version__,
        "made": time.strftime("%Y-%m-%d"),
        "name": model.experiment.name,
        "checkpoint": f"{directory.parent.name}/{directory.name}",
        "head": digest(model),
        "fingerprint": fingerprint(directory),
        "emotions": list(model.experiment.emotions),
        "notes": list(notes),
        "proof": proof.content(),
    }


def _put(aside: Path, target: Path) -> None:
    """Rename the finished export to its place; an earlier one is removed only when the new one is there."""
    before = target.with_name(f"{aside.name}.before")
    if target.is_dir():
        target.rename(before)
    aside.rename(target)
    shutil.rmtree(before, ignore_errors=True)


def _size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())

"""The model card of an export: what it is, how well it does on whom, that it answers as the checkpoint, and its limits.

Its head is the metadata that Hugging Face's hub reads, with the metrics as a model-index.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from huggingface_hub import EvalResult, ModelCardData, try_to_load_from_cache

from ser_ray.config import Experiment
from ser_ray.corpora.describe import licence_of
from ser_ray.disk import read_json
from ser_ray.evaluation.card import LEAKY, METRICS, metrics_table, speech_words, what_chose
from ser_ray.evaluation.verdicts import NAMES
from ser_ray.exporting import Format
from ser_ray.exporting.proof import Proof
from ser_ray.exporting.recordings import data_of
from ser_ray.models import pretrained
from ser_ray.models.ensemble import Model, members_of
from ser_ray.models.pretrained import on_hub, shown
from ser_ray.schema import is_known
from ser_ray.speech import shards

TASK: Final = "audio-classification"
AI_ACT: Final = (
    "In the European Union it is prohibited to put into service or use systems that infer people's emotions, from "
    "their voice too, at work and in education, other than for medical or safety reasons (AI Act, Regulation (EU) "
    "2024/1689, Art. 5(1)(f)). Elsewhere, people have to be told that such a system is used on them (Art. 50(3))."
)


def card(form: Format, model: Model, directory: Path, about: Mapping[str, Any], proof: Proof) -> str:
    """The card as Markdown, with its head. ``directory``: the checkpoint; ``about``: the content of export.json."""
    experiment = model.experiment
    evaluation = _evaluation(directory)
    facts = _spoken(directory, evaluation)
    data = ModelCardData(
        model_name=experiment.name,
        pipeline_tag=TASK,
        library_name=form.LIBRARY,
        language=sorted(facts["languages"]) or None,
        base_model=_one_or_all([name for name in _backbones(model) if on_hub(name)]),
        tags=["speech-emotion-recognition", "ser_ray"],
        metrics=["accuracy", "recall"],
        eval_results=_results(experiment, evaluation.get("test")),
    )
    notes = "".join(f"- {note}\n" for note in about["notes"])
    text = (
        f"# {experiment.name}\n\n"
        f"Emotion of speech, one of {', '.join(experiment.emotions)}: {_parts(model)}, trained and exported with "
        f"ser_ray {about['version']}.\n\n"
        f"## Use\n\n{form.usage(model)}\n\n"
        f"## Metrics\n\n{_metrics(evaluation, experiment)}\n\n"
        f"## Same answers as the checkpoint\n\n{_proof(proof)}\n{notes}\n"
        f"## Trained and tested on\n\n{_material(experiment, facts)}\n\n"
        f"## Intended use and limits\n\n"
        f"For research on emotion in speech like the above. {speech_words(list(experiment.corpora))} Expect lower "
        "metrics on other speakers, languages and microphones than were tested. It knows no other emotions than those "
        "above, and names one for every recording. What a voice expresses is not what a person feels: do not use it to "
        f"judge people.\n\n{AI_ACT}\n\n"
        f"## Licences\n\n{_licences(model)}\n"
    )
    return f"---\n{data.to_yaml()}\n---\n\n{text}"


# -- below: how it is done


def _evaluation(directory: Path) -> dict[str, Any]:
    """The records of dev and test of the chosen model, beside which ``best/`` lies; else what the checkpoint says of
    itself, under ``own``."""
    folder = directory.parent / "evaluation"
    if directory.name == "best" and (folder / "test.json").is_file():
        names = ("dev", "test", "choice")
        return {name: read_json(folder / f"{name}.json") for name in names if (folder / f"{name}.json").is_file()}
    own = directory / "metrics.json"  # which an ensemble does not have
    return {"own": read_json(own) if own.is_file() else {}}


def _backbones(model: Model) -> list[str]:
    """Each once."""
    return list(dict.fromkeys(member.experiment.backbone for member in members_of(model)))


def _one_or_all(names: list[str]) -> str | list[str] | None:
    """As the hub has one name, or a list of several."""
    return names[0] if len(names) == 1 else names or None


def _parts(model: Model) -> str:
    members = [member.experiment for member in members_of(model)]
    named = [f"{shown(experiment.backbone)} ({experiment.adapter.method})" for experiment in members]
    if len(named) == 1:
        return f"{named[0]} and a classifier"
    what = f"the product of the calibrated probabilities of {len(named)} models"
    return f"{what}, {', '.join(named)}, with a classifier each"


def _spoken(directory: Path, evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """Languages of the data, if they are on this machine, and the speakers of test."""
    data = data_of(directory)
    languages = set(shards.read_index(data)["language"].to_pylist()) - {None, ""} if data else set()
    speakers = [name for name in evaluation.get("test", {}).get("per_speaker", {}) if is_known(name)]
    return {"languages": languages, "speakers": speakers}


def _results(experiment: Experiment, test: Mapping[str, Any] | None) -> list[EvalResult] | None:
    if not test:
        return None
    corpora = ", ".join(experiment.corpora)
    protocol = {"protocol": test["protocol"]["description"], "leaky": test["leaky"]}
    return [
        EvalResult(
            task_type=TASK,
            task_name="Speech emotion recognition",
            dataset_type="-".join(experiment.corpora),
            dataset_name=corpora,
            dataset_split="test",
            dataset_args=protocol,
            metric_type="recall" if name == "uar" else name,
            metric_name=NAMES[name],
            metric_value=round(test[name], 4),
            metric_args={"ci95": [round(limit, 4) for limit in test["ci95"][name]], "over": test["ci95_unit"]},
        )
        for name in METRICS
    ]


def _metrics(evaluation: Mapping[str, Any], experiment: Experiment) -> str:
    if "test" not in evaluation:
        own = evaluation["own"]
        known = [f"{NAMES[name]} {own[f'dev_{name}']:.3f}" for name in METRICS if f"dev_{name}" in own]
        dev = f"On dev, by which its epoch was chosen: {', '.join(known)}, without intervals. " if known else ""
        return f"{dev}It was not evaluated on a test set that is known here: its metrics on unheard speech are unknown."
    test = evaluation["test"]
    metric = str(evaluation.get("choice", {}).get("metric", "dev_uar")).removeprefix("dev_")
    return (
        f"{LEAKY if test['leaky'] else ''}{metrics_table(evaluation['dev'], test)}\n\n"
        f"Protocol: {test['protocol']['description']}; speakers or audio shared between splits: "
        f"{'yes (LEAKY)' if test['leaky'] else 'none'}. 95 % intervals: bootstrap over the unit in the last column. "
        f"{what_chose(test, metric)}"
    )


def _proof(proof: Proof) -> str:
    d = proof.difference
    uar = "" if d.uar is None else f" UAR is {d.uar:.4f} for the checkpoint and {d.uar_export:.4f} for this export."
    return (
        f"Loaded in a fresh process without ser_ray, and compared with `ser-ray predict` on {d.recordings} recordings, "
        f"{proof.source}: probabilities differ by at most {d.largest:.1e} and by {d.mean:.1e} on average (limit "
        f"{proof.limit:g}); {d.equal:.1%} of the recordings get the same emotion.{uar} In fp32 on a CPU.\n"
    )


def _material(experiment: Experiment, facts: Mapping[str, Any]) -> str:
    languages, speakers = sorted(facts["languages"]), facts["speakers"]
    return (
        f"- Corpora: {', '.join(experiment.corpora)}.\n"
        f"- Languages: {', '.join(languages) if languages else 'not recorded'}.\n"
        f"- Emotions: {', '.join(experiment.emotions)}.\n"
        f"- Speakers of test: {f'{len(speakers)} ({_few(speakers)})' if speakers else 'not recorded'}."
    )


def _few(names: list[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _licences(model: Model) -> str:
    lines = []
    for name in _backbones(model):
        see = f"see https://huggingface.co/{name}" if on_hub(name) else "ask where it is from"
        lines.append(f"- Backbone {shown(name)}: {_licence_of(name) or f'not recorded; {see}'}.")
    lines += [f"- Corpus {corpus}: {licence_of(corpus) or 'not recorded'}." for corpus in model.experiment.corpora]
    return "\n".join([*lines, "\nWhoever publishes this model chooses its licence, within what these allow."])


def _licence_of(backbone: str) -> str:
    """What the card of a backbone says, if it lies here; an embedded one is part of this project."""
    if backbone.startswith(pretrained.EMBEDDED):
        return "Apache-2.0, as ser_ray"
    found = try_to_load_from_cache(backbone, "README.md") if on_hub(backbone) else None
    path = Path(found) if isinstance(found, str) else Path(pretrained.source(backbone)) / "README.md"
    head = path.read_text("utf-8", errors="replace").split("\n---", 1)[0] if path.is_file() else ""
    found_in = re.search(r"^license: *[\"']?([\w.-]+)", head, re.M) if head.startswith("---") else None
    return found_in[1] if found_in else ""

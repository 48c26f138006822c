"""The model card of ``best/``: what the model is, how it was selected, its metrics, and its limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from ser_ray.config import Experiment
from ser_ray.corpora.describe import speech_of
from ser_ray.evaluation.calibration import sentences
from ser_ray.evaluation.ensemble import sentences as about_ensemble
from ser_ray.evaluation.results import the_probe
from ser_ray.evaluation.verdicts import NAMES

METRICS: Final = ("accuracy", "uar", "macro_f1", "kappa")
LEAKY: Final = "**LEAKY: speakers or audio are shared between splits; these metrics are inflated.**\n\n"
_KNOWN: Final = (
    "These metrics are for speakers of whom nothing is known. Recordings of a speaker, without labels, make him or her "
    "known: `ser-ray enrol THIS_DIRECTORY AUDIO... --output voice.json`, then `ser-ray predict` with `--voice "
    "voice.json`.\n\n"
)


def model_card(
    experiment: Experiment,
    dev: Mapping[str, Any],
    test: Mapping[str, Any],
    metric: str,
    calibrated: Mapping[str, Any] | None = None,
    ensemble: Mapping[str, Any] | None = None,
) -> str:
    """The card as Markdown, from the experiment of the checkpoint and the evaluation records of dev and test.

    ``metric`` is the one that trials are compared by, such as ``uar``. ``calibrated``: of `calibration.record_of`.
    ``ensemble``: the content of ``ensemble.json``, if the model is one.
    """
    return (
        f"# {experiment.name}\n\n"
        f"Speech emotion classifier: {_model(experiment, test, ensemble)}; "
        f"emotions: {', '.join(experiment.emotions)}.\n"
        f"Corpora: {', '.join(experiment.corpora)}. Protocol: {test['protocol']['description']}.\n\n"
        f"{LEAKY if test['leaky'] else ''}"
        f"{metrics_table(dev, test)}\n\n"
        f"95 % intervals: bootstrap over the unit in the last column. {what_chose(test, metric)}\n\n"
        f"{_taught(experiment, test)}"
        f"{_paragraph(about_ensemble(ensemble or {}, NAMES[metric]))}"
        f"{_paragraph(sentences(calibrated or {}))}"
        f"{_KNOWN if experiment.head.speaker != 'none' else ''}"
        "Input: mono audio at 16 kHz, silence trimmed as set in experiment.yaml. "
        f"Use: `ser-ray predict THIS_DIRECTORY AUDIO...`{_elsewhere(experiment)}\n\n"
        f"{limits(list(experiment.corpora))}\n"
    )


def limits(corpora: list[str]) -> str:
    """What a model that was trained on these corpora is not for."""
    return (
        f"{speech_words(corpora)} Expect lower metrics on other speakers, languages and microphones. "
        "Do not use it to judge people."
    )


def metrics_table(dev: Mapping[str, Any], test: Mapping[str, Any]) -> str:
    """A table in Markdown of the metrics of dev and test, with intervals, from their evaluation records."""
    titles = [NAMES[name] for name in METRICS]
    return (
        f"| split (utterances) | {' | '.join(titles)} | 95 % intervals over |\n|---|{'---|' * len(titles)}---|\n"
        f"{_row('dev', dev)}\n{_row('test', test)}"
    )


def speech_words(corpora: list[str]) -> str:
    """Sentences that say whether the speech of the corpora is acted, synthetic, or not known to be either."""
    words = {
        "acted": "Acted speech ({}): expect lower metrics on spontaneous emotion.",
        "synthetic": "Synthetic speech ({}): the metrics say nothing about human speech.",
        "": "Whether the speech of {} is acted or spontaneous is not known here.",
    }
    named = {kind: ", ".join(name for name in corpora if speech_of(name) == kind) for kind in words}
    return " ".join(words[kind].format(names) for kind, names in named.items() if names)


def what_chose(test: Mapping[str, Any], metric: str) -> str:
    """How the model was selected, and whether tested utterances influenced that; ``test``: the content of test.json."""
    runs = test.get("runs", ())
    if len(runs) < 2:
        return "This checkpoint was selected on dev; test was not used for selection."
    folds, seeds = (sorted({run[key] for run in runs}) for key in ("fold", "seed"))
    own = runs[0]
    chosen = (
        f"This configuration was selected by the mean dev {NAMES[metric]} of {len(runs)} runs "
        f"({_numbered('fold', folds)}; {_numbered('seed', seeds)}); best/ is one of them, fold {own['fold']}, "
        f"seed {own['seed']}, and the metrics are over all."
    )
    shared = test.get("tested_in_dev")
    if shared is None:  # an older record
        return chosen
    if shared == 0:
        return f"{chosen} Test was not used for selection."
    return (
        f"{chosen} {shared} of the {test['tested']} tested utterances were dev in another run, and so influenced the "
        "selection of the configuration; within a run test was not used for selection."
    )


# -- below: how it is done


def _paragraph(lines: Sequence[str]) -> str:
    return f"{' '.join(lines)}\n\n" if lines else ""


def _model(experiment: Experiment, test: Mapping[str, Any], ensemble: Mapping[str, Any] | None) -> str:
    if ensemble and len(ensemble["members"]) > 1:
        return f"an ensemble of {len(ensemble['members'])} models"
    checkpoints = [run["checkpoint"] for run in test.get("runs", ())]
    among = the_probe(checkpoints)
    others = f" ({among})" if len(checkpoints) > 1 and among else ""
    if not the_probe(checkpoints[:1]):
        return f"{experiment.backbone}, {experiment.adapter.method}{others}"
    return (
        f"{experiment.backbone}, frozen, with the probe: logistic regression on its hidden states{others}; no epoch of "
        f"{experiment.adapter.method} was better on dev"
    )


def _taught(experiment: Experiment, test: Mapping[str, Any]) -> str:
    """Who a student was taught by; empty for a model without a teacher, and for a probe, which has none."""
    settings = experiment.distil
    if not settings.answers or the_probe([run["checkpoint"] for run in test.get("runs", ())[:1]]):
        return ""
    unlabelled = f" and of {', '.join(settings.unlabelled)}, which has no labels" if settings.unlabelled else ""
    return (
        f"Distilled: trained on the probabilities that its teacher, {settings.teacher}, gives to the utterances of "
        f"train{unlabelled} (temperature {settings.temperature:g}; weight of the labels {settings.label_weight:g}).\n\n"
    )


def _elsewhere(experiment: Experiment) -> str:
    """What who loads the adapter in another program has to know."""
    if experiment.adapter.method not in ("lora", "qlora"):
        return ""
    return (
        " With PEFT alone, merge adapter/ before use (`merge_and_unload()`), if the backbone is a WavLM: in "
        "transformers its attention bypasses updates that are not merged."
    )


def _row(split: str, metrics: Mapping[str, Any]) -> str:
    cells = [f"{metrics[m]:.3f} [{metrics['ci95'][m][0]:.3f}, {metrics['ci95'][m][1]:.3f}]" for m in METRICS]
    return f"| {split} ({metrics['n']}) | {' | '.join(cells)} | {metrics['ci95_unit']} |"


def _numbered(what: str, numbers: list[int]) -> str:
    return f"{what}{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"

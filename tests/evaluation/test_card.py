"""What the model card says: what chose what, each interval's unit, the probe, and whose speech it is."""

from dataclasses import replace
from typing import Any

import pytest
from report_fixtures import SPACE, predictions

from ser_ray.config import Experiment
from ser_ray.corpora import NAMES
from ser_ray.corpora.describe import speech_of
from ser_ray.evaluation.card import model_card, what_chose
from ser_ray.evaluation.summary import summarise


def run(fold: int, seed: int = 0, epoch: int = 4) -> dict[str, Any]:
    return {"fold": fold, "seed": seed, "checkpoint": f"finals/001-fold{fold}-seed{seed}/epoch_{epoch:03}"}


def card(
    runs: list[dict[str, Any]], corpora: tuple[str, ...] = ("ravdess",), speaker: str = "none", **test: Any
) -> str:
    """Dev is of one speaker, test of ten."""
    experiment = {**SPACE["experiment"], "corpora": dict.fromkeys(corpora, "mine.csv"), "head": {"speaker": speaker}}
    protocol = {"description": "as told"}
    dev = summarise(replace(predictions(seed=0), speakers=("ravdess/01",) * 140), protocol, False)
    tested = summarise(predictions(seed=1), protocol, False) | {"runs": runs} | test
    return model_card(Experiment.model_validate(experiment), dev, tested, "uar")


def test_of_one_run_dev_chose_and_test_nothing():
    assert "selected on dev; test was not used for selection." in card([run(0)], tested=100, tested_in_dev=0)


def test_where_folds_rotate_what_is_tested_was_dev_elsewhere():
    """Every test utterance of three folds is dev in another: to say that test chose nothing would be untrue."""
    said = card([run(1), run(0), run(2)], tested=140, tested_in_dev=140)
    assert "This configuration was selected by the mean dev UAR of 3 runs (folds 0, 1, 2; seed 0)" in said
    assert "best/ is one of them, fold 1, seed 0, and the metrics are over all." in said
    assert "140 of the 140 tested utterances were dev in another run" in said
    assert "This checkpoint was selected" not in said
    assert "Test was not used for selection" not in said


def test_of_several_seeds_of_one_fold_test_chose_nothing():
    said = card([run(0), run(0, 1)], tested=140, tested_in_dev=0)
    assert "by the mean dev UAR of 2 runs (fold 0; seeds 0, 1); best/ is one of them, fold 0, seed 0" in said
    assert said.count("Test was not used for selection.") == 1


def test_a_record_that_does_not_say_what_was_dev_claims_nothing_of_it():
    assert "used for selection" not in what_chose({"runs": [run(0), run(1)]}, "uar")


@pytest.mark.parametrize(("method", "merge"), [("lora", True), ("qlora", True), ("frozen", False), ("full", False)])
def test_who_loads_the_adapter_with_peft_is_told_to_merge_it(method: str, merge: bool) -> None:
    adapted = {**SPACE["experiment"], "corpora": {"ravdess": "mine.csv"}, "adapter": {"method": method}}
    dev = summarise(predictions(seed=0), {"description": "as told"}, False)
    said = model_card(Experiment.model_validate(adapted), dev, dev | {"runs": [run(0)]}, "uar")
    assert ("merge_and_unload()" in said) is merge


def test_every_interval_names_its_own_unit():
    rows = [line for line in card([run(0)]).splitlines() if line.startswith("| ")]
    assert rows[0].endswith("| 95 % intervals over |")
    assert rows[1].startswith("| dev (140)")
    assert rows[1].endswith("| utterances |")
    assert rows[2].startswith("| test (140)")
    assert rows[2].endswith("| speakers |")


def test_a_model_of_epoch_0_is_the_probe_and_not_what_was_never_trained():
    assert "openai/whisper-base, lora; emotions" in card([run(0)])
    said = card([run(0, epoch=0)])
    assert (
        "openai/whisper-base, frozen, with the probe: logistic regression on its hidden states; no epoch of lora"
        in said
    )
    some = card([run(0, epoch=3), run(1, epoch=0)])
    assert "openai/whisper-base, lora (the probe in 1 of 2 runs); emotions" in some
    assert "with the probe" in card([run(0, epoch=0), run(1, epoch=3)])


@pytest.mark.parametrize(
    ("corpora", "said", "unsaid"),
    [
        (("ravdess", "emodb"), ["Acted speech (ravdess, emodb): expect lower metrics on spontaneous"], ["not known"]),
        (("mine",), ["Whether the speech of mine is acted or spontaneous is not known here."], ["Acted speech"]),
        (("synthetic",), ["Synthetic speech (synthetic)"], ["Acted speech"]),
        (("crema_d", "mine"), ["Acted speech (crema_d):", "Whether the speech of mine is"], ["Synthetic"]),
    ],
)
def test_acted_speech_is_said_of_acted_corpora_alone(corpora, said, unsaid):
    text = card([run(0)], corpora)
    assert all(words in text for words in said)
    assert not [words for words in unsaid if words in text]


def test_every_corpus_says_what_its_speech_is():
    assert {speech_of(name) for name in NAMES} == {"acted", "synthetic"}
    assert [name for name in NAMES if speech_of(name) == "synthetic"] == ["synthetic"]


def test_of_a_model_that_can_know_speakers_the_metrics_are_of_unknown_ones():
    assert "These metrics are for speakers of whom nothing is known." in card([run(0)], speaker="center")
    assert "nothing is known" not in card([run(0)])

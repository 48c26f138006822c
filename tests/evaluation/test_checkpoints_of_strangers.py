"""Folders of others: ids of trials, names of corpora and links lead to nothing outside."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from backbone_fixtures import experiment

from ser_ray import config
from ser_ray.evaluation import best, ensemble, folder
from ser_ray.evaluation.calibration import Calibration
from ser_ray.evaluation.runs import Run
from ser_ray.schema import UserError
from ser_ray.trials.records import Trials


@pytest.mark.parametrize("trial_id", ["../../escaped", "002", "/tmp/escaped", None, 1])
def test_a_trial_is_written_to_its_own_folder(tmp_path: Path, trial_id: object) -> None:
    path = tmp_path / "results" / "trials" / "001" / "trial.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"trial_id": trial_id, "values": {}, "status": "failed"}))
    with pytest.raises(UserError, match=r"001/trial\.json: its trial_id is .*; it has to be that of its folder"):
        Trials(tmp_path / "results", ())


@pytest.mark.parametrize("text", ["[]", "{", '{"trial_id": "001"}', '{"trial_id": "001", "values": {}, "more": 1}'])
def test_a_record_that_is_none_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "001").mkdir()
    (tmp_path / "001" / "trial.json").write_text(text)
    with pytest.raises(UserError, match=r"trial\.json: not the record of a trial") as caught:
        folder.read_trials(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("epoch", ['"../.."', "1.5", "null"])
def test_an_epoch_is_a_number(tmp_path: Path, epoch: str) -> None:
    (tmp_path / "history.jsonl").write_text(f'{{"epoch": {epoch}, "best_epoch": {epoch}}}\n')
    with pytest.raises(UserError, match="a line is not an epoch"):
        folder.trial_history(tmp_path)


@pytest.mark.parametrize("name", ["../../out", "/out", "a/b", "..", ".hidden", "", "a\nb", "a*", "x" * 101, "a\\b"])
def test_a_name_of_a_corpus_is_that_of_a_folder(name: str) -> None:
    with pytest.raises(ValueError, match="the name of a corpus becomes that of a folder"):
        experiment("embedded/tiny-whisper", corpora={name: "/data/mine.csv"})


@pytest.mark.parametrize("name", ["mine", "MSP-Podcast 1.11", "nemo_pl", "Emoções", "語料", "a (b) + c"])
def test_other_names_of_corpora_are_as_good(name: str) -> None:
    assert experiment("embedded/tiny-whisper", corpora={name: "/data/mine.csv"}).corpora == {name: "/data/mine.csv"}


def test_what_a_link_leads_to_is_not_given_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(best, "model_card", lambda *_: "a card")
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key").write_text("secret")
    source = tmp_path / "trials" / "001" / "epoch_001"
    (source / "adapter").mkdir(parents=True)
    (source / "experiment.yaml").write_text(config.dump(experiment("embedded/tiny-whisper")))
    (source / "notes").symlink_to(tmp_path / "secret" / "key")
    (source / "more").symlink_to(tmp_path / "secret")
    (source / "adapter" / "notes").symlink_to("../../../../secret/key")
    chosen = ensemble.trial([Run("001", 0, 0, "trials/001/epoch_001")], [])
    best.install_best(tmp_path, chosen, {}, {}, "uar", Calibration())
    files = sorted(str(path.relative_to(tmp_path / "best")) for path in (tmp_path / "best").rglob("*"))
    assert files == ["README.md", "adapter", "experiment.yaml"]

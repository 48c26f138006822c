"""The trainable that trains nothing leaves what a search, its continuation and its evaluation ask of a trial."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import stub_trainable
from backbone_fixtures import experiment
from search_fixtures import record

from ser_ray import config
from ser_ray.evaluation import folder
from ser_ray.models import checkpoint
from ser_ray.runtime import tuner
from ser_ray.runtime.trial import run_trial

OURS = experiment("embedded/tiny-whisper", head={"init": "probe"}, adapter={"method": "lora", "rank": 2}, epochs=3)


@pytest.fixture(autouse=True)
def variables(untrained, monkeypatch):
    for name, value in stub_trainable.settings(untrained).items():
        monkeypatch.setenv(name, value)


def trial(directory: Path) -> SimpleNamespace:
    """What the stub asks of a `ser_ray.runtime.trial.Trial`."""
    return SimpleNamespace(experiment=config.to_dict(OURS), metric="dev_uar", directory=str(directory))


def told(directory: Path, most: int = 99) -> list[folder.Record]:
    """What a trial tells of, until it is cut off after so many epochs."""
    heard: list[folder.Record] = []

    def tell(line: folder.Record) -> None:
        heard.append(line)
        if len(heard) == most:
            raise KeyboardInterrupt

    try:
        stub_trainable.fit(trial(directory), callback=tell)
    except KeyboardInterrupt:
        assert len(heard) == most
    return heard


def test_it_tells_what_training_tells(tmp_path):
    whole = told(tmp_path / "one")
    assert [line["epoch"] for line in whole] == [0, 1, 2, 3]
    assert [line["last"] for line in whole] == [False, False, False, True]
    assert record(1, 0.5, 0.5).keys() <= whole[0].keys()
    assert folder.trial_history(tmp_path / "one") == whole
    assert told(tmp_path / "two") == whole, "figures are a function of values and epoch"


def test_it_goes_on_where_it_was_cut_off_and_tells_the_last_epoch_again(tmp_path):
    whole = told(tmp_path / "whole")
    assert told(tmp_path / "cut", 2) == whole[:2]
    assert told(tmp_path / "cut") == whole[2:]
    assert told(tmp_path / "cut") == whole[3:]
    assert folder.trial_history(tmp_path / "cut") == whole


def test_its_checkpoints_are_whole(tmp_path):
    told(tmp_path / "trial")
    model = checkpoint.load(tmp_path / "trial" / folder.checkpoint_name(3))
    assert model.experiment == OURS


def test_a_search_calls_what_is_named(monkeypatch):
    monkeypatch.delenv(tuner.TRAINABLE, raising=False)
    assert tuner._trainable() is run_trial
    monkeypatch.setenv(tuner.TRAINABLE, stub_trainable.TRAINABLE)
    assert tuner._trainable() is stub_trainable.run_trial

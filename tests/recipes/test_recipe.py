"""The recipe: what it writes, that a cut changes nothing, and a shortened one from end to end."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from recipes.embedded import material, recipe
from recipes.embedded.objectives import WEIGHTS, total
from recipes.embedded.recipe import Recipe, Training
from ser_ray.models import backbones

SHORT = Recipe("whisper", hours=0.01, steps=6, batch=3, rate=1e-3, objectives=tuple(WEIGHTS), masks=(0.1, 0.1), seed=0)
FAMILIES = ["whisper", "wav2vec2"]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def take(training, spoken, steps):
    for batch in material.batches(spoken, training.recipe.seed, training.recipe.batch, steps):
        training.update(batch)
    return training


def weights(training):
    return training.backbone.state_dict()


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_a_cut_changes_nothing(spoken, tmp_path):
    whole = take(Training(SHORT, tmp_path, "cpu"), spoken, range(6))
    take(Training(SHORT, tmp_path, "cpu"), spoken, range(4)).save(tmp_path / "latest.safetensors")
    second = Training(SHORT, tmp_path, "cpu")
    second.load(tmp_path / "latest.safetensors")
    assert second.step == 4
    take(second, spoken, range(4, 6))
    assert same(weights(whole), weights(second))
    assert whole.losses == second.losses
    assert not same(weights(whole), weights(Training(SHORT, tmp_path, "cpu")))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_is_a_directory_of_hugging_face(family, spoken, tmp_path):
    own = Recipe(**{**vars(SHORT), "family": family})
    training = take(Training(own, tmp_path, "cpu"), spoken, range(2))
    out = tmp_path / "out"
    recipe.write(training, out)
    path = out / "model.safetensors"
    assert path.stat().st_size < 8e6
    stored = load_file(path)
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    assert sum(tensor.numel() for tensor in stored.values()) < 4e6

    ours = backbones.load(str(out))
    for key, value in ours.model.state_dict().items():
        assert torch.equal(value, training.backbone.model.state_dict()[key].half().float()), key
    theirs = AutoModel.from_pretrained(out, dtype=torch.float32)
    encoder = theirs.encoder if family == "whisper" else theirs
    for key, value in encoder.state_dict().items():
        assert torch.equal(value, ours.model.state_dict()[key]), key

    told = json.loads((out / "recipe.json").read_text())
    assert told["steps_done"] == 2
    assert told["objectives"] == list(WEIGHTS)


def test_the_rate_rises_and_falls():
    rates = [recipe.rate_at(step, 2000) for step in range(2000)]
    assert max(rates) == 1 == rates[recipe.WARM_UP - 1]
    assert rates[: recipe.WARM_UP] == sorted(rates[: recipe.WARM_UP])
    assert rates[recipe.WARM_UP :] == sorted(rates[recipe.WARM_UP :], reverse=True)
    assert 0 <= rates[-1] < 1e-4


def test_losses_fall(spoken, tmp_path):
    training = Training(Recipe(**{**vars(SHORT), "steps": 40, "rate": 3e-3}), tmp_path, "cpu")
    batch = next(material.batches(spoken, 0, 3, range(1)))

    def loss():
        training.backbone.eval()
        with torch.no_grad():
            return float(total(training.heads(*training.backbone(batch.waveform_BT, batch.lengths_B), batch)))

    before = loss()
    for _ in range(40):
        training.update(batch)
    assert loss() < 0.7 * before


def test_another_recipe_beside_is_refused(tmp_path, capsys):
    arguments = [str(tmp_path / "out"), "--family", "whisper", "--speech", str(tmp_path / "spoken"), "--hours", "0.001"]
    (tmp_path / "out.training").mkdir()
    (tmp_path / "out.training" / "recipe.json").write_text('{"steps": 7}')
    assert recipe.main(arguments) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "another recipe" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_ctrl_c_keeps_the_steps_that_were_taken(tmp_path):
    arguments = f"{tmp_path}/out --family whisper --speech {tmp_path}/spoken --hours 0.02 --steps 10000 --batch 1"
    command = [sys.executable, "-m", "recipes.embedded.recipe", *arguments.split(), "--workers", "1", "--threads", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as training:
        assert training.stdout is not None
        for line in training.stdout:
            if line.startswith("step "):
                break
        os.killpg(training.pid, signal.SIGINT)
        assert "the same command continues" in training.stdout.read()
    assert training.returncode == 130
    kept = recipe.saved_notes(tmp_path / "out.training" / "latest.safetensors")
    assert int(kept["step"]) >= int(line.split()[1])


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_shortened_recipe_gives_the_same_weights_twice(family, tmp_path, capsys):
    for out in ("one", "two"):
        arguments = (
            f"{tmp_path / out} --family {family} --speech {tmp_path / 'spoken'} --hours 0.02 --steps 12 --batch 4"
        )
        assert recipe.main([*arguments.split(), "--threads", "1", "--workers", str(int(out == "two"))]) == 0
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()
    assert "step 12 of 12" in capsys.readouterr().out
    assert recipe.main([*arguments.split(), "--threads", "1", "--export"]) == 0, "nothing is left to do"

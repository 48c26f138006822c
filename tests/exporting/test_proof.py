"""The proof: what is compared, on what, and when it does not hold."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from backbone_fixtures import experiment, noise
from sklearn.metrics import balanced_accuracy_score

from ser_ray.exporting import ORIGINAL, QUANTISED, Options
from ser_ray.exporting.proof import EXACT, ROUNDED, Difference, Proof, compare, in_fresh_process, prove
from ser_ray.exporting.recordings import Recordings, recordings_for
from ser_ray.models.classifier import build
from ser_ray.protocols.task import load_task
from ser_ray.schema import SAMPLING_RATE
from ser_ray.speech import shards
from ser_ray.speech.audio import from_int16
from ser_ray.training.inference import predict

EMOTIONS = ("neutral", "calm", "happy", "sad", "angry", "fear", "disgust", "surprised")


def test_a_difference_is_that_of_a_plain_loop():
    rng = np.random.default_rng(0)
    ours, theirs = (rng.dirichlet(np.ones(4), 50) for _ in range(2))
    labels = rng.integers(0, 4, 50)
    found = compare(ours, theirs, labels)
    apart = [abs(a - b) for row, other in zip(ours, theirs, strict=True) for a, b in zip(row, other, strict=True)]
    assert found.largest == max(apart)
    assert found.mean == pytest.approx(sum(apart) / len(apart))
    assert found.equal == sum(a.argmax() == b.argmax() for a, b in zip(ours, theirs, strict=True)) / 50
    assert found.uar == pytest.approx(balanced_accuracy_score(labels, ours.argmax(1)))
    assert found.uar_export == pytest.approx(balanced_accuracy_score(labels, theirs.argmax(1)))
    assert compare(ours, theirs).uar is None


@pytest.mark.parametrize(("largest", "holds"), [(0.9e-4, True), (1.1e-4, False), (float("nan"), False)])
def test_it_holds_within_the_limit(largest, holds):
    assert Proof("x", EXACT, Difference(3, largest, 0.0, 1.0, None, None)).holds is holds


@pytest.mark.parametrize(
    ("method", "options", "limit"),
    [
        ("lora", Options(), EXACT),
        ("lora", Options("fp16"), ROUNDED),
        ("qlora", Options(base=ORIGINAL), ROUNDED),
        ("qlora", Options(base=QUANTISED), EXACT),
        ("qlora", Options("int8", base=QUANTISED), ROUNDED),
    ],
)
def test_a_recording_that_predict_refuses_does_not_count(backbones_dir, tmp_path, method, options, limit):
    model = build(experiment(backbones_dir / "whisper", adapter={"method": method, "rank": 2, "alpha": 4})).eval()
    waveform_BT, _ = noise((0.5, 0.5, 0.5))
    waveforms = list(waveform_BT.numpy())
    waveforms[1] = waveforms[1][:1000]
    given: list[np.ndarray] = []

    def exact(target: Path, directory: Path, asked: list[np.ndarray], with_options: Options) -> np.ndarray:
        given.extend(asked)
        answers = predict(model, [(waveform, SAMPLING_RATE) for waveform in asked])
        return np.array([list(answer.probabilities.values()) for answer in answers])

    form = SimpleNamespace(predict=exact)
    proof = prove(form, tmp_path, tmp_path, model, Recordings("noise", waveforms, np.array([0, 1, 2])), options)
    assert [len(waveform) for waveform in given] == [8000, 8000]
    assert proof.difference.recordings == 2
    assert proof.holds
    assert proof.limit == limit


def test_a_fresh_process_has_no_ser_ray_and_its_failure_is_shown(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, numpy\n"
        "target, given, made, more = sys.argv[1:]\n"
        "try:\n    import ser_ray.schema\nexcept ImportError:\n    pass\nelse:\n    raise SystemExit('it is there')\n"
        "if more == 'fail':\n    raise ValueError('no such head')\n"
        "arrays = numpy.load(given)\n"
        "numpy.save(made, numpy.array([[len(arrays['0']), len(arrays['1'])]]))\n"
    )
    waveforms = [np.zeros(3, np.float32), np.zeros(5, np.float32)]
    assert in_fresh_process(script, tmp_path, waveforms, "go").tolist() == [[3, 5]]
    with pytest.raises(RuntimeError, match="no such head"):
        in_fresh_process(script, tmp_path, waveforms, "fail")


def test_in_a_results_folder_it_is_on_dev_of_the_checkpoints_own_fold(backbones_dir, tiny_cache, tmp_path):
    (shard_dir,) = (tiny_cache / "shards").iterdir()
    settings = experiment(
        backbones_dir / "whisper",
        [emotion for emotion in EMOTIONS if emotion != "calm"],
        corpora={"ravdess": None},
        merge={"calm": "neutral"},
        protocol={"scheme": "speaker_kfold", "folds": 3, "fold": 1},
    )
    (tmp_path / "provenance.json").write_text(json.dumps({"data": [{"directory": str(shard_dir)}]}))
    model = build(settings)
    found = recordings_for(tmp_path / "trials" / "001" / "epoch_002", model)
    rows = load_task(settings, [shard_dir]).rows("dev")
    every = {
        utterance_id: from_int16(audio.as_buffer())
        for table in shards.read_tables([shard_dir])
        for utterance_id, audio in zip(table["utterance_id"].to_pylist(), table["audio"], strict=True)
    }
    assert rows.num_rows == len(found.waveforms) == 32
    for utterance_id, waveform in zip(rows["utterance_id"].to_pylist(), found.waveforms, strict=True):
        assert np.array_equal(every[utterance_id], waveform)
    named = [{"calm": "neutral"}.get(emotion, emotion) for emotion in rows["emotion"].to_pylist()]
    assert [settings.emotions[label] for label in found.labels] == named
    assert found.source == f"dev utterances of {tmp_path.name}"


@pytest.mark.parametrize("directory", ["/nowhere/shards/x", None])
def test_without_the_data_it_is_on_synthetic_speech_of_several_lengths(backbones_dir, tmp_path, directory):
    if directory:
        (tmp_path / "provenance.json").write_text(json.dumps({"data": [{"directory": directory}]}))
    found = recordings_for(tmp_path / "best", build(experiment(backbones_dir / "whisper")))
    seconds = [len(waveform) / SAMPLING_RATE for waveform in found.waveforms]
    assert found.labels is None
    assert min(seconds) < 0.5
    assert max(seconds) > 30
    assert len(set(seconds)) > 15
    assert found.source.startswith("synthetic speech, 0.4 to ")

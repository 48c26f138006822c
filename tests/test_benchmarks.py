"""The scripts in tests/benchmarks do what they say: the same adapters as ours, finite figures, the published names."""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import math
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import bitsandbytes
import feed
import fuzz
import gpu
import gpu_cells
import numpy as np
import order
import pyarrow as pa
import pytest
import reference_rehearsal
import soundfile
import soxr
import steps
import torch
import trainer
import variants
from backbone_fixtures import experiment, noise
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import recall_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from transformers import AutoFeatureExtractor, TrainerState

from ser_ray import config, corpora
from ser_ray.config import Audio
from ser_ray.corpora import crema_d, ravdess, tess
from ser_ray.corpora.describe import describe, differences
from ser_ray.models.classifier import build
from ser_ray.models.logmel import LogMel
from ser_ray.protocols.folds import labelled, make_fold
from ser_ray.speech.audio import is_silent, load_recording
from ser_ray.speech.fingerprint import fingerprint
from ser_ray.speech.matching import same_recordings

CPU = torch.device("cpu")
BACKBONES = ("wav2vec2-layer", "wav2vec2-group", "whisper")


def utterances(count: int) -> list[trainer.Utterance]:
    waveform_BT, lengths_B = noise([0.3 + 0.1 * (i % 4) for i in range(count)])
    rows = zip(waveform_BT, lengths_B.tolist(), strict=True)
    return [(row[:length].numpy(), number % 3) for number, (row, length) in enumerate(rows)]


def adapters(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of the low-rank updates, by the name that they have below the encoder."""
    learning = {n: tuple(p.shape) for n, p in model.named_parameters() if p.requires_grad and ".lora_" in n}
    return {name[name.index("layers.") :]: shape for name, shape in learning.items()}


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_trainer_adapts_the_same_modules_as_ours(backbones_dir: Path, backbone: str, method: str) -> None:
    settings = experiment(backbones_dir / backbone, adapter={"method": method, "rank": 4})
    theirs, ours = trainer.classifier(settings, CPU), build(settings)
    assert adapters(theirs) == adapters(ours) != {}
    rest = {name for name, p in theirs.named_parameters() if p.requires_grad and ".lora_" not in name}
    assert {name.removeprefix("base_model.model.").split(".")[0] for name in rest} == {
        "projector",
        "classifier",
        "layer_weights",
    }


@pytest.mark.parametrize("backbone", ["wav2vec2-layer", "whisper"])
def test_full_trains_the_same_weights_as_ours(backbones_dir: Path, backbone: str) -> None:
    settings = experiment(backbones_dir / backbone, adapter={"method": "full"})
    learning = {n: tuple(p.shape) for n, p in trainer.classifier(settings, CPU).named_parameters() if p.requires_grad}
    encoder = {n.split(".", 1)[1]: shape for n, shape in learning.items() if n.startswith(("wav2vec2.", "encoder."))}
    ours = {n: tuple(p.shape) for n, p in build(settings).backbone.model.named_parameters() if p.requires_grad}
    assert {n: shape for n, shape in encoder.items() if n != "masked_spec_embed"} == ours


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "grouped"), [("wav2vec2-layer", True), ("wav2vec2-group", False), ("whisper", False)]
)
def test_trainer_runs(backbones_dir: Path, backbone: str, grouped: bool) -> None:
    settings = experiment(backbones_dir / backbone, epochs=2)
    outcome = trainer.run(
        settings, utterances(7), utterances(5), batch_size=4, group_by_length=grouped, count_flops=True
    )
    assert np.isfinite(outcome.train_loss)
    assert outcome.dev_predicted.shape == (5,)
    assert 0 <= outcome.dev_uar <= 1
    assert outcome.seconds_per_epoch == pytest.approx(7 / outcome.utterances_per_s)
    assert outcome.flops_per_utterance is not None
    assert outcome.flops_per_utterance > 0


def test_trainer_has_the_pretrained_weights(backbones_dir: Path) -> None:
    """Its encoder gives the same states as ours on an utterance of 30 s."""
    settings = experiment(backbones_dir / "whisper")
    theirs, ours = trainer.classifier(settings, CPU).eval(), build(settings).eval()
    waveform_BT, lengths_B = noise([30.0])
    extractor = AutoFeatureExtractor.from_pretrained(settings.backbone)
    batch = trainer.collate(extractor, [{"input_features": waveform_BT[0].numpy(), "labels": 0}])
    with torch.inference_mode():
        hidden = theirs.get_submodule("base_model.model.encoder")(batch["input_features"]).last_hidden_state
        hiddens, _ = ours.hidden_states(waveform_BT, lengths_B)
    assert torch.allclose(hidden, hiddens[-1], atol=1e-3)


def test_clock_counts_utterances_after_the_warm_up() -> None:
    clock = trainer.Clock(CPU, utterances=7, batch_size=4, warm_up=2, counting=None)
    for step in range(1, 6):
        clock.on_step_end(None, TrainerState(global_step=step), None)
    assert (clock.warming, clock.utterances) == (7, 4 + 3 + 4)


def test_operations_of_what_torch_does_not_know() -> None:
    query = torch.randn(2, 3, 5, 8, requires_grad=True)
    with trainer.operations() as counter:
        torch.nn.functional.scaled_dot_product_attention(query, query, query)
    assert counter.get_total_flops() == 2 * (2 * 2 * 3 * 5 * 5 * 8)
    layer = bitsandbytes.nn.Linear4bit(64, 32, bias=False, quant_type="nf4").to("cpu")
    with trainer.operations() as counter:
        layer(torch.randn(7, 64, requires_grad=True))
    assert counter.get_total_flops() == 2 * 7 * 64 * 32


@pytest.mark.slow
def test_gpu_script_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every cell, tiny; whole searches are tried by their own tests, and tiny batches are all of one size."""
    jobs = [job for job in gpu.jobs(gpu_arguments(), tmp_path) if job.cells and "batches" not in job.name]
    rows = tmp_path / "rows.jsonl"
    options = ["--rows", str(rows), "--tiny", "--device", "cpu", "--minutes", "60"]
    gpu.main([*options, "--only", *(job.name for job in jobs)])
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| w")]
    found = gpu.read_rows(rows)
    assert [row for row in found if "failed" in row] == []
    cells = [cell for job in jobs for cell in job.cells if "family" in cell]
    assert len(lines) - 1 == len(cells) == sum("family" in row for row in found)
    for row in found:
        if "family" in row:
            assert math.isfinite(row["utterances_per_s"])
            assert row["utterances_per_s"] > 0
            assert row["memory_gib"] > 0
    assert all(line[7] for line in lines[:-1]), "every share of the matrix rate, also of compiled blocks"


def gpu_arguments(**own: object) -> argparse.Namespace:
    settings = {"ravdess": "DIR", "whisper": "DIR", "tiny": True, "device": "cpu"}
    return argparse.Namespace(**settings | own)


def test_every_row_that_was_promised_is_among_the_jobs(tmp_path: Path) -> None:
    jobs = gpu.jobs(gpu_arguments(), tmp_path)
    cells = [cell for job in jobs for cell in job.cells if "family" in cell]
    ours = {(c["family"], c["method"], c["seconds"]) for c in cells if "way" not in c}
    for family in ("wav2vec2", "wavlm", "whisper"):
        assert ours >= {(family, method, 120) for method in ("lora", "qlora", "full", "frozen")}
        assert any(cell["family"] == family for cell in cells if cell.get("way") == "trainer")
    assert ours >= {("whisper", "lora", seconds) for seconds in (30, 120, 480)}
    assert {cell["switch"] for cell in cells if cell.get("switch")} == set(gpu.SWITCHES)
    assert [job.name for job in jobs if job.command] == [
        "RAVDESS",
        "the demo",
        "the first step of the demo",
        "RAVDESS, a GPU each",
    ]
    assert len(gpu.jobs(gpu_arguments(ravdess=None), tmp_path)) == len(jobs) - 2


def test_a_job_that_hangs_or_fails_is_a_row_and_costs_the_others_nothing(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    writes = f"open({str(rows)!r}, 'a').write('{{\"family\": 1}}\\n')"
    for name, script in {
        "hangs": f"{writes}; import time; time.sleep(600)",
        "fails": "raise SystemExit(3)",
        "ends": "pass",
    }.items():
        limit_s = 5 if name == "hangs" else 60
        gpu.run(gpu.Job(name, limit_s, command=["-c", script]), rows, limit_s, gpu_arguments())
    with rows.open("a") as file:
        file.write('{"family": "cut o')
    first, *others = gpu.read_rows(rows)
    assert first == {"family": 1}
    assert [(row["job"], row.get("failed")) for row in others] == [
        ("hangs", "not done in 5 s"),
        ("fails", "exit code 3"),
        ("ends", None),
    ]


def test_what_runs_ends_with_the_script(tmp_path: Path) -> None:
    script = (
        f"import sys; sys.path.insert(0, {str(Path(gpu.__file__).parent)!r})\n"
        "import gpu, argparse, pathlib\n"
        "sleeps = 'import os, time; print(os.getpid(), flush=True); time.sleep(600)'\n"
        "gpu.machine = lambda: {}\n"
        "gpu.jobs = lambda *_: [gpu.Job('sleeps', 600, command=['-c', sleeps])]\n"
        f"gpu.main(['--rows', {str(tmp_path / 'rows.jsonl')!r}])\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
    log, child = tmp_path / "rows.log", ""
    while not child.isdigit():
        time.sleep(0.1)
        child = log.read_text().rpartition("==")[2].removeprefix(" sleeps").strip() if log.exists() else ""
    process.terminate()
    process.wait(60)
    assert not Path(f"/proc/{child}").exists()


def test_what_a_search_did_is_read_from_its_folder(tmp_path: Path) -> None:
    job = gpu.search("RAVDESS, a GPU each", "ravdess_whisper.yaml", tmp_path, 1)
    folder = tmp_path / "results" / "RAVDESS--a-GPU-each"
    folder.mkdir(parents=True)
    (folder / "trials.csv").write_text("trial_id,status\n0,finished\n1,stopped\n2,failed\n3,running\n")
    (folder / "plan.json").write_text('{"allocation": {"sharing": "4 trials on each GPU"}}')
    assert gpu.outcome(job) == {"trials": 4, "done": 2, "sharing": "4 trials on each GPU"}


def test_the_page_has_a_line_for_every_row() -> None:
    own = {"family": "whisper", "method": "lora", "seconds": 120, "took_s": 9.0}
    measured = {"utterances_per_s": 100.0, "step_ms": 50.0, "memory_gib": 2.0}
    rows = [
        {"job": "machine", "gpu": "H200", "versions": "torch 2", "cores": 16},
        {"flops_per_s": 1e12},
        own | measured | {"flops_per_utterance": 5e9},
        own | measured | {"flops_per_utterance": None, "switch": "compile"},
        own | {"way": "trainer", "failed": "out of memory"},
        {"job": "the demo", "took_s": 70.0, "trials": 4, "done": 3, "sharing": "4 trials on each GPU"},
        {"job": "RAVDESS", "took_s": 90.0, "failed": "not done in 90 s"},
    ]
    page = gpu.page([], rows)
    for line in (
        "| whisper | lora | 120 | ser_ray | 100.0 | 50 | 2.00 | 0.5 | 9.0 |",
        "| whisper | lora | 120 | ser_ray, compile | 100.0 | 50 | 2.00 | 0.5 | 9.0 |",
        "| whisper | lora | 120 | Trainer + PEFT | out of memory | | | | 9.0 |",
        "| the demo | 70.0 | 3 of 4 | 4 trials on each GPU |",
        "| RAVDESS | 90.0 | not done in 90 s |  |",
    ):
        assert line in page.splitlines()
    assert page.startswith("# Large backbones on a GPU\n")


def test_cells_fail_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(cell: dict[str, object], *_: object) -> dict[str, object]:
        if cell["method"] == "full":
            raise torch.OutOfMemoryError
        if cell["method"] == "qlora":
            raise ValueError("broken")
        return {"utterances_per_s": 1.0}

    monkeypatch.setattr(gpu_cells, "measured", measured)
    rows = tmp_path / "rows.jsonl"
    cells = [{"family": "whisper", "method": method, "seconds": 120} for method in ("full", "qlora", "lora")]
    gpu_cells.main(rows, cells, CPU, "tiny")
    assert [row.get("failed") for row in gpu.read_rows(rows)] == ["out of memory", "ValueError: broken", None]


def test_feed_script_at_a_small_size(capsys: pytest.CaptureFixture[str]) -> None:
    feed.main(["--utterances", "8", "--threads", "1", "2", "--rounds", "1"])
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [tuple(row[:2]) for row in rows[1:]] == [
        *((name, threads) for name in feed.WAYS for threads in ("1", "2")),
        ("read from a file", "1"),
    ]
    assert all(math.isfinite(float(figure)) and float(figure) > 0 for row in rows[1:] for figure in row[2:])


def test_what_a_step_costs_is_counted() -> None:
    x, y = torch.randn(4, 8, requires_grad=True), torch.randn(8, 8)
    with steps.Kernels() as kernels, steps.kept() as held:
        product = x @ y
        (product.view(8, 4) * product.view(8, 4)).t()
    assert kernels.names == {"mm": 1, "mul": 1}
    assert held() == y.nbytes + product.nbytes, "each storage once, and nothing for views"


@pytest.mark.parametrize("family", ["whisper", "wav2vec2", "hubert"])
def test_lora_dispatches_and_keeps_no_more_than_full_training(family: str) -> None:
    full, lora, qlora = (steps.count(family, method) for method in ("full", "lora", "qlora"))
    assert 40 < lora["kernels"] <= min(full["kernels"], 110 if family == "whisper" else 150)
    assert qlora["kernels"] <= lora["kernels"] + 10
    assert 10 < lora["kept_mb"] <= full["kept_mb"]


def test_the_page_of_steps_has_a_row_for_every_family_and_method() -> None:
    counts = {family: {m: {"kernels": 80.0, "kept_mb": 50.0} for m in steps.METHODS} for family in steps.FAMILIES}
    before = {family: {m: {"kernels": 200.0, "kept_mb": 100.0} for m in steps.METHODS} for family in steps.FAMILIES}
    rates = {", ".join(how): {"now": [(4.0, 8.0)] * 3, "before": [(2.0, 4.0)] * 3} for how in steps.TIMED}
    machine = {"torch": "1", "transformers": "2", "cores": "2", "processor": "x"}
    result = {"machine": machine, "counts": counts, "before": before, "rates": rates, "load": 3.0}
    page = steps.page(result, "command")
    assert page.count("| 80 | 50.0 | 200 | 100.0 | 1.00 | 1.00 | 0.40 | 0.50 |") == 16
    timed = "| 4.00 | 2.00 | **2.00** [2.00, 2.00] | 8.00 | 4.00 | **2.00** [2.00, 2.00] |"
    assert page.count(timed) == len(steps.TIMED)


def test_the_order_of_an_epoch_is_told_before_and_now() -> None:
    table = order.rows(share=0.4)
    whole = order.tenths(table, [np.arange(table.num_rows)]).mean(axis=0)
    for epoch in (1, 2):
        old, new = order.before(table, epoch), order.now(table, epoch)
        for batches in (old, new):
            assert sorted(np.concatenate(batches).tolist()) == list(range(table.num_rows))
        assert np.abs(order.tenths(table, old) - whole).max() > 0.3, "one corpus after the other"
        assert np.abs(order.tenths(table, new) - whole).max() < 0.1
    label_N, samples_N = table["label"].to_numpy(), table["num_samples"].to_numpy()
    before, now = order.shares(table, old, by_batch=True), order.shares(table, new, by_batch=False)
    assert np.bincount(label_N, now) == pytest.approx(np.full(7, 1 / 7), rel=0.01)
    assert np.bincount(label_N, before).max() > 1.1 / 7
    longest = samples_N >= np.quantile(samples_N, 0.9)
    assert before[longest].mean() > 1.3 * before.mean()
    page = order.page(table)
    assert page.count("| 10 | ") == 1
    assert "times one of the shortest" in page


@pytest.mark.parametrize("corpus", reference_rehearsal.DIRECTORIES)
def test_stand_ins_have_every_published_name(tmp_path: Path, corpus: str) -> None:
    for name in reference_rehearsal.names(corpus):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    utterances, rejected = corpora.read(corpus, tmp_path)
    assert rejected == []
    assert differences(corpus, describe(utterances)) == []


def test_the_reference_trains_and_tests_on_every_corpus() -> None:
    """By the published names; TESS has two speakers, and its fold decides whether one of them is heard in training."""
    read = {"crema_d": crema_d.parse, "ravdess": ravdess.parse, "tess": tess.parse}
    utterances = [read[corpus](Path(name)) for corpus in read for name in reference_rehearsal.names(corpus)]
    keys = ("utterance_id", "corpus", "speaker", "emotion", "gender", "perceived")
    index = pa.Table.from_pylist([{key: getattr(utterance, key) for key in keys} for utterance in utterances])
    experiment = config.load(Path(__file__).parents[1] / reference_rehearsal.SPACE).experiment
    splits = make_fold(labelled(index, experiment.emotions, experiment.merge), experiment.protocol).splits
    used = {(splits[utterance.utterance_id], utterance.corpus) for utterance in utterances}
    assert used >= {(split, corpus) for split in ("train", "test") for corpus in read}


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About three dozen files."""
    directory = tmp_path_factory.mktemp("stand-ins")
    reference_rehearsal.write(directory, share=0.003)
    return directory


def test_stand_ins_are_speech_that_is_used(stand_ins: Path) -> None:
    """At the published rates, by the published people, and no two of them one take."""
    prints = {}
    for corpus, folder in reference_rehearsal.DIRECTORIES.items():
        utterances, rejected = corpora.read(corpus, stand_ins / folder)
        assert utterances
        assert rejected == []
        if corpus == "crema_d":
            assert {utterance.gender for utterance in utterances} == {"female", "male"}
        for utterance in utterances:
            path = stand_ins / folder / utterance.path
            assert soundfile.info(path).samplerate == reference_rehearsal.RATES[corpus]
            recording = load_recording(path, Audio())
            assert recording.flags == ()
            (waveform,) = recording.windows
            assert not is_silent(waveform)
            assert 0.4 < len(waveform) / 16_000 < 3
            prints[utterance.utterance_id] = fingerprint(waveform)
    assert same_recordings(prints) == []


def test_stand_ins_are_continued(stand_ins: Path, tmp_path: Path) -> None:
    """What was cut off goes on, to the same bytes; what is there stays."""
    whole = {path.relative_to(stand_ins): path for path in stand_ins.rglob("*.wav")}
    lost = sorted(whole)[::2]
    made = {name: (path.stat().st_mtime_ns, path.read_bytes()) for name, path in whole.items()}
    for name in lost:
        whole[name].unlink()
    reference_rehearsal.write(stand_ins, share=0.003)
    for name, (when, content) in made.items():
        assert whole[name].read_bytes() == content
        assert (whole[name].stat().st_mtime_ns == when) == (name not in lost)
    assert len({content for _, content in made.values()}) == len(made)


def test_stand_ins_can_be_learned_from_other_speakers() -> None:
    """By a linear model on means and deviations of the log-mel spectrum: far above chance, and not perfectly."""
    names = [name for name in reference_rehearsal.names("ravdess")[::4] if name < "Actor_13"]
    utterances = [ravdess.parse(Path(name)) for name in names]
    mel = LogMel(40)
    features = []
    for name in names:
        waveform = soxr.resample(reference_rehearsal.speak("ravdess", name), 48_000, 16_000)
        frames_MF = mel(torch.from_numpy(waveform[None]), torch.tensor([len(waveform)]))[0][0].numpy()
        features.append(np.r_[frames_MF.mean(1), frames_MF.std(1), frames_MF.shape[1]])
    emotions = np.array(["neutral" if u.emotion == "calm" else u.emotion for u in utterances])
    is_heard = np.array([u.speaker < "ravdess/09" for u in utterances])
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
    model.fit(np.stack(features)[is_heard], emotions[is_heard])
    uar = recall_score(emotions[~is_heard], model.predict(np.stack(features)[~is_heard]), average="macro")
    assert 0.35 < uar < 0.95


def test_the_rehearsal_overrides_backbone_epochs_trials_and_paths_alone(tmp_path: Path) -> None:
    own = reference_rehearsal.overrides(tmp_path, tmp_path, reference_rehearsal.BACKBONES, epochs=1, trials=1)
    space = Path(__file__).parents[1] / reference_rehearsal.SPACE
    changed = {line.partition(":")[0] for line in config.differences(config.load(space), config.load(space, own))}
    corpora_paths = {f"experiment.corpora.{corpus}" for corpus in reference_rehearsal.DIRECTORIES}
    others = {"search.backbone.choice", "experiment.epochs", "tune.trials", "storage.results", "storage.cache"}
    assert changed == corpora_paths | others


@pytest.mark.slow
def test_the_rehearsal_at_a_small_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    resources = ["resources.gpus_per_worker=0", "resources.cpus_per_worker=1"]
    options = ["--share", "0.03", "--epochs", "1", "--trials", "1", "--scratch", str(tmp_path)]
    reference_rehearsal.main([*options, "--", *resources])
    page = capsys.readouterr().out
    assert str(tmp_path) not in page.split("## The stand-ins")[1]
    for told in (
        "crema_d: ",
        "ravdess: ",
        "tess: ",
        "split: ",
        "| **together** | **",
        "Trials: 1 (1 finished), 1 epochs in all",
    ):
        assert told in page
    assert "| report, end of the command |" in page
    (report,) = tmp_path.glob("run-*/results/reference/report.html")
    assert report.stat().st_size > 10_000


@pytest.mark.slow
def test_a_small_fuzz_run_finds_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts = ["--tables", "24", "--checkpoints", "24", "--inputs", "24", "--names", "24"]
    assert fuzz.main([*counts, "--workers", "1", "--findings", str(tmp_path / "findings")]) == 0
    page = capsys.readouterr().out
    assert list((tmp_path / "findings").iterdir()) == []
    for kind in fuzz.KINDS:
        (row,) = (line for line in page.splitlines() if line.startswith(f"| {kind} |"))
        _, _, cases, done, partly, refused, findings, *_ = (cell.strip() for cell in row.split("|"))
        assert (cases, findings) == ("24", "0")
        assert int(refused) + int(partly) > 0
        assert int(done) > 0 or kind == "names"  # of which one in seventy is usable


@pytest.mark.parametrize(
    ("answers", "wrong"),
    [
        ('{"probabilities": {"sad": NaN, "angry": 1.0}}', "JSON with NaN"),
        ('{"probabilities": {"sad": 0.2, "angry": 0.2}}', "do not sum to 1"),
        ('{"probabilities": {}}', "without a reason"),
        ("", "no answer at all"),
    ],
)
def test_a_fuzz_run_sees_answers_that_are_none(answers: str, wrong: str) -> None:
    with pytest.raises(fuzz.Wrong, match=wrong):
        fuzz._check_answers(answers, "jsonl")


@pytest.mark.parametrize(
    ("printed", "wrong"),
    [
        ("ser-ray predict: one\ntwo", "not one line, but 2"),
        ("Traceback\n", "not one line"),
        (f"ser-ray predict: {'x' * 500}", "a message of 500 characters"),
    ],
)
def test_a_fuzz_run_sees_messages_that_are_not_one_line(tmp_path: Path, printed: str, wrong: str) -> None:
    with pytest.raises(fuzz.Wrong, match=wrong):
        fuzz._one_line(fuzz.Case("", ["predict", "x"]), printed, tmp_path)


def test_a_fuzz_run_sees_what_a_terminal_obeys() -> None:
    fuzz._check_printable("naïve 😀 [bold] \t\n")
    for sign in ("\x1b", "\r", "\u202e", "\u2028", "\udce9"):
        with pytest.raises(fuzz.Wrong, match="a terminal obeys"):
            fuzz._check_printable(f"a{sign}b")


def test_the_page_of_variants_counts_whole_seeds_and_says_what_is_missing(tmp_path: Path) -> None:
    labels = [number % 8 for number in range(32)]
    predicted = {"LoRA": [*labels[:24], *[0] * 8], "DoRA": labels}
    (tmp_path / "runs").mkdir()
    for way, guesses in predicted.items():
        runs = [(rate, 0, 0) for rate in variants.RATES]
        runs += [(variants.RATES[0], fold, seed) for fold in range(6) for seed in range(2) if seed == 0 or fold < 3]
        for run in (variants.Run(way, *rest) for rest in runs):
            told = {"dev": [0.5, 0.25], "loss": [1.0, 0.5], "seconds": 3.0, "parameters": 10, "labels": labels}
            told |= {"predicted": guesses, "speakers": [f"{run.fold}{number // 16}" for number in range(32)]}
            run.file(tmp_path).write_text(json.dumps(told))
    page = variants.page(Namespace(scratch=tmp_path, seeds=2))
    assert "Not complete: of 24 runs 6 are missing" in page
    cells = [line.split(" | ") for line in page.splitlines()]
    uar = {way: float(recall_score(labels, guesses, average="macro")) for way, guesses in predicted.items()}
    assert ["| LoRA", f"{variants.RATES[0]:g}", "1", "0.50", "0.250"] in [row[:5] for row in cells]
    (gap,) = (row for row in cells if row[0] == "| DoRA over LoRA")
    assert gap[1] == "1"
    assert gap[2].startswith(f"+{100 * (uar['DoRA'] - uar['LoRA']):.1f} [")


def test_what_one_script_asks_of_another_is_there() -> None:
    """Most take too long to be run by a test; a name that has moved would be found by who waited for them."""
    scripts = {path.stem: path for path in Path(gpu.__file__).parent.glob("*.py")}
    asked = set()
    for path in scripts.values():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {
            alias.asname or alias.name: alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.Import)
            for alias in node.names
            if alias.name in scripts
        }
        asked |= {
            (names[node.value.id], node.attr)
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in names
        }
    assert ("gpu_cells", "speech") in asked
    assert [
        (module, name) for module, name in sorted(asked) if not hasattr(importlib.import_module(module), name)
    ] == []

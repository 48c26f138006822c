"""The plan of a run: what it says is what runs, it is plain JSON, and what can never run is refused before any work."""

from __future__ import annotations

import io
import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from test_verbs import write_space

from ser_ray import config
from ser_ray.__main__ import main
from ser_ray.config import SearchSpace
from ser_ray.prepare import prepare
from ser_ray.protocols.task import load_task
from ser_ray.runtime import allocation, feature_cache, plan
from ser_ray.runtime.plan import RunPlan
from ser_ray.schema import UserError
from ser_ray.speech import order

ONE_GPU = allocation.Allocation(
    1, allocation.Worker(2.0, 1.0), 1, 1, allocation.Node(2, 1), cuda=True, precision="bf16"
)


@pytest.fixture
def path(tiny_corpus, tiny_cache, tmp_path) -> Path:
    return write_space(tmp_path, tiny_corpus, tiny_cache)


def made(space: SearchSpace, own: allocation.Allocation = ONE_GPU) -> RunPlan:
    shard_dirs = prepare(space, use_ray=False, console=Console(file=io.StringIO()))
    return plan.make(space, own, shard_dirs, load_task(space.experiment, shard_dirs))


def test_auto_is_resolved_once_and_the_plan_is_plain_json(path):
    found = made(config.load(path))
    assert (found.space.resources.cpus_per_worker, found.space.resources.gpus_per_worker) == (2.0, 1.0)
    told = json.loads(json.dumps(found.to_dict()))
    assert told["space"]["resources"]["gpus_per_worker"] == 1.0
    assert sum(told["splits"].values()) == len(
        load_task(found.space.experiment, [Path(d) for d in told["shards"]]).index
    )
    assert SearchSpace.model_validate(told["space"]) == found.space


def test_a_cache_is_named_by_the_precision_that_workers_compute_in(path):
    space = config.load(path, ["search={}", "tune.first=[]", "experiment.adapter={method: lora, first_layer: 1}"])
    on_gpu, on_cpu = made(space), made(space, allocation.here(cuda=False, precision="fp32"))
    one, other = on_gpu.prefix(space.experiment), on_cpu.prefix(space.experiment)
    assert one is not None
    assert other is not None
    assert (one.precision, other.precision) == ("bf16", "fp32")
    assert one.key() != other.key()
    named = config.load(path, ["search={}", "tune.first=[]", "experiment.precision=fp32"])
    assert made(named).prefix(named.experiment) is None or made(named).prefix(named.experiment).precision == "fp32"


@pytest.mark.parametrize(("workers", "accumulate"), [(1, 1), (1, 3), (2, 2)])
def test_planned_steps_are_those_of_the_order(path, workers, accumulate):
    space = config.load(path, [f"experiment.optimizer.accumulate={accumulate}", "experiment.epochs=3"])
    own = allocation.Allocation(workers, allocation.Worker(1.0, 0.0), 2, 1, allocation.Node(2))
    (steps,) = made(space, own).steps
    rows = load_task(space.experiment, prepare(space, use_ray=False, console=Console(file=io.StringIO()))).rows("train")
    experiment = space.experiment
    taken = [
        len(
            order.steps(
                sum(map(len, order.epoch(rows, experiment.batch_seconds, (experiment.seed, e)))), accumulate, 0, workers
            )
        )
        for e in (1, 2, 3)
    ]
    assert (steps.epoch, steps.total) == (taken[0], sum(taken))


def test_what_differs_between_trials_is_told_as_a_range(path):
    search = "search={batch_seconds: {choice: [4, 16]}, epochs: {randint: [1, 3]}}"
    least, most = made(config.load(path, [search, "tune.first=[]"])).steps
    assert least.total < most.total
    assert least.total == least.epoch
    text = "\n".join(made(config.load(path, [search, "tune.first=[]"])).lines())
    assert f"steps per trial: {least.epoch} to {most.epoch} an epoch, {least.total} to {most.total} in all" in text


def test_with_more_frozen_parts_than_trials_the_trials_make_their_own(path):
    many = "search={adapter.first_layer: {choice: [0, 1]}, head.layer_mix: {choice: [weighted, last]}}"
    lora = "experiment.adapter={method: lora}"
    few = made(config.load(path, [many, lora, "tune.first=[]", "tune.trials=3"]))
    assert len(few.cacheable()) == 3, "below the first block all layer mixes need the same"
    assert few.cached_first()
    assert not made(config.load(path, [many, lora, "tune.first=[]", "tune.trials=2"])).cached_first()


@pytest.mark.parametrize("cached", ["0", "50"])
@pytest.mark.parametrize("verb", ["train", "tune"])
def test_a_first_layer_beyond_the_backbone_is_refused_before_work_starts(path, capsys, verb, cached, monkeypatch):
    monkeypatch.setattr("ser_ray.prepare.prepare", lambda *_, **__: pytest.fail("prepared"))
    monkeypatch.setattr("ser_ray.runtime.cluster.connect", lambda *_: None)
    own = [
        "experiment.adapter={method: lora, first_layer: 7}",
        f"storage.prefix_gb={cached}",
        "search={}",
        "tune.first=[]",
    ]
    workers = ["resources.workers=0"] if verb == "train" else []
    assert main([verb, str(path), *own, *workers]) == 2
    assert "adapter.first_layer: 7, but embedded/tiny-whisper has blocks 0 to" in capsys.readouterr().err


def test_a_searched_first_layer_is_looked_at_for_every_backbone(path, backbones_dir):
    search = {
        "backbone": {"choice": ["embedded/tiny-whisper", str(backbones_dir / "whisper")]},
        "adapter.method": {"choice": ["frozen", "lora"]},
        "adapter.first_layer": {"randint": [0, 2], "when": {"adapter.method": ["lora"]}},
    }
    space = config.load(path, [f"search={json.dumps(search)}", "tune.first=[]"])
    with pytest.raises(UserError, match=r"adapter\.first_layer: 2, but .*whisper has blocks 0 to 1"):
        plan.check(space)


@pytest.mark.parametrize("methods", [["lora"], ["lora", "qlora"]])
def test_a_variant_is_looked_at_with_every_method(path, methods):
    search = {"adapter.method": {"choice": methods}, "adapter.variant": {"choice": ["plain", "pissa"]}}
    space = config.load(path, [f"search={json.dumps(search)}", "tune.first=[]"])
    with pytest.raises(UserError, match=r"adapter\.variant: with qlora") if "qlora" in methods else nullcontext():
        plan.check(space)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("verb", ["train", "tune"])
def test_dry_run_prints_the_plan_and_trains_nothing(path, capsys, verb):
    search = (
        "{optimizer.lr: {uniform: [0.001, 0.01]}, adapter.variant: {choice: [plain, rslora, dora, pissa, loraplus]}}"
    )
    own = ["experiment.adapter={method: lora, first_layer: 1}", f"search={search}"]
    assert main([verb, str(path), *own, "tune.first=[]", "--dry-run"]) == 0
    said = capsys.readouterr().out
    for part in (
        "nothing is trained",
        "at once; each holds 1 worker with",
        "split: ",
        " an epoch, ",
        "GB in all, room for 50",
    ):
        assert part in said, part
    results = Path(yaml.safe_load(path.read_text())["storage"]["results"])
    assert not results.exists()


def test_a_long_making_is_told_in_a_log(monkeypatch):
    """Shards done and seconds left, now and then; a bar cannot move there."""
    monkeypatch.setattr(feature_cache, "LINE_S", -1.0)
    said = io.StringIO()
    feature_cache._show(iter(range(3)), 3, "frozen prefix x", Console(file=said, width=200))
    assert [line.rpartition(", about")[0] for line in said.getvalue().splitlines()] == [
        "frozen prefix x: 1 of 3 shards",
        "frozen prefix x: 2 of 3 shards",
    ]


def test_a_condition_on_another_key_may_hold_or_not(path):
    """Pooling is searched where the head starts from a probe; else it is what the experiment says."""
    search = {
        "head.init": {"choice": ["random", "probe"]},
        "head.pooling": {"choice": ["mean", "statistics"], "when": {"head.init": ["probe"]}},
    }
    own = [f"search={json.dumps(search)}", "tune.first=[]", "experiment.adapter={method: frozen}"]
    found = made(config.load(path, [*own, "experiment.head={pooling: attentive, hidden: 0}"]))
    for values in ({"head.init": "random"}, {"head.init": "probe", "head.pooling": "mean"}):
        assert found.prefix(found.space.trial(values)) is not None


def test_augmentation_that_is_searched_is_part_of_the_plan(path):
    search = "search={augment.gain_db: {choice: [0.0, 6.0]}}"
    found = made(config.load(path, [search, "tune.first=[]", "experiment.adapter={method: lora, first_layer: 1}"]))
    assert len(found.cacheable()) == 1
    assert found.uncacheable_reasons() == ["augment.gain_db changes the input of the frozen part"]


def test_how_many_trials_share_a_gpu_is_said(path):
    shared = allocation.Allocation(
        1, allocation.Worker(4.0, 0.25), 4, 4, allocation.Node(16, 1), cuda=True, sharing="4 trials on each GPU: small"
    )
    lines = list(made(config.load(path), shared).lines())
    assert "resources.gpus_per_worker: auto: 4 trials on each GPU: small" in lines
    assert "GPUs: 1 of 1 in use" in lines

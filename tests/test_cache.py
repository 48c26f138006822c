"""What frozen layers compute: made once, by a pool or here, equal to the model; bounded; found again; never half."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from backbone_fixtures import write_backbone
from rich.console import Console
from safetensors.torch import load_file, save_file
from test_verbs import write_space

from ser_ray import config, disk
from ser_ray.__main__ import main
from ser_ray.config import SearchSpace
from ser_ray.models import backbones, prefix
from ser_ray.prepare import prepare
from ser_ray.protocols.task import load_task
from ser_ray.runtime import allocation, feature_cache, plan
from ser_ray.runtime.plan import RunPlan
from ser_ray.schema import UserError
from ser_ray.speech import shards, stream
from ser_ray.speech.cached_features import Prefix

LORA = "experiment.adapter={method: lora, first_layer: 1}"
FROZEN = "experiment.adapter={method: frozen}"


@pytest.fixture
def path(tiny_corpus, tiny_cache, tmp_path, backbones_dir) -> Path:
    """A search space over a tiny Whisper."""
    return write_space(tmp_path, tiny_corpus, tiny_cache)


@pytest.fixture
def load(path, backbones_dir):
    """The space with overrides, nothing searched."""

    def loaded(*overrides: str) -> SearchSpace:
        return config.load(
            path, [f"experiment.backbone={backbones_dir / 'whisper'}", "search={}", "tune.first=[]", *overrides]
        )

    return loaded


HERE = allocation.here(cuda=False, precision="fp32")
ON_RAY = allocation.Allocation(1, allocation.Worker(1, 0), 2, 2, allocation.Node(2))


def planned(space: SearchSpace, own: allocation.Allocation = HERE) -> RunPlan:
    """The plan of a space, whose corpus is prepared in this process."""
    shard_dirs = prepare(space, use_ray=False, console=Console(file=io.StringIO()))
    return plan.make(space, own, shard_dirs, load_task(space.experiment, shard_dirs))


def keep(
    space: SearchSpace, extract: feature_cache.Extract | None = None
) -> tuple[feature_cache.CachedFeatures | None, str]:
    """What is cached, by this process or another, and what was said."""
    said = io.StringIO()
    console = Console(file=said, width=400)
    found = planned(space, ON_RAY if extract else HERE)
    wanted = found.prefix(space.experiment)
    if wanted is None:
        return None, ""
    with feature_cache.keep(found, wanted, console, extract) as kept:
        return kept, said.getvalue()


def contents(kept: feature_cache.CachedFeatures) -> dict[str, np.ndarray]:
    rows = [row for path in kept.paths for row in pq.read_table(path).to_pylist()]
    return {row["utterance_id"]: kept.prefix.read(row["features"]) for row in rows}


@pytest.mark.parametrize("adapter", [LORA, FROZEN])
def test_what_is_kept_is_what_the_model_computes_of_one_utterance(load, adapter):
    space = load(adapter)
    kept, _ = keep(space)
    assert kept is not None
    found = contents(kept)
    backbone = backbones.load(space.experiment.backbone).eval()
    tables = list(shards.read_tables(prepare(space, use_ray=False, console=Console(file=io.StringIO()))))
    assert sum(table.num_rows for table in tables) == len(found)
    for table in tables:
        labelled = table.slice(0, 5).append_column("label", pa.array([0] * min(5, table.num_rows)))
        for row in range(labelled.num_rows):
            (batch,) = stream.batches(labelled, [np.array([row])])
            (expected,) = prefix.compute(kept.prefix, backbone, batch)
            own = found[batch.utterance_ids[0]]
            assert own.shape == expected.shape
            np.testing.assert_allclose(own.astype(np.float32), expected.astype(np.float32), rtol=2e-2, atol=2e-2)


def test_rows_are_where_they_are_in_the_speech(load):
    """So that one fold says where either is."""
    space = load(LORA)
    kept, _ = keep(space)
    assert kept is not None
    shard_dirs = prepare(space, use_ray=False, console=Console(file=io.StringIO()))
    sources = [path for directory in shard_dirs for path in shards.shard_paths(directory)]
    assert [path.name for path in kept.paths] == [path.name for path in sources]
    for source, target in zip(sources, kept.paths, strict=True):
        assert shards.read_ids(source) == shards.read_ids(target)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_pool_on_ray_caches_the_same_for_one_model_after_another(load, monkeypatch):
    monkeypatch.setattr(feature_cache, "ACTOR_S", 10.0)  # several actors, for little speech
    made = mock.Mock(wraps=feature_cache.Pool)
    monkeypatch.setattr(feature_cache, "Pool", made)
    elsewhere = "storage.cache=" + str(Path(load().storage.cache) / "other")
    with feature_cache.by_pool(planned(load(LORA), ON_RAY)) as extract:
        for adapter in (LORA, FROZEN):
            here, _ = keep(load(adapter))
            there, said = keep(load(adapter, elsewhere), extract)
            assert here is not None
            assert there is not None
            assert "making" in said
            one, other = contents(here), contents(there)
            assert one.keys() == other.keys()
            for utterance_id, array in one.items():
                np.testing.assert_array_equal(array, other[utterance_id])
    made.assert_called_once()


@pytest.mark.parametrize(("seconds", "actors"), [(0.5, 1), (120, 1), (121, 2), (1e5, 2)])
def test_little_speech_takes_few_actors(load, monkeypatch, seconds, actors):
    class Made(Exception):  # noqa: N818 (no failure)
        pass

    def pool(actor, arguments, size, worker, console):
        raise Made(size)

    monkeypatch.setattr(feature_cache, "Pool", pool)
    space = load(LORA)
    found = planned(space, ON_RAY)
    shard_dirs = prepare(space, use_ray=False, console=Console(file=io.StringIO()))
    work = [(path, path) for directory in shard_dirs for path in shards.shard_paths(directory)]
    wanted, console = found.prefix(space.experiment), Console(file=io.StringIO())
    with feature_cache.by_pool(found) as extract, pytest.raises(Made, match=f"^{actors}$"):
        list(extract(wanted, work * 9, seconds, console))


def test_it_is_made_once_and_a_missing_part_alone_again(load):
    first, said = keep(load(LORA))
    assert first is not None
    assert first.made == len(first.paths)
    assert "making" in said
    before = {path: path.stat().st_mtime_ns for path in first.paths}
    second, said = keep(load(LORA, "experiment.optimizer.lr=0.5", "experiment.adapter.rank=3"))
    assert second is not None
    assert (second.made, second.paths, said) == (0, first.paths, "")
    first.paths[0].unlink()
    third, _ = keep(load(LORA))
    assert third is not None
    assert third.made == 1
    assert {path: path.stat().st_mtime_ns for path in third.paths[1:]} == dict(list(before.items())[1:])


def test_its_size_is_said_before_and_is_right(load):
    for adapter in (LORA, FROZEN):
        kept, said = keep(load(adapter))
        assert kept is not None
        rows = [row for path in kept.paths for row in pq.read_table(path).to_pylist()]
        seconds = sum(row["num_samples"] for row in rows) / 16_000
        expected = kept.prefix.gigabytes(seconds, len(rows))
        assert f"making {expected:.2f} GB" in said
        held = sum(len(row["features"]) for row in rows) / 1e9
        assert expected == pytest.approx(held, rel=0.05)


def test_what_cannot_be_kept_says_why(load):
    def why(space: SearchSpace) -> str:
        return plan.uncacheable_reason(space.experiment, space.storage.prefix_gb) or ""

    varied = load(LORA, "experiment.augment.gain_db=6")
    assert "augment.gain_db" in why(varied)
    masked = load(LORA, "experiment.augment.time_mask=0.1")
    assert "augment.time_mask" in why(masked)
    full = load("experiment.adapter={method: full}")
    assert "every weight" in why(full)
    never = load(LORA, "storage.prefix_gb=0")
    assert "prefix_gb" in why(never)
    for space in (varied, full, never):
        assert keep(space)[0] is None


def test_too_little_room_is_a_line_and_training_goes_on_without(load):
    kept, said = keep(load(LORA, "storage.prefix_gb=1e-6"))
    assert kept is None
    assert said.count("\n") == 1
    assert "storage.prefix_gb" in said


def test_room_is_made_by_removing_what_was_used_longest_ago(load):
    old, _ = keep(load(LORA))
    newer, _ = keep(load(FROZEN))
    assert old is not None
    assert newer is not None
    os.utime(old.paths[0].parent / feature_cache.IN_USE, ns=(1, 1))
    room = (old.gigabytes + newer.gigabytes) * 1.02
    third, _ = keep(load("experiment.adapter={method: lora, first_layer: 0}", f"storage.prefix_gb={room}"))
    assert third is not None
    assert not old.paths[0].exists()
    assert newer.paths[0].exists()


def test_caches_that_are_made_at_once_stay_within_the_limit_together(load, monkeypatch):
    first, second = (planned(load(adapter)) for adapter in (LORA, FROZEN))
    sizes = [own.gigabytes(prefix) for own in (first, second) if (prefix := own.prefix(own.space.experiment))]
    limit = f"storage.prefix_gb={sizes[0] + sizes[1] / 2}"
    extract, said = feature_cache.Extractor.extract, []

    def beside_another(self, wanted: prefix.Prefix, source: Path, target: Path) -> None:
        """Before any of its files is there, another process wants to make the second."""
        monkeypatch.setattr(feature_cache.Extractor, "extract", extract)
        said.append(keep(load(FROZEN, limit))[1])
        extract(self, wanted, source, target)

    monkeypatch.setattr(feature_cache.Extractor, "extract", beside_another)
    made, _ = keep(load(LORA, limit))
    assert made is not None
    assert f"but storage.prefix_gb leaves {sizes[1] / 2:.2f}" in said[0]
    mark = made.paths[0].parent / feature_cache.PLANNED
    assert not mark.exists()
    disk.write_json(mark, 1000.0)  # by a process that was killed: it holds no lock
    assert keep(load(FROZEN, limit))[0] is not None


def test_what_a_trial_reads_is_not_removed(load):
    old, _ = keep(load(LORA))
    assert old is not None
    with disk.locked(old.paths[0].parent / feature_cache.IN_USE, shared=True):
        third, said = keep(load(FROZEN, f"storage.prefix_gb={old.gigabytes * 1.001}"))
    assert third is None
    assert "storage.prefix_gb" in said
    assert old.paths[0].exists()


def test_every_frozen_part_that_a_search_can_ask_for_is_planned(path, backbones_dir):
    search = {
        "backbone": {"choice": [str(backbones_dir / "whisper"), str(backbones_dir / "wavlm-group")]},
        "adapter.method": {"choice": ["lora", "full", "frozen"]},
        "adapter.first_layer": {"randint": [0, 1], "when": {"adapter.method": ["lora", "full"]}},
        "adapter.rank": {"choice": [2, 4], "when": {"adapter.method": ["lora"]}},
        "head.pooling": {"choice": ["mean", "attentive"]},
    }
    space = config.load(path, [f"search={json.dumps(search)}", "tune.first=[]"])
    prefixes = planned(space).prefixes
    rng = np.random.default_rng(0)
    asked = set()
    for _ in range(200):
        values = {}
        for key, distribution in space.search.items():
            if all(values.get(name) in allowed for name, allowed in distribution.when.items()):
                options = [0, 1] if distribution.randint else list(distribution.choice or ())
                values[key] = options[int(rng.integers(len(options)))]
        experiment = space.trial(values)
        if plan.uncacheable_reason(experiment, space.storage.prefix_gb) is None:
            asked.add(plan.cache_key(experiment))
    assert asked == prefixes.keys()
    kinds = {(p.first_layer, p.moments) for p in prefixes.values()}
    assert kinds == {(0, None), (1, None), (2, None), (2, "mean")}


def test_a_state_beyond_fp16_is_one_line(path, tmp_path, load):
    directory = write_backbone("whisper", tmp_path / "loud")
    weights = load_file(directory / "model.safetensors")
    weights["embed_positions.weight"] *= 1e6
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"exceeds fp16.*prefix_gb"):
        keep(load(LORA, f"experiment.backbone={directory}"))


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_the_command_makes_and_then_finds(path, backbones_dir, capsys):
    own = [f"experiment.backbone={backbones_dir / 'whisper'}", "search={}", "tune.first=[]", LORA]
    assert main(["cache", str(path), *own]) == 0
    assert "made in" in capsys.readouterr().out
    assert main(["cache", str(path), *own]) == 0
    assert "found" in capsys.readouterr().out
    assert main(["cache", str(path), *own, "experiment.augment.gain_db=3"]) == 0
    assert "nothing is cached: augment.gain_db" in capsys.readouterr().out


def test_a_killed_maker_leaves_nothing_half_written(path, load, tmp_path, backbones_dir):
    space = load(LORA)
    prepare(space, use_ray=False, console=Console(file=io.StringIO()))
    whole, _ = keep(load(LORA, f"storage.cache={tmp_path / 'whole'}"))
    assert whole is not None
    script = (
        "import sys, torch; torch.set_num_threads(1); sys.path.insert(0, sys.argv[1])\n"
        "from test_cache import *\n"
        "import ser_ray.disk, time\n"
        "write = pq.write_table\n"
        "def slowly(table, target, **named):\n"
        "    write(table, target, **named); print('written', flush=True); time.sleep(60)\n"
        "pq.write_table = slowly\n"
        f"own = ['experiment.backbone={backbones_dir / 'whisper'}', 'search={{}}', 'tune.first=[]', LORA]\n"
        "keep(config.load(sys.argv[2], own))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(Path(__file__).parent), str(path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "written"  # aside, before it takes its place
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept, _ = keep(space)
    assert kept is not None
    assert kept.made == len(kept.paths)
    one, other = contents(kept), contents(whole)
    assert one.keys() == other.keys()
    for utterance_id, array in one.items():
        np.testing.assert_array_equal(array, other[utterance_id])


def test_a_prefix_tells_its_shape_and_ignores_where_the_backbone_lies():
    def made(backbone: str = "a", moments: str | None = None, states: int = 3) -> Prefix:
        return Prefix(backbone, "digest", False, "fp32", 2, states, 8, moments)

    assert made().key() == made("b").key() != made(states=2).key()
    assert (made().shape, made(moments="mean").shape, made(moments="statistics").shape) == ((3, 8), (3, 8), (9, 8))
    frames = np.arange(2 * 3 * 8).reshape(2, 3, 8).astype(np.float16)
    np.testing.assert_array_equal(made().read(frames.tobytes()), frames)
    pooled = np.arange(9 * 8).reshape(9, 8).astype(np.float32)
    np.testing.assert_array_equal(made(moments="statistics").read(pooled.tobytes()), pooled)
    assert made().gigabytes(10.0, 4) == 10 * 50 * 3 * 8 * 2 / 1e9
    assert made(moments="mean").gigabytes(10.0, 4) == 4 * 3 * 8 * 4 / 1e9


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("head", ["{pooling: statistics}", "{pooling: mean}", "{layer_mix: last}"])
def test_in_low_precision_it_is_read_as_the_model_computes_it(load, head, precision):
    space = load(FROZEN, f"experiment.head={head}", f"experiment.precision={precision}")
    kept, _ = keep(space)
    exact, _ = keep(load(FROZEN, f"experiment.head={head}"))
    assert kept is not None
    assert exact is not None
    found, expected = contents(kept), contents(exact)
    assert found.keys() == expected.keys()
    for utterance_id, array in found.items():
        own = expected[utterance_id]
        assert (array.dtype, array.shape) == (own.dtype, own.shape)
        np.testing.assert_allclose(array.astype(np.float32), own.astype(np.float32), atol=0.1)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_frozen_model_with_plain_pooling_trains_in_low_precision(path, precision):
    chosen = ["search={}", "tune.first=[]", FROZEN, f"experiment.precision={precision}", "experiment.epochs=1"]
    assert main(["train", str(path), *chosen, "resources.workers=0"]) == 0


def test_a_whole_cache_is_given_while_another_process_makes_one_of_that_name(load):
    """For another corpus, say: a trial that holds a GPU must not wait for actors that wait for that GPU."""
    first, _ = keep(load(LORA))
    assert first is not None
    with disk.locked(first.paths[0].parent / feature_cache.MAKING):
        again, said = keep(load(LORA))
        assert again is not None
        assert (again.made, said) == (0, "")
        first.paths[0].unlink()
        mended, _ = keep(load(LORA))  # what this process makes itself it makes at once
        assert mended is not None
        assert mended.made == 1


def test_who_makes_the_same_at_once_makes_no_shard_twice(load, monkeypatch):
    space = load(LORA)
    whole, _ = keep(space)
    assert whole is not None
    content = {path: path.read_bytes() for path in whole.paths}
    assert len(content) > 1
    for path in whole.paths:
        path.unlink()
    extract, made = feature_cache.Extractor.extract, []

    def beside_another(self, wanted: prefix.Prefix, source: Path, target: Path) -> None:
        """Another process has made all the others meanwhile."""
        extract(self, wanted, source, target)
        made.append(target)
        for path, found in content.items():
            path.write_bytes(found)

    monkeypatch.setattr(feature_cache.Extractor, "extract", beside_another)
    keep(space)
    assert len(made) == 1


def test_where_no_room_can_be_made_nothing_is_removed(load):
    old, _ = keep(load(LORA))
    assert old is not None
    refused, said = keep(load(FROZEN, "storage.prefix_gb=1e-7"))
    assert refused is None
    assert "training without the cache" in said
    assert all(path.is_file() for path in old.paths)


def test_memory_that_is_short_while_a_cache_is_made_halves_its_batches(load, monkeypatch):
    whole, _ = keep(load(LORA))
    assert whole is not None
    expected = contents(whole)
    for path in whole.paths:
        path.unlink()
    compute, sizes = prefix.compute, []

    def short(wanted: Prefix, backbone: object, batch: stream.Batch) -> list[np.ndarray]:
        sizes.append(batch.inputs.numel() / 16_000)
        if sizes[-1] > 8:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return compute(wanted, backbone, batch)

    monkeypatch.setattr(prefix, "compute", short)
    again, _ = keep(load(LORA))
    assert again is not None
    assert max(sizes) > 8
    for utterance_id, array in contents(again).items():
        np.testing.assert_allclose(array.astype(np.float32), expected[utterance_id].astype(np.float32), atol=2e-2)
    for path in again.paths:
        path.unlink()
    monkeypatch.setattr(prefix, "compute", lambda *_: short_of_everything())
    with pytest.raises(UserError, match="out of memory with one utterance per batch"):
        keep(load(LORA))


def short_of_everything() -> None:
    raise RuntimeError("CUDA out of memory")

"""What every node must have, on a made-up cluster and on the real one of this session."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import ray

from ser_ray import config
from ser_ray.runtime import nodes
from ser_ray.schema import UserError


def node(number: int, gpus: float = 0) -> dict[str, Any]:
    about = {
        "NodeID": f"{number:056x}",
        "NodeManagerHostname": f"host{number}",
        "NodeManagerAddress": f"10.0.0.{number}",
    }
    return about | {"Alive": True, "Resources": {"CPU": 4.0} | ({"GPU": gpus} if gpus else {})}


@pytest.fixture
def space(tmp_path: Path) -> config.SearchSpace:
    places = [f"storage.results={tmp_path / 'results'}", f"storage.cache={tmp_path / 'cache'}"]
    return config.load(config.default_space(), places)


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """Two nodes that answer as this machine does; change what one of them says."""
    own = nodes._look({})
    found = {f"host{number}": {**own, "versions": dict(own["versions"]), "gpus": 1} for number in (1, 2)}
    monkeypatch.setattr(nodes, "alive", lambda: [node(1, gpus=1), node(2, gpus=1)])
    monkeypatch.setattr(nodes, "_ask", lambda asked, paths: {**found[asked["NodeManagerHostname"]], "paths": paths})
    monkeypatch.setattr(nodes, "_answer", lambda asked, answer: answer)
    return found


def test_nodes_that_do_not_come_are_an_error_with_those_that_did(monkeypatch, capsys):
    monkeypatch.setattr(nodes, "alive", lambda: [node(1)])
    monkeypatch.setenv(nodes.EXPECTED, "2")
    monkeypatch.setenv(nodes.PATIENCE, "0.1")
    with pytest.raises(UserError, match=r"1 of 2 nodes came up within 0.1 s \(host1 \(10.0.0.1\)\)"):
        nodes.wait()
    assert "waiting for nodes: 1 of 2 are up" in capsys.readouterr().err
    monkeypatch.setenv(nodes.EXPECTED, "1")
    nodes.wait()


def test_alike_nodes_pass_and_leave_no_trace(space, answers, tmp_path):
    nodes.check(space)
    assert list((tmp_path / "results").iterdir()) == list((tmp_path / "cache").iterdir()) == []


def test_every_path_that_trials_read_is_looked_for(space, answers, tmp_path, monkeypatch):
    experiment = space.experiment.model_copy(
        update={
            "corpora": {"synthetic": None, "ravdess": "/data/RAVDESS"},
            "backbone": "/models/one",
            "protocol": space.experiment.protocol.model_copy(update={"given": "/data/folds.csv"}),
        }
    )
    asked: list[str] = []
    monkeypatch.setattr(nodes, "_ask", lambda node, paths: asked.extend(paths) or answers["host1"])
    nodes.check(space.model_copy(update={"experiment": experiment, "search": {}}))
    needed = ["experiment.corpora.ravdess", "backbone /models/one", "experiment.protocol.given"]
    assert asked == [*needed, "storage.results", "storage.cache"] * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unseen": ["storage.cache"]}, r"node host2 \(10.0.0.2\): storage.cache: .*/cache is not there; give a path"),
        ({"versions": {"torch": "1.0"}}, r"node host2 .*: torch is 1.0, here it is 2"),
        ({"versions": {"ser_ray's code": "0ddba11"}}, r"node host2 .*: ser_ray's code is 0ddba11, here"),
        ({"gpus": 0}, r"node host2 .*: offers 1 GPUs, but nvidia-smi lists 0"),
    ],
)
def test_what_differs_on_a_node_is_named(space, answers, tmp_path, change, message):
    for key, value in change.items():
        answers["host2"][key] = {**answers["host2"][key], **value} if isinstance(value, dict) else value
    with pytest.raises(UserError, match=message):
        nodes.check(space)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_place_that_cannot_be_written_is_said_first(space, answers, tmp_path):
    (tmp_path / "results").write_text("a file in the way")
    with pytest.raises(UserError, match=r"storage\.results: cannot write to"):
        nodes.check(space)


@pytest.mark.ray
def test_a_real_node_answers(ray_cluster, tmp_path):
    (there,) = nodes.alive()
    asked = nodes._ask(there, {"here": str(tmp_path), "absent": str(tmp_path / "absent")})
    answer = nodes._answer(there, asked)
    assert answer["unseen"] == ["absent"]
    assert answer["versions"] == nodes._look({})["versions"]


@pytest.mark.ray
def test_a_node_that_cannot_run_our_code_is_named(ray_cluster):
    @ray.remote(num_cpus=0)
    def broken() -> None:
        raise ModuleNotFoundError("No module named 'ser_ray'")

    with pytest.raises(UserError, match=r"cannot run ser_ray there: .*No module named 'ser_ray'"):
        nodes._answer(nodes.alive()[0], broken.remote())


def test_the_code_of_a_node_is_all_of_the_package(tmp_path, monkeypatch):
    before = nodes._code()
    shutil.copytree(nodes.CODE, tmp_path / "ser_ray")
    monkeypatch.setattr(nodes, "CODE", tmp_path / "ser_ray")
    assert nodes._code() == before
    with (tmp_path / "ser_ray" / "models" / "classifier.py").open("a") as file:
        file.write("# another version\n")
    assert nodes._code() != before

"""`ser-ray serve` as a user runs it: one server for all tests here, asked over HTTP and WebSocket."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest
from huggingface_hub import InferenceClient
from ray_head import ray_head
from serving_fixtures import encoded, pcm, wav
from websockets.sync.client import connect

import ser_ray
from ser_ray.__main__ import main
from ser_ray.runtime import cluster

pytestmark = [pytest.mark.ray, pytest.mark.slow]
REPLICA = "ServeReplica:ser-ray:Models"
KILLED = re.compile(r"\(raylet\)|worker died or was killed")
"""What Ray says of a process that was killed, with advice on memory; it says it of no other."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def asked(port: int, method: str, path: str, body: bytes = b"", kind: str = "") -> tuple[int, object]:
    """Status and content of an answer, over a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=900)
    try:
        connection.request(method, path, body, {"content-type": kind} if kind else {})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def until_ready(port: int, process: subprocess.Popen[str] | None = None) -> None:
    ends = time.monotonic() + 900
    while time.monotonic() < ends and (process is None or process.poll() is None):
        try:
            if asked(port, "GET", "/ready")[0] == 200:
                return
        except (OSError, ValueError):
            pass
        time.sleep(0.5)
    raise AssertionError("it does not become ready")


@contextmanager
def running(
    checkpoints: dict[str, str],
    folder: Path,
    *options: str,
    end: signal.Signals = signal.SIGTERM,
    to_all: bool = False,
) -> Iterator[tuple[int, psutil.Process]]:
    """A server: its port, and its process. It is ended by a signal, sent ``to_all`` of its processes as by Ctrl-C in a
    terminal, and by `timeout` and systemd; it has said no more than it should then, with exit code 0, and left nothing
    running."""
    port, said = free_port(), folder / "said.txt"
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, "-m", "ser_ray", "serve", *checkpoints.values(), "--port", str(port), *options]
    with said.open("w") as file:
        process = subprocess.Popen(
            command, env=environment, stdout=file, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
    children: list[psutil.Process] = []
    try:
        try:
            until_ready(port, process)
        except AssertionError as error:
            raise AssertionError(said.read_text()) from error
        yield port, psutil.Process(process.pid)
    finally:
        if process.poll() is None:
            children = psutil.Process(process.pid).children(recursive=True)
        if to_all:
            os.killpg(process.pid, end)
        else:
            process.send_signal(end)
        code = process.wait(timeout=600)
    _, left = psutil.wait_procs(children, timeout=60)
    assert [child.cmdline() for child in left if child.is_running()] == []
    lines = [line for line in said.read_text().splitlines() if not KILLED.search(line)]
    assert code == 0, lines
    assert lines == [
        f"http://127.0.0.1:{port} answers with plain, known; Ctrl-C ends it",
        "only this machine reaches it, and no key is needed",
    ]


@pytest.fixture(scope="module")
def server(
    checkpoints: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[int, psutil.Process]]:
    """One for all tests that leave it as it is."""
    folder = tmp_path_factory.mktemp("server")
    with running(checkpoints, folder, "--replicas", "1", end=signal.SIGINT, to_all=True) as started:
        yield started


def replica(server: psutil.Process) -> psutil.Process:
    """The process that has the model."""
    (found,) = (child for child in server.children(recursive=True) if REPLICA in " ".join(child.cmdline()))
    return found


def scores(checkpoint: str, recording: bytes, folder: Path) -> dict[str, float]:
    """Of `predict`, for all of a recording."""
    path = folder / "recording"
    path.write_bytes(recording)
    model = ser_ray.load(checkpoint, device="cpu")
    *_, whole = model.predict(path)
    return {emotion: whole[f"p_{emotion}"] for emotion in model.emotions}


def test_the_client_of_hugging_face_needs_no_change(server, checkpoints, tmp_path):
    port, _ = server
    recording = wav(1.4, 1, 44_100)
    expected = scores(checkpoints["plain"], recording, tmp_path)
    path = tmp_path / "call.wav"
    path.write_bytes(recording)
    client = InferenceClient()
    for given in (str(path), path, recording):
        found = client.audio_classification(given, model=f"http://127.0.0.1:{port}")
        assert {one.label: one.score for one in found} == pytest.approx(expected, abs=1e-5)
    (best,) = client.audio_classification(str(path), model=f"http://127.0.0.1:{port}/", top_k=1)
    assert best.label == max(expected, key=expected.__getitem__)


def test_many_at_once_have_the_answers_that_each_has_alone(server, checkpoints, tmp_path):
    port, _ = server
    recordings = [wav(seconds, number) for number, seconds in enumerate(np.linspace(0.4, 6.0, 24))]
    models = ["plain", "known"] * 12
    expected = [scores(checkpoints[m], r, tmp_path) for m, r in zip(models, recordings, strict=True)]

    def ask(number: int) -> dict[str, float]:
        status, found = asked(port, "POST", f"/?model={models[number]}", recordings[number])
        assert status == 200, found
        return {one["label"]: one["score"] for one in found}

    with ThreadPoolExecutor(24) as pool:
        for number, found in enumerate(pool.map(ask, range(24))):
            assert found == pytest.approx(expected[number], abs=1e-5)


def test_files_voices_and_statuses(server):
    port, _ = server
    body = {"files": [{"audio": encoded(wav(5.0))}], "model": "known"}
    status, voice = asked(port, "POST", "/v1/voices", json.dumps(body).encode(), "application/json")
    assert (status, voice["recordings"]) == (200, 3)
    asking = json.dumps(body | {"voice": voice, "embedding": True}).encode()
    status, found = asked(port, "POST", "/v1/predict", asking, "application/json")
    assert status == 200
    assert [window["end"] > window["start"] for window in found["files"][0]["windows"]] == [True] * 3
    wrong = json.dumps(body | {"voice": {"format": 1}}).encode()
    for path, content, kind, expected in (
        ("/", b"hello", "", 415),
        ("/", b"", "", 422),
        ("/", b"[" * 100_000, "application/json", 422),
        ("/", bytes(33_000_000), "", 413),
        ("/?model=none", wav(1.0), "", 422),
        ("/v1/predict", wrong, "application/json", 422),
        ("/nowhere", b"x", "", 404),
        ("/v1/models", b"x", "", 405),
    ):
        try:
            status, answer = asked(port, "POST", path, content, kind)
        except (BrokenPipeError, ConnectionResetError):  # of a body that was refused before it was sent
            assert expected == 413
            continue
        assert (status, set(answer)) == (expected, {"error", "status"})
    assert asked(port, "GET", "/v1/models")[1]["models"][1]["name"] == "known"


def test_a_stream_over_a_socket(server, checkpoints):
    port, _ = server
    rate, sound = 24_000, pcm(3.0, 24_000)
    with connect(f"ws://127.0.0.1:{port}/v1/stream") as stream:
        stream.send(json.dumps({"rate": rate}))
        answers = []
        for second in range(3):
            stream.send(sound[2 * rate * second : 2 * rate * (second + 1)])
            answers.append(json.loads(stream.recv()))
        stream.send("no PCM")
        assert json.loads(stream.recv())["status"] == 422
    assert [answer["end"] for answer in answers] == [1.0, 2.0, 3.0]
    (expected,) = ser_ray.load(checkpoints["plain"], device="cpu").predict(np.frombuffer(sound, "<i2"), rate)
    assert answers[-1]["probabilities"]["happy"] == pytest.approx(expected["p_happy"], abs=1e-5)


def test_the_client_of_the_documentation_prints_an_answer_a_second(server, tmp_path):
    port, _ = server
    page = (Path(__file__).parents[2] / "docs" / "serve.md").read_text()
    (client,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.S) if "connect(" in block)
    assert len(client.strip().splitlines()) <= 20
    (tmp_path / "client.py").write_text(client.replace(":8000", f":{port}"))
    (tmp_path / "call.wav").write_bytes(wav(2.5))
    command = [sys.executable, str(tmp_path / "client.py"), str(tmp_path / "call.wav")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[:2] for line in lines] == [["1.0", "s"], ["2.0", "s"]]
    assert {line[2] for line in lines} <= {"angry", "happy", "sad"}


def test_all_of_it_listens_on_this_machine_alone(server):
    _, process = server
    found = {
        connection.laddr.ip
        for one in (process, *process.children(recursive=True))
        for connection in one.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    assert found
    assert found <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def test_a_killed_replica_loses_no_request(checkpoints, tmp_path):
    """And a client that is slow is told so; SIGTERM to all of its processes ends them. With time enough for a replica
    on a busy machine."""
    options = ("--replicas", "1", "--limit", "answer_seconds=600", "--limit", "receive_seconds=2")
    with running(checkpoints, tmp_path, *options, to_all=True) as (port, process):
        assert slowly(port, wav(1.0)) == 408
        killed = replica(process)
        answered: list[int] = []

        def ask(client: int) -> list[int]:
            found = []
            while len(answered) < 96:  # so that requests are under way when it is killed, and after
                found.append(asked(port, "POST", "/", wav(1.0, client))[0])
                answered.append(client)
                if len(answered) == 48:
                    killed.kill()
            return found

        with ThreadPoolExecutor(16) as pool:
            statuses = [status for found in pool.map(ask, range(16)) for status in found]
        assert set(statuses) == {200}
        assert not killed.is_running() or killed.status() == psutil.STATUS_ZOMBIE
        assert asked(port, "GET", "/ready")[0] == 200
        assert replica(process).pid != killed.pid


def slowly(port: int, body: bytes) -> int:
    """The status of a request whose body stops on its way."""
    with socket.create_connection(("127.0.0.1", port), timeout=120) as connection:
        head = f"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        connection.sendall(head + body[:100])
        return int(connection.recv(65_536).split()[1])


# -- the command


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0: other machines reach this address; give --key-file"),
        (["--replicas", "0"], "--replicas 0"),
        (["--limit", "nothing=1"], "there is no such limit"),
        (["--key-file", "absent"], "no such file"),
    ],
)
def test_what_is_wrong_is_one_line(checkpoints, capsys, options, said):
    assert main(["serve", checkpoints["plain"], *options]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_port_in_use_and_a_checkpoint_that_is_none(checkpoints, capsys, tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        assert main(["serve", checkpoints["plain"], "--port", port]) == 2
    assert f"--port {port}" in capsys.readouterr().err
    assert main(["serve", str(tmp_path)]) == 2
    assert "experiment.yaml" in capsys.readouterr().err


def test_a_configuration_file_for_ray_serve(checkpoints, capsys, tmp_path):
    import yaml
    from ray.serve.schema import ServeDeploySchema

    from ser_ray.serve import APPLICATION
    from ser_ray.serving.settings import Settings

    key_file = tmp_path / "keys"
    key_file.write_text("anna " + "k" * 30)
    key_file.chmod(0o600)
    options = ["--host", "0.0.0.0", "--key-file", str(key_file), "--limit", "seconds=20", "--replicas", "3", "--config"]
    assert main(["serve", *checkpoints.values(), *options]) == 0
    content = yaml.safe_load(capsys.readouterr().out)
    read = ServeDeploySchema.model_validate(content)
    assert (read.http_options.host, read.http_options.port) == ("0.0.0.0", 8000)
    assert read.logging_config.enable_access_log is False
    (one,) = read.applications
    settings = Settings.model_validate(one.args)
    assert settings.checkpoints == checkpoints
    assert (settings.limits.seconds, settings.replicas, settings.key_file) == (20, 3, str(key_file))
    assert one.import_path == APPLICATION
    assert "k" * 30 not in json.dumps(content)


@pytest.mark.parametrize(
    ("resources", "cpus", "gpus", "most"),
    [({"CPU": 2.0}, 1, 0, 1), ({"CPU": 3.0, cluster.OWN: 1.0}, 1, 0, 1), ({"CPU": 17.0, "GPU": 8.0}, 0, 1, 8)],
)
def test_ray_serve_builds_the_application_of_a_file(checkpoints, monkeypatch, resources, cpus, gpus, most):
    """By the function that `serve deploy` calls on a cluster."""
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary as build_application

    from ser_ray.serving import deployment

    monkeypatch.setattr(deployment.ray, "cluster_resources", lambda: resources)
    built = build_application(deployment.application, {"checkpoints": checkpoints})
    front = built._bound_deployment
    models = front.init_args[1]._bound_deployment
    assert models.init_args[0].checkpoints == checkpoints
    options = models.ray_actor_options
    assert (options["num_cpus"], options["num_gpus"]) == (cpus, gpus)
    config = models._deployment_config
    assert (config.autoscaling_config.min_replicas, config.autoscaling_config.max_replicas) == (1, most)
    assert front._deployment_config.max_ongoing_requests > config.max_ongoing_requests
    fixed = build_application(deployment.application, {"checkpoints": checkpoints, "replicas": 3})
    assert fixed._bound_deployment.init_args[1]._bound_deployment.num_replicas == 3


def test_a_model_that_cannot_be_loaded_is_one_line(checkpoints, tmp_path):
    """A replica finds it, and Ray Serve tries three times; also where the process that listens starts late."""
    damaged = tmp_path / "damaged"
    shutil.copytree(checkpoints["plain"], damaged)
    (damaged / "head.safetensors").write_bytes(b"nothing")
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    impatient = (
        "import sys; from ray.serve._private import api; api.HTTP_PROXY_TIMEOUT = 0.1; "
        "from ser_ray.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", impatient, "serve", str(damaged), "--port", str(free_port())]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("ser-ray serve: ")
    assert "head.safetensors" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_cluster_serves_what_the_configuration_file_says(checkpoints, tmp_path):
    """By `serve deploy` on a Ray that `ray start` started; there the command itself says what to do."""
    port = free_port()
    with ray_head(tmp_path, jobs=True) as head:
        environment = {**head.environment, "RAY_ADDRESS": head.address}
        program = [sys.executable, "-m", "ser_ray", "serve", checkpoints["plain"], "--port", str(port)]
        refused = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=600)
        assert refused.returncode == 2, refused.stderr
        assert "--config" in refused.stderr
        written = subprocess.run([*program, "--config"], env=environment, capture_output=True, text=True, check=True)
        (tmp_path / "serve.yaml").write_text(written.stdout)
        deploy = "import sys; from ray.serve.scripts import cli; sys.exit(cli())"
        command = [sys.executable, "-c", deploy, "deploy", str(tmp_path / "serve.yaml"), "-a", head.dashboard]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        until_ready(port)
        status, found = asked(port, "POST", "/", wav(1.0))
        assert (status, len(found)) == (200, 3)

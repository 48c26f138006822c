"""The endpoints over a model in this process: answers equal `predict`, and whatever is wrong is one line of JSON."""

from __future__ import annotations

import hashlib
import json
import socket
from pathlib import Path

import numpy as np
import psutil
import pytest
from serving_fixtures import HERE, Here, answering_at, encoded, pcm, refused, wav
from starlette.websockets import WebSocketDisconnect

import ser_ray
from ser_ray.serving.keys import Keys, read_keys
from ser_ray.serving.limits import Refused
from ser_ray.speech.long import load_windows

JSON = {"content-type": "application/json"}
SOCKET = {"host": "127.0.0.1:8000"}


def predicted(checkpoint: str, recording: bytes, tmp_path: Path, **options: object) -> list[dict]:
    """By the API, of a file."""
    path = tmp_path / "recording"
    path.write_bytes(recording)
    return list(ser_ray.load(checkpoint, device="cpu").predict(path, **options))


@pytest.mark.parametrize(("format", "rate"), [("WAV", 16_000), ("FLAC", 44_100), ("OGG", 48_000)])
def test_a_recording_has_the_answer_of_predict(serving, checkpoints, tmp_path, format, rate):
    recording = wav(1.3, 1, rate, format)
    (expected,) = predicted(checkpoints["plain"], recording, tmp_path)
    client = serving()
    answers = [
        client.post("/", content=recording),
        client.post("/", json={"inputs": encoded(recording), "parameters": {"top_k": 3}}),
    ]
    for answer in answers:
        assert answer.status_code == 200, answer.text
        found = answer.json()
        assert found[0]["label"] == expected["emotion"]
        assert [one["score"] for one in found] == sorted((one["score"] for one in found), reverse=True)
        assert {f"p_{one['label']}": one["score"] for one in found} == pytest.approx(
            {name: expected[name] for name in expected if name.startswith("p_")}, abs=1e-6
        )
    assert len(client.post("/", json={"inputs": encoded(recording), "parameters": {"top_k": 1}}).json()) == 1


def test_a_server_that_ends_leaves_no_decoder(serving):
    client, process = serving(), psutil.Process()
    before = set(process.children())
    assert client.post("/", content=wav(0.5, 1)).status_code == 200
    assert len(set(process.children()) - before) == 1
    client.__exit__(None, None, None)
    assert set(process.children()) <= before


def test_several_files_have_windows_times_and_embeddings(serving, checkpoints, tmp_path):
    long, short = wav(5.0, 2), wav(0.8, 3)
    files = [{"name": "long", "audio": encoded(long)}, {"name": "short", "audio": encoded(short)}]
    answer = serving().post("/v1/predict", json={"files": files, "model": "known", "embedding": True})
    assert answer.status_code == 200, answer.text
    content = answer.json()
    assert content["model"]["name"] == "known"
    for found, recording in zip(content["files"], (long, short), strict=True):
        *windows, whole = predicted(checkpoints["known"], recording, tmp_path)
        assert found["emotion"] == whole["emotion"]
        for mine, theirs in zip([found, *found["windows"]], [whole, *(windows or [whole])], strict=True):
            assert mine["probabilities"] == pytest.approx(
                {emotion: theirs[f"p_{emotion}"] for emotion in mine["probabilities"]}, abs=1e-6
            )
        times = [(window["start"], window["end"]) for window in found["windows"]]
        path = tmp_path / "recording"
        audio = ser_ray.load(checkpoints["known"], device="cpu").classifier.experiment.audio
        assert times == [(window.start, window.end) for window in load_windows(path, audio)]
        vector = ser_ray.load(checkpoints["known"], device="cpu").embed(path)[0]
        np.testing.assert_allclose(found["embedding"], vector, atol=1e-5)
    assert len(content["files"][0]["windows"]) == 3


def test_a_file_that_cannot_be_used_does_not_harm_the_others(serving):
    files = [{"audio": encoded(wav(1.0))}, {"audio": encoded(b"no audio")}, {"audio": encoded(wav(0.1))}]
    one, two, three = serving().post("/v1/predict", json={"files": files}).json()["files"]
    assert one["emotion"]
    assert "reason" not in one
    assert (two["emotion"], three["emotion"]) == (None, None)
    assert two["reason"].startswith("cannot be decoded")
    assert three["reason"].startswith("too short")


def test_a_speaker_is_enrolled_and_the_client_has_the_voice(serving, checkpoints, tmp_path):
    client = serving()
    recordings = [wav(1.0, seed) for seed in (5, 6)]
    files = [{"audio": encoded(one)} for one in recordings]
    voice = client.post("/v1/voices", json={"files": files, "model": "known", "name": "Anna"}).json()
    paths = [tmp_path / f"{number}.wav" for number in range(2)]
    for path, recording in zip(paths, recordings, strict=True):
        path.write_bytes(recording)
    model = ser_ray.load(checkpoints["known"], device="cpu")
    model.enrol(paths, name="Anna").save(tmp_path / "anna.json")
    expected = json.loads((tmp_path / "anna.json").read_text())
    assert voice.keys() == expected.keys()
    for name, value in expected.items():
        assert voice[name] == (pytest.approx(value, abs=1e-5) if isinstance(value, list) else value)
    asked = {"files": [{"audio": encoded(wav(1.0, 9))}], "model": "known", "voice": voice}
    (with_voice,) = client.post("/v1/predict", json=asked).json()["files"]
    (without,) = client.post("/v1/predict", json=asked | {"voice": None}).json()["files"]
    (expected,) = predicted(checkpoints["known"], wav(1.0, 9), tmp_path, voice=tmp_path / "anna.json")
    assert with_voice["probabilities"]["sad"] == pytest.approx(expected["p_sad"], abs=1e-6)
    assert with_voice["probabilities"]["sad"] != pytest.approx(without["probabilities"]["sad"], abs=1e-3)
    assert with_voice["voice"].startswith("used 2 unlabelled recordings of the speaker Anna")
    assert "another checkpoint" in refused(
        client.post("/v1/predict", json=asked | {"voice": voice | {"checkpoint": "0" * 12}}), 422
    )
    assert "head.speaker" in refused(client.post("/v1/predict", json=asked | {"model": "plain"}), 422)
    assert "damaged" in refused(client.post("/v1/predict", json=asked | {"voice": voice | {"mean": [1]}}), 422)


def test_a_model_says_what_it_is(serving):
    plain, known = serving().get("/v1/models").json()["models"]
    assert (plain["name"], known["name"]) == ("plain", "known")
    assert plain["emotions"] == ["angry", "happy", "sad"]
    assert (plain["uses_voices"], known["uses_voices"]) == (False, True)
    assert plain["metrics"] == {"split": "dev", "uar": {"value": 0.5, "ci95": None}}
    assert "Do not use it to judge people" in plain["not_for"]


@pytest.mark.parametrize(
    ("content", "headers", "status", "reason"),
    [
        (b"", {}, 422, "empty"),
        (b"hello", {}, 415, "cannot be decoded"),
        (b"RIFF\xff\xff\xff\xffWAVEfmt ", {}, 415, "cannot be decoded"),
        (wav(0.1), {}, 422, "too short"),
        (wav(1.0), {"content-type": "text/plain"}, 415, "a recording as it is"),
        (wav(1.0), {"content-type": "multipart/form-data; boundary=x"}, 415, "a recording as it is"),
        (b"{}", JSON, 422, "inputs: Field required"),
        (b"{", JSON, 422, "not JSON"),
        (b"[" * 100_000, JSON, 422, "not JSON"),
        (b'{"a":' * 100_000, JSON, 422, "not JSON"),
        (b'{"inputs": "%%%"}', JSON, 422, "base64"),
        (b'{"inputs": 1}', JSON, 422, "inputs: Input should be a valid string"),
        (b'{"inputs": "", "parameters": {"function_to_apply": "sigmoid"}}', JSON, 422, "softmax"),
        (b'{"inputs": "", "parameters": {"top_k": 0}}', JSON, 422, "top_k"),
        (b"\xff\xfe", JSON, 422, "not JSON"),
    ],
)
def test_what_is_wrong_is_one_line(serving, content, headers, status, reason):
    client = serving()
    assert reason in refused(client.post("/", content=content, headers=headers), status)
    assert client.post("/", content=wav(1.0)).status_code == 200, "the next one is answered"


def test_nothing_of_a_request_is_in_its_refusal(serving):
    secret = "a-secret-of-the-client"
    for body in ({"inputs": 1, secret: secret}, {"inputs": secret}, {"files": [{"audio": secret, secret: 1}]}):
        for path in ("/", "/v1/predict", "/v1/voices"):
            answer = serving().post(path, json=body)
            assert answer.status_code == 422
            assert answer.text.count(secret) <= json.dumps(body).count(f'"{secret}":'), "the name of a field at most"


def test_limits_of_a_request(serving):
    client = serving(megabytes=0.1, seconds=4, recordings=2)
    assert "0.1 MB" in refused(client.post("/", content=bytes(200_000)), 413)
    assert "0.1 MB" in refused(client.post("/", content=(bytes(60_000) for _ in range(2))), 413)  # without a length
    assert "4 s of audio" in refused(client.post("/", content=wav(8.0, format="OGG")), 413)
    files = [{"audio": encoded(wav(2.5, format="OGG"))}] * 2
    assert "4 s of audio" in refused(client.post("/v1/predict", json={"files": files}), 413)
    assert "2 recordings" in refused(client.post("/v1/predict", json={"files": [files[0]] * 3}), 413)
    assert "Content-Length" in refused(client.post("/", content=b"x", headers={"content-length": "many"}), 400)
    assert client.post("/", content=wav(1.0)).status_code == 200


def test_a_slow_client_is_told_so(checkpoints, here):
    with answering_at(checkpoints, here, receive_seconds=0.3) as port:
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            connection.sendall(b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000\r\n\r\nRIFF")
            answer = connection.recv(65_536)
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert "within 0.3 s" in json.loads(answer.partition(b"\r\n\r\n")[2])["error"]


def test_decoding_that_takes_too_long_is_ended(serving):
    client = serving(decode_seconds=0.0001)
    assert "to decode" in refused(client.post("/", content=wav(30.0)), 413)


def test_a_full_server_says_when_to_come_again(serving):
    full = serving(queue=1)
    room = full.app.room
    room.enter(10)
    answer = full.post("/", content=wav(1.0))
    assert "no room" in refused(answer, 503)
    assert answer.headers["retry-after"] == "1"
    room.leave(10)
    assert full.post("/", content=wav(1.0)).status_code == 200
    assert (room.requests, room.bytes) == (0, 0)


def test_a_model_that_is_not_there(serving, here):
    assert "there is none" in refused(serving().post("/?model=other", content=wav(1.0)), 422)
    down = serving(backend=Here(here.loaded, Refused(503, "not there", 5), ready=False))
    answer = down.post("/", content=wav(1.0))
    assert refused(answer, 503) == "not there"
    assert answer.headers["retry-after"] == "5"
    assert refused(down.get("/ready"), 503)
    assert down.get("/health").status_code == 200


def test_a_failure_has_no_traceback_in_its_answer(serving, here):
    broken = serving(backend=Here(here.loaded, RuntimeError("a secret of the server")))
    answer = broken.post("/", content=wav(1.0))
    assert "secret" not in refused(answer, 500)


def test_keys(serving, tmp_path):
    file = tmp_path / "keys"
    file.write_text("# of the team\nanna aaaaaaaaaaaaaaaaaaaaaaaa\nben bbbbbbbbbbbbbbbbbbbbbbbb\n")
    file.chmod(0o600)
    client = serving(read_keys(file, "0.0.0.0"), burst=2, requests_per_minute=0.001)
    anna, ben, nobody = ({"authorization": f"Bearer {letter * 24}"} for letter in "abc")
    for headers in ({}, nobody, {"authorization": "Basic x"}, {"authorization": f"Bearer {'a' * 23}"}):
        answer = client.post("/", content=wav(1.0), headers=headers)
        refused(answer, 401)
        assert answer.headers["www-authenticate"] == "Bearer"
    for path in ("/metrics", "/v1/models", "/openapi.json", "/nowhere"):
        refused(client.get(path), 401)
    assert [client.get(path).status_code for path in ("/", "/health", "/ready")] == [200, 200, 200]
    assert [client.post("/", content=wav(1.0), headers=anna).status_code for _ in range(2)] == [200, 200]
    answer = client.post("/", content=wav(1.0), headers=anna)
    assert "too many requests" in refused(answer, 429)
    assert int(answer.headers["retry-after"]) > 0
    assert client.post("/", content=wav(1.0), headers=ben).status_code == 200, "another key has requests of its own"


def test_a_page_of_another_site_gets_nothing(serving):
    client = serving()
    refused(client.post("/", content=wav(1.0), headers={"origin": "https://evil.example"}), 403)
    assert "localhost" in refused(client.post("/", content=wav(1.0), headers={"host": "evil.example:8000"}), 403)
    assert client.post("/", content=wav(1.0), headers={"origin": HERE}).status_code == 200
    with client.websocket_connect("/v1/stream", headers=SOCKET | {"origin": "https://evil.example"}) as socket:
        assert socket.receive_json()["status"] == 403


def test_measures_have_sizes_and_times_alone(serving):
    client = serving()
    client.post("/", content=wav(1.0))
    client.get("/a-secret-path")
    text = client.get("/metrics").text
    assert 'ser_ray_requests_total{path="/",status="200"} 1.0' in text
    assert 'ser_ray_requests_total{path="other",status="404"} 1.0' in text
    assert "secret" not in text


def test_openapi_has_every_endpoint(serving):
    paths = serving().get("/openapi.json").json()["paths"]
    assert set(paths) == {"/", "/v1/predict", "/v1/voices", "/v1/models", "/health", "/ready", "/metrics"}
    assert "application/json" in paths["/v1/predict"]["post"]["requestBody"]["content"]


def test_the_page_is_served_if_it_is_there_and_may_talk_to_this_server_alone(serving, monkeypatch, tmp_path):
    monkeypatch.setattr("ser_ray.serving.app.PAGE", tmp_path / "page.html")
    client = serving()
    assert client.get("/").text.startswith("ser-ray")
    (tmp_path / "page.html").write_text("<h1>here</h1>")
    answer = client.get("/")
    assert answer.text == "<h1>here</h1>"
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "http" not in answer.headers["content-security-policy"]


def test_a_model_with_sets_answers_them(serving, here, monkeypatch):
    model = here.loaded.get("plain")
    monkeypatch.setattr(model, "least_probability", 0.0, raising=False)
    files = [{"audio": encoded(wav(1.0))}]
    (all_of_them,) = serving().post("/v1/predict", json={"files": files}).json()["files"]
    assert sorted(all_of_them["set"]) == ["angry", "happy", "sad"]
    assert [all_of_them["probabilities"][e] for e in all_of_them["set"]] == sorted(
        all_of_them["probabilities"].values(), reverse=True
    )
    monkeypatch.setattr(model, "least_probability", 1.0)
    (found,) = serving().post("/v1/predict", json={"files": files}).json()["files"]
    assert found["set"] == [found["emotion"]] == found["windows"][0]["set"]
    (plain,) = serving().post("/v1/predict?model=known", content=wav(1.0)).json()["files"]
    assert "set" not in plain


# -- streams


def test_a_stream_is_answered_every_second(serving, checkpoints):
    rate = 44_100
    sound, answers = pcm(5.0, rate), []
    with serving().websocket_connect("/v1/stream", headers=SOCKET) as socket:
        socket.send_json({"rate": rate})
        for second in range(5):
            for begin in range(second * 2 * rate, (second + 1) * 2 * rate, 8820):
                socket.send_bytes(sound[begin : begin + 8820])
            answers.append(socket.receive_json())
    assert [round(answer["end"]) for answer in answers] == [1, 2, 3, 4, 5]
    assert [round(answer["start"]) for answer in answers] == [0, 0, 0, 1, 2], "a window of 3 s"
    model = ser_ray.load(checkpoints["plain"], device="cpu")
    for answer in answers:
        samples = np.frombuffer(sound, "<i2")[round(answer["start"] * rate) : round(answer["end"] * rate)]
        (expected,) = model.predict(samples, rate)
        assert answer["probabilities"] == pytest.approx(
            {emotion: expected[f"p_{emotion}"] for emotion in answer["probabilities"]}, abs=1e-6
        )
        assert answer["skipped"] == 0


def test_silence_is_said_to_be_silence(serving):
    with serving().websocket_connect("/v1/stream", headers=SOCKET) as socket:
        socket.send_json({"rate": 16_000})
        socket.send_bytes(bytes(32_000))
        answer = socket.receive_json()
    assert answer["emotion"] is None
    assert answer["reason"].startswith("silent")


@pytest.mark.parametrize(
    ("messages", "status", "reason"),
    [
        ([b"\0\0"], 422, "a start message"),
        (["{"], 422, "not JSON"),
        (["{}"], 422, "rate"),
        (['{"rate": 1}'], 422, "rate"),
        (['{"rate": 16000, "model": "other"}'], 422, "there is none"),
        (['{"rate": 16000, "window": 1000}'], 422, "window"),
        (['{"rate": 16000}', b"\0"], 422, "even number of bytes"),
        (['{"rate": 16000}', "more"], 422, "PCM"),
        (['{"rate": 16000}', bytes(2**20 + 2)], 413, "in a message"),
        (['{"rate": 16000}', *[bytes(2**19)] * 3], 429, "ahead of the clock"),
    ],
)
def test_what_is_wrong_with_a_stream_is_one_line_and_its_end(serving, messages, status, reason):
    client = serving()
    with client.websocket_connect("/v1/stream", headers=SOCKET) as socket:
        for message in messages:
            socket.send_bytes(message) if isinstance(message, bytes) else socket.send_text(message)
        found = json.loads(socket.receive_text())
        while "error" not in found:  # an answer that was due before
            found = json.loads(socket.receive_text())
        assert found["status"] == status
        assert reason in found["error"]
        with pytest.raises(WebSocketDisconnect):
            socket.receive_text()
    assert client.app.room.streams == 0


def test_streams_need_a_key_and_room(serving):
    keys = Keys({"anna": hashlib.sha256(b"k" * 24).digest()})
    client = serving(keys, connections=1)
    with client.websocket_connect("/v1/stream", headers=SOCKET) as socket:
        socket.send_json({"rate": 16_000})
        assert socket.receive_json()["status"] == 401
    with client.websocket_connect("/v1/stream", headers=SOCKET) as one:
        one.send_json({"rate": 16_000, "key": "k" * 24})
        one.send_bytes(bytes(32_000))
        one.receive_json()
        with client.websocket_connect("/v1/stream", headers=SOCKET | {"authorization": f"Bearer {'k' * 24}"}) as two:
            two.send_json({"rate": 16_000})
            assert two.receive_json()["status"] == 503

"""Limits, keys, messages, decoders, batches, models in memory and streams, each by itself."""

from __future__ import annotations

import asyncio
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from backbone_fixtures import noise
from pydantic import ValidationError
from serving_fixtures import pcm, wav

import ser_ray
from ser_ray.config import Audio
from ser_ray.models.about import model_of
from ser_ray.schema import UserError
from ser_ray.serving import answering, keys
from ser_ray.serving.checkpoints import named
from ser_ray.serving.decoding import Decoders
from ser_ray.serving.limits import Limits, Rates, Refused, Room, read_limits
from ser_ray.serving.listening import Listening
from ser_ray.serving.loaded import LoadedModels
from ser_ray.serving.settings import Settings
from ser_ray.speech.audio import to_int16
from ser_ray.speech.pieces import pieces_of

# -- limits


def test_limits_are_read_and_refused_in_one_line():
    assert read_limits([]) == Limits()
    assert read_limits(["seconds=20", "queue=3"]) == Limits(seconds=20, queue=3)
    for given, said in (("second=20", "there is no such limit"), ("seconds=x", "number"), ("queue=0", "greater")):
        with pytest.raises(UserError, match=said):
            read_limits([given])
    with pytest.raises(ValidationError):
        Settings(checkpoints={})


def test_a_key_has_its_burst_and_then_its_rate():
    now = 0.0
    rates = Rates(Limits(burst=3, requests_per_minute=30), clock=lambda: now)
    for _ in range(3):
        rates.count("anna")
    with pytest.raises(Refused) as refused:
        rates.count("anna")
    assert (refused.value.status, refused.value.wait_s) == (429, 3)
    rates.count("ben")
    now = 2.0
    rates.count("anna")
    with pytest.raises(Refused):
        rates.count("anna")
    now = 1000.0
    for _ in range(3):
        rates.count("anna")
    with pytest.raises(Refused):
        rates.count("anna")


def test_room_is_for_requests_and_for_their_bytes():
    room = Room(Limits(queue=3, queue_megabytes=1, connections=1))
    room.enter(900_000)
    with pytest.raises(Refused):
        room.enter(200_000)
    room.enter(0)
    room.enter(0)
    with pytest.raises(Refused):
        room.enter(0)
    for size in (900_000, 0, 0):
        room.leave(size)
    room.enter(32_000_000)  # one alone is let in, whatever the sum
    room.open_stream()
    with pytest.raises(Refused):
        room.open_stream()


def test_a_refusal_goes_between_processes():
    again = pickle.loads(pickle.dumps(Refused(503, "why", 5)))
    assert (again.status, again.reason, again.wait_s) == (503, "why", 5)


# -- keys


def written(tmp_path: Path, text: str | bytes, mode: int = 0o600) -> Path:
    path = tmp_path / "keys"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    path.chmod(mode)
    return path


@pytest.mark.parametrize(
    ("text", "mode", "said"),
    [
        ("", 0o600, "it has no key"),
        ("# nothing\n", 0o600, "it has no key"),
        ("anna short\n", 0o600, "line 1"),
        ("anna\n", 0o600, "line 1"),
        ("a " + "k" * 20 + "\n\na " + "l" * 20, 0o600, "line 3"),
        ("a " + "k" * 20, 0o604, "every user of this machine can read it"),
        (b"\xff\xfe", 0o600, "UTF-8"),
    ],
)
def test_a_key_file_that_is_none(tmp_path, text, mode, said):
    with pytest.raises(UserError, match=said) as error:
        keys.read_keys(written(tmp_path, text, mode), "0.0.0.0")
    assert "k" * 20 not in str(error.value)


def test_another_address_needs_a_key_file(tmp_path):
    for host in ("0.0.0.0", "::", "192.168.0.7", "my-server", ""):
        with pytest.raises(UserError, match="--key-file"):
            keys.read_keys(None, host)
    for host in ("127.0.0.1", "::1", "localhost", "127.0.0.53"):
        assert keys.read_keys(None, host).owner("") == ""
    with pytest.raises(UserError, match="no such file"):
        keys.read_keys(tmp_path / "absent", "0.0.0.0")


def test_every_digest_is_compared_in_constant_time(tmp_path, monkeypatch):
    compared = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append(other)
        return one == other

    found = keys.read_keys(written(tmp_path, "".join(f"n{i} {str(i) * 20}\n" for i in range(5))), "0.0.0.0")
    monkeypatch.setattr(keys.hmac, "compare_digest", compare)
    assert found.owner("0" * 20) == "n0"
    with pytest.raises(Refused):
        found.owner("x")
    assert compared == list(found.digests.values()) * 2


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "", "[", "[::1", "@"])
def test_without_a_key_only_names_of_this_machine_are_answered(host):
    with pytest.raises(Refused):
        keys.check_origin(host, "", needs_key=False)
    keys.check_origin(host, "", needs_key=True)


# -- decoding


AUDIO = Audio(max_seconds=2.0)


def test_a_process_decodes_as_this_one(tmp_path):
    recordings = [wav(5.0, 1), wav(1.0, 2, 44_100, "FLAC"), wav(0.1), b"nothing", wav(1.0)[:300]]

    async def decoded():
        decoders = Decoders(1, Limits())
        found = [await decoders.pieces(recording, AUDIO) for recording in recordings]
        decoders.close()
        return found

    for recording, found in zip(recordings, asyncio.run(decoded()), strict=True):
        (tmp_path / "recording").write_bytes(recording)
        expected = list(pieces_of(AUDIO, [tmp_path / "recording"]))
        assert len(found) == len(expected)
        for mine, theirs in zip(found, expected, strict=True):
            assert (mine.reason, mine.start, mine.end) == (theirs.reason, theirs.start, theirs.end)
            assert (mine.number, mine.of) == (theirs.number, theirs.of)
            if theirs.samples is not None:
                np.testing.assert_array_equal(mine.samples, theirs.samples)


def test_a_decoder_that_hangs_or_dies_is_replaced(monkeypatch):
    """By programs in its place: one that never answers, and one that ends."""
    import subprocess

    popen = subprocess.Popen

    async def run():
        decoders = Decoders(1, Limits(decode_seconds=0.5))
        answers = []
        for program, status in (("print('[]', flush=True); import time; time.sleep(60)", 413), ("print('[]')", 415)):
            monkeypatch.setattr(
                "subprocess.Popen", lambda command, p=program, **pipes: popen([command[0], "-c", p], **pipes)
            )
            with pytest.raises(Refused) as refused:
                await decoders.pieces(wav(1.0), AUDIO)
            answers.append(refused.value.status == status)
        monkeypatch.setattr("subprocess.Popen", popen)
        decoders.limits = Limits()
        answers.append(len(await decoders.pieces(wav(1.0), AUDIO)) == 1)
        decoders.close()
        return answers

    assert asyncio.run(run()) == [True, True, True]


def test_a_client_that_goes_away_leaves_no_decoder_at_work(monkeypatch):
    async def run():
        decoders = Decoders(1, Limits())
        assert len(await decoders.pieces(wav(1.0), AUDIO)) == 1
        first = decoders.free.get_nowait()
        decoders.free.put_nowait(first)
        started = asyncio.Event()
        decode = first.decode

        def slow(*arguments):
            loop.call_soon_threadsafe(started.set)
            first.process.stdin.write(b'{"bytes": 10, "seconds": 1, "audio": {}}\n')  # and never the bytes
            first.process.stdin.flush()
            return first._read()

        loop = asyncio.get_running_loop()
        monkeypatch.setattr(first, "decode", slow)
        task = asyncio.create_task(decoders.pieces(wav(1.0), AUDIO))
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert decode
        assert first.process.poll() is not None
        assert len(await decoders.pieces(wav(1.0), AUDIO)) == 1
        decoders.close()

    asyncio.run(run())


# -- batches


def windows(*seconds: float) -> list[np.ndarray]:
    waveform_BT, lengths_B = noise(seconds)
    return [to_int16(row[:length].numpy()) for row, length in zip(waveform_BT, lengths_B, strict=True)]


def test_an_answer_does_not_depend_on_its_neighbours(checkpoints):
    loaded = LoadedModels(checkpoints, 2)
    one, other = loaded.get("plain"), loaded.get("known")
    voice = answering.enrolled(other, windows(1.0, 0.7), "x")
    own = windows(0.4, 1.9, 0.8, 1.1, 0.5)
    jobs = [
        answering.known_of(answering.Job("plain", (own[0],)), one),
        answering.known_of(answering.Job("known", (own[1], own[2]), embedding=True), other),
        answering.known_of(answering.Job("known", (own[3],), voice, embedding=True), other),
        answering.known_of(answering.Job("plain", (own[4],)), one),
    ]
    together, apart = answering.answer(jobs), [answering.answer([job])[0] for job in jobs]
    for mine, alone in zip(together, apart, strict=True):
        np.testing.assert_allclose(mine.probabilities, alone.probabilities, atol=1e-5, rtol=0)
        assert (mine.pooled_NP is None) == (alone.pooled_NP is None)
        if mine.pooled_NP is not None:
            np.testing.assert_allclose(mine.pooled_NP, alone.pooled_NP, atol=1e-5)
    model = ser_ray.load(checkpoints["plain"], device="cpu")
    (expected,) = model.predict(own[0], 16_000)
    assert together[0].probabilities[0] == pytest.approx(
        [expected[f"p_{emotion}"] for emotion in model.emotions], abs=1e-5
    )
    assert [reply.said[:6] for reply in together] == ["", "", "used 2", ""]


def test_padded_seconds_and_jobs_by_length(checkpoints):
    model = LoadedModels(checkpoints, 1).get("plain")
    known = [answering.known_of(answering.Job("plain", tuple(windows(*each))), model) for each in ((1.0, 3.0), (2.5,))]
    assert answering.padded_seconds(known) == 9
    assert answering.padded_seconds(known[:1]) == 6
    lengths = [30.0] * 5 + [1.0] * 7
    silent = [np.zeros(round(16_000 * seconds), np.int16) for seconds in lengths]
    jobs = list(answering.jobs_of("plain", silent))
    assert sorted(place for places, _ in jobs for place in places) == list(range(12))
    for _, job in jobs:
        assert answering.padded_seconds([answering.known_of(job, model)]) <= answering.BATCH_SECONDS


# -- models in memory


def test_models_share_a_backbone_and_the_least_recently_used_one_goes(checkpoints, tmp_path):
    third = tmp_path / "third"
    third.symlink_to(checkpoints["known"])
    loaded = LoadedModels(checkpoints | {"third": str(third)}, 2)
    plain, known = loaded.get("plain"), loaded.get("known")
    mine, theirs = (dict(model.backbone.named_parameters()) for model in (plain, known))
    large = [name for name, tensor in mine.items() if tensor.numel() >= 4096]
    assert large
    assert all(mine[name].data_ptr() == theirs[name].data_ptr() for name in large)
    assert loaded.get("plain") is plain
    loaded.get("third")
    assert list(loaded.models) == ["plain", "third"]
    assert list(loaded.tensors) == ["plain", "third"]
    assert loaded.get("plain") is plain
    assert loaded.get("known") is not known
    (answer,) = answering.answer([answering.known_of(answering.Job("known", tuple(windows(1.0))), loaded.get("known"))])
    (expected,) = ser_ray.load(checkpoints["known"], device="cpu").predict(windows(1.0)[0], 16_000)
    assert answer.probabilities[0][0] == pytest.approx(expected["p_angry"], abs=1e-6)


def test_names_of_checkpoints(checkpoints, tmp_path):
    assert named([Path(path) for path in checkpoints.values()]) == checkpoints
    other = tmp_path / "plain" / "best"
    other.parent.mkdir()
    other.symlink_to(checkpoints["plain"])
    assert list(named([Path(checkpoints["plain"]), other]).values()) == [checkpoints["plain"], str(other)]
    assert len(named([Path(checkpoints["plain"]), other])) == 2
    with pytest.raises(UserError, match="twice"):
        named([other, other])
    with pytest.raises(UserError, match="no such file"):
        named([tmp_path])


def test_a_tested_model_has_its_intervals_and_its_stamp():
    folder = Path(__file__).parents[1] / "fixtures" / "results-0.1.0"
    found = model_of("demo", folder / "best")
    tested = json.loads((folder / "evaluation" / "test.json").read_text())
    assert found["metrics"]["uar"] == {"value": tested["uar"], "ci95": tested["ci95"]["uar"]}
    assert (found["metrics"]["split"], found["metrics"]["unit"]) == ("test", "speakers")
    assert found["leaky"] is False
    assert found["protocol"] == tested["protocol"]["description"]


# -- streams


def test_a_stream_has_one_window_whatever_arrives():
    now = 0.0
    listening = Listening(8_000, 2.0, clock=lambda: now)
    sound = pcm(9.0, 8_000)
    listening.add(sound[:16_000])
    assert listening.waiting == 1
    piece, skipped = listening.due(AUDIO)
    assert (piece.start, piece.end, skipped, listening.waiting) == (0.0, 1.0, 0, 0)
    now = 5.0
    listening.add(sound[16_000:96_000])
    assert len(listening.samples) == 16_000, "two seconds"
    assert listening.waiting == 5
    piece, skipped = listening.due(AUDIO)
    assert (piece.start, piece.end, skipped, listening.waiting) == (4.0, 6.0, 4, 0)
    listening.add(sound[96_000:])
    with pytest.raises(Refused, match="ahead of the clock") as refused:
        listening.add(sound)
    assert refused.value.status == 429
    assert len(listening.samples) == 16_000


# -- replicas that end


@pytest.mark.parametrize(
    ("ended", "answer"), [("aaa", "done"), ("aba", None), ("", "done")], ids=["one", "two", "none"]
)
def test_a_request_is_asked_again_of_another_replica_once(monkeypatch, ended, answer):
    """``ended``: the replica of each error, of which Ray may give several for one that has ended."""
    from ray.exceptions import RayActorError

    from ser_ray.serving import deployment

    monkeypatch.setattr(deployment, "AGAIN_S", 0)
    left = list(ended)

    async def ask() -> str:
        if left:
            raise RayActorError(left.pop(0), "it ended")
        return "done"

    replicas = deployment.Replicas(None)
    if answer:
        assert asyncio.run(replicas._asked(ask)) == answer
    else:
        with pytest.raises(Refused, match="two processes"):
            asyncio.run(replicas._asked(ask))
    assert left == ([] if answer else ["a"])

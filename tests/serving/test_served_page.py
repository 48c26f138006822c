"""The same page where a server is behind it: what it sends, and what it shows of the answers and of refusals."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from browser import AXE, CHROMIUM, Page, browser, faults
from serving_fixtures import Here, answering_at, wav

import ser_ray
from ser_ray.serving.keys import read_keys

FAKE = ("--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium")
PAGE = Path(ser_ray.__file__).with_name("serving") / "page.html"
MODEL = {
    "name": "calls",
    "emotions": ["angry", "sad"],
    "backbone": "openai/whisper-base",
    "corpora": ["ravdess"],
    "protocol": "random",
    "uses_voices": True,
    "metrics": {"split": "test", "unit": "speakers", "uar": {"value": 0.61, "ci95": [0.55, 0.66]}},
    "leaky": True,
    "not_for": "Judging people.",
}
VOICE = {"format": 1, "mean": [0.5]}


class Server(BaseHTTPRequestHandler):
    """Answers as `ser-ray serve` does, and notes what it is sent."""

    requests: list[tuple[str, bytes]]
    answer: tuple[int, dict[str, Any]]

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            return self._send(json.dumps({"models": [MODEL]}).encode(), "application/json")
        return self._send(PAGE.read_bytes(), "text/html; charset=utf-8")

    def do_POST(self) -> None:
        self.requests.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
        status, content = (200, VOICE) if self.path == "/v1/voices" else self.answer
        self._send(json.dumps(content).encode(), "application/json", status)

    def _send(self, body: bytes, kind: str, status: int = 200) -> None:
        self.send_response(status)
        for name, value in {
            "Content-Type": kind,
            "Content-Length": len(body),
        }.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def tab() -> Iterator[Page]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server, browser() as opened:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        opened.open(f"http://127.0.0.1:{server.server_port}/")
        opened.wait("document.body.dataset.ready")
        yield opened
        server.shutdown()


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    Server.requests = []
    soundfile.write(tmp_path / "call.wav", 0.1 * np.sin(np.arange(16_000) / 9), 16_000)
    return tmp_path / "call.wav"


def answered(angry: float) -> tuple[int, dict[str, Any]]:
    one = {"emotion": "angry", "probabilities": {"sad": 1 - angry, "angry": angry}}
    windows = [{"start": 0.0, "end": 0.5, **one}, {"start": 0.5, "end": 1.0, "emotion": None, "reason": "silent"}]
    return 200, {"model": MODEL, "files": [{**one, "windows": windows}]}


def test_the_file_is_sent_as_it_is_and_the_answer_shown(tab: Page, recording: Path) -> None:
    Server.answer = answered(0.75)
    tab.drop(recording)
    tab.wait("at('heard').textContent === 'call.wav'")
    assert Server.requests == [("/v1/predict", recording.read_bytes())]
    rows = tab.run("[...document.querySelectorAll('#answer tbody tr')].map(r => r.innerText.split('\\t'))")
    assert [[row[0], row[-1]] for row in rows] == [["angry", "75.0 %"], ["sad", "25.0 %"]]
    about = tab.run("at('about').innerText")
    assert "LEAKY" in about
    assert "UAR 0.610 [0.550, 0.660]" in about
    assert "sent to the server" in tab.run("at('where').textContent")
    assert tab.problems == []


def test_a_voice_is_learned_by_the_server_and_kept_by_the_page(tab: Page, recording: Path) -> None:
    Server.answer = answered(0.75)
    tab.drop(recording)
    tab.wait("!at('learn').disabled")
    tab.run("at('learn').click()")
    tab.wait("at('known').textContent.startsWith('Your voice is known by 1 recording;')")
    Server.answer = answered(0.25)
    tab.drop(recording)
    tab.wait("document.querySelector('#answer tr[data-emotion=angry]').innerText.includes('25.0 %')")
    tab.run("at('forget').click()")
    tab.wait("at('known').textContent === 'Nobody is known.'")
    tab.drop(recording)
    tab.wait("at('status').textContent.startsWith('call.wav: sad')")
    (_, plain), (learned, files), (_, known), (_, forgotten) = Server.requests
    assert plain == forgotten == recording.read_bytes()
    assert learned == "/v1/voices"
    assert json.loads(files) == {"files": [{"audio": base64.b64encode(plain).decode()}]}
    assert json.loads(known) == json.loads(files) | {"voice": VOICE}


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((422, {"error": "silent: the peak is below -60 dBFS"}), "silent: the peak"),
        ((200, {"files": [{"emotion": None, "reason": "too short", "windows": []}]}), "too short"),
        ((503, {}), "The server answers 503."),
    ],
)
def test_a_refusal_is_shown_in_its_words(
    tab: Page, recording: Path, answer: tuple[int, dict[str, Any]], words: str
) -> None:
    Server.answer = answer
    tab.run("say('')")
    tab.drop(recording)
    assert tab.wait("at('problem').textContent").startswith(words)


def test_a_set_is_shown_where_the_model_has_sets(tab: Page, recording: Path) -> None:
    status, content = answered(0.6)
    (one,) = content["files"]
    windows = [{"start": 0.0, "end": 0.5, **one}, {"start": 0.5, "end": 1.0, **one}]
    for window in windows:
        window.pop("windows")
        window["set"] = ["angry"]
    Server.answer = status, {"files": [one | {"set": ["angry", "sad"], "windows": windows}]}
    tab.drop(recording)
    assert tab.wait("!at('set').hidden && at('set').textContent").startswith("Set: angry, sad.")
    assert tab.run("at('status').textContent") == "call.wav: angry, 60.0 %; set: angry, sad"
    rows = tab.run("[...document.querySelectorAll('#windows tr')].map(r => r.innerText.split('\\t').at(-1))")
    assert rows == ["set", "angry", "angry"]
    Server.answer = answered(0.6)
    tab.drop(recording)
    tab.wait("at('set').hidden")
    assert tab.run("[...document.querySelectorAll('#windows th')].at(-1).hidden")


@pytest.mark.skipif(not AXE, reason="SER_RAY_AXE is not set")
def test_axe_finds_no_fault(tab: Page, recording: Path) -> None:
    Server.answer = answered(0.6)
    tab.drop(recording)
    tab.wait("!at('learn').disabled")
    assert faults(tab) == []
    tab.run("explain(keyNeeded())")
    assert faults(tab) == []
    tab.run("at('key').hidden = true")


# -- the application itself behind the page


@pytest.fixture
def spoken(tmp_path: Path) -> Path:
    (tmp_path / "spoken.wav").write_bytes(wav(9.0, 3, 48_000))
    return tmp_path / "spoken.wav"


def test_a_microphone_is_answered_every_second_by_the_stream(
    checkpoints: dict[str, str], here: Here, spoken: Path
) -> None:
    with answering_at(checkpoints, here) as port, browser(*FAKE, f"--use-file-for-fake-audio-capture={spoken}") as tab:
        tab.open(f"http://127.0.0.1:{port}/")
        tab.wait("document.body.dataset.ready")
        tab.run(
            "globalThis.heard = []; const first = heardLive; heardLive = (own, w) => { heard.push(w); first(own, w); }"
        )
        tab.run("at('record').click()")
        tab.wait("heard.length >= 4 && at('windows').tBodies[0].rows.length >= 4")
        assert tab.run("at('heard').textContent") == "The last 3 seconds"
        assert "Recording: " in tab.run("at('status').textContent")
        tab.run("globalThis.held = microphone; at('record').click()")
        tab.wait("at('heard').textContent === 'Your recording'")
        windows = tab.run("heard.map(w => ({ ...w }))")
        assert [round(w["end"]) for w in windows[:4]] == [1, 2, 3, 4]
        assert [round(w["start"]) for w in windows[:4]] == [0, 0, 0, 1]
        assert tab.run("at('windows').tBodies[0].rows.length") >= 4, "what was heard stays"
        rate, sound = tab.run("held.rate"), tab.run("Array.from(joined(held.parts), int16)")
        samples = np.array(sound, np.int16)
        model = ser_ray.load(checkpoints["plain"], device="cpu")
        emotions = list(model.emotions)
        heard = samples[round(windows[3]["start"] * rate) : round(windows[3]["end"] * rate)]
        for found, part in ((windows[3]["probabilities"], heard), (shown(tab), samples)):
            *_, expected = model.predict(part, rate)
            assert found == pytest.approx([expected[f"p_{emotion}"] for emotion in emotions], abs=1e-4)
        assert tab.problems == []


def test_silence_is_no_fault_of_the_page(checkpoints: dict[str, str], here: Here, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "silent.wav", np.zeros(48_000 * 4), 48_000)
    silent = f"--use-file-for-fake-audio-capture={tmp_path / 'silent.wav'}"
    with answering_at(checkpoints, here) as port, browser(*FAKE, silent) as tab:
        tab.open(f"http://127.0.0.1:{port}/")
        tab.wait("document.body.dataset.ready")
        tab.run("at('record').click()")
        tab.wait("microphone && microphone.parts.length * 2048 > 2.5 * microphone.rate")
        assert tab.run("at('status').textContent") == "Recording: speak."
        tab.run("at('record').click()")
        assert tab.wait("at('problem').textContent").startswith("Silence")
        assert tab.problems == []


def test_a_server_with_keys_is_used_with_a_key_that_the_page_keeps_for_itself(
    checkpoints: dict[str, str], here: Here, tmp_path: Path, spoken: Path
) -> None:
    (tmp_path / "keys").write_text(f"anna {'k' * 24}\n")
    (tmp_path / "keys").chmod(0o600)
    keys = read_keys(tmp_path / "keys", "0.0.0.0")
    microphone = f"--use-file-for-fake-audio-capture={spoken}"
    with answering_at(checkpoints, here, keys) as port, browser(*FAKE, microphone) as tab:
        tab.open(f"http://127.0.0.1:{port}/")
        assert tab.wait("at('problem').textContent") == "This server needs a key."
        assert tab.run("document.activeElement.id") == "key-value"
        for given, said in (("wrong", "This is not a key of this server."), ("k" * 24, "")):
            tab.call("Input.insertText", text=given)
            tab.press("Enter", 13)
            tab.wait(f"at('problem').textContent === {said!r} && (document.body.dataset.ready || {said!r})")
        assert tab.run("at('key').hidden")
        assert tab.run("document.activeElement.id") == "record"
        tab.press("Enter", 13)
        tab.wait("at('heard').textContent === 'The last 3 seconds'")
        tab.press("Enter", 13)
        tab.wait("at('heard').textContent === 'Your recording'")
        assert [problem for problem in tab.problems if "401" not in problem] == [], (
            "a browser notes those of 401 itself"
        )
        kept = "[document.cookie, localStorage.length, sessionStorage.length, at('key-value').value, location.search]"
        assert tab.run(kept) == ["", 0, 0, "", ""]


def shown(tab: Page) -> list[float]:
    """The probabilities on the page, to all digits."""
    return tab.run("[...document.querySelectorAll('#answer tbody tr')].map(row => +row.dataset.probability)")

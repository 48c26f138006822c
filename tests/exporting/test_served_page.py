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
from browser import CHROMIUM, Page, browser

import ser_ray

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium")
PAGE = Path(ser_ray.__file__).with_name("serving") / "page.html"
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline' blob:; worker-src blob:; style-src 'unsafe-inline'; "
    "connect-src 'self'; media-src blob:; img-src data: blob:; base-uri 'none'; frame-ancestors 'none'"
)
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
            "Content-Security-Policy": POLICY,
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

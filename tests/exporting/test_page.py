"""The page of ``ser-ray export --to page`` in real browsers, from the disk: the answers of predict, and nothing else.

It needs Chromium or Firefox, and onnxruntime-web: ``SER_RAY_ORT`` is the folder that npm unpacks. ``SER_RAY_AXE`` is
axe.min.js of axe-core, for what a screen reader needs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from backbone_fixtures import experiment, noise
from browser import AXE, CHROMIUM, Page, browser, faults
from firefox import ENTER, FIREFOX, TAB, Tab, firefox

from ser_ray import export
from ser_ray.__main__ import main
from ser_ray.disk import write_json
from ser_ray.evaluation import calibration
from ser_ray.exporting import page_format
from ser_ray.exporting.recordings import Recordings
from ser_ray.models import checkpoint
from ser_ray.models.classifier import build

ORT = os.environ.get("SER_RAY_ORT")
in_a_browser = pytest.mark.skipif(not CHROMIUM or not ORT, reason="no Chromium, or SER_RAY_ORT is not set")
in_firefox = pytest.mark.skipif(not FIREFOX or not ORT, reason="no Firefox, or SER_RAY_ORT is not set")
RATE = 16_000
EMOTIONS = ("angry", "happy", "sad")


@pytest.fixture(scope="module")
def best(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint") / "best"
    audio = {"max_seconds": 3.0}
    model = build(experiment("embedded/tiny-whisper", adapter={"method": "frozen"}, audio=audio))
    with torch.random.fork_rng():
        torch.manual_seed(3)
        for parameter in model.head.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    checkpoint.save(model, directory, {"epoch": 0, "dev_uar": 0.51, "dev_accuracy": 0.52})
    write_json(directory / calibration.FILE, {"temperature": 1.5, "least_probability": 0.3})
    return directory


@pytest.fixture(scope="module")
def page(best: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file."""
    target = tmp_path_factory.mktemp("page") / "page"
    with pytest.MonkeyPatch.context() as patch:
        few = Recordings("noise", list(noise((0.6, 0.6))[0].numpy()))
        patch.setattr(export, "recordings_for", lambda *_: few)
        arguments = ["export", str(best), "--to", "page", "--ort", str(ORT), "--output", str(target)]
        assert main(arguments) == 0
    return target / page_format.PAGE


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("recordings")
    speech = noise([8.0])[0][0].numpy()
    quiet = np.zeros(RATE // 2, np.float32)
    found = {name: folder / f"{name}.wav" for name in ("long", "short", "stereo", "float", "text", "silent")}
    soundfile.write(found["long"], np.concatenate([quiet, speech, quiet]), RATE)
    soundfile.write(found["short"], speech[:RATE], RATE, subtype="PCM_24")
    soundfile.write(found["stereo"], np.stack([speech[:RATE], speech[RATE : 2 * RATE]], 1), 48_000)
    soundfile.write(found["float"], speech[: 2 * RATE] * 9, RATE, subtype="FLOAT")
    soundfile.write(found["silent"], np.zeros(RATE), RATE)
    found["text"].write_text("no audio, whatever its name says")
    return found


@pytest.fixture(scope="module")
def tab(page: Path, recordings: dict[str, Path]) -> Iterator[Page]:
    """The page in a browser whose microphone plays a recording."""
    fake = ("--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream")
    with browser(*fake, f"--use-file-for-fake-audio-capture={recordings['long']}") as opened:
        opened.size(360)
        opened.open(page.as_uri())
        opened.wait("document.body.dataset.ready")
        yield opened


def answered(tab: Page | Tab) -> dict[str, float]:
    """The probabilities that the page shows, to all digits."""
    rows = "[...document.querySelectorAll('#answer tbody tr')]"
    return tab.run(f"Object.fromEntries({rows}.map(row => [row.dataset.emotion, +row.dataset.probability]))")


def in_sets(tab: Page | Tab) -> list[str]:
    """Of the recording, and of each window."""
    windows = "[...at('windows').tBodies[0].rows].map(row => row.cells[4].textContent)"
    return tab.run(f"[at('set').textContent.match(/^Set: (.*?)\\./)[1], ...{windows}]")


def predicted(best: Path, path: Path, capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    assert main(["predict", str(best), str(path), "--format", "jsonl", "--sets"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@in_a_browser
@pytest.mark.parametrize(("name", "limit"), [("long", 1e-4), ("short", 1e-4), ("float", 1e-4), ("stereo", 1e-3)])
@pytest.mark.parametrize("way", ["drop", "choose"])
def test_a_file_gets_the_answer_of_predict(
    best: Path,
    tab: Page,
    recordings: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
    name: str,
    limit: float,
    way: str,
) -> None:
    path = recordings[name]
    tab.run("at('heard').textContent = ''")
    if way == "drop":
        tab.drop(path)
    else:
        tab.choose("#file", path)
    tab.wait(f"at('heard').textContent === {path.name!r}")
    *windows, whole = predicted(best, path, capsys)
    assert answered(tab) == pytest.approx(whole["probabilities"], abs=limit)
    shown = tab.run("[...document.querySelectorAll('#windows tbody tr')].map(r => r.innerText.split('\\t'))")
    assert in_sets(tab)[0] == ", ".join(whole["set"])
    if windows:
        assert in_sets(tab)[1:] == [", ".join(window["set"]) for window in windows]
        assert [row[:3] for row in shown] == [
            [f"{window['start']:.1f} s", f"{window['end']:.1f} s", window["emotion"]] for window in windows
        ]
    assert tab.problems == []


@in_a_browser
@pytest.mark.parametrize(("name", "words"), [("text", "text.wav is not a recording"), ("silent", "Silence")])
def test_what_is_no_speech_is_refused(tab: Page, recordings: dict[str, Path], name: str, words: str) -> None:
    tab.drop(recordings[name])
    assert tab.wait("at('problem').textContent").startswith(words)
    assert tab.problems == []


@in_a_browser
def test_a_microphone_is_answered_while_it_records_by_keyboard_alone(tab: Page) -> None:
    tab.run("document.activeElement.blur()")
    tab.press("Tab", 9)
    assert tab.run("document.activeElement.id") == "record"
    tab.press("Enter", 13)
    tab.wait("at('heard').textContent === 'The last 3 seconds'")
    assert sum(answered(tab).values()) == pytest.approx(1, abs=1e-5)
    assert tab.run("at('record').textContent") == "Stop recording"
    tab.press("Enter", 13)
    tab.wait("at('heard').textContent === 'Your recording'")
    assert tab.run("at('record').textContent") == "Record"
    tab.press("Tab", 9)
    assert tab.run("document.activeElement.id") == "file"
    assert tab.problems == []


@in_a_browser
def test_it_fits_a_telephone_and_asks_nobody(tab: Page) -> None:
    for width in (360, 1280):
        tab.size(width, dark=width == 360)
        assert tab.run("document.documentElement.scrollWidth") <= width
    local = ("file:", "blob:", "data:")
    assert [address for address in tab.requests if not address.startswith(local)] == []
    about = tab.run("at('about').innerText")
    for words in ("tiny-whisper", "UAR 0.510", "accuracy 0.520", "calibrated on the speakers of dev", *EMOTIONS):
        assert words in about
    assert "have to be told" in tab.run("document.querySelector('[role=note]').innerText")
    unnamed = "filter(e => !(e.innerText || e.ariaLabel || e.labels?.length || e.caption)).length"
    assert tab.run(f"[...document.querySelectorAll('button, input, canvas, table')].{unnamed}") == 0


@in_a_browser
@pytest.mark.skipif(not AXE, reason="SER_RAY_AXE is not set")
@pytest.mark.parametrize("dark", [False, True])
def test_axe_finds_no_fault(tab: Page, recordings: dict[str, Path], dark: bool) -> None:
    tab.size(360, dark=dark)
    tab.drop(recordings["long"])
    tab.wait("at('heard').textContent === 'long.wav' && !at('over-time').hidden")
    assert faults(tab) == []
    tab.drop(recordings["text"])
    tab.wait("at('problem').textContent")
    assert faults(tab) == []


@pytest.fixture(scope="module")
def fox(page: Path) -> Iterator[Tab]:
    """The page in Firefox."""
    with firefox() as opened:
        opened.size(360)
        opened.open(page.as_uri())
        opened.wait("document.body.dataset.ready")
        yield opened


@in_firefox
def test_it_opens_from_the_disk_in_firefox(
    best: Path, fox: Tab, recordings: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert fox.run("document.documentElement.scrollWidth") <= 360
    for name in ("long", "short", "float"):
        if name == "float":
            fox.drop(recordings[name])
        else:
            fox.choose("#file", recordings[name])
        fox.wait(f"at('heard').textContent === '{name}.wav'")
        *_, whole = predicted(best, recordings[name], capsys)
        assert answered(fox) == pytest.approx(whole["probabilities"], abs=1e-4)
        assert in_sets(fox)[0] == ", ".join(whole["set"])
    fox.drop(recordings["text"])
    assert fox.wait("at('problem').textContent").startswith("text.wav is not a recording")
    assert fox.problems == []
    assert [address for address in fox.requests if not address.startswith(("file:", "blob:", "data:"))] == []


@in_firefox
def test_firefox_leads_a_keyboard_to_the_button(fox: Tab) -> None:
    fox.run("(globalThis.heard = [], addEventListener('keydown', e => heard.push([e.key, e.target.id]), true))")
    fox.run("document.activeElement.blur()")
    fox.press(TAB)
    fox.press(ENTER)
    fox.press(TAB)
    assert fox.run("heard")[-2:] == [["Enter", "record"], ["Tab", "record"]]
    assert fox.run("document.activeElement.id") == "file"


@in_firefox
def test_firefox_records(fox: Tab) -> None:
    late = "new Promise(done => setTimeout(done, 20000))"
    begins = "(async () => { const c = new AudioContext(); await c.resume(); await c.close(); return true; })()"
    if not fox.run(f"Promise.race([{begins}, {late}.then(() => false)])"):
        pytest.skip("Firefox finds no sound device, without which it gives no sound of a microphone")
    fox.run("at('record').click()")
    fox.wait("at('heard').textContent === 'The last 3 seconds'")
    fox.run("at('record').click()")
    fox.wait("at('heard').textContent === 'Your recording'")
    assert sum(answered(fox).values()) == pytest.approx(1, abs=1e-5)
    assert fox.problems == []


@in_a_browser
def test_it_is_one_file_of_a_size_that_can_be_mailed(page: Path) -> None:
    assert page.stat().st_size < 40e6
    assert b"http://" not in page_format.TEMPLATE.read_bytes()
    assert b"https://" not in page_format.TEMPLATE.read_bytes()


@pytest.mark.parametrize(
    ("more", "words"), [(["--to", "page"], "npm pack onnxruntime-web"), (["--to", "hf", "--ort", "x"], "--ort is for")]
)
def test_the_runtime_is_asked_for_at_once(
    tmp_path: Path, more: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(tmp_path), *more]) == 2
    assert words in capsys.readouterr().err
    (tmp_path / "dist").mkdir()
    assert main(["export", str(tmp_path), "--to", "page", "--ort", str(tmp_path)]) == 2
    assert f"{page_format.CODE} is not there" in capsys.readouterr().err

"""How large is the page without a server, and how soon do both pages answer speech?

    python tests/benchmarks/page.py CHECKPOINT RECORDING --ort package/dist > results/benchmarks/page.md

Chromium opens each page with a microphone that plays RECORDING. The delay is from the moment at which three seconds of
speech are recorded to the first answer about all of them. Then the recording is dropped, and the largest difference of
a probability to `ser-ray predict` is taken. `--shots DIR` keeps pictures, 360 and 1 000 pixels wide, light and dark.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

import soundfile
from browser import Page, browser
from server_fixture import serving

import ser_ray
from ser_ray.__main__ import main as command

TRIES: Final = 3
WATCH: Final = """
(() => {
  const begun = startRecording, first = heardLive;
  globalThis.spoken = null; globalThis.answered = null;
  startRecording = async () => {
    await begun();
    let total = 0;
    const { parts, rate } = microphone;
    parts.push = part => {
      total += part.length;
      if (total >= 3 * rate) spoken ??= performance.now();
      return Array.prototype.push.call(parts, part);
    };
  };
  heardLive = (own, window) => {
    first(own, window);
    if (window.end >= 3 && spoken) answered ??= performance.now();
  };
})()
"""
"""The pages as they are, with two clocks."""


def main() -> int:
    """Print the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("recording", type=Path)
    parser.add_argument("--ort", required=True)
    parser.add_argument("--shots", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sound = Path(folder) / "speech.wav"
        samples, rate = soundfile.read(given.recording, dtype="int16")
        soundfile.write(sound, samples, rate)
        target = Path(folder) / "page"
        arguments = ["export", given.checkpoint, "--to", "page", "--ort", given.ort, "--output", str(target)]
        with contextlib.redirect_stdout(sys.stderr):  # the export says what it does, which is not for the page
            assert command(arguments) == 0
        size = (target / "page.html").stat().st_size / 1e6
        alone = of_page((target / "page.html").as_uri(), sound, given, "alone")
        with serving([sys.executable, "-m", "ser_ray", "serve", given.checkpoint]) as server:
            served = of_page(f"http://127.0.0.1:{server.port}/", sound, given, "served")
    lines = [
        *("# Two pages", "", "```"),
        "python tests/benchmarks/page.py CHECKPOINT RECORDING --ort package/dist > results/benchmarks/page.md",
        *("```", "", *(__doc__ or "").strip().split("\n\n")[2].splitlines(), ""),
        f"{os.cpu_count()} CPU cores; the page without a server is {size:.1f} MB.",
        *("", "| page | first answer after 3 s of speech, ms | largest difference to predict |", "|---|---|---|"),
        *(
            f"| {name} | {', '.join(f'{delay:.0f}' for delay in delays)} | {difference:.1e} |"
            for name, (delays, difference) in {"without a server": alone, "of `ser-ray serve`": served}.items()
        ),
    ]
    print("\n".join(lines))
    return 0


def of_page(address: str, sound: Path, given: argparse.Namespace, name: str) -> tuple[list[float], float]:
    """Delays in ms, and the largest difference to `predict`."""
    fake = ("--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream")
    with browser(*fake, f"--use-file-for-fake-audio-capture={sound}") as tab:
        tab.open(address)
        tab.wait("document.body.dataset.ready")
        tab.run(WATCH)
        delays = []
        for _ in range(TRIES):
            tab.run("spoken = answered = null")
            tab.run("at('record').click()")
            tab.wait("answered")
            delays.append(tab.run("answered - spoken"))
            pictures(tab, given.shots, f"{name}-live")
            tab.run("at('record').click()")
            tab.wait("at('heard').textContent === 'Your recording'")
        pictures(tab, given.shots, f"{name}-recorded")
        tab.size(1000)
        tab.drop(sound)
        tab.wait(f"at('heard').textContent === {sound.name!r}")
        rows = "[...document.querySelectorAll('#answer tbody tr')]"
        found = tab.run(f"Object.fromEntries({rows}.map(row => [row.dataset.emotion, +row.dataset.probability]))")
        assert tab.problems == [], tab.problems
    *_, expected = ser_ray.load(given.checkpoint, device="cpu").predict(sound)
    return delays, max(abs(value - expected[f"p_{emotion}"]) for emotion, value in found.items())


def pictures(tab: Page, folder: Path | None, name: str) -> None:
    """If they are asked for."""
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for width, dark in ((360, True), (1000, False)):
        tab.size(width, 1400, dark)
        tab.screenshot(folder / f"{name}-{width}.png")


if __name__ == "__main__":
    sys.exit(main())

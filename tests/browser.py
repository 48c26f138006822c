"""Chromium driven over its DevTools protocol: pages as a user sees them, without another library for it."""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import websocket

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
AXE = os.environ.get("SER_RAY_AXE")
"""axe.min.js of axe-core, which npm has."""
PATIENCE = 300
"""Seconds until a page that does not answer is a failure, on a machine with other work."""


class Remote:
    """A tab that is told what to do over a socket. What the page writes to its console as a warning or an error, and
    what it requests, is collected."""

    def __init__(self, address: str) -> None:
        self.socket = websocket.create_connection(address, timeout=PATIENCE, suppress_origin=True)
        self.numbers = itertools.count(1)
        self.problems: list[str] = []
        self.requests: list[str] = []

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self.numbers)
        self.socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self.socket.recv())
            if message.get("id") == number:
                assert "error" not in message, (method, message)
                return message["result"]
            self._note(message)

    def wait(self, script: str) -> Any:
        """Until an expression is true; returns it."""
        end = time.monotonic() + PATIENCE
        while not (value := self.run(script)):
            assert time.monotonic() < end, f"never: {script}; {self.problems}; {self.run('document.body.innerText')}"
            time.sleep(0.1)
        return value

    def run(self, script: str) -> Any:
        """The value of an expression, awaited."""
        raise NotImplementedError

    def _note(self, message: dict[str, Any]) -> None:
        """Collect a message that answers no call."""
        raise NotImplementedError


class Page(Remote):
    """One tab of Chromium."""

    def __init__(self, address: str) -> None:
        super().__init__(address)
        for domain in ("Page", "Runtime", "Log", "Network", "DOM"):
            self.call(f"{domain}.enable")

    def _note(self, message: dict[str, Any]) -> None:
        about = message.get("params", {})
        if message["method"] == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(about["exceptionDetails"])[:500])
        elif message["method"] == "Runtime.consoleAPICalled" and about["type"] in ("error", "warning", "assert"):
            self.problems.append(json.dumps(about["args"])[:500])
        elif message["method"] == "Log.entryAdded" and about["entry"]["level"] in ("error", "warning"):
            self.problems.append(about["entry"]["text"])
        elif message["method"] == "Network.requestWillBeSent":
            self.requests.append(about["request"]["url"])

    def run(self, script: str) -> Any:
        """The value of an expression, awaited."""
        answer = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def open(self, address: str) -> None:
        self.call("Page.navigate", url=address)
        self.wait(f"document.readyState === 'complete' && location.href.startsWith({address[:12]!r})")

    def choose(self, selector: str, path: Path) -> None:
        """Give a file to an input, as its dialog would."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def drop(self, path: Path) -> None:
        """Drop a file on the middle of the page."""
        data = {"items": [], "files": [str(path)], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.call("Input.dispatchDragEvent", type=kind, x=150, y=150, data=data)

    def press(self, key: str, code: int) -> None:
        text = {"Enter": "\r", " ": " "}.get(key, "")
        known = {"key": key, "windowsVirtualKeyCode": code} | ({"text": text} if text else {})
        self.call("Input.dispatchKeyEvent", type="keyDown", **known)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    def size(self, width: int, height: int = 800, dark: bool = False) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=2, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, path: Path) -> None:
        found = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(found["data"]))


def faults(tab: Page) -> list[str]:
    """What axe-core says of a page, from moderate to critical."""
    assert AXE is not None
    tab.call("Runtime.evaluate", expression=Path(AXE).read_text(encoding="utf-8"))
    found = tab.run("axe.run().then(all => all.violations.map(v => [v.impact, v.id, v.nodes.map(n => n.html)]))")
    return [f"{impact}: {name} {nodes}" for impact, name, nodes in found if impact != "minor"]


@contextmanager
def browser(*options: str) -> Iterator[Page]:
    """A fresh Chromium without a network, which ends with the block."""
    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile:
        command = [
            *(
                CHROMIUM,
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                "--no-first-run",
                "--remote-debugging-port=0",
            ),
            *(f"--user-data-dir={profile}", "--proxy-server=127.0.0.1:9", "--proxy-bypass-list=127.0.0.1", *options),
            "about:blank",
        ]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            port = written(Path(profile) / "DevToolsActivePort", process).split()[0]
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json", timeout=PATIENCE) as listed:
                (tab,) = (one for one in json.load(listed) if one["type"] == "page")
            yield Page(tab["webSocketDebuggerUrl"])
        finally:
            process.terminate()
            process.wait(PATIENCE)


def written(path: Path, process: subprocess.Popen[bytes]) -> str:
    """The text of a file in which a browser that has started says where it listens."""
    end = time.monotonic() + PATIENCE
    while not path.is_file() or not path.read_text():
        assert process.poll() is None, f"the browser ended with {process.returncode}"
        assert time.monotonic() < end, "the browser never listened"
        time.sleep(0.1)
    return path.read_text()

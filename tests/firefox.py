"""Firefox driven over WebDriver BiDi: what `browser` is for Chromium, as far as the page without a server needs it."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from base64 import b64decode, b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from browser import PATIENCE, Remote, written

FIREFOX = shutil.which("firefox-esr") or shutil.which("firefox")
TAB, ENTER = "\ue004", "\ue006"
"""Keys, as WebDriver writes them (its section 17.4.2)."""
SETTINGS = {
    "media.navigator.streams.fake": True,  # a microphone that plays a tone
    "media.navigator.permission.disabled": True,
    "media.autoplay.default": 0,
    "datareporting.policy.dataSubmissionEnabled": False,
    "app.update.enabled": False,
    "browser.shell.checkDefaultBrowser": False,
    "network.proxy.type": 1,  # to nowhere: a page that asks for something is seen
    "network.proxy.socks": "127.0.0.1",
    "network.proxy.socks_port": 9,
}


class Tab(Remote):
    """One tab of Firefox."""

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self.call("session.new", capabilities={})
        self.context = self.call("browsingContext.getTree")["contexts"][0]["context"]
        self.call("session.subscribe", events=["log.entryAdded", "network.beforeRequestSent"])

    def _note(self, message: dict[str, Any]) -> None:
        about = message.get("params", {})
        if message.get("method") == "log.entryAdded" and about["level"] in ("error", "warn"):
            self.problems.append(str(about["text"]))
        elif message.get("method") == "network.beforeRequestSent":
            self.requests.append(about["request"]["url"])

    def run(self, script: str) -> Any:
        """The value of an expression, awaited."""
        asked = {
            "expression": f"(async () => JSON.stringify(await ({script})))()",
            "awaitPromise": True,
            "userActivation": True,
        }
        answer = self.call("script.evaluate", target={"context": self.context}, **asked)
        assert answer["type"] == "success", answer
        found = answer["result"].get("value")
        return None if found is None else json.loads(found)

    def open(self, address: str) -> None:
        self.call("browsingContext.navigate", context=self.context, url=address, wait="complete")

    def choose(self, selector: str, path: Path) -> None:
        """Give a file to an input, as its dialog would."""
        located = {"type": "css", "value": selector}
        (node,) = self.call("browsingContext.locateNodes", context=self.context, locator=located)["nodes"]
        element = {"sharedId": node["sharedId"]}
        self.call("input.setFiles", context=self.context, element=element, files=[str(path)])

    def drop(self, path: Path) -> None:
        """Drop a file on the page, by events as a script makes them: BiDi has no files that are dragged."""
        content = f"Uint8Array.from(atob('{b64encode(path.read_bytes()).decode()}'), c => c.charCodeAt(0))"
        file = f"new File([{content}], {json.dumps(path.name)})"
        event = "new DragEvent(kind, { dataTransfer: data, bubbles: true, cancelable: true })"
        kinds = f"for (const kind of ['dragenter', 'dragover', 'drop']) document.body.dispatchEvent({event})"
        self.run(f"(() => {{ const data = new DataTransfer(); data.items.add({file}); {kinds} }})()")

    def press(self, key: str) -> None:
        """A key, by its code in WebDriver, for what has the focus. No button is pressed by it: without a screen no
        window is the active one."""
        presses = [{"type": kind, "value": key} for kind in ("keyDown", "keyUp")]
        self.call(
            "input.performActions", context=self.context, actions=[{"type": "key", "id": "k", "actions": presses}]
        )

    def size(self, width: int, height: int = 800) -> None:
        self.call("browsingContext.setViewport", context=self.context, viewport={"width": width, "height": height})

    def screenshot(self, path: Path) -> None:
        found = self.call("browsingContext.captureScreenshot", context=self.context, origin="document")
        path.write_bytes(b64decode(found["data"]))


@contextmanager
def firefox() -> Iterator[Tab]:
    """A fresh Firefox without a network, which ends with the block."""
    assert FIREFOX is not None
    with tempfile.TemporaryDirectory(prefix="firefox-", ignore_cleanup_errors=True) as folder:
        lines = [f"user_pref({json.dumps(name)}, {json.dumps(value)});" for name, value in SETTINGS.items()]
        (Path(folder) / "user.js").write_text("\n".join(lines))
        command = [FIREFOX, "--headless", "--no-remote", "--profile", folder, "--remote-debugging-port=0"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            port = json.loads(written(Path(folder) / "WebDriverBiDiServer.json", process))["ws_port"]
            yield Tab(f"ws://127.0.0.1:{port}/session")
        finally:
            process.terminate()
            process.wait(PATIENCE)

"""A model hub on loopback: serves directories in the way that Hugging Face's library asks for them."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

COMMIT = "c0ffee" + "0" * 34


@contextmanager
def hub(models: Mapping[str, Path]) -> Iterator[tuple[str, list[str]]]:
    """Id of a model -> its directory; gives the address for HF_ENDPOINT, and every request as it comes."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, body: bool) -> None:
            path = unquote(self.path.partition("?")[0])
            asked.append(f"{self.command} {self.path}")
            for name, directory in models.items():
                if path.startswith(f"/{name}/resolve/"):
                    return self._file(directory / path.removeprefix(f"/{name}/resolve/").partition("/")[2], body)
                if path.startswith(f"/api/models/{name}"):
                    files = [{"rfilename": file.name} for file in sorted(directory.iterdir())]
                    about = {
                        "id": name,
                        "modelId": name,
                        "sha": COMMIT,
                        "siblings": files,
                        "tags": [],
                        "private": False,
                    }
                    rest = path.removeprefix(f"/api/models/{name}")
                    found = about if rest == "" or rest.startswith("/revision") else []
                    return self._send(200, json.dumps(found).encode(), {"Content-Type": "application/json"}, body)
            return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)

        def _file(self, file: Path, body: bool) -> None:
            if not file.is_file():
                return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, body)
            content = file.read_bytes()
            etag = hashlib.sha256(content).hexdigest()
            return self._send(200, content, {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"'}, body)

        def _send(self, status: int, content: bytes, headers: Mapping[str, str], body: bool) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()

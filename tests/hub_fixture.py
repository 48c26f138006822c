"""A model hub on loopback: serves directories as Hugging Face's library asks for them, and has what is uploaded."""

from __future__ import annotations

import base64
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
def hub(models: Mapping[str, Path], uploads: Path | None = None) -> Iterator[tuple[str, list[str]]]:
    """Id of a model -> its directory; gives the address for HF_ENDPOINT, and every request as it comes. What is
    uploaded goes to the folder of its id in ``uploads``; without that, uploads are refused."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def do_POST(self) -> None:
            path = unquote(self.path.partition("?")[0])
            asked.append(f"POST {self.path}")
            content = self.rfile.read(int(self.headers["Content-Length"]))
            if uploads is None:
                return self._json(403, {"error": "this hub takes no uploads"})
            if path == "/api/repos/create":
                about = json.loads(content)
                name = "/".join(filter(None, (about.get("organization"), about["name"])))
                return self._json(200, {"url": f"http://127.0.0.1:{self.server.server_port}/{name}"})
            if path == "/api/validate-yaml":
                return self._json(200, {"errors": [], "warnings": []})
            name = path.removeprefix("/api/models/").rpartition("/")[0].rpartition("/")[0]
            if path.endswith("/preupload/main"):
                files = [{"path": one["path"], "uploadMode": "regular"} for one in json.loads(content)["files"]]
                return self._json(200, {"files": [one | {"shouldIgnore": False} for one in files]})
            assert path.endswith("/commit/main"), path
            for line in map(json.loads, content.splitlines()):
                if line["key"] == "file":
                    file = uploads / name / line["value"]["path"]
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(base64.b64decode(line["value"]["content"]))
            address = f"http://127.0.0.1:{self.server.server_port}/{name}/commit/{COMMIT}"
            return self._json(200, {"success": True, "commitOid": COMMIT, "commitUrl": address})

        def _json(self, status: int, content: object) -> None:
            self._send(status, json.dumps(content).encode(), {"Content-Type": "application/json"}, body=True)

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

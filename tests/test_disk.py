"""Writing whole or not at all."""

from __future__ import annotations

import pytest

from ser_ray import disk


def test_writing_replaces_whole_files_and_leaves_nothing_aside(tmp_path):
    path = tmp_path / "deep" / "x.json"
    disk.write_json(path, {"a": 1})
    disk.write_json(path, {"a": "ü"})
    assert disk.read_json(path) == {"a": "ü"}
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    disk.write_json(path, {"a": 1})
    with pytest.raises(TypeError, match="not JSON serializable"):
        disk.write_json(path, {"b": b"bytes"})
    with pytest.raises(ValueError, match="JSON"):
        disk.write_json(path, {"a": float("nan")})
    with pytest.raises(FileNotFoundError), disk.replacing(path):
        pass  # nothing was written
    with pytest.raises(ValueError, match="surrogates"):
        disk.write_text(path, "half \ud800")
    assert disk.read_json(path) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]

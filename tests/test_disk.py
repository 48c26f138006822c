"""Writing whole or not at all."""

from __future__ import annotations

import fcntl
import subprocess
import sys

import pytest

from ser_ray import disk

HOLD = """
import pathlib, sys, time
from ser_ray import disk
with disk.locked(pathlib.Path(sys.argv[1]), shared=sys.argv[2] == "shared") as got:
    print(got, flush=True)
    time.sleep(60)
"""


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


@pytest.mark.parametrize("kind", ["shared", "exclusive"])
def test_a_lock_holds_between_processes_and_ends_with_a_killed_one(tmp_path, kind):
    path = tmp_path / "folder" / ".lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(path), kind], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "True\n"
    with disk.locked(path, wait=False) as alone:
        assert not alone
    with disk.locked(path, shared=True, wait=False) as together:
        assert together is (kind == "shared")
    holder.kill()
    holder.wait()
    with disk.locked(path) as alone:
        assert alone


def test_a_lock_on_a_file_that_was_removed_is_taken_on_the_new_one(tmp_path, monkeypatch):
    """Who waits for a folder that is being removed would hold a file that nobody else finds."""
    path = tmp_path / "folder" / "lock"
    lock, removed = fcntl.flock, []

    def remove_once(file, how) -> None:
        lock(file, how)
        if not removed:
            removed.append(path.unlink())

    monkeypatch.setattr(fcntl, "flock", remove_once)
    with disk.locked(path) as got:
        assert got
        assert removed
        monkeypatch.setattr(fcntl, "flock", lock)
        with disk.locked(path, wait=False) as second:
            assert second is False


def test_a_path_may_be_anything(tmp_path):
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "link").symlink_to("real")
    assert disk.resolved(tmp_path / "circle") == tmp_path / "circle"
    assert disk.resolved(tmp_path / "link" / ".." / "x") == tmp_path / "x"
    assert disk.resolved("~nobody-of-that-name/x").name == "x"
    assert disk.resolved("/a\0b").name == "a\0b"


def test_a_path_that_no_file_can_have_is_said(tmp_path):
    (tmp_path / "circle").symlink_to("circle")
    for path in (tmp_path / ("x" * 300), tmp_path / "circle"):
        with pytest.raises(OSError, match=r".") as caught:
            path.open()
        assert f"{path}: " in str(disk.explain(caught.value))
        assert "give another path" in str(disk.explain(caught.value))

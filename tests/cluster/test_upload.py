"""What `ray job submit --working-dir .` takes along from a checkout."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

from ray._private.runtime_env.packaging import create_package

REPOSITORY = Path(__file__).resolve().parents[2]


def test_code_and_spaces_travel_and_data_never(tmp_path):
    checkout = tmp_path / "checkout"
    for name in ("ser_ray", "search_spaces"):
        shutil.copytree(REPOSITORY / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (".gitignore", ".rayignore", "pyproject.toml", "README.md"):
        shutil.copy(REPOSITORY / name, checkout / name)
    for name in (
        "data/a.wav",
        "openai/model.safetensors",
        "results/mine/report.html",
        "a.wav",
        "mine.yaml",
        "folds.csv",
    ):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_bytes(b"x")
    create_package(str(checkout), tmp_path / "package.zip", include_gitignore=True)
    with zipfile.ZipFile(tmp_path / "package.zip") as package:
        files = {name for name in package.namelist() if not name.endswith("/")}
    assert {"mine.yaml", "folds.csv", "pyproject.toml", "ser_ray/tune.py", "search_spaces/demo.yaml"} <= files
    assert not {name for name in files if name.startswith(("data", "openai", "results", "a.wav"))}
    code = {path.relative_to(checkout).as_posix() for path in (checkout / "ser_ray").rglob("*") if path.is_file()}
    assert code <= files, "all of the package"

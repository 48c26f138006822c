"""How Sphinx builds the documentation: `sphinx-build -W --keep-going docs docs/_build`. Warnings are errors."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

import generate  # noqa: E402

import ser_ray  # noqa: E402

project = "ser_ray"
author = "The ser_ray maintainers"
release = ser_ray.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc"]
myst_enable_extensions = ["colon_fence", "deflist", "tasklist"]
myst_heading_anchors = 3
default_role = "code"
html_theme = "furo"
html_title = f"ser_ray {release}"
exclude_patterns = ["_build", "examples"]
autodoc_member_order = "bysource"
autodoc_typehints = "description"

generate.write(ROOT / "docs" / "reference")

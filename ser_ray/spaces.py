"""The search spaces that come with the project: a list, or the text of one.

``ser-ray spaces``, ``ser-ray new NAME > mine.yaml``
"""

from __future__ import annotations

if __name__ == "__main__":
    import sys

    from ser_ray.__main__ import main as command

    sys.exit(command(["spaces", *sys.argv[1:]]))

import sys
from pathlib import Path

from ser_ray import config
from ser_ray.schema import UserError
from ser_ray.terminal import PlainConsole


def main(name: str | None = None) -> int:
    """Print the space ``name`` with its comments; without a name, what there is. Raises UserError for another name."""
    spaces = config.built_in_spaces()
    if name is None:
        console = PlainConsole()
        for known, path in spaces.items():
            console.print(known, style="bold")
            console.print("  " + "\n  ".join(describe(path)) + "\n")
        return 0
    if name not in spaces:
        raise UserError(f"{name}: no such search space; there are {', '.join(spaces)}")
    sys.stdout.write(spaces[name].read_text(encoding="utf-8"))
    return 0


def describe(path: Path) -> list[str]:
    """The comment that a space begins with, by line: what it is for, what it needs and takes, what it reached."""
    lines = path.read_text(encoding="utf-8").splitlines()
    end = next((number for number, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return [line.removeprefix("#").strip() for line in lines[:end] if line.strip("# ")]

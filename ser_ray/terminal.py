"""What a command prints, and the file that it is given to write to in place of the terminal."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TextIO

from rich.console import Console
from rich.text import Text

from ser_ray.disk import readable, resolved
from ser_ray.schema import UserError

HIDDEN: Final = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that a terminal obeys instead of showing them (colours, the direction of writing, other ends of lines),
and bytes of names that are not UTF-8; not the tab and the end of a line."""


def printable(text: str) -> str:
    """Text from anywhere, such as the name of a file, with what cannot be shown as its number.

    >>> printable("a\\x1b[31m.wav")
    'a\\\\x1b[31m.wav'
    """
    return HIDDEN.sub(lambda found: _number(found[0]), text)


def one_line(text: str) -> str:
    """`printable`, for a place that has one line.

    >>> one_line("a\\nb.wav")
    'a\\\\nb.wav'
    """
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def titled(title: str, text: str, style: str = "bold") -> Text:
    """A line that begins with a title in another style."""
    return Text.assemble((printable(title), style), printable(text))


class PlainConsole(Console):
    """Prints text as it is: square brackets in the name of a file or an emotion are no markup, and colons no emoji.
    What is to be bold has a ``style``, or is `titled`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"highlight": False, "soft_wrap": True} | options, markup=False, emoji=False)

    def render_str(self, text: str, **options: Any) -> Text:
        """Every string that is printed, and every cell of a table, passes here."""
        return super().render_str(printable(text), **options)


def output_path(path: Path) -> Path:
    """Where a file that the user names is written to: through links, in a folder that is made if it is not there. To be
    called before the work.

    Raises UserError for a directory, a device, or a folder that cannot be made.
    """
    target = resolved(path)
    if target.is_dir():
        raise UserError(f"--output: {readable(path)} is a directory; give the name of a file in it")
    if target.exists() and not target.is_file():
        raise UserError(f"--output: {readable(path)} is a device or a pipe, not a file; use > in place of --output")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output: {readable(target.parent)}: {error.strerror}; name another folder") from None
    return target


@contextmanager
def opened_output(path: Path | None) -> Iterator[TextIO]:
    """The file to write to, by its `output_path`, or the terminal. Ends quietly where what reads a pipe has ended."""
    if path is None:
        try:
            yield sys.stdout
            sys.stdout.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it ends
        return
    try:
        with path.open("w", encoding="utf-8", newline="") as file:
            yield file
    except OSError as error:  # of a full disk, which itself does not say where
        raise OSError(error.errno, error.strerror, error.filename or str(path)) from error


# -- below: how it is done


def _number(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte, by Python's surrogateescape
        return f"\\x{code - 0xDC00:02x}"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"

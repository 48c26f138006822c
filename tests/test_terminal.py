"""What is printed is what it is, and a file that is named for output is written to and nothing else."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from rich.table import Table

from ser_ray.schema import UserError
from ser_ray.terminal import PlainConsole, one_line, opened_output, output_path, printable, titled

NASTY = "P07 [neutral] :smile: [/] \x1b[31mred " + os.fsdecode(b"caf\xe9")
SHOWN = r"P07 [neutral] :smile: [/] \x1b[31mred caf\xe9"


def test_what_is_printed_is_neither_markup_nor_obeyed():
    file = io.StringIO()
    console = PlainConsole(file=file, width=200)
    table = Table("[red]head", box=None)
    table.add_row(NASTY)
    console.print(NASTY)
    console.print(NASTY, style="red")
    console.print(titled(NASTY, NASTY))
    console.print(table)
    first, second, third, *rest = file.getvalue().splitlines()
    assert (first, second, third) == (SHOWN, SHOWN, SHOWN + SHOWN)
    assert [line.strip() for line in rest] == ["[red]head", SHOWN]


def test_lines_stay_lines():
    assert printable("a\nb\tc\r") == "a\nb\tc\\x0d"
    assert one_line("a\nb\tc") == r"a\nb\tc"
    assert printable("a\u2028b\u200fc\u200ed") == "a\\u2028b\\u200fc\\u200ed"  # ends of lines and marks of direction
    assert printable("naïve 😀 语音 \u202egnp.wav") == "naïve 😀 语音 \\u202egnp.wav"


def test_output_goes_through_links(tmp_path):
    (tmp_path / "real.csv").write_text("old")
    (tmp_path / "link.csv").symlink_to("real.csv")
    with opened_output(output_path(tmp_path / "link.csv")) as file:
        file.write("new")
    assert (tmp_path / "link.csv").is_symlink()
    assert (tmp_path / "real.csv").read_text() == "new"
    (tmp_path / "dangling.csv").symlink_to("made.csv")
    assert output_path(tmp_path / "dangling.csv") == tmp_path / "made.csv"


def test_the_folder_of_an_output_is_made(tmp_path):
    assert output_path(tmp_path / "new" / "a.csv") == tmp_path / "new" / "a.csv"
    assert (tmp_path / "new").is_dir()


@pytest.mark.parametrize(
    ("name", "said"), [(".", "is a directory"), ("pipe", "is a device"), ("pipe/x", "name another folder")]
)
def test_output_to_anything_else_is_refused(tmp_path, name, said):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=said):
        output_path(tmp_path / name)
    with pytest.raises(UserError, match="is a device"):
        output_path(Path("/dev/null"))


def test_a_full_disk_says_which_file(tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with (
        pytest.raises(OSError, match="No space left on device: '/dev/full'"),
        opened_output(Path("/dev/full")) as file,
    ):
        file.write("x")

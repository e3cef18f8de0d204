"""The console of all commands: text is text. No markup, no emoji codes, no signs that drive a terminal."""

from __future__ import annotations

import ast
import io
import sys
import warnings
from pathlib import Path

import pytest
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

import paged_ref
from paged_ref.cli import main
from paged_ref.views.common import streams
from paged_ref.views.common.canvas import exactly, page
from paged_ref.views.common.console import Console

SOURCE = Path(paged_ref.__file__).parent
FOREIGN = "'.[compare]' :smile: \x1b[8m\u202e"
SHOWN = "'.[compare]' :smile: ␛[8m�"


def drawn(*pictures: object) -> str:
    file = io.StringIO()
    Console(file=file, width=60).print(*pictures)
    return file.getvalue()


def test_foreign_text_is_shown_wherever_it_stands() -> None:
    table = Table(title=FOREIGN)
    table.add_column(FOREIGN)
    table.add_row(FOREIGN)
    assert drawn(FOREIGN) == drawn(Text(FOREIGN)) == SHOWN + "\n"
    assert drawn(table).count(SHOWN) == 3
    assert drawn("two\nlines\tand a tab") == "two\nlines   and a tab\n"


def test_a_terminal_gets_rich_colours_and_no_others() -> None:
    file = io.StringIO()
    console = Console(file=file, width=60, force_terminal=True, color_system="truecolor", highlight=False)
    console.print(Text(FOREIGN, "bold red"))
    assert file.getvalue() == f"\x1b[1;31m{SHOWN}\x1b[0m\n"
    with console.screen(hide_cursor=True):
        console.print("x")
    assert "\x1b[?1049h" in file.getvalue()


def test_a_line_of_a_frame_has_its_width_also_with_such_text() -> None:
    assert exactly(Text("a\x1bb\nc\u200b"), 8).plain == "a␛b␊c�  "
    assert page([Text("\x1b]0;x\x07" * 9)], 6, 2).plain.split("\n") == ["␛]0;x…", "      "]
    styled = exactly(Text.assemble(("\x1b", "bold"), ("x", "red")), 3)
    assert [(span.start, span.end, span.style) for span in styled.spans] == [(0, 1, "bold"), (1, 2, "red")]


def test_prints_beside_a_progress_bar_and_rich_itself_reach_the_real_stream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rich would put a stream of its own in front of standard output while a bar moves, and follow what is printed."""
    real = io.StringIO()
    monkeypatch.setattr(sys, "stdout", real)
    with streams.standard_streams():
        console = Console(force_terminal=True, width=60)
        with Progress(console=console) as progress:
            progress.add_task("work", total=1)
            assert console.file.stream is real  # type: ignore[attr-defined]
            print("\x1b[8mprinted")
    assert "␛[8mprinted" in real.getvalue()
    assert "\x1b[?25l" in real.getvalue()
    assert sys.stdout is real


def test_an_error_of_the_stream_says_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stdout", Full())
    with streams.standard_streams(), pytest.raises(OSError, match="standard output"):
        print("x")
    with streams.standard_streams(), pytest.raises(OSError, match="standard output"):
        Console().print("x")


def test_a_warning_of_the_readers_code_names_its_line() -> None:
    """A warning of the package's own code is a sentence without a place."""
    for file, place in (("my_answer.py", "my_answer.py, line 2: "), (str(SOURCE / "llm.py"), "")):
        with streams.standard_streams():
            said = warnings.formatwarning("overflow encountered in exp", RuntimeWarning, file, 2)
        assert said == f"paged-ref: warning: {place}overflow encountered in exp\n"


def test_no_file_goes_around_the_console() -> None:
    """One place: Rich's own Console, its `print` and its markup are used nowhere else."""
    found = []
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            if (module == "rich.console" and "Console" in names) or (module == "rich" and "print" in names):
                found.append(path)
            if "rich.console" in names or (isinstance(node, ast.Attribute) and node.attr == "from_markup"):
                found.append(path)
    assert set(found) == {SOURCE / "views" / "common" / "console.py"}


def test_a_file_name_with_brackets_is_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--trace", str(tmp_path / "a[red]b[/red].csv")]) == 2
    assert "a[red]b[/red].csv" in capsys.readouterr().err

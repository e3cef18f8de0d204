"""Standard output and error while a command runs: foreign text drives no terminal, ASCII is enough, faults are named.

`print`, argparse and tracebacks write through `plain`. Rich, which draws with escape sequences of its own, writes past
it (console.py makes its text plain). Characters that the encoding lacks become similar ones.
"""

from __future__ import annotations

import codecs
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO, cast

from ...extras.plain_text import plain
from .program import short_path

OUTPUT = "standard output"
_ERRORS = "paged-ref-ascii"
# What this package draws with: the characters that each ASCII character stands in for.
_ASCII = {
    ord(drawn): similar
    for similar, alike in {
        " ": "\u2800", "*": "•" + "".join(map(chr, range(0x2801, 0x2900))), "#": "█■", "%": "▓", ":": "▒", ",": "░",
        "_": "▁▂", ".": "·▃▄", "-": "─−╴╶╸╺▅", "=": "═━▆▇", "|": "│‖▏", "+": "└├┤┌┐┘┬┴┼±", '"': "“”", "~": "…",
        "x": "×✗", "v": "↓✓", "^": "↑▲", "<": "←≤", ">": "→▶▸", "/": "↵", "!": "≠", "o": "○□", "@": "●", "S": "§",
        "u": "µ", "T": "ᵀ",
    }.items()
    for drawn in alike
}  # fmt: skip


def _similar(error: UnicodeError) -> tuple[str, int]:
    """The error handler of the streams."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    wanted = error.object[error.start : error.end].translate(_ASCII)
    return "".join(c if c.isascii() else "?" for c in wanted), error.end


codecs.register_error(_ERRORS, _similar)


class _Named:
    """A stream whose OSErrors say its name."""

    def __init__(self, stream: TextIO, name: str) -> None:
        self.stream, self.name = stream, name

    def write(self, text: str) -> int:
        with self._named():
            return self.stream.write(text)

    def flush(self) -> None:
        with self._named():
            self.stream.flush()

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            error.filename = self.name
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class PlainStream(_Named):
    """What `print` writes to. Rich looks for `rich_proxied_file`, and writes to that."""

    @property
    def rich_proxied_file(self) -> _Named:
        return _Named(self.stream, self.name)

    def write(self, text: str) -> int:
        return super().write(plain(text, lines=True))


def _warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """One line; with the place for code that is neither the package's nor a library's: a lesson's, or the reader's."""
    ours = filename.startswith(str(Path(__file__).parents[2])) or "site-packages" in filename
    return f"paged-ref: warning: {'' if ours else f'{short_path(Path(filename))}, line {lineno}: '}{message}\n"


@contextmanager
def standard_streams() -> Iterator[None]:
    """Both streams as described above, in this block. Raises OSError with the stream's name where output is closed.

    A closed input is an empty one; where the error stream is closed, its text is dropped.
    """
    before = sys.stdin, sys.stdout, sys.stderr  # None: closed when Python began
    sentence, warnings.formatwarning = warnings.formatwarning, _warning
    changed = [(stream, stream.errors) for stream in before[1:] if hasattr(stream, "reconfigure")]
    with open(os.devnull, "r+", encoding="utf-8") as nothing:
        try:
            for stream, _ in changed:
                stream.reconfigure(errors=_ERRORS)
            sys.stdin = sys.stdin or nothing
            sys.stderr = cast(TextIO, PlainStream(sys.stderr or nothing, "standard error"))
            if sys.stdout is None:
                raise OSError(None, "it is closed", OUTPUT)
            sys.stdout = cast(TextIO, PlainStream(sys.stdout, OUTPUT))
            yield
        finally:
            sys.stdin, sys.stdout, sys.stderr = before
            warnings.formatwarning = sentence
            for stream, handler in changed:
                stream.reconfigure(errors=handler)


def give_up(stream: TextIO) -> None:
    """Nothing more can be written to the stream: what is left in its buffer goes nowhere, also at the end."""
    with suppress(OSError, ValueError):  # a test's stream has no number
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())

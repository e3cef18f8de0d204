"""The reader's terminal: how many rows were printed, and which keys were typed too early."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Any, TextIO


def forget_keys() -> None:
    """Drop what was typed before the question: it is no answer."""
    with suppress(ImportError, OSError, ValueError):  # no such terminal: nothing was typed
        import termios

        with suppress(termios.error):
            termios.tcflush(sys.stdin.fileno(), termios.TCIFLUSH)


class CountedOutput:
    """Standard output that counts its rows. While `held` is a list, text is kept there and not printed."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.rows = 0
        self.held: list[str] | None = None

    def write(self, text: str) -> int:
        if self.held is not None:
            self.held.append(text)
            return len(text)
        self.rows += text.count("\n")
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

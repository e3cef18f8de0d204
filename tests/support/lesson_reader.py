"""A reader of lessons at a pseudo terminal."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from contextlib import suppress
from pathlib import Path

from support.terminal import own_terminal

CTRL_C = b"\x03"


class Reader:
    """`paged-ref lesson` on a pseudo terminal of 80 by 24."""

    def __init__(self, directory: Path, *argv: str, lessons: Path | None = None) -> None:
        """`directory`: where the reader works, and where the lessons are if no other folder is given."""
        self.main, side = pty.openpty()
        termios.tcsetwinsize(self.main, (24, 80))
        env = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR")}
        env |= {"TERM": "xterm", "XDG_STATE_HOME": str(directory / "state"), "PAGED_REF_DEVICE": "cpu"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "paged_ref", "lesson", *argv, "--lessons", str(lessons or directory)],
            stdin=side, stdout=side, stderr=side, env=env, start_new_session=True,
            preexec_fn=own_terminal, cwd=directory,
        )  # fmt: skip
        os.close(side)
        self.seen = self.raw = ""

    def _read(self) -> None:
        text = os.read(self.main, 65536).decode(errors="replace")
        self.seen += text
        self.raw += text  # with its escape sequences, and not forgotten

    def see(self, text: str) -> str:
        """Wait until `text` is printed; return and forget what came up to it."""
        deadline = time.monotonic() + 300  # a test waits so long only to fail, and a machine may be busy
        while text not in self.plain:
            assert time.monotonic() < deadline, f"waited for {text!r}, saw\n{self.plain}"
            if select.select([self.main], [], [], 0.1)[0]:
                try:
                    self._read()
                except OSError:
                    assert text in self.plain, f"waited for {text!r} to the end, saw\n{self.plain}"
        before, _, self.seen = self.plain.partition(text)
        return before + text

    @property
    def plain(self) -> str:
        assert "␛" not in self.seen, "an escape sequence is shown as text"
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", self.seen)

    def type(self, line: str) -> None:
        os.write(self.main, f"{line}\n".encode())

    def interrupt(self) -> None:
        """Ctrl-C, once it waits for the keyboard: Python loses one that comes just before it does."""
        deadline = time.monotonic() + 300
        while self.process.poll() is None:
            assert time.monotonic() < deadline, f"Ctrl-C did not end it; saw\n{self.plain}"
            time.sleep(0.5)
            os.write(self.main, CTRL_C)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=10)

    def end(self) -> int:
        code = self.process.wait(timeout=300)
        os.close(self.main)
        return code

    def press_enter_to_the_end(self, seconds: float) -> str:
        """Enter at every question, until the lesson ends; return all that was printed."""
        deadline = time.monotonic() + seconds
        said = ""
        while True:
            assert time.monotonic() < deadline, f"not at its end; saw\n{said}{self.plain}"
            if select.select([self.main], [], [], 0.1)[0]:
                try:
                    self._read()
                except OSError:  # the lesson has ended
                    return said + self.plain
            elif self.process.poll() is not None:
                return said + self.plain
            if re.search(r"(\]|\):) $", self.plain):
                said, self.seen = said + self.plain, ""
                self.type("")

"""A pseudo-terminal with the real program on it: keys in, the screen read back by a terminal emulator."""

from __future__ import annotations

import codecs
import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pyte

ENTER, LEAVE = "\x1b[?1049h", "\x1b[?1049l"  # the alternate screen


def own_terminal() -> None:
    """Run in a new process: the terminal on its standard input becomes its own, so that Ctrl-C and Ctrl-Z reach it.

    A shell that starts the tests in the background makes them ignore these signals, and what they start would too.
    """
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


class Terminal:
    """`paged-ref viz LOG`, another command or another `program` of Python's, on a pseudo terminal of a given size."""

    def __init__(
        self, log: Path | str = "", *argv: str, command: str = "viz", size: tuple[int, int] = (80, 24),
        program: Sequence[str] = (), **environment: str,
    ) -> None:  # fmt: skip
        self.main, self.side = pty.openpty()
        self.screen = pyte.Screen(*size)
        self.stream = pyte.Stream(self.screen)
        self.raw = ""
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self._resize(size)
        self.before = termios.tcgetattr(self.side)
        env = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS", "LINES", "FORCE_COLOR")}
        env |= {"TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8", "PAGED_REF_DEVICE": "cpu", **environment}
        self.process = subprocess.Popen(
            [sys.executable, *(program or ["-m", "paged_ref", command, str(log), *argv])],
            stdin=self.side,
            stdout=self.side,
            stderr=self.side,
            env=env,
            start_new_session=True,
            preexec_fn=own_terminal,
        )

    def _resize(self, size: tuple[int, int]) -> None:
        fcntl.ioctl(self.main, termios.TIOCSWINSZ, struct.pack("HHHH", size[1], size[0], 0, 0))

    def resize(self, columns: int, rows: int) -> None:
        self.screen.resize(rows, columns)
        self._resize((columns, rows))

    def read(self, seconds: float = 0.05) -> None:
        while select.select([self.main], [], [], seconds)[0]:
            try:
                text = self.decoder.decode(os.read(self.main, 65536))
            except OSError:  # the other side is closed
                return
            self.raw += text
            self.stream.feed(text)

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + 300  # a test waits so long only to fail, and a machine may be busy
        while not condition():
            assert time.monotonic() < deadline, f"{what}; the screen is\n" + self.text
            self.read()

    def press(self, keys: str) -> None:
        os.write(self.main, keys.encode())

    def see(self, text: str) -> str:
        """Wait until `text` is on the screen; return all of it."""
        self.wait(lambda: text in self.text, f"waited for {text!r}")
        self.read(0.1)
        return self.text

    @property
    def text(self) -> str:
        return "\n".join(self.screen.display)

    def end(self) -> int:
        self.wait(lambda: self.process.poll() is not None, "waited for the end")
        self.read()
        return self.process.returncode

    def assert_restored(self) -> None:
        assert self.raw.count(ENTER) == self.raw.count(LEAVE) >= 1
        assert self.raw.rindex(LEAVE) > self.raw.rindex(ENTER)
        assert self.raw.rindex("\x1b[?25h") > self.raw.rindex("\x1b[?25l")  # the cursor shows again
        assert termios.tcgetattr(self.side) == self.before

    def close(self) -> None:
        if self.process.poll() is None:
            os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self.main)
        os.close(self.side)

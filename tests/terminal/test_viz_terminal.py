"""The real program on a real (pseudo) terminal: keys in, the screen read back by a terminal emulator."""

from __future__ import annotations

import codecs
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyte
import pytest

ENTER, LEAVE = "\x1b[?1049h", "\x1b[?1049l"  # the alternate screen


class Terminal:
    """`paged-ref viz LOG`, or another command, on a pseudo terminal of a given size."""

    def __init__(
        self, log: Path | str, *argv: str, command: str = "viz", size: tuple[int, int] = (80, 24), **environment: str
    ) -> None:
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
            [sys.executable, "-m", "paged_ref", command, str(log), *argv],
            stdin=self.side,
            stdout=self.side,
            stderr=self.side,
            env=env,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that Ctrl-C and Ctrl-Z reach it
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
        deadline = time.monotonic() + 60
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


@pytest.fixture
def start(log_file: Path) -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def begin(*argv: str, **more: object) -> Terminal:
        opened.append(Terminal(log_file, *argv, **more))  # type: ignore[arg-type]
        return opened[-1]

    yield begin
    for terminal in opened:
        terminal.close()


LEFT, RIGHT, UP, DOWN = "\x1b[D", "\x1b[C", "\x1b[A", "\x1b[B"
HOME, END = "\x1b[H", "\x1b[F"


def test_a_session(start: Callable[..., Terminal]) -> None:
    terminal = start()
    first = terminal.see("event 1 of")
    assert "12 blocks of 4 slots" in first
    terminal.press(RIGHT * 3)
    terminal.see("event 4 of")
    terminal.press(DOWN)
    assert "Step 0 computes 7 tokens" in terminal.see("event 5 of")
    terminal.press(UP + LEFT * 3)
    assert terminal.see("event 1 of") == first  # back at the start is the start
    terminal.press("2n")
    assert "B2 forks off B1" in terminal.see("[2 sharing]")
    terminal.press("6/c\r")
    assert "▶C" in terminal.see("C: its next event")
    terminal.press(END)
    (events,) = re.findall(r"event 1 of (\d+)", first)
    terminal.see(f"event {events} of {events}")
    terminal.press("\t")
    terminal.see("run 2/3")
    terminal.press(HOME + "?")
    terminal.see("one event back, forward")
    terminal.press("x1")
    terminal.see("[1 tables]")
    terminal.press(" ")
    terminal.see("event 3 of")  # it plays
    terminal.press("q")
    assert terminal.end() == 0
    terminal.assert_restored()


@pytest.mark.parametrize("size", [(100, 30), (60, 16), (160, 50)])
def test_resizing(start: Callable[..., Terminal], size: tuple[int, int]) -> None:
    terminal = start()
    terminal.see("event 1 of")
    terminal.resize(*size)
    terminal.wait(lambda: terminal.screen.display[-1].rstrip().endswith(("quit", "…")), "waited for the last line")
    terminal.read(0.2)
    assert "event 1 of " in terminal.screen.display[0]
    assert len(terminal.screen.display[0].rstrip()) >= size[0] - 1
    terminal.resize(40, 10)
    terminal.see("at least 60x16")
    terminal.resize(80, 24)
    terminal.see("12 blocks of 4 slots")
    terminal.press("q")
    assert terminal.end() == 0
    terminal.assert_restored()


def test_ctrl_c(start: Callable[..., Terminal]) -> None:
    terminal = start()
    terminal.see("event 1 of")
    terminal.press("\x03")
    assert terminal.end() == 130
    terminal.assert_restored()
    assert "Traceback" not in terminal.raw


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signals(start: Callable[..., Terminal], number: signal.Signals) -> None:
    terminal = start()
    terminal.see("event 1 of")
    terminal.process.send_signal(number)
    assert terminal.end() == 128 + number
    terminal.assert_restored()


def test_ctrl_z_and_back(start: Callable[..., Terminal]) -> None:
    terminal = start()
    terminal.see("event 1 of")
    terminal.press(RIGHT)
    terminal.see("event 2 of")
    terminal.press("\x1a")
    terminal.wait(lambda: LEAVE in terminal.raw, "waited for the alternate screen to be left")
    terminal.wait(lambda: termios.tcgetattr(terminal.side) == terminal.before, "waited for the settings")
    terminal.process.send_signal(signal.SIGCONT)
    terminal.wait(lambda: terminal.raw.count(ENTER) == 2, "waited for the screen to come back")
    terminal.press(RIGHT)
    terminal.see("event 3 of")
    terminal.press("q")
    assert terminal.end() == 0
    terminal.assert_restored()


def test_an_exception_restores_the_terminal(start: Callable[..., Terminal], tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import paged_ref.terminal.player as player\n"
        "def broken(self): raise RuntimeError('planted')\n"
        "player.Player._actions['n'] = broken\n",
        encoding="utf-8",
    )
    terminal = start(PYTHONPATH=str(tmp_path))
    terminal.see("event 1 of")
    terminal.press("n")
    assert terminal.end() == 1
    terminal.assert_restored()
    assert "planted" in terminal.raw[terminal.raw.rindex(LEAVE) :]  # the traceback comes where it can be read


def test_no_color_is_respected(start: Callable[..., Terminal]) -> None:
    colour = re.compile(r"\x1b\[(?:\d+;)*(?:3[0-8]|4[0-8]|9[0-7])m")
    for environment, coloured in (({"NO_COLOR": "1"}, False), ({}, True)):
        terminal = start("--at", "S", **environment)
        terminal.see("SwappedOut")
        assert bool(colour.search(terminal.raw)) is coloured
        terminal.press("q")
        assert terminal.end() == 0

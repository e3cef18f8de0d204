"""The real program on a real (pseudo) terminal: keys in, the screen read back by a terminal emulator."""

from __future__ import annotations

import os
import re
import signal
import termios
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.terminal import ENTER, LEAVE, Terminal


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
    assert "Copy on write: B1 is to write into block 0" in terminal.see("event 22 of")  # a moment worth seeing
    terminal.press(HOME)
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
    terminal = start("--at", "1")
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
    terminal = start("--at", "1")
    terminal.see("event 1 of")
    terminal.press("\x03")
    assert terminal.end() == 130
    terminal.assert_restored()
    assert "Traceback" not in terminal.raw


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signals(start: Callable[..., Terminal], number: signal.Signals) -> None:
    terminal = start("--at", "1")
    terminal.see("event 1 of")
    terminal.process.send_signal(number)
    assert terminal.end() == 128 + number
    terminal.assert_restored()


def test_ctrl_z_and_back(start: Callable[..., Terminal]) -> None:
    terminal = start("--at", "1")
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
        "import paged_ref.views.viz.player as player\n"
        "def broken(self): raise RuntimeError('planted')\n"
        "player.Player.actions['n'] = broken\n",
        encoding="utf-8",
    )
    terminal = start(
        "--at", "1", PYTHONPATH=os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    )
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

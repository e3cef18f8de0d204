"""Keys in, screens out: the loop around a view on a terminal.

Rich draws, prompt_toolkit reads the keys. The terminal is given back as it was, whatever happens: at the end,
at Ctrl-C, at an exception, at SIGTERM and SIGHUP, and while Ctrl-Z has stopped the program.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from prompt_toolkit.input import Input, create_input
from rich.control import Control

from .console import Console
from .viewer import SPEEDS, Viewer

_RESIZE = 0.1  # seconds after which a new size of the window shows, at the latest
_ESCAPE = 0.05  # seconds after which a lone escape is the key, and not the beginning of another


_KEYS = {
    "s-up": "up", "s-down": "down", "s-left": "left", "s-right": "right", "pageup": "pgup", "pagedown": "pgdn",
    "c-i": "tab", "s-tab": "shift tab", "c-m": "enter", "c-j": "enter", "c-h": "backspace", "delete": "backspace",
}  # fmt: skip


def play(viewer: Viewer) -> None:
    """Show the view on this terminal until a key quits. Raises KeyboardInterrupt at Ctrl-C, the terminal restored."""
    console, keys = Console(), create_input()
    with _signals() as stopped:
        while True:
            with console.screen(hide_cursor=True), keys.raw_mode():
                if not _until_stopped(viewer, keys, console, stopped):
                    return
            stopped.clear()
            os.kill(0, signal.SIGSTOP)  # all of this job waits here for `fg`


def _until_stopped(viewer: Viewer, keys: Input, console: Console, stopped: list[bool]) -> bool:
    """False: a key quit the view. True: Ctrl-Z is to stop the program for a while."""
    drawn: tuple[int, int] | None = None
    due = 0.0
    while not stopped:
        size = os.get_terminal_size(sys.stdout.fileno())
        width, height = max(1, size.columns), max(1, size.lines)
        if drawn != (width, height):
            _draw(viewer, console, width, height)
            drawn = (width, height)
            due = time.monotonic() + 1 / SPEEDS[viewer.speed]
        wait = min(_RESIZE, max(0.0, due - time.monotonic())) if viewer.playing else _RESIZE
        pressed = _read(keys, wait)
        for key in pressed:
            if key == "c-c":
                raise KeyboardInterrupt
            if key == "c-z":
                stopped.append(True)
            elif not viewer.press(key):
                return False
            drawn = None
        if keys.closed:  # the terminal is gone
            return False
        if not pressed and viewer.playing and time.monotonic() >= due:
            viewer.tick()
            drawn = None
    return True


def _read(keys: Input, seconds: float) -> list[str]:
    """The keys that were pressed within this time."""
    if not select.select([keys.fileno()], [], [], seconds)[0]:
        return []
    pressed = keys.read_keys()
    if not pressed and not select.select([keys.fileno()], [], [], _ESCAPE)[0]:
        pressed = keys.flush_keys()
    names = [str(getattr(press.key, "value", press.key)) for press in pressed]
    return [_KEYS.get(name, name) for name in names if not name.startswith("<") or name == "<"]


def _draw(viewer: Viewer, console: Console, width: int, height: int) -> None:
    console.size = (width, height)  # asked anew each time: COLUMNS would hide a resize
    with console:  # one write
        console.control(Control.home())
        console.print(viewer.draw(width, height), end="", no_wrap=True, overflow="crop", crop=True)


@contextmanager
def _signals() -> Iterator[list[bool]]:
    """A request to stop goes into a list, for the loop to see; those to end become an exception."""
    stopped: list[bool] = []

    def end(number: int, _: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    handlers = {signal.SIGTSTP: lambda *_: stopped.append(True), signal.SIGTERM: end, signal.SIGHUP: end}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""`paged-ref monitor` on a real (pseudo) terminal: it follows a file that grows, and gives the terminal back."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.hand_made_log import hand_made

from paged_ref.timeline.events import to_json

if sys.platform == "win32":
    pytest.skip("needs a pseudo terminal", allow_module_level=True)

from support.terminal import Terminal


@pytest.fixture
def start() -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def begin(*argv: str) -> Terminal:
        opened.append(Terminal(*argv, command="monitor"))
        return opened[-1]

    yield begin
    for terminal in opened:
        terminal.close()


def test_it_follows_a_file_that_grows(start: Callable[..., Terminal], tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    lines = [to_json(event) + "\n" for event in hand_made()]
    terminal = start(str(path))
    terminal.see("waiting for")
    with path.open("w", encoding="utf-8", buffering=1) as file:
        file.write("".join(lines[:20]))
        terminal.see("20 events")
        file.write(lines[20][:8])
        file.flush()
        pictures = terminal.raw.count("paged_ref ")
        terminal.wait(lambda: terminal.raw.count("paged_ref ") > pictures + 2, "waited for more pictures")
        assert "20 events" in terminal.text  # half a line is no event
        file.write(lines[20][8:] + "".join(lines[21:]))
        terminal.see(f"{len(lines)} events")
    assert "following run.jsonl" in terminal.text
    assert "2 running, 0 waiting, 0 swapped, 1 finished" in terminal.text
    terminal.press(" ")
    terminal.see("paused")
    terminal.resize(100, 30)
    terminal.wait(lambda: "q quit" in terminal.screen.display[-1], "waited for the last line")
    terminal.press("q")
    assert terminal.end() == 0
    terminal.assert_restored()


def test_ctrl_c_and_a_log_that_breaks_give_the_terminal_back(start: Callable[..., Terminal], tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text("".join(to_json(event) + "\n" for event in hand_made()[:20]), encoding="utf-8")
    terminal = start(str(path))
    terminal.see("20 events")
    terminal.press("\x03")
    assert terminal.end() == 130
    terminal.assert_restored()
    terminal = start(str(path))
    terminal.see("20 events")
    with path.open("a", encoding="utf-8") as file:
        file.write("of another program\n")
    assert terminal.end() == 2
    terminal.assert_restored()
    assert "line 21: not JSON" in terminal.raw
    assert "Traceback" not in terminal.raw


def test_a_command_is_watched_to_its_end(start: Callable[..., Terminal]) -> None:
    prompt = "Four score and seven years ago our"
    terminal = start("--run", "generate", "--prompt", prompt, "--max-tokens", "3")
    terminal.see("1 finished")
    terminal.see("ended")
    terminal.press("q")
    assert terminal.end() == 0
    terminal.assert_restored()
    assert f"{prompt} fathers brought forth" in terminal.raw[terminal.raw.rindex("\x1b[?1049l") :]

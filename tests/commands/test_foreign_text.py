"""Texts from outside, in every command, at a pseudo-terminal: what the terminal gets drives it only as Rich does."""

from __future__ import annotations

import re
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from support.hand_made_log import hand_made
from support.several_commands import printed_by_each, program
from support.terminal import Terminal

from paged_ref.cli import main
from paged_ref.core.model.loading import TINY
from paged_ref.timeline.events import (
    Event,
    ModelOpened,
    PoolOpened,
    SequenceFinished,
    TokenNamed,
    TokenSampled,
    write_events,
)
from paged_ref.views.common.plots import Bar, Line, svg

NASTY = "\x1b]0;PWNED\x07\x1b[8m\x1b[2J\x9b31m\u202eevil\u2066\u200b\r\nnew[bold]line[/bold]"
# What Rich and a terminal's own line discipline write: colours, the cursor, the other screen.
ALLOWED = re.compile(r"\x1b\[(?!8m|2J|31m\u202e)[0-9;]*[mHKABCDGJ]|\x1b\[\?(25|1049|2004)[hl]|\r|\n|\t")
FORBIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]")


def named_nastily(events: list[Event], manager: bool = False) -> list[Event]:
    """The log with such text in every place that has text."""
    changed: list[Event] = []
    for event in events:
        match event:
            case PoolOpened() if manager:
                event = msgspec.structs.replace(event, manager=NASTY)
            case ModelOpened():
                event = msgspec.structs.replace(event, model=NASTY)
            case SequenceFinished():
                event = msgspec.structs.replace(event, reason=NASTY)
        changed.append(event)
        if len(changed) == 1:
            changed += [TokenNamed(token_id, f"{NASTY}{token_id}") for token_id in range(100)]
    assert any(isinstance(event, TokenSampled) for event in changed)
    return changed


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log, a log of another manager, a model, a text and a trace, all named nastily."""
    place = tmp_path_factory.mktemp("foreign")
    for name, events in (
        ("log", named_nastily(hand_made())),
        ("other.log", named_nastily(hand_made("standard"), manager=True)),
    ):
        with (place / name).open("w", encoding="utf-8") as file:
            write_events(events, file)
    shutil.copytree(TINY, place / NASTY, ignore=shutil.ignore_patterns("*.md", "*.py"))
    stories = "<|endoftext|>".join(["Once upon a time there was a dog."] * 40)
    (place / f"{NASTY}.txt").write_text(stories, encoding="utf-8")
    (place / f"{NASTY}.csv").write_text("prompt,output\n" + "20,10\n" * 4, encoding="utf-8")
    return place


RUN = [
    [NASTY],
    ["info", NASTY],
    ["generate", "--prompt", NASTY, "--prompt", "b", "--max-tokens", "3"],
    ["generate", "--prompt", "a", "--model", NASTY + "no"],
    ["generate", "--prompt", "a", "--backend", NASTY],
    ["generate", "--prompt", "a", "--manager", NASTY],
    ["generate", "--prompt", "a", "--record", f"{NASTY}/nowhere"],
    ["demo", "--model", NASTY, "--backend", NASTY],
]
LOOK = [
    ["viz", "log", "--print", "--size", "100x40", "--at", "N"],
    *(["viz", "log", "--print", "--size", "160x50", "--frame", str(k)] for k in (1, 4)),
    ["viz", "other.log", "--print", "--size", "100x30", "--frame", "2"],
    ["viz", "other.log", "--print", "--size", "100x30", "--frame", "5"],
    ["viz", "--prompt", NASTY, "--max-tokens", "2", "--print"],
    ["viz", NASTY],
    ["monitor", "log", "--print"],
    ["monitor", "log", "--once"],
    ["monitor", "log", "--prometheus"],
    ["monitor", "other.log", "--print"],
    ["walk", "--at", NASTY],
]
OTHER = [
    ["assess", "--trace", f"{NASTY}.csv"],
    ["assess", "--gpu", NASTY],
    ["compare", "--trace", NASTY + "no"],
    ["paper", NASTY],
    ["train", "--text", NASTY + "no", "--out", NASTY + "new"],
    ["train", "--text", f"{NASTY}.txt", "--held-out", "0.1", "--measure", NASTY],
    ["long", "--model", NASTY, "--recall", "--tokens", "64", "--new-tokens", "2"],
    ["long", "--text", f"{NASTY}.txt", "--tokens", "99999"],
    ["lesson", "--lessons", NASTY],
    ["bench", NASTY],
    ["bench", "kernels", "--shape", NASTY],
    ["bench", "sass", "--kernel", NASTY],
]
ASSESS = [["assess", "--model", NASTY]]  # half a minute of simulation


@pytest.mark.parametrize("commands", [RUN, LOOK, OTHER, pytest.param(ASSESS, marks=pytest.mark.slow)])
def test_no_command_lets_foreign_text_drive_the_terminal(
    commands: list[list[str]], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    terminal = Terminal(program=program(commands), size=(120, 40))
    try:
        terminal.end()
    finally:
        terminal.close()
    for argv, (raw, _) in zip(commands, printed_by_each(terminal.raw, commands), strict=True):
        print(argv)
        assert_harmless(raw)


def test_nor_does_a_run_while_it_is_watched(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    terminal = Terminal("--run", "generate", "--prompt", "a", "--backend", NASTY, command="monitor", size=(120, 40))
    try:
        terminal.see("ended")
        terminal.press("q")
        terminal.end()
    finally:
        terminal.close()
    assert_harmless(terminal.raw)


def assert_harmless(raw: str) -> None:
    assert raw
    left = ALLOWED.sub("", raw)
    found = FORBIDDEN.search(left)
    assert found is None, repr(left[max(0, found.start() - 80) : found.end() + 80])


@pytest.mark.parametrize("command", ["viz", "monitor"])
def test_nor_does_a_log_while_it_is_watched(command: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    terminal = Terminal("log", command=command, size=(150, 50))
    try:
        terminal.see("paged manager")
        for key in "\x1b[F123456nnn/A\r?q " if command == "viz" else "   ":
            terminal.press(key)
            terminal.read(0.03)
        terminal.press("q")
        terminal.end()
    finally:
        terminal.close()
    assert "PWNED" in terminal.raw
    assert_harmless(terminal.raw)


def test_a_finished_command_would_show_what_it_lets_through() -> None:
    with pytest.raises(AssertionError):
        assert_harmless(f"text {NASTY}")
    with pytest.raises(AssertionError):
        assert_harmless("text \x1b[8m")
    assert_harmless("\x1b[1;32mtext\x1b[0m\x1b[?25h\r\n")


@pytest.mark.parametrize("frame", range(1, 7))
def test_a_picture_of_such_a_log_is_well_formed(frame: int, place: Path, tmp_path: Path) -> None:
    picture = tmp_path / "frame.svg"
    assert main(["viz", str(place / "log"), "--frame", str(frame), "--svg", str(picture)]) == 0
    text = picture.read_text(encoding="utf-8")
    ET.fromstring(text)
    assert "PWNED" in text or frame in (3, 5)
    assert not FORBIDDEN.search(text.replace("\n", ""))


def test_so_are_plots_with_such_names() -> None:
    text = svg(NASTY, [Bar(NASTY, {"tokens": 1.0})], [Line(NASTY, [(0.0, 1.0), (1.0, 2.0)])], 2.0, NASTY, NASTY, 1.0)
    ET.fromstring(text)
    assert not FORBIDDEN.search(text.replace("\n", ""))


def test_an_error_is_one_line_whatever_it_names(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    wrong: list[Callable[[], object]] = [
        lambda: main(["generate", "--prompt", "a", "--model", "no\nsuch\x1b[8m"]),
        lambda: main(["viz", "no\nsuch"]),
    ]
    for run in wrong:
        assert run() == 2
        printed = capsys.readouterr().err
        assert (printed.count("\n"), "no␊such" in printed) == (1, True)

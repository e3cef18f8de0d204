"""The standard streams in every command: a full disk, a closed stream, a reader that leaves, ASCII."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from support.hand_made_log import hand_made
from support.several_commands import printed_by_each, program

from paged_ref.timeline.events import write_events

PAGED_REF = f"{sys.executable} -m paged_ref"
# Of each way to write one: argparse's, a stream of text, Rich's pictures, its other screen, lines, a lesson.
COMMANDS = [
    "--help",
    "generate --prompt 'Four score and seven years ago our' --max-tokens 3",
    "viz log --print --frame 2 --size 120x50",
    "monitor log",
    "monitor log --prometheus",
    "lesson 5",
]
OTHERS = [
    "info",
    "viz log --print --at 3 --size 160x50",
    "monitor log --once",
    "walk --print --at keys",
    "assess",
]
MORE = [
    "lesson",
    "train --help",
    "bench memory --help",
    "demo",
    "long --tokens 64 --new-tokens 2 --attend all",
    "compare --requests 20 --jobs 1 --block-sizes 16",
]
each_command = pytest.mark.parametrize(
    "argv", [*COMMANDS, *(pytest.param(argv, marks=pytest.mark.slow) for argv in OTHERS)]
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("streams")
    with (place / "log").open("w", encoding="utf-8") as file:
        write_events(hand_made(), file)
    return place


def shell(line: str, place: Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON") or name == "PYTHONPATH"}
    environment = kept | {"PAGED_REF_DEVICE": "cpu", "XDG_STATE_HOME": str(place)} | environment
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line}"], capture_output=True, env=environment, cwd=place, timeout=900,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip


@each_command
def test_a_full_disk_behind_the_output_is_one_sentence(argv: str, place: Path) -> None:
    done = shell(f"{PAGED_REF} {argv} > /dev/full", place)
    assert done.stderr.decode() == "paged-ref: error: standard output: No space left on device\n"
    assert done.returncode == 2


@each_command
def test_a_reader_that_leaves_is_no_error(argv: str, place: Path) -> None:
    done = shell(f"{PAGED_REF} {argv} | head -1", place)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("argv", ["info", "generate --prompt a", "demo"])
def test_a_closed_output_is_one_sentence_before_the_work(argv: str, place: Path) -> None:
    done = shell(f"{PAGED_REF} {argv} >&-", place)
    assert (done.returncode, done.stderr) == (2, b"paged-ref: error: standard output: it is closed\n")


@pytest.mark.parametrize(
    "argv",
    [
        "viz log --at 3",
        "lesson 5",
        *(pytest.param(argv, marks=pytest.mark.slow) for argv in ("info", "monitor log", "lesson")),
    ],
)
def test_a_closed_input_is_an_empty_one(argv: str, place: Path) -> None:
    done = shell(f"{PAGED_REF} {argv} <&-", place)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_closed_input_is_no_prompt(place: Path) -> None:
    done = shell(f"{PAGED_REF} generate --prompt - <&-", place)
    assert (done.returncode, done.stderr.count(b"\n")) == (2, 1)
    assert b"the prompt is empty" in done.stderr


def test_closed_and_full_error_streams_lose_only_the_sentence(place: Path) -> None:
    for stream in ("2>&-", "2>/dev/full"):
        done = shell(f"{PAGED_REF} viz nowhere {stream}", place)
        assert (done.returncode, done.stdout, done.stderr) == (2, b"", b"")


ASCII = {"PYTHONIOENCODING": "ascii"}
# Python would take UTF-8 in the locale C, unless it is told not to.
LOCALE_C = {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize(
    ("lines", "environment"),
    [
        ([*COMMANDS, *OTHERS], ASCII),
        (["viz log --print", "generate --prompt a --max-tokens 2"], LOCALE_C),
        *(pytest.param(MORE, each, marks=pytest.mark.slow) for each in (ASCII, LOCALE_C)),
    ],
)
def test_ascii_is_enough(lines: list[str], environment: dict[str, str], place: Path) -> None:
    commands = [shlex.split(line) for line in lines]
    done = shell(shlex.join([sys.executable, *program(commands)]), place, **environment)
    assert done.returncode == 0, done.stderr
    assert "Error" not in done.stderr.decode("ascii")
    for argv, (printed, status) in zip(commands, printed_by_each(done.stdout.decode("ascii"), commands), strict=True):
        assert printed, argv
        assert status == "0", argv
        # Lines of pictures keep their length; a sign that has no likeness is a question mark.
        assert printed.count("?") <= 2 + printed.count("? ") + printed.count("?\n"), argv


def test_pictures_in_ascii_show_what_they_show(place: Path) -> None:
    wide = shell(f"{PAGED_REF} viz log --print --at 40 --size 100x30", place, PYTHONIOENCODING="utf-8").stdout.decode()
    narrow = shell(f"{PAGED_REF} viz log --print --at 40 --size 100x30", place, **ASCII).stdout.decode("ascii")
    assert [len(line) for line in wide.splitlines()] == [len(line) for line in narrow.splitlines()]
    assert "─" in wide
    assert "-- Block tables -----" in narrow


def test_a_text_in_other_signs_becomes_question_marks(place: Path) -> None:
    done = shell(f"{PAGED_REF} generate --prompt 'a 日本 b' --max-tokens 1", place, **ASCII)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"a ?? b")

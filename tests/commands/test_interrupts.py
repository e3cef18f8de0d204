"""Ctrl-C in every command: one line, status 130, no process left, whatever the command is in the middle of."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from paged_ref.views.common.interrupts import Interrupts

MANY = [word for i in range(64) for word in ("--prompt", f"Once upon a time there were {i}")]
LONG = ["--max-tokens", "400"]
START = "import sys; from paged_ref.cli import main; print('ready', flush=True); {}; sys.exit(main(sys.argv[1:]))"
INTERRUPTED = "paged-ref: interrupted\n"


class Started:
    """The command line in a session of its own, after its first line."""

    def __init__(self, argv: list[str], place: Path, before: str = "pass") -> None:
        command = [sys.executable, "-c", START.format(before), *argv]
        with (place / "errors").open("w", encoding="utf-8") as errors:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, start_new_session=True,
                text=True, env=os.environ | {"PAGED_REF_DEVICE": "cpu"}, preexec_fn=_default_interrupts,
            )  # fmt: skip
        self.errors = place / "errors"
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def interrupt(self, group: bool = True) -> tuple[int, str]:
        """As a terminal does it, for all processes of the group: exit status, and what was printed as errors."""
        assert self.process.poll() is None, self.errors.read_text(encoding="utf-8")
        (os.killpg if group else os.kill)(self.process.pid, signal.SIGINT)
        try:
            self.process.communicate(timeout=120)
        finally:
            self.left = self._left()
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.returncode, self.errors.read_text(encoding="utf-8")

    def _left(self) -> list[str]:
        """The processes of the group that still run, a few seconds later."""
        for _ in range(50):
            listed = subprocess.run(["ps", "-e", "-o", "pgid=,stat=,args="], capture_output=True, text=True, check=True)
            rows = [line.split(maxsplit=2) for line in listed.stdout.splitlines()]
            left = [row[2] for row in rows if row[0] == str(self.process.pid) and not row[1].startswith("Z")]
            if not left:
                break
            time.sleep(0.1)
        return left


def _default_interrupts() -> None:
    """A shell that starts the tests in the background makes them ignore SIGINT, and what they start would too."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


IMPORTING, RUNNING = 0.3, 1.0  # seconds: what most commands do then, on a machine that is not busy
GENERATE = ["generate", *MANY, *LONG, "--ignore-eos", "--kv-tokens", "32768"]


@pytest.mark.parametrize(
    ("argv", "seconds"),
    [
        pytest.param(
            argv, seconds, id=f"{' '.join(argv[:2])}-{seconds}", marks=[pytest.mark.slow] * (seconds != chosen)
        )
        for argv, chosen in (
            (GENERATE, RUNNING),
            (["viz", *MANY, *LONG, "--print"], RUNNING),
            (["lesson", "17"], IMPORTING),
            (["long", "--tokens", "8192"], RUNNING),
            (["bench", "memory"], IMPORTING),
            (["monitor", "--once", "--run", *GENERATE], RUNNING),
            (["bench", "kernels", "--rounds", "1000"], IMPORTING),
        )
        for seconds in (IMPORTING, RUNNING)
    ]
    + [(["demo"], IMPORTING)],  # takes not much more than a second
)
def test_every_command_ends_in_one_line(argv: list[str], seconds: float, tmp_path: Path) -> None:
    started = Started(argv, tmp_path)
    time.sleep(seconds)
    status, errors = started.interrupt()
    assert status == 130, errors
    assert errors == ("" if argv[0] == "lesson" and not errors else INTERRUPTED)
    assert not started.left


def test_training_ends_in_the_middle_of_a_step(tmp_path: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out"
    stories = [f"Once upon a time {name} and {other} went to the sea." for name in "ABCDEFGH" for other in "abcdefgh"]
    text.write_text("\n<|endoftext|>\n".join(stories * 8), encoding="utf-8")
    sizes = ["--vocab-size", "280", "--context", "64", "--batch-tokens", "1000000", "--micro-tokens", "256"]
    started = Started(["train", "--text", str(text), "--out", str(out), "--steps", "9999", *sizes], tmp_path)
    while not (out / "tokenizer.json").exists():
        assert started.process.poll() is None, started.errors.read_text(encoding="utf-8")
        time.sleep(0.05)
    time.sleep(0.5)
    status, errors = started.interrupt()
    made = int(errors.split()[3])
    assert (status, errors) == (130, f"stopped after step {made} of 9999; --resume {out} continues\n")
    assert (out / "training_state.safetensors").exists()
    assert not started.left


BLOCKED = (
    "import hashlib, multiprocessing, time, paged_ref.commands.info as info;"
    "worker = multiprocessing.get_context('spawn').Process(target=time.sleep, args=(600,), daemon=True);"
    "info.main = lambda args: (worker.start(), print('blocked', flush=True), "
    "hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9))"
)


def test_compiled_code_that_does_not_come_back_is_left_alone_and_its_workers_end(tmp_path: Path) -> None:
    """Python sees no interrupt while the digest is computed, which takes many minutes."""
    started = Started(["info"], tmp_path, BLOCKED)
    assert started.process.stdout is not None
    assert started.process.stdout.readline() == "blocked\n"
    assert started.interrupt(group=False) == (130, INTERRUPTED)
    assert not started.left


IN_A_FINALIZER = (
    "import os, time, weakref, paged_ref.commands.info as info;"
    "info.main = lambda args: ("
    "weakref.finalize(set(), lambda: (print('finalizer', flush=True), time.sleep(60))), time.sleep(60))"
)


def test_an_interrupt_in_a_finalizer_is_not_lost_and_prints_no_traceback(tmp_path: Path) -> None:
    started = Started(["info"], tmp_path, IN_A_FINALIZER)
    assert started.process.stdout is not None
    assert started.process.stdout.readline() == "finalizer\n"
    assert started.interrupt() == (130, INTERRUPTED)


def test_a_fault_of_the_program_shows_its_traceback_and_asks_for_a_report(tmp_path: Path) -> None:
    """No kind of error is mended by catching everything."""
    broken = "import paged_ref.commands.info as info; info.main = lambda args: {}['not foreseen \x1b[8m']"
    started = Started(["info"], tmp_path, broken)
    started.process.communicate(timeout=60)
    lines = started.errors.read_text(encoding="utf-8").splitlines()
    assert started.process.returncode == 1
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-2:] == [
        "KeyError: 'not foreseen \\x1b[8m'",
        "paged-ref: this is a fault of the program; please report it with the lines above",
    ]


def test_a_whole_block_comes_to_its_end_first() -> None:
    done: list[str] = []
    with pytest.raises(KeyboardInterrupt), Interrupts() as interrupts:
        _interrupted_twice(interrupts, done)
    assert done == ["whole"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def _interrupted_twice(interrupts: Interrupts, done: list[str]) -> None:
    with interrupts.whole():
        signal.raise_signal(signal.SIGINT)
        done.append("whole")
    done.append("never")


def test_a_second_interrupt_ends_a_whole_block_too() -> None:
    done: list[str] = []

    def interrupt_twice() -> None:
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
            done.append("goes on")

    with pytest.raises(KeyboardInterrupt), Interrupts() as interrupts, interrupts.whole():
        interrupt_twice()
    assert done == ["goes on"]

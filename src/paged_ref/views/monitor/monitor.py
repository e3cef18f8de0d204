"""`paged-ref monitor`: a run as it goes, live on a terminal, or its numbers for programs.

The monitor follows a log that `--record` writes. With `--run` the monitor starts the command itself, lets the
command record into a temporary file, and follows that file.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import ClassVar, NamedTuple, TextIO

from rich.text import Text

from ...core.checks import plural
from ...timeline.events import Event
from ...timeline.following import Follower
from ..common.loop import play
from ..common.printing import Size, is_terminal, parse_size, print_frames
from ..common.viewer import Viewer
from ..viz.frames.screen import SMALLEST
from .gpu_meter import GPUMeter, GPUReading
from .report import as_json, as_prometheus
from .screen import screen
from .state import Monitor

RECORDING = ("demo", "generate", "compare")  # commands that --run starts: they take --record
MAX_BYTES = 1 << 18  # of the log that are read between two pictures: some thousand events
HELP = """

For Prometheus: node_exporter's textfile collector reads NAME.prom in its
directory, which must never be half written. From a timer:
  paged-ref monitor run.jsonl --prometheus > DIR/run.tmp && mv DIR/run.tmp DIR/run.prom"""
KEYS = "space pause   + - faster, slower   q quit"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (parser.epilog or "") + HELP
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE", help="a log that --record writes, or will write")
    parser.add_argument(
        "--run", nargs=argparse.REMAINDER, metavar="COMMAND",
        help="start demo, generate or compare --run and watch it; the rest of the line is its own",
    )  # fmt: skip
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--once", action="store_true", help="print the numbers up to the log's end as JSON")
    how.add_argument("--prometheus", action="store_true", help="the same as Prometheus text, for scrapers")
    how.add_argument(
        "--print", action="store_true", help="print the screen at the log's end, though this is a terminal"
    )
    parser.add_argument("--size", metavar="WxH", help="of a printed screen (default: COLUMNS and LINES, or 80x24)")


def main(args: argparse.Namespace) -> int:
    size = parse_size(args.size, SMALLEST) if args.size else None
    if (args.file is None) == (args.run is None):
        raise ValueError("one of FILE and --run COMMAND is needed: a log to follow, or a command to start")
    live = is_terminal() and not (args.once or args.prometheus or args.print or size)
    if args.run is not None:
        return _watch(args, size, live)
    if live:
        play(Live(args.file))
    else:
        _report(args, args.file, size)
    return 0


def _watch(args: argparse.Namespace, size: Size | None, live: bool) -> int:
    """The command of `--run`. The exit status is the command's, or 0 where the viewer stopped it."""
    _check_run(args.run)
    with _started(args.run) as command:
        if live:
            play(Live(command.log, command))
            if command.process.poll() is None:  # the viewer quit first: the command ends with this block
                print(f"{args.run[0]} was not at its end, and is stopped", file=sys.stderr)
                return 0
        status = command.process.wait()
        if live or status:  # now that the screen is free
            sys.stderr.write(command.printed())
        if not (live or status):
            _report(args, command.log, size)
    return status


class Live(Viewer):
    """The screen of a log that grows. It has one position, the end of the log, and can pause."""

    num_positions = 1
    actions: ClassVar = {key: Viewer.actions[key] for key in " +=-"}

    def __init__(self, path: Path, command: Command | None = None) -> None:
        super().__init__(speed=4)
        self.playing = True
        self.monitor = Monitor()
        self._follower = Follower(path)
        self._command = command
        self._meter = GPUMeter()
        self._behind = False
        self.tick()

    def tick(self) -> None:
        """Read on. A file that is missing may still be made. Raises ValueError for a file that is no log."""
        events = self._follower.poll(MAX_BYTES)
        if self._follower.restarted:
            self.monitor = Monitor()
        _take(self.monitor, events, self._follower.path)
        self._behind = self._follower.num_bytes >= MAX_BYTES

    def draw(self, width: int, height: int) -> Text:
        gpu = self._meter.read() or self._meter.why_not
        status, why = self._status()
        keys = why if self.monitor.opened and why else KEYS
        status = status if self.monitor.opened or not why else f"{status}: {why}"
        return screen(self.monitor, width, height, gpu=gpu, status=status, keys=keys)

    def _status(self) -> tuple[str, str]:
        """What the run does, and for a command that failed what its last line says."""
        if self._command is not None and (status := self._command.process.poll()) is not None:
            return (f"ended with status {status}", self._command.last_line()) if status else ("ended", "")
        if not self.playing:
            return "paused", ""
        if self._command is not None:
            return "running", ""
        if not self._follower.exists:
            return f"waiting for {self._follower.path}", ""
        if self._behind:
            return "catching up", ""
        name, monitor = self._follower.path.name, self.monitor
        all_finished = f"all {plural(monitor.finished, 'sequence')} of {name} finished"
        return all_finished if monitor.all_finished else f"following {name}", ""


# --- once --------------------------------------------------------------------------------------------------


def _report(args: argparse.Namespace, path: Path, size: Size | None) -> None:
    """The log up to its end, as the options ask: JSON, Prometheus text or a screen. Raises ValueError for no log."""
    follower, monitor = Follower(path), Monitor()
    _take(monitor, follower.to_the_end(), path)
    meter = GPUMeter()
    gpu: GPUReading | None = meter.read()
    if args.once:
        json.dump(as_json(monitor, gpu, complete=not follower.in_partial_line), sys.stdout, indent=1)
        print()
    elif args.prometheus:
        print(as_prometheus(monitor, gpu), end="")
    else:
        status = "log cut off" if follower.in_partial_line else f"the end of {path.name}"
        shown = partial(screen, monitor, gpu=gpu or meter.why_not, status=status)
        print_frames(lambda _, width, height: shown(width, height), [0], size, SMALLEST)


def _take(monitor: Monitor, events: Iterable[Event], path: Path) -> None:
    for event in events:
        try:
            monitor.take(event)
        except ValueError as error:
            raise ValueError(f"{path}, {error}") from None


# --- a command of its own ----------------------------------------------------------------------------------


class Command(NamedTuple):
    """A command under way."""

    process: subprocess.Popen[str]
    log: Path
    output: TextIO  # what the command prints

    def printed(self) -> str:
        """All that the command printed; for a command that has ended."""
        self.output.seek(0)
        return self.output.read()

    def last_line(self) -> str:
        return next((line for line in reversed(self.printed().splitlines()) if line.strip()), "")


def _check_run(argv: list[str]) -> None:
    if not argv or argv[0] not in RECORDING:
        raise ValueError(f"--run is {' '.join(argv)!r}; it begins with one of {', '.join(RECORDING)}")
    if any(argument.split("=")[0] == "--record" for argument in argv):
        raise ValueError("--run has --record of its own; start the command without monitor, and follow its FILE")


@contextmanager
def _started(argv: list[str]) -> Iterator[Command]:
    """Start the command, which records into a temporary file; end it with this block at the latest."""
    with tempfile.TemporaryDirectory(prefix="paged_ref_") as place:
        log, output = Path(place) / "run.jsonl", Path(place) / "output"
        command = [sys.executable, "-m", "paged_ref", *argv, "--record", str(log)]
        with output.open("w+", encoding="utf-8") as file:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, text=True, start_new_session=True
            )
            try:
                yield Command(process, log, file)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)  # its workers, too
                process.wait()

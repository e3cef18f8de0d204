"""`paged-ref viz`: the page table of a real run, step by step, forwards and backwards."""

from __future__ import annotations

import argparse
import gc
from dataclasses import replace
from pathlib import Path
from typing import get_args

from rich.text import Text

from ..extras.managers import MANAGERS, ManagerName
from ..extras.sampling_params import SamplingParams
from ..timeline.events import Event
from ..timeline.history import History, histories, read_histories
from ..timeline.marks import MARKS
from ..views.common import options
from ..views.common.console import Console
from ..views.common.files import recording
from ..views.common.loop import play
from ..views.common.printing import Size, is_terminal, parse_size, print_frames, write_svg
from ..views.viz.frames.screen import FRAMES, FRAMES_OF_PAGES, SMALLEST, Frame, frames_of, screen
from ..views.viz.player import Player, opening
from ..views.viz.scene import Scene
from ..views.viz.tour import SMALLEST_TOUR, Tour
from ..views.viz.viz_page import write_page
from ..views.viz.viz_run import PAPER, Workload, record, workload

MAX_TOKENS = 12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("logs", nargs="*", type=Path, metavar="FILE", help="replay logs that --record wrote")
    show = parser.add_argument_group("what to show")
    show.add_argument("--tour", action="store_true", help="a minute's tour: the same requests under each manager")
    names = ", ".join(f"{i} {frame.name}" for i, frame in enumerate(FRAMES, start=1))
    pages = ", ".join(f"{i} {frame.name}" for i, frame in enumerate(FRAMES_OF_PAGES, start=1))
    show.add_argument("--frame", default="1", metavar="K", help=f"{names}; of a log of `long`: {pages} (default 1)")
    letters = ", ".join(f"{mark} {what}" for mark, what in MARKS.items())
    show.add_argument(
        "--at", metavar="EVENT", help=f"begin at this event (without a terminal: only this one), or the first {letters}"
    )
    options.integer(show, "--every", None, "without a terminal: a frame for every N events, not steps")
    options.printed(show)
    options.svg_output(show, "write the frame at --at (default: the last) as a picture")
    options.output(show, "--html", "write every event of every run as one page for a browser, which opens at --at")
    run = parser.add_argument_group("what to run, in place of the paper's example")
    run.add_argument("--model", metavar="DIR", help="Hugging Face directory (default: embedded)")
    run.add_argument("--prompt", action="append", metavar="TEXT", help="may be given several times")
    options.integer(run, "--n", None, "samples of each prompt; more than 1 draws at temperature 0.8", least=None)
    options.integer(run, "--max-tokens", None, f"new tokens of each sample (default {MAX_TOKENS})", least=None)
    options.seed(run, None, "the same seed draws the same tokens (default 0)")
    options.integer(run, "--block-size", None, "tokens in a block (default 4)", least=None)
    options.integer(run, "--blocks", None, "of the pool (default: 12, or too few for all prompts)")
    options.integer(run, "--host-blocks", None, "of host memory (default: as the pool; 0: recompute)", least=0)
    run.add_argument("--manager", choices=(*MANAGERS, "all"), default="all", help="default: all, to compare them")
    options.record_output(run, "write what happens as JSON lines, too")


def main(args: argparse.Namespace) -> int:
    if not args.logs:
        _frame(args.frame, FRAMES)  # nonsense is refused before the model runs
    if args.tour and (other := options.first_given(args, "at", "every", "svg", "html")):
        raise ValueError(f"{other} cannot be given with --tour, which shows moments of its own")
    size = parse_size(args.size, SMALLEST_TOUR if args.tour else SMALLEST) if args.size else None
    runs = _runs(args)
    if args.tour:
        return _tour(runs, args.print, size)
    frame = _frame(args.frame, frames_of(runs[0]))
    at = None if args.at is None else _position(args.at, runs[0])
    if args.html:
        with Console(stderr=True).status("drawing each event ..."):
            write_page(args.html, runs, frame, opening(runs[0]) if at is None else at, size)
    if args.svg:
        size = size or (100, 30)
        still = _still(runs, frame, len(runs[0]) - 1 if at is None else at, size)
        write_svg(args.svg, still, size, f"paged-ref viz: {frames_of(runs[0])[frame].name}")
    elif args.html:
        pass
    elif is_terminal() and not (args.print or args.every or size):
        gc.freeze()  # the events stay to the end: the collector need not walk them between two keys
        play(Player(runs, frame, opening(runs[0]) if at is None else at))
    else:
        _print(runs, frame, at, args.every, size)
    return 0


# --- what to show -----------------------------------------------------------------------------------------


def _frame(text: str, frames: tuple[Frame, ...]) -> int:
    for i, frame in enumerate(frames):
        if text in (str(i + 1), frame.name):
            return i
    known = ", ".join(f"{i} {frame.name}" for i, frame in enumerate(frames, start=1))
    raise ValueError(f"--frame is {text!r}; known are {known}")


def _position(text: str, run: History) -> int:
    """A place in the log: the number of an event, from 1, or the first one with this mark."""
    if text in MARKS:
        found = next((position for position, mark in run.marks if mark == text), None)
        if found is None:
            raise ValueError(f"--at is {text}, {MARKS[text]}; there is none in this run")
        return found
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:18]) <= len(run)):
        known = ", ".join(MARKS)
        raise ValueError(f"--at is {text!r}; this run has the events 1 to {len(run)}, and the marks {known}")
    return int(text) - 1


def _print(runs: list[History], frame: int, at: int | None, every: int | None, size: Size | None) -> None:
    """Frames one after another, for pipes: of each step, of every so many events, or of one event."""
    (first, *_) = runs
    if at is not None:
        positions = [at]
    elif every is not None:
        positions = [*range(0, len(first), every)]
    else:
        positions = list(first.step_positions) or [len(first) - 1]
    print_frames(lambda at, width, height: _still(runs, frame, at, (width, height)), positions, size, SMALLEST)


def _tour(runs: list[History], printed: bool, size: Size | None) -> int:
    tour = Tour(runs)
    if is_terminal() and not (printed or size):
        play(tour)
        return 0

    def draw(stop: int, width: int, height: int) -> Text:
        tour.go(stop)
        return tour.draw(width, height)

    print_frames(draw, range(tour.num_positions), size, SMALLEST_TOUR)
    return 0


def _still(runs: list[History], frame: int, at: int, size: Size) -> Text:
    """A frame without the hints about keys."""
    return screen(Scene(runs[0].moment(at), runs, hints=False), frame, *size)


# --- what to run ------------------------------------------------------------------------------------------


def _runs(args: argparse.Namespace) -> list[History]:
    """The runs of the logs, or of an engine here and now."""
    chosen = ("model", "prompt", "n", "max_tokens", "seed", "block_size", "blocks", "host_blocks", "record")
    if args.logs:
        if option := options.first_given(args, *chosen):
            raise ValueError(f"{option} is for a new run; {args.logs[0]} is a log of one that was")
        return [run for path in args.logs for run in read_histories(path)]
    options.check_text("--prompt", args.prompt or ())
    work = _workload(args)
    names: list[ManagerName] = list(get_args(ManagerName)) if args.manager == "all" else [args.manager]
    events: list[Event] = []
    with recording(args.record) as log, Console(stderr=True).status("running the model ..."):
        for name in names:
            events += record(work, name)
        if log:
            for event in events:
                log(event)
    return histories(events)


def _workload(args: argparse.Namespace) -> Workload:
    sizes = dict(model=args.model, block_size=args.block_size, num_blocks=args.blocks, num_host_blocks=args.host_blocks)
    given = {name: value for name, value in sizes.items() if value is not None}
    n = 1 if args.n is None else args.n
    params = SamplingParams(
        max_tokens=MAX_TOKENS if args.max_tokens is None else args.max_tokens,
        n=n,
        temperature=0.8 if n > 1 else 0.0,
        seed=args.seed or 0,
    )
    if not args.prompt and params == SamplingParams(max_tokens=MAX_TOKENS, seed=0):
        return replace(PAPER, **given)  # the paper's requests in another memory, or on another model
    return workload(args.prompt or [prompt for _, prompt, _ in PAPER.arrivals], params, **given)

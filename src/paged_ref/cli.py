"""The command line: finds the module of a command, runs it, and turns errors into sentences."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Sequence

# command -> (module with add_arguments(parser) and main(args) -> exit status, help)
COMMANDS = {
    "demo": ("paged_ref.commands.demo", "the same prompts with standard and with paged memory, compared"),
    "generate": ("paged_ref.commands.generate", "continue prompts, streaming the text"),
    "viz": ("paged_ref.commands.viz", "the page table of a real run, step by step, forwards and backwards"),
    "walk": ("paged_ref.views.walk.walk", "inside the kernel: which thread reads which slot, access by access"),
    "assess": ("paged_ref.commands.assess", "what paging would buy: a model on a GPU in numbers, and the settings"),
    "train": ("paged_ref.commands.train", "a tokenizer and a small Llama from a text file"),
    "monitor": ("paged_ref.views.monitor.monitor", "a run while it runs: memory, sequences, speed; JSON, Prometheus"),
    "long": ("paged_ref.commands.long", "a context longer than the device: exactly, or the pages that matter"),
    "info": ("paged_ref.commands.info", "device, attention backends, versions"),
    "lesson": ("paged_ref.lesson.command", "the guided course: lessons that run, ask, measure and check"),
    "compare": ("paged_ref.commands.compare", "what paging would buy: standard, swapping and paged on real traffic"),
    "paper": ("paged_ref.commands.paper", "the figures of the PagedAttention paper, measured here, beside its numbers"),
    "bench": ("paged_ref.bench", "benchmarks: kernels, sass, engine, model, memory, simulate, training, long"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Exit status: 0 done, 1 the command's own finding, or a fault of the program, 2 bad input, or a
    file or stream that fails, 130 interrupted."""
    try:
        from .views.common import interrupts, streams  # here, so that an interrupt is one line from now on

        with interrupts.ends_in_time(), streams.standard_streams():
            return _with_sentences(list(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt:
        _say("interrupted")
        return 130
    except OSError as error:
        if error.filename is None:
            raise
        return _fail(error)  # one of the streams is closed


def _with_sentences(argv: list[str]) -> int:
    """Run the command; every error that is known becomes one sentence."""
    from .views.common import streams

    try:
        try:
            return _run(argv)
        finally:
            sys.stdout.flush()
    except ValueError as error:
        return _fail(error)
    except BrokenPipeError:  # the program that reads the output has ended, as `| head` does
        streams.give_up(sys.stdout)
        return 0
    except OSError as error:
        if error.filename is None:
            return _fault()
        if error.filename == streams.OUTPUT:
            streams.give_up(sys.stdout)
        return _fail(error)
    except Exception:
        return _fault()


def _fail(error: ValueError | OSError) -> int:
    """One sentence about what is outside of the program."""
    from .extras.plain_text import plain

    words = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)
    _say(f"error: {plain(words)}")
    return 2


def _fault() -> int:
    """An error that is not known: its traceback, and what to do with it."""
    _say("this is a fault of the program; please report it with the lines above", traceback.format_exc())
    return 1


def _say(sentence: str, before: str = "") -> None:
    """A line of our own on standard error, where it goes nowhere if that stream is closed or fails, too."""
    from .views.common.streams import give_up

    if sys.stderr is None:
        return
    try:
        print(f"{before}paged-ref: {sentence}", file=sys.stderr, flush=True)
    except OSError:
        give_up(sys.stderr)


def _run(argv: list[str]) -> int:
    from .views.common.options import Parser, integer, subcommands

    parser = Parser(prog="paged-ref", description="PagedAttention to read, run, single-step and import.")
    integer(parser, "--threads", help="that compute on a CPU (default: one for each core that this process may use)")
    subcommands(parser, "command", COMMANDS, "COMMAND")
    args = parser.parse_args(argv)
    if args.threads is not None:
        os.environ["NUMBA_NUM_THREADS"] = str(args.threads)  # read by tuned/threads.py and by Numba, which load later
    return int(importlib.import_module(COMMANDS[args.command][0]).main(args))


if __name__ == "__main__":
    sys.exit(main())

"""The command line: finds the module of a command, runs it, and turns errors into sentences."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING

from . import __version__

if TYPE_CHECKING:
    from .views.common.options import Parser

# What people want -> command -> (module with add_arguments(parser) and main(args) -> exit status, help, examples).
GROUPS: dict[str, dict[str, tuple[str, str, tuple[str, ...]]]] = {
    "See it": {
        "demo": (
            "paged_ref.commands.demo", "the same prompts with standard and with paged memory, compared",
            ("demo", "demo --block-size 8 --record runs.jsonl"),
        ),
        "lesson": (
            "paged_ref.lesson.command", "the guided course: lessons that run, ask, measure and check",
            ("lesson", "lesson 5", "lesson 5 --watch", "lesson --grade my_cache.py --json"),
        ),
        "viz": (
            "paged_ref.commands.viz", "the page table of a real run, step by step, forwards and backwards",
            ("viz", "viz --tour", "viz run.jsonl", "viz --at C --html run.html"),
        ),
        "walk": (
            "paged_ref.views.walk.walk", "inside the kernel: which thread reads which slot, access by access",
            ("walk", "walk --heads 4 --kv-heads 2", "walk --mine my_kernel.py", "walk --html walk.html"),
        ),
    },
    "Run it": {
        "generate": (
            "paged_ref.commands.generate", "continue prompts, streaming the text",
            ('generate --prompt "Once upon a time" --max-tokens 40',
             'generate --prompt "The cat" --temperature 0.8 --n 3 --seed 1 --record run.jsonl',
             'generate --model DIR --prompt "The cat" --beam-width 4',
             'generate --prompt "The cat" --tensor-parallel 2 --json -'),
        ),
        "monitor": (
            "paged_ref.views.monitor.monitor", "a run while it runs: memory, sequences, speed; JSON, Prometheus",
            ("monitor run.jsonl", "monitor run.jsonl --once"),
        ),
        "long": (
            "paged_ref.commands.long", "a context longer than the device: exactly, or the pages that matter",
            ("long --tokens 4096", "long --tokens 4096 --evict sliding"),
        ),
        "train": (
            "paged_ref.commands.train", "a tokenizer and a small Llama from a text file",
            ("train --text FILE --out DIR --steps 500", "train --text FILE --out DIR --memory page --budget 24MiB"),
        ),
    },
    "Decide": {
        "assess": (
            "paged_ref.commands.assess", "what paging would buy: a model on a GPU in numbers, and the settings",
            ("assess --model Llama-3-8B --gpu A100-80GB",
             "assess --model Llama-3-8B --gpu A100-80GB --tpot 0.05 --html report.html"),
        ),
        "compare": (
            "paged_ref.commands.compare", "what paging would buy: standard, swapping and paged on real traffic",
            ("compare", "compare --model Llama-3-8B --gpu A100-80GB --trace sharegpt --ttft 1"),
        ),
        "paper": (
            "paged_ref.commands.paper", "the figures of the PagedAttention paper, measured here, beside its numbers",
            ("paper", "paper 2 12"),
        ),
    },
    "Measure": {
        "bench": (
            "paged_ref.bench", "benchmarks: kernels, engine, memory, training and more",
            ("bench kernels", "bench memory --help"),
        ),
        "info": ("paged_ref.commands.info", "device, attention backends, versions", ("info",)),
    },
}  # fmt: skip
COMMANDS = {name: command for commands in GROUPS.values() for name, command in commands.items()}


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
    from .views.common.options import as_typed

    parser = _parser()
    if "_ARGCOMPLETE" in os.environ:  # a shell asks for completions: see `completion` in pyproject.toml
        import argcomplete

        argcomplete.autocomplete(parser)
    args = parser.parse_args(argv, argparse.Namespace(command_line=argv))
    if args.threads is not None:
        os.environ["NUMBA_NUM_THREADS"] = str(args.threads)  # read by tuned/threads.py and by Numba, which load later
    try:
        return int(importlib.import_module(COMMANDS[args.command][0]).main(args))
    except ValueError as error:
        raise ValueError(as_typed(error, args)) from error


def _parser() -> Parser:
    """The command line. Its help has the commands by what people want."""
    from .views.common.options import Parser, integer, subcommands

    described = ["PagedAttention to read, run, single-step and import."]
    for title, commands in GROUPS.items():
        described += ["", f"{title}:", *(f"  {name:<9} {command[1]}" for name, command in commands.items())]
    parser = Parser(
        prog="paged-ref", usage="%(prog)s [--help] [--threads N] COMMAND ...", description="\n".join(described),
        epilog="paged-ref COMMAND --help has the options of a command, and examples.",
    )  # fmt: skip
    integer(parser, "--threads", help="threads for the CPU (default: one for each core)")
    parser.add_argument("--version", action="version", version=f"paged_ref {__version__}", help="print the version")
    subcommands(parser, "command", COMMANDS, "COMMAND", listed=False)
    return parser


if __name__ == "__main__":
    sys.exit(main())

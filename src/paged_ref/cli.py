"""The command line. Each command lives in its own module; this one finds it and turns errors into words."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

# command -> (module with add_arguments(parser) and main(args) -> exit status, help)
COMMANDS = {
    "demo": ("paged_ref.commands.demo", "the same prompts with standard and with paged memory, compared"),
    "generate": ("paged_ref.commands.generate", "continue prompts, streaming the text"),
    "viz": ("paged_ref.commands.viz", "the page table of a real run, step by step, forwards and backwards"),
    "walk": ("paged_ref.views.walk.walk", "inside the kernel: which thread reads which slot, access by access"),
    "assess": ("paged_ref.commands.assess", "what paging would buy: a model on a GPU in numbers, and the settings"),
    "train": ("paged_ref.commands.train", "a tokenizer and a small Llama from a text file"),
    "monitor": (
        "paged_ref.views.monitor.monitor",
        "a run as it goes: memory, sequences, speed; JSON, Prometheus",
    ),
    "long": ("paged_ref.commands.long", "a context longer than the device: exactly, or the pages that matter"),
    "info": ("paged_ref.commands.info", "device, attention backends, versions"),
    "lesson": ("paged_ref.lesson.command", "the guided course: lessons that run, ask, measure and check"),
    "compare": ("paged_ref.commands.compare", "what paging would buy: standard, swapping and paged on real traffic"),
    "paper": ("paged_ref.commands.paper", "the figures of the PagedAttention paper, measured here, beside its numbers"),
    "bench": ("paged_ref.bench", "benchmarks: kernels, sass, engine, model, memory, simulate, training, long"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Exit status: 0 done, 1 the command's own finding, 2 bad input, 130 interrupted."""
    try:
        return _run(list(sys.argv[1:] if argv is None else argv))
    except ValueError as error:
        print(f"paged-ref: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("paged-ref: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader left, as `| head` does; nobody is there to be told
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.filename is None:
            raise
        print(f"paged-ref: error: {error.filename}: {error.strerror}", file=sys.stderr)  # such as --json FILE
        return 2


def _run(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="paged-ref", description="PagedAttention to read, run, single-step and import."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        if argv[:1] == [name]:  # only the command that runs is imported, so that --help stays quick
            importlib.import_module(module).add_arguments(command)
    args = parser.parse_args(argv)
    return int(importlib.import_module(COMMANDS[args.command][0]).main(args))


if __name__ == "__main__":
    sys.exit(main())

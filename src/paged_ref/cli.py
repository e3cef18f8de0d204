"""The command line: finds the module of a command, runs it, and turns errors into sentences."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from .views.common.options import integer, subcommands

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
    """Run one command. Exit status: 0 done, 1 the command's own finding, 2 bad input, 130 interrupted."""
    try:
        return _run(list(sys.argv[1:] if argv is None else argv))
    except ValueError as error:
        print(f"paged-ref: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("paged-ref: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the program that reads the output has ended, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.filename is None:
            raise
        print(f"paged-ref: error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2


def _run(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="paged-ref", description="PagedAttention to read, run, single-step and import."
    )
    integer(parser, "--threads", help="that compute on a CPU (default: one for each core that this process may use)")
    subcommands(parser, "command", COMMANDS, "COMMAND")
    args = parser.parse_args(argv)
    if args.threads is not None:
        os.environ["NUMBA_NUM_THREADS"] = str(args.threads)  # read by tuned/threads.py and by Numba, which load later
    return int(importlib.import_module(COMMANDS[args.command][0]).main(args))


if __name__ == "__main__":
    sys.exit(main())

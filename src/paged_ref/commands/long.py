"""`paged-ref long`: a context longer than the device, exactly and with budgets, beside a run that holds all of it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from ..beyond_device.kv import StreamedKV
from ..beyond_device.relevance import Attend, check_attend
from ..beyond_device.streaming import EVICTIONS
from ..core.model.config import ModelConfig
from ..interop.checkpoints import load
from ..interop.model_memory import require_kv_memory
from ..kernels import why_not
from ..llm import LLM
from ..timeline.events import Event, Log
from ..views.common import options
from ..views.common.console import Console
from ..views.common.files import recording
from ..views.common.program import program
from ..views.common.versions import describe_device
from .long_recall import print_recall, recall
from .long_run import OBSERVED, LongRun
from .long_text import text_of

ATTENDS: tuple[Attend, ...] = ("all", 0.1, 0.25)
UNUSED_BY_RECALL = ("device_blocks", "host_blocks", "attend", "evict", "full_layers", "watch", "record")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.model(parser)
    options.integer(parser, "--tokens", 2048, "of text before the new ones", least=2)
    options.integer(parser, "--new-tokens", 32, f"that are timed; with {OBSERVED} more, they are compared")
    parser.add_argument("--text", type=Path, metavar="FILE", help="the text (default: the model writes one itself)")
    options.integer(parser, "--device-blocks", help="default: a tenth of what the text needs", metavar="B")
    options.integer(parser, "--host-blocks", help="default: what the text needs", least=0, metavar="B")
    options.block_size(parser, least=1)
    parser.add_argument(
        "--attend", action="append", metavar="WHAT", type=_attend,
        help="all, a number of blocks, or a share such as 0.1; may be given several times (default: all, 0.1, 0.25)",
    )  # fmt: skip
    parser.add_argument(
        "--evict", choices=EVICTIONS, help="which pages are evicted first (default: lru; with a budget: relevance)"
    )
    options.integer(
        parser, "--full-layers", help="first layers that attend to all (default: 1 in 16, at least 1)", least=0
    )
    options.backend(parser)
    options.seed(parser, help="of the text that the model writes", least=0)
    parser.add_argument("--recall", action="store_true", help="instead: the share of attention that each choice covers")
    parser.add_argument(
        "--watch", metavar="LAYER:HEAD", help="log the attention of this query head, for `paged-ref viz` (default 1:0)"
    )
    options.record_output(parser, "write what happens in the last run as JSON lines")


def main(args: argparse.Namespace) -> int:
    watch = _checked(args)  # before the text, which takes a while
    console = Console(soft_wrap=True)
    with Console(stderr=True).status("reading, or writing, the text ..."):
        ids = text_of(args.model, args.text, args.tokens, args.seed)
    if args.recall:
        with Console(stderr=True).status("running the model ..."):
            found = recall(args.model, ids, args.new_tokens, args.block_size, args.seed)
        print_recall(console, found, Path(args.model).name, args.tokens, args.new_tokens, args.block_size)
        return 0
    needed = -(-_length(args) // args.block_size)
    device_blocks = max(1, needed // 10) if args.device_blocks is None else args.device_blocks
    with recording(args.record) as log, Console(stderr=True).status("running the model ..."):
        runs = _runs(args, ids, device_blocks, needed, watch, log)
    _show(console, args, runs, device_blocks, needed)
    return 0


def _checked(args: argparse.Namespace) -> tuple[int, int] | None:
    """The head to watch, if any. Raises ValueError for options that do not fit this machine, or each other."""
    if args.backend != "auto" and (reason := why_not(args.backend)) is not None:
        raise ValueError(f"--backend is {args.backend!r}, which does not work on this machine: {reason}")
    if args.recall and (option := options.first_given(args, *UNUSED_BY_RECALL)):
        raise ValueError(f"{option} is given with --recall, which has no use for it")
    config = load(args.model).config
    watch = _watch(args.watch, config) if args.watch or args.record else None
    if args.watch and not args.record:
        raise ValueError(f"--watch is {args.watch}; --record FILE is needed, the log for `{program()} viz`")
    for asked in (("--tokens", args.tokens), ("--new-tokens", args.new_tokens), ("--block-size", args.block_size)):
        require_kv_memory(config, "float32", "float32", asked)
    blocks = ("--device-blocks", args.device_blocks or 0), ("--host-blocks", args.host_blocks or 0)
    require_kv_memory(config, "float32", "float32", *blocks, unit=args.block_size)
    return watch


def _length(args: argparse.Namespace) -> int:
    """Tokens of a whole run."""
    return int(args.tokens + args.new_tokens + OBSERVED)


def _runs(
    args: argparse.Namespace, ids: Sequence[int], device_blocks: int, needed: int, watch: tuple[int, int] | None,
    log: Log | None,
) -> list[LongRun]:  # fmt: skip
    """First the run with all `needed` blocks on the device, then one for each --attend; the last of them is logged."""
    common: dict[str, Any] = {
        "block_size": args.block_size, "max_model_len": _length(args), "beyond_context": True, "backend": args.backend,
    }  # fmt: skip
    exact = LongRun("resident", LLM(args.model, kv_cache_tokens=needed * args.block_size, **common))
    exact.go(ids, args.new_tokens)
    runs = [exact]
    attends: Sequence[Attend] = args.attend or ATTENDS
    host_blocks = needed if args.host_blocks is None else args.host_blocks
    events: list[Event] = []  # written at the end: a run's times are without the file
    for i, attend in enumerate(attends, start=1):
        llm = LLM(
            args.model, device_blocks=device_blocks, host_blocks=host_blocks, attend=attend, evict=args.evict,
            full_layers=args.full_layers, log=events.append if log and i == len(attends) else None, **common,
        )  # fmt: skip
        if watch:
            assert isinstance(llm.engine.kv, StreamedKV)
            llm.engine.kv.watch = watch
        runs.append(LongRun(str(attend), llm))
        runs[-1].go(ids, args.new_tokens, exact)
    if log:
        for event in events:
            log(event)
    return runs


def _show(console: Console, args: argparse.Namespace, runs: Sequence[LongRun], device_blocks: int, needed: int) -> None:
    title = (
        f"{args.tokens} tokens of text, then {args.new_tokens} new ones, timed, and {OBSERVED} more, observed: "
        f"all {args.new_tokens + OBSERVED} are compared\n"
        f"{describe_device()}; {device_blocks} of the {needed} blocks of {args.block_size} tokens are on the device"
    )
    table = Table(box=box.SIMPLE_HEAD, title=title)
    table.add_column("attend")  # a narrow terminal breaks these words, not the numbers
    for run in runs:
        table.add_column(run.name, justify="right", no_wrap=True)

    figures = [_figures(run, runs[0], args.new_tokens) for run in runs]
    for label in figures[0]:
        table.add_row(label, *(each[label] for each in figures))
    console.print(table, soft_wrap=False)
    console.print(_about_context(runs[0].llm.config.max_position_embeddings, _length(args)), soft_wrap=False)


def _figures(run: LongRun, exact: LongRun, new_tokens: int) -> dict[str, str]:
    same, difference = run.agreement(exact)
    return {
        "device memory, KiB": f"{run.device_bytes / 1024:,.0f}",
        "from the host, KiB/token": f"{run.counters.bytes_in / new_tokens / 1024:,.1f}",
        "to the host, KiB/token": f"{run.counters.bytes_out / new_tokens / 1024:,.1f}",
        "pages found on the device": f"{run.counters.hit_rate if run is not exact else 1:.1%}",
        "ms/token": f"{run.seconds * 1000:.1f}",
        "attention mass covered": f"{np.mean(run.covered or [1]):.1%}",
        "tokens agree": f"{same:.1%}",
        "logits differ at most by": f"{difference:.2g}",
    }


def _about_context(context: int, length: int) -> str:
    """What the numbers say about a model that was trained for `context` tokens, and what they do not say."""
    if length <= context:
        return f"The model was trained for {context} tokens; all of this lies within."
    return (
        f"The model was trained for {context} tokens and has {length} here: what it says beyond {context} is not "
        "to be taken for language. Measured is whether the same model, with less memory, says the same."
    )


def _attend(text: str) -> Attend:
    """The value of --attend. What is not allowed is refused in the words of the engine."""
    attend: Attend = text
    for kind in (float, int):
        with suppress(ValueError):
            attend = kind(text)
    try:
        check_attend(attend)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("attend is ")) from None
    return attend


def _watch(text: str | None, config: ModelConfig) -> tuple[int, int]:
    """(layer, query head) that --watch says; without it, the first head of the first layer that chooses."""
    layer, _, head = (text or f"{min(1, config.num_layers - 1)}:0").partition(":")
    if not (layer.isascii() and layer.isdigit() and head.isascii() and head.isdigit()):
        raise ValueError(f"--watch is {text!r}; LAYER:HEAD is needed, such as 1:0")
    if int(layer) >= config.num_layers or int(head) >= config.num_heads:
        raise ValueError(
            f"--watch is {text}; the model has layers 0 to {config.num_layers - 1} and query heads 0 to "
            f"{config.num_heads - 1}"
        )
    return int(layer), int(head)

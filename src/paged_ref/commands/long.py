"""`paged-ref long`: a context longer than the device, exactly and with a budget, beside the run that holds it all."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from ..beyond_device.kv import Counters, StreamedKV
from ..beyond_device.observation import Observation
from ..beyond_device.relevance import Attend, check_attend
from ..beyond_device.streaming import EVICTIONS
from ..core.device import describe
from ..core.engine.sampling import SamplingParams
from ..core.memory.kv import KVCache
from ..core.model.config import ModelConfig
from ..core.model.loading import load
from ..kernels import why_not
from ..llm import LLM
from ..timeline.events import write_events
from .long_recall import BUDGETS, CHOICES, recall
from .long_text import text_of
from .recording import record_to

OBSERVED = 8  # tokens more, at the end of each run, of which the true attention is looked at: this is not timed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="tiny", metavar="DIR", help="Hugging Face directory (default: embedded)")
    parser.add_argument("--tokens", type=int, default=2048, metavar="N", help="of text before the new ones (2048)")
    parser.add_argument("--new-tokens", type=int, default=32, metavar="N", help="that are timed and compared (32)")
    parser.add_argument("--text", type=Path, metavar="FILE", help="the text (default: the model writes one itself)")
    parser.add_argument("--device-blocks", type=int, metavar="B", help="default: a tenth of what the text needs")
    parser.add_argument("--host-blocks", type=int, metavar="B", help="default: what the text needs")
    parser.add_argument("--block-size", type=int, default=16, metavar="N", help="tokens in a block (default 16)")
    parser.add_argument(
        "--attend", action="append", metavar="WHAT", type=_attend,
        help="all, a number of blocks, or a share such as 0.1; may be given several times (default: all, 0.1, 0.25)",
    )  # fmt: skip
    parser.add_argument("--evict", choices=EVICTIONS, help="who leaves first (default: lru; with a budget: relevance)")
    parser.add_argument(
        "--full-layers", type=int, metavar="N", help="first layers that attend to all (default: 1 in 16, at least 1)"
    )
    parser.add_argument("--backend", default="auto", metavar="NAME", help="attention backend (see paged-ref info)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the text that the model writes")
    parser.add_argument("--recall", action="store_true", help="instead: what share of attention each choice catches")
    parser.add_argument(
        "--watch", metavar="LAYER:HEAD", help="log the attention of this query head, for `paged-ref viz` (default 1:0)"
    )
    parser.add_argument("--record", type=Path, metavar="FILE", help="write what happens in the last run as JSON lines")


def main(args: argparse.Namespace) -> int:
    bounds = {"tokens": 2, "new_tokens": 1, "block_size": 1, "seed": 0}
    bounds |= {"device_blocks": 1, "host_blocks": 0, "full_layers": 0}
    for name, least in bounds.items():  # before the text, which takes a while
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; at least {least} is needed")
    if args.backend != "auto" and (reason := why_not(args.backend)) is not None:
        raise ValueError(f"--backend is {args.backend!r}, which does not work on this machine: {reason}")
    if args.recall:
        for name in ("device_blocks", "host_blocks", "attend", "evict", "full_layers", "watch", "record"):
            if getattr(args, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')} is given with --recall, which has no use for it")
    watch = _watch(args.watch, load(args.model).config) if args.watch or args.record else None
    if args.watch and not args.record:
        raise ValueError(f"--watch is {args.watch}; --record FILE is needed, the log for `paged-ref viz`")
    console = Console(soft_wrap=True)
    with Console(stderr=True).status("reading, or writing, the text ..."):
        ids = text_of(args.model, args.text, args.tokens, args.seed)
    if args.recall:
        return _recall(console, args, ids)
    attends: list[Attend] = args.attend or ["all", 0.1, 0.25]
    needed = -(-(args.tokens + args.new_tokens + OBSERVED) // args.block_size)
    device_blocks = max(1, needed // 10) if args.device_blocks is None else args.device_blocks
    host_blocks = needed if args.host_blocks is None else args.host_blocks
    with record_to(args.record) as file, Console(stderr=True).status("running the model ..."):
        total = args.tokens + args.new_tokens + OBSERVED
        common = {
            "block_size": args.block_size, "max_model_len": total, "beyond_context": True, "backend": args.backend,
        }  # fmt: skip
        exact = Run("resident", _llm(args.model, {**common, "kv_cache_tokens": needed * args.block_size}))
        exact.go(ids, args.new_tokens, None)
        runs = [exact]
        for i, attend in enumerate(attends):
            events: list[Any] = []
            options = {
                **common, "device_blocks": device_blocks, "host_blocks": host_blocks, "attend": attend,
                "evict": args.evict, "full_layers": args.full_layers,
                "log": events.append if file and i + 1 == len(attends) else None,
            }  # fmt: skip
            run = Run(str(attend), _llm(args.model, options))
            if watch:
                assert isinstance(run.llm.engine.kv, StreamedKV)
                run.llm.engine.kv.watch = watch
            run.go(ids, args.new_tokens, exact)
            runs.append(run)
            if file:
                write_events(events, file)
    _show(console, args, exact.llm, runs, device_blocks, needed)
    return 0


def _llm(model: str, options: dict[str, Any]) -> LLM:
    return LLM(model, **options)


@dataclass
class Run:
    """One way to run over the text, and what is measured."""

    name: str
    llm: LLM
    rows: list[np.ndarray] = field(default_factory=list)  # the logits of each new token
    tokens: list[int] = field(
        default_factory=list
    )  # the likeliest after the text, and after each token of the exact run
    times: list[float] = field(default_factory=list)
    caught: list[float] = field(default_factory=list)  # shares of attention mass
    counters: Counters = field(default_factory=Counters)  # of the timed tokens
    device_bytes: int = 0

    def go(self, ids: Sequence[int], new_tokens: int, exact: Run | None) -> None:
        """Continue the text greedily; with `exact`, with the tokens of that run, so that each is asked the same."""
        kv = self.llm.engine.kv

        def hook(tokens: Sequence[int], logits: np.ndarray) -> np.ndarray:
            self.times.append(perf_counter())
            n = len(self.rows)
            self.rows.append(logits.copy())
            self.tokens.append(int(logits.argmax()))
            if isinstance(kv, StreamedKV):
                if n == 0:
                    kv.counters = Counters()  # the text is read; now the new tokens count
                elif n == new_tokens:
                    self.counters = replace(kv.counters)  # as they are now: more tokens follow
                    self.device_bytes = kv.device_bytes
                    kv.observe = self._see
            if exact is not None:
                logits[exact.tokens[n]] = np.inf
            return logits

        params = SamplingParams(max_tokens=new_tokens + OBSERVED, ignore_eos=True, logits_hook=hook)
        self.llm.generate([list(ids)], params)
        if isinstance(kv, KVCache):
            self.device_bytes = int(kv.device.nbytes)
        del self.times[new_tokens + 1 :]

    def _see(self, seen: Observation) -> None:
        for mass, blocks in zip(seen.mass, seen.chosen, strict=True):
            self.caught.append(float(mass[:, blocks].sum(axis=-1).mean()))

    @property
    def seconds(self) -> float:
        return median(np.diff(self.times).tolist())

    def agreement(self, exact: Run) -> tuple[float, float]:
        """The share of tokens that are the same, and the largest difference of a logit."""
        same = float(np.mean(np.array(self.tokens) == np.array(exact.tokens)))
        return same, max(float(np.abs(a - b).max()) for a, b in zip(self.rows, exact.rows, strict=True))


def _show(
    console: Console, args: argparse.Namespace, llm: LLM, runs: Sequence[Run], device_blocks: int, needed: int
) -> None:
    exact = runs[0]
    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"{args.tokens} tokens of text, then {args.new_tokens} new ones; {describe()}\n"
        f"device: {device_blocks} of the {needed} blocks of {args.block_size} tokens that all of it needs",
    )
    table.add_column("attend")  # narrow terminals break these words, not the numbers
    for run in runs:
        table.add_column(run.name, justify="right", no_wrap=True)
    lines: list[tuple[str, list[str]]] = [
        ("device memory, KiB", [f"{run.device_bytes / 1024:,.0f}" for run in runs]),
        ("from the host, KiB/token", [_kib(run.counters.bytes_in, args.new_tokens) for run in runs]),
        ("to the host, KiB/token", [_kib(run.counters.bytes_out, args.new_tokens) for run in runs]),
        ("pages found on the device", [_percent(run.counters.hit_rate if run is not exact else 1) for run in runs]),
        ("ms/token", [f"{run.seconds * 1000:.1f}" for run in runs]),
        ("attention mass covered", [_percent(float(np.mean(run.caught or [1]))) for run in runs]),
        ("tokens agree", [_percent(run.agreement(exact)[0]) for run in runs]),
        ("logits differ at most by", [f"{run.agreement(exact)[1]:.2g}" for run in runs]),
    ]
    for name, values in lines:
        table.add_row(name, *values)
    console.print(table)
    console.print(_about_context(llm, args.tokens + args.new_tokens + OBSERVED))


def _about_context(llm: LLM, length: int) -> str:
    """What these numbers say of the model, and what they do not."""
    context = llm.config.max_position_embeddings
    if length <= context:
        return f"The model was trained for {context} tokens; all of this lies within."
    return (
        f"The model was trained for {context} tokens and has {length} here: what it says beyond {context} is not\n"
        "to be taken for language. Measured is whether the same model, with less memory, says the same."
    )


def _percent(share: float) -> str:
    return f"{share:.1%}"


def _kib(num_bytes: int, tokens: int) -> str:
    return f"{num_bytes / tokens / 1024:,.1f}"


def _recall(console: Console, args: argparse.Namespace, ids: Sequence[int]) -> int:
    with Console(stderr=True).status("running the model ..."):
        found = recall(args.model, ids, args.new_tokens, args.block_size, args.seed)
    name = Path(args.model).name
    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"Share of attention mass in the chosen blocks: {name}, {args.tokens} tokens, blocks of "
        f"{args.block_size}\n(mean over {args.new_tokens} tokens, all heads, and the layers that choose)",
    )
    table.add_column("budget")
    for choice in CHOICES:
        table.add_column(choice, justify="right")
    for budget in BUDGETS:
        table.add_row(f"{budget:.0%}", *(f"{found[budget, choice]:.1%}" for choice in CHOICES))
    console.print(table)
    console.print(
        "oracle: the best blocks, seen from the scores themselves. recent: the last ones only.\n"
        "random and relevance always keep the first block and the last."
    )
    return 0


def _attend(text: str) -> Attend:
    """What --attend says; nonsense is refused with the words of the engine."""
    attend: Attend = text
    for kind in (float, int):
        try:
            attend = kind(text)
        except ValueError:
            continue
    try:
        check_attend(attend)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
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

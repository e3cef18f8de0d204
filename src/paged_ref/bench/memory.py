"""`paged-ref bench memory`: what the bookkeeping costs, on the CPU, with no model and no K or V.

The scheduler and a manager plan decode steps for a batch of sequences with contexts of mixed lengths. All
contenders take their turns step by step, and medians are compared: a busy neighbour slows all of them alike.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter

from rich import box
from rich.console import Console
from rich.table import Table

from ..core.device import describe
from ..core.engine.scheduler import Scheduler
from ..core.engine.sequence import Group
from ..core.engine.sequence import Sequence as TokenSequence
from ..core.memory.manager import KVCacheManager
from ..core.memory.paged import PagedManager
from ..core.memory.standard import StandardManager
from ..core.memory.swapping import SwappingManager
from ..extras.prefix_cache import block_digests
from ..timeline.events import Event

BLOCK_SIZE = 16
LONGEST = 2048  # tokens of context, when the steps begin

POOL_TOKENS = 16  # the same for the pools of different sizes: few enough for the smallest pool
POOL_STEPS = 32  # then all sequences end, and others begin


@dataclass(frozen=True)
class Result:
    """One row of the table. The target is an upper bound, where there is one."""

    name: str
    measured: float
    unit: str
    target: float | None = None

    @property
    def met(self) -> bool | None:
        return None if self.target is None else self.measured < self.target


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sequences", type=int, default=256, metavar="N", help="running at once (default 256)")
    parser.add_argument("--steps", type=int, default=256, metavar="N", help="timed steps of each contender")
    parser.add_argument(
        "--pools", type=int, nargs="+", default=[10**3, 10**4, 10**5, 10**6], metavar="BLOCKS",
        help="sizes of pool to compare (default 1000 to 1000000)",
    )  # fmt: skip
    parser.add_argument("--prompt-tokens", type=int, default=100_000, metavar="N", help="to admit (default 100000)")
    parser.add_argument("--rounds", type=int, default=25, metavar="N", help="times that the prompt is admitted")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results here")


def main(args: argparse.Namespace) -> int:
    for name in ("sequences", "steps", "prompt_tokens", "rounds"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name} is {getattr(args, name)}; at least 1 is needed")
    needed = args.sequences * (POOL_TOKENS + POOL_STEPS) // BLOCK_SIZE
    for num_blocks in args.pools:
        if num_blocks < needed:
            raise ValueError(f"pools has {num_blocks} blocks; {args.sequences} sequences need {needed}")
    results = [
        *scheduling(args.sequences, args.steps),
        *appending(args.sequences, args.steps, args.pools),
        *admission(args.prompt_tokens, args.rounds),
    ]
    table = Table(box=box.SIMPLE_HEAD, title=f"Bookkeeping of {args.sequences} running sequences, {describe()}")
    for column in ("", "measured", "target", "met"):
        table.add_column(column, justify="left" if not column else "right")
    for result in results:
        measured = f"{result.measured:.0f}" if result.measured >= 100 else f"{result.measured:.3g}"
        target = "" if result.target is None else f"< {result.target:g} {result.unit}"
        met = {True: "yes", False: "no", None: ""}[result.met]
        table.add_row(result.name, f"{measured} {result.unit}", target, met)
    Console().print(table)
    if args.json:
        rows = [{**asdict(result), "met": result.met} for result in results]
        args.json.write_text(json.dumps({"device": describe(), "results": rows}, indent=1) + "\n", encoding="utf-8")
    return 0


class Batch:
    """Sequences that run, each one token behind, as in decode."""

    def __init__(self, manager: KVCacheManager, lengths: Sequence[int], num_steps: int) -> None:
        """Room in `manager` is up to the caller: nobody may be preempted in the next `num_steps` steps."""
        self.manager = manager
        self.scheduler = Scheduler(manager, max_batch_tokens=sum(lengths), max_batch_seqs=len(lengths))
        self.groups = []
        for seq_id, length in enumerate(lengths):
            self.groups.append(Group([TokenSequence(seq_id, [0] * length, length, length + num_steps + 1)]))
            self.scheduler.add(self.groups[-1])
        self.step()  # the prompts

    def step(self) -> float:
        """Schedule one step, and let every sequence catch up and get a token. Seconds of the first."""
        began = perf_counter()
        plan = self.scheduler.schedule()
        seconds = perf_counter() - began
        if len(plan.chunks) < len(self.groups):
            raise RuntimeError(f"{len(plan.chunks)} of {len(self.groups)} sequences run; the pool is too small")
        for seq, num_tokens in plan.chunks:
            seq.num_computed += num_tokens
            seq.tokens.append(0)
        return seconds

    def end(self) -> None:
        for group in self.groups:
            self.scheduler.finish(group, group.leader)


def scheduling(num_seqs: int, num_steps: int) -> list[Result]:
    """A decode step of each manager, of the paged one with a log, and what looking on costs."""
    lengths = random.Random(0).choices(range(1, LONGEST + 1), k=num_seqs)
    most = LONGEST + num_steps + 1
    # Twice what is ever needed: regions move as they grow, and leave holes.
    num_slots = 2 * num_seqs * most
    num_blocks = num_slots // BLOCK_SIZE
    events: list[Event] = []
    managers: dict[str, KVCacheManager] = {
        "paged": PagedManager(num_blocks, BLOCK_SIZE),
        "standard": StandardManager(num_slots, most),
        "swapping": SwappingManager(num_slots),
        "recorded": PagedManager(num_blocks, BLOCK_SIZE, log=events.append),
    }
    batches = {name: Batch(manager, lengths, num_steps) for name, manager in managers.items()}
    seconds: dict[str, list[float]] = {name: [] for name in [*batches, "snapshot"]}
    for _ in range(num_steps):
        for name, batch in batches.items():
            seconds[name].append(batch.step())
        began = perf_counter()
        batches["paged"].manager.snapshot()
        seconds["snapshot"].append(perf_counter() - began)
    micros = {name: 1e6 * median(times) for name, times in seconds.items()}
    return [
        Result("scheduling step, paged", micros["paged"], "µs", target=400),
        Result("scheduling step, standard", micros["standard"], "µs"),
        Result("scheduling step, swapping", micros["swapping"], "µs"),
        Result("scheduling step, paged, events recorded", micros["recorded"], "µs"),
        Result("recording events, times as long", _ratio(seconds["recorded"], seconds["paged"]), "", target=1.3),
        Result("snapshot of the pool", micros["snapshot"], "µs"),
    ]


def appending(num_seqs: int, num_steps: int, pools: Sequence[int]) -> list[Result]:
    """The cost of each appended token, for pools of different sizes. Blocks lie shuffled, as after a long day."""
    managers = []
    for num_blocks in pools:
        order = list(range(num_blocks))
        random.Random(0).shuffle(order)
        managers.append(PagedManager(num_blocks, BLOCK_SIZE, free_order=order))
    lengths = random.Random(0).choices(range(1, POOL_TOKENS + 1), k=num_seqs)
    seconds: list[list[float]] = [[] for _ in pools]
    for _ in range(0, num_steps, POOL_STEPS):
        batches = [Batch(manager, lengths, POOL_STEPS) for manager in managers]
        for _ in range(POOL_STEPS - 1):
            for batch, times in zip(batches, seconds, strict=True):
                times.append(batch.step())
        for batch in batches:
            batch.end()
    results = [
        Result(f"appended token, pool of {num_blocks} blocks", 1e6 * median(times) / num_seqs, "µs")
        for num_blocks, times in zip(pools, seconds, strict=True)
    ]
    largest, smallest = seconds[pools.index(max(pools))], seconds[pools.index(min(pools))]
    return [*results, Result("  the largest pool, times the smallest", _ratio(largest, smallest), "", target=1.2)]


def admission(num_tokens: int, num_rounds: int) -> list[Result]:
    """A prompt whose blocks the prefix cache knows: digests of the tokens, the match, and the rest."""
    tokens = random.Random(0).choices(range(32_000), k=num_tokens)
    manager = PagedManager(num_tokens // BLOCK_SIZE + 1, BLOCK_SIZE, prefix_cache=True)
    assert manager.cache is not None
    manager.admit(0, tokens, num_tokens)
    manager.append([(0, num_tokens)])
    manager.commit(0, tokens, num_tokens)
    manager.free(0)
    parts: dict[str, list[float]] = {name: [] for name in ("admit", "digests", "match", "share")}
    for _ in range(num_rounds):
        marks = [perf_counter()]
        digests = list(block_digests(tokens, BLOCK_SIZE))
        marks.append(perf_counter())
        manager.cache.match(digests)
        marks.append(perf_counter())
        manager.admit(0, tokens, num_tokens)  # does both again, then shares the blocks
        marks.append(perf_counter())
        manager.free(0)
        digest, match, admit = (after - before for before, after in pairwise(marks))
        for times, took in zip(parts.values(), (admit, digest, match, admit - digest - match), strict=True):
            times.append(took)
    millis = {name: 1e3 * median(times) for name, times in parts.items()}
    return [
        Result(f"admitting a known prompt of {num_tokens} tokens", millis["admit"], "ms", target=20),
        Result("  of this, digests of its blocks", millis["digests"], "ms"),
        Result("  of this, match in the prefix cache", millis["match"], "ms"),
        Result("  of this, room and sharing", millis["share"], "ms"),
    ]


def _ratio(a: Iterable[float], b: Iterable[float]) -> float:
    """The median ratio of runs that took turns."""
    return median(x / y for x, y in zip(a, b, strict=True))

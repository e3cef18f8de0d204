"""`paged-ref bench memory`: what the bookkeeping costs, on the CPU, with no model and no K or V.

The scheduler and a manager plan decode steps for a batch of sequences with contexts of mixed lengths. All
contenders take turns step by step, and medians are compared. `WHAT` is printed with them.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from operator import sub
from statistics import median
from time import perf_counter

from ..core.engine.scheduler import Scheduler
from ..core.engine.sequence import Group
from ..core.engine.sequence import Sequence as TokenSequence
from ..core.memory.block_pool import BlockPool
from ..core.memory.manager import KVCacheManager
from ..core.memory.paged import PagedManager
from ..core.memory.standard import StandardManager
from ..extras.memory_limit import require_memory
from ..extras.prefix_cache import CachingBlockPool, block_digests
from ..extras.swapping import SwappingManager
from ..timeline.events import Event
from ..timeline.logged import LoggedManager
from ..views.common import options
from ..views.common.console import Console
from ..views.common.versions import describe_device
from .conditions import record_rounds
from .results import median_ratio, table_of, write_results

BLOCK_SIZE = 16
ENTRY_BYTES = 64  # of an integer in a list, and of what goes with it
LONGEST = 2048  # tokens of context, when the steps begin

WHAT = (
    f"A scheduling step plans one more token for each sequence. Contexts have 1 to {LONGEST} tokens. The scheduler "
    "decides which sequences run, and the manager says where the K and V of each new token go. A step of the paged "
    "manager also runs with a record of all events. A snapshot counts what the slots are used for. An appended token "
    "is a step divided by its sequences. To admit a known prompt is to find its blocks in the prefix cache. No model "
    "runs."
)

POOL_TOKENS = 16  # the longest context in the pools of different sizes: the smallest pool must hold them all
POOL_STEPS = 32  # then all sequences end, and others begin


@dataclass(frozen=True)
class Measurement:
    """One row of the table. The target is an upper bound, where there is one."""

    name: str
    measured: float
    unit: str
    target: float | None = None

    @property
    def met(self) -> bool | None:
        return None if self.target is None else self.measured < self.target


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.integer(parser, "--sequences", 256, "that run at the same time")
    options.integer(parser, "--steps", 256, "timed steps of each contender")
    options.integer(
        parser, "--pools", [10**3, 10**4, 10**5, 10**6], "sizes of pool to compare (default 1000 to 1000000)",
        metavar="BLOCKS", nargs="+",
    )  # fmt: skip
    options.integer(parser, "--prompt-tokens", 100_000, "to admit")
    options.integer(parser, "--rounds", 25, "times that the prompt is admitted")
    options.json_output(parser)


def main(args: argparse.Namespace) -> int:
    for name, value in (("--prompt-tokens", args.prompt_tokens), ("--pools", max(args.pools))):
        require_memory(f"{name} holds {value}: a list of so many", ENTRY_BYTES * value)
    needed = args.sequences * (POOL_TOKENS + POOL_STEPS) // BLOCK_SIZE
    for num_blocks in args.pools:
        if num_blocks < needed:
            raise ValueError(f"--pools has {num_blocks}; --sequences {args.sequences} asks for {needed} or more")
    results = [
        *scheduling(args.sequences, args.steps),
        *appending(args.sequences, args.steps, args.pools),
        *admission(args.prompt_tokens, args.rounds),
    ]
    title = f"Bookkeeping of {args.sequences} running sequences, {describe_device()}"
    console = Console(highlight=False)
    console.print(table_of(("", "measured", "target", "met"), map(_row, results), title=title))
    console.print(WHAT)
    write_results(args.json, results=[{**asdict(result), "met": result.met} for result in results])
    return 0


def _row(result: Measurement) -> tuple[str, ...]:
    measured = f"{result.measured:.0f}" if result.measured >= 100 else f"{result.measured:.3g}"
    target = "" if result.target is None else f"< {result.target:g} {result.unit}"
    met = {True: "yes", False: "no", None: ""}[result.met]
    return result.name, f"{measured} {result.unit}", target, met


class DecodeBatch:
    """Sequences that run, each one token behind, as in decode."""

    def __init__(self, manager: KVCacheManager, lengths: Sequence[int], num_steps: int) -> None:
        """`manager` needs room for all of the next `num_steps` steps: no sequence may be preempted in them."""
        self.manager = manager
        self.scheduler = Scheduler(manager, max_batch_tokens=sum(lengths), max_batch_seqs=len(lengths))
        self.groups = [
            Group([TokenSequence(seq_id, [0] * length, length, length + num_steps + 1)])
            for seq_id, length in enumerate(lengths)
        ]
        for group in self.groups:
            self.scheduler.add(group)
        self.step()  # the prompts

    def step(self) -> float:
        """Schedule one step; then every sequence is computed and gets a token. Returns the seconds of scheduling."""
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


def scheduling(num_seqs: int, num_steps: int) -> list[Measurement]:
    """A decode step of each manager, and of the paged one with a log; the cost of a snapshot."""
    lengths = random.Random(0).choices(range(1, LONGEST + 1), k=num_seqs)
    most = LONGEST + num_steps + 1
    # Twice the tokens: regions move when they grow, and leave holes.
    num_slots = 2 * num_seqs * most
    num_blocks = num_slots // BLOCK_SIZE
    events: list[Event] = []
    managers: dict[str, KVCacheManager] = {
        "paged": PagedManager(BlockPool(num_blocks), BLOCK_SIZE),
        "standard": StandardManager(num_slots, most),
        "swapping": SwappingManager(num_slots),
        "recorded": LoggedManager(PagedManager(BlockPool(num_blocks), BLOCK_SIZE), events.append),
    }
    batches = {name: DecodeBatch(manager, lengths, num_steps) for name, manager in managers.items()}
    seconds: dict[str, list[float]] = {name: [] for name in [*batches, "snapshot"]}
    for _ in range(num_steps):
        for name, batch in batches.items():
            seconds[name].append(batch.step())
        began = perf_counter()
        batches["paged"].manager.snapshot()
        seconds["snapshot"].append(perf_counter() - began)
    for times in seconds.values():
        record_rounds(times)
    micros = {name: 1e6 * median(times) for name, times in seconds.items()}
    recording = 1e6 * median(map(sub, seconds["recorded"], seconds["paged"]))
    return [
        Measurement("scheduling step, paged", micros["paged"], "µs", target=300),
        Measurement("scheduling step, standard", micros["standard"], "µs"),
        Measurement("scheduling step, swapping", micros["swapping"], "µs"),
        Measurement("scheduling step, paged, events recorded", micros["recorded"], "µs"),
        Measurement("  of this, recording the events", recording, "µs", target=150),
        Measurement("snapshot of the pool", micros["snapshot"], "µs"),
    ]


def appending(num_seqs: int, num_steps: int, pools: Sequence[int]) -> list[Measurement]:
    """The cost of each appended token, for pools of different sizes. Free blocks are shuffled, as after long use."""
    managers = []
    for num_blocks in pools:
        order = list(range(num_blocks))
        random.Random(0).shuffle(order)
        managers.append(PagedManager(BlockPool(num_blocks, order), BLOCK_SIZE))
    lengths = random.Random(0).choices(range(1, POOL_TOKENS + 1), k=num_seqs)
    seconds: list[list[float]] = [[] for _ in pools]
    for _ in range(0, num_steps, POOL_STEPS):
        batches = [DecodeBatch(manager, lengths, POOL_STEPS) for manager in managers]
        for _ in range(POOL_STEPS - 1):
            for batch, times in zip(batches, seconds, strict=True):
                times.append(batch.step())
        for batch in batches:
            batch.end()
    ratio = median_ratio(seconds[pools.index(max(pools))], seconds[pools.index(min(pools))])
    return [
        *(
            Measurement(f"appended token, pool of {num_blocks} blocks", 1e6 * median(times) / num_seqs, "µs")
            for num_blocks, times in zip(pools, seconds, strict=True)
        ),
        Measurement("  the largest pool, times the smallest", ratio, "", target=1.2),
    ]


def admission(num_tokens: int, num_rounds: int) -> list[Measurement]:
    """A prompt whose blocks are cached: the time for the digests of its tokens, for the match, and for the rest."""
    tokens = random.Random(0).choices(range(32_000), k=num_tokens)
    pool = CachingBlockPool(num_tokens // BLOCK_SIZE + 1)
    manager = PagedManager(pool, BLOCK_SIZE)
    manager.admit(0, tokens, num_tokens)
    manager.append([(0, num_tokens)])
    manager.commit(0, tokens, num_tokens)
    manager.free(0)
    rounds = []
    for _ in range(num_rounds):
        marks = [perf_counter()]
        digests = list(block_digests(tokens, BLOCK_SIZE))
        marks.append(perf_counter())
        for digest in digests:
            pool.block_of.get(digest)
        marks.append(perf_counter())
        manager.admit(0, tokens, num_tokens)  # digests and matches again, then shares the blocks
        marks.append(perf_counter())
        manager.free(0)
        digested, match, admit = (after - before for before, after in pairwise(marks))
        rounds.append((admit, digested, match, admit - digested - match))
    admit, digested, match, share = (1e3 * median(times) for times in zip(*rounds, strict=True))
    return [
        Measurement(f"admitting a known prompt of {num_tokens} tokens", admit, "ms", target=20),
        Measurement("  of this, digests of its blocks", digested, "ms"),
        Measurement("  of this, match in the prefix cache", match, "ms"),
        Measurement("  of this, room and sharing", share, "ms"),
    ]

"""Bugs of real engines, planted one at a time: each is caught, and the test says by what.

Four checks watch a run: the sanitizer (what is read), the integrity check (what the manager holds), the replay (what
the log says of it), and the contract (the tokens are those of the engine without the bug). Besides, the engine may
stop by itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from msgspec import structs
from support.driving import Engine, assert_nothing_held
from support.manager_state import state_of

from paged_ref import SamplingParams
from paged_ref.core.engine import engine as engine_module
from paged_ref.core.engine import llm as llm_module
from paged_ref.core.engine.scheduler import Scheduler
from paged_ref.core.engine.sequence import Status
from paged_ref.core.memory.block_pool import BlockPool
from paged_ref.core.memory.kv import KVCache
from paged_ref.core.memory.paged import PagedManager, Table
from paged_ref.extras import prefix_cache as prefix_cache_module
from paged_ref.extras.host_swap import SwappablePagedManager
from paged_ref.extras.prefix_cache import CachingBlockPool, block_digests
from paged_ref.extras.sanitizer import SanitizerError
from paged_ref.timeline.logged import LoggedManager
from paged_ref.timeline.state import RunState

PAPER = "Four score and seven years ago our"


def greedy(max_tokens: int, **options: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True, **options)


# --- scenarios -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scenario:
    """Requests on a small engine, in which a bug comes to light."""

    requests: list[tuple[str | list[int], SamplingParams]]
    options: dict[str, Any] = field(default_factory=dict)
    meddle: Callable[[Engine], None] = lambda engine: None  # before each step


def abort_what_is_swapped(engine: Engine) -> None:
    for request in list(engine.llm.engine.requests.values()):
        if request.groups[0].status is Status.SWAPPED:
            engine.llm.abort(request.output.request_id)


ALONE = Scenario([(PAPER, greedy(12))])
BESIDE = Scenario([(PAPER, greedy(12)), ("The cat", greedy(12))])
ALIKE = Scenario([(PAPER, greedy(12)), ([5] * 7, greedy(12))])  # tables of one length
SCATTERED = Scenario([(PAPER, greedy(12))], {"free_order": [(5 * i + 3) % 64 for i in range(64)]})
TOM = "Tom saw a big dog in the park and"
SAMPLES = Scenario([(TOM, greedy(10, n=3, temperature=1.5, seed=0))])
BEAMS = Scenario([(PAPER, greedy(10, beam_width=4))])
SAME_STEP = Scenario([([5] * 12, greedy(8)), ([5] * 12 + [7] * 3, greedy(8))], {"prefix_cache": True})
IN_TURN = {"prefix_cache": True, "max_batch_seqs": 1}  # one request after another
AGAIN = Scenario([([5] * 12, greedy(4)), ([5] * 12, greedy(4))], IN_TURN)
SAME_MIDDLE = Scenario(
    [([5] * 4 + [6] * 5, greedy(2)), ([7] * 4 + [8] * 5, greedy(2)), ([5] * 4 + [8] * 5, greedy(2))], IN_TURN
)
EVICTED = Scenario(
    [([5] * 12, greedy(4)), ([9] * 20, greedy(4)), ([8] * 20, greedy(4)), ([5] * 12, greedy(4))],
    {**IN_TURN, "kv_cache_tokens": 40},
)
# The third request finds the first one's blocks, and grows with the second until one of them has to make room.
REUSED = Scenario(
    [([5] * 9, greedy(1)), ([9] * 5, greedy(20)), ([5] * 9, greedy(28))],
    {"prefix_cache": True, "kv_cache_tokens": 40, "max_batch_seqs": 2},
)
TIGHT = {"kv_cache_tokens": 40, "watermark": 0}
SWAPPED = Scenario([(PAPER, greedy(16)), ("The cat", greedy(16)), ("Tom", greedy(16))], {**TIGHT, "preemption": "swap"})
RECOMPUTED = replace(SWAPPED, options=TIGHT)
# Three samples begin, and copy their last block, with three tokens, to the one that "The cat" has to give up.
COPIED_OVER = Scenario(
    [([*range(20, 31)], greedy(2, n=3, temperature=1.5, seed=0)), ("The cat", greedy(6))],
    {"kv_cache_tokens": 20, "watermark": 0, "preemption": "swap"},
)
ABORTED = replace(SWAPPED, meddle=abort_what_is_swapped)


@dataclass
class Verdict:
    """Which check stopped the run first, and with which words."""

    by: str
    words: str = ""


def run(scenario: Scenario, books: bool = True) -> tuple[Verdict, list[list[list[int]]]]:
    """Run it under all checks, or without the `books`: integrity and replay."""
    engine = Engine(**{"block_size": 4, "kv_cache_tokens": 256, "backend": "reference", **scenario.options})
    outputs = [engine.add(prompt, params) for prompt, params in scenario.requests]
    try:
        for _ in range(400):
            if not engine.llm.has_unfinished:
                break
            for action in (partial(scenario.meddle, engine), engine.llm.step):
                action()
                if books:
                    engine.manager.check_integrity()
                    check_replay(engine)
        else:
            return Verdict("nothing", "it never ends"), []
        if books:
            assert_nothing_held(engine.llm)
    except SanitizerError as error:
        return Verdict("sanitizer", str(error)), []
    except AssertionError as error:
        return Verdict("integrity", str(error)), []
    except ReplayError as error:
        return Verdict("replay", str(error)), []
    except Exception as error:
        return Verdict("engine", f"{type(error).__name__}: {error}"), []
    return Verdict("nothing"), [[sample.token_ids for sample in output.outputs] for output in outputs]


class ReplayError(Exception):
    """The log says something else than the manager holds."""


def check_replay(engine: Engine) -> None:
    state = RunState()
    try:
        for event in engine.events:
            state.apply(event)
    except ValueError as error:
        raise ReplayError(str(error)) from None
    if state.memory != state_of(engine.manager):
        raise ReplayError("the replayed state is another")


# --- bugs ----------------------------------------------------------------------------------------------

Plant = Callable[[pytest.MonkeyPatch], None]


def commit_that_replaces_duplicates(swap: Callable[[PagedManager, Table, int, int], None]) -> Plant:
    """A commit that finds a block's content in the prefix cache, and calls `swap` to use that block instead."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        real = PagedManager.commit

        def commit(self: PagedManager, seq_id: int, tokens: Sequence[int], num_written: int) -> None:
            pool, table = self.pool, self.tables[seq_id]
            assert isinstance(pool, CachingBlockPool)
            full = range(num_written // self.block_size)
            fresh = [place for place in full if table.blocks[place] not in pool.digest_of]
            real(self, seq_id, tokens, num_written)
            for place in fresh:
                known = pool.block_of[pool.digest_of[table.blocks[place]]]
                if known != table.blocks[place]:
                    swap(self, table, place, known)

        patch.setattr(PagedManager, "commit", commit)

    return plant


def keeps_pointing_to_the_freed_block(manager: PagedManager, table: Table, place: int, known: int) -> None:
    manager.pool.share(known)
    manager.pool.release(table.blocks[place])


def forgets_to_count_the_other_block(manager: PagedManager, table: Table, place: int, known: int) -> None:
    manager.pool.release(table.blocks[place])
    table.blocks[place] = known


def forgets_to_release_its_own(manager: PagedManager, table: Table, place: int, known: int) -> None:
    manager.pool.share(known)
    table.blocks[place] = known


def no_block_at_a_full_block(patch: pytest.MonkeyPatch) -> None:
    """The first token behind a full block gets no block."""
    real = PagedManager.append

    def append(self: PagedManager, appends: Sequence[tuple[int, int]]) -> Any:
        transfers = real(self, appends)
        for seq_id, _ in appends:
            table = self.tables[seq_id]
            if table.length % self.block_size == 1:
                self.pool.release(table.blocks.pop())
        return transfers

    patch.setattr(PagedManager, "append", append)


def slot_behind_a_full_block(patch: pytest.MonkeyPatch) -> None:
    """The first token of a new block is written one slot behind the block before."""
    real = PagedManager.slots

    def slots(self: PagedManager, seq_id: int, first: int, count: int) -> list[int]:
        found = real(self, seq_id, first, count)
        for i, position in enumerate(range(first, first + count)):
            if position and position % self.block_size == 0:
                before = self.tables[seq_id].blocks[position // self.block_size - 1]
                found[i] = (before + 1) * self.block_size
        return found

    patch.setattr(PagedManager, "slots", slots)


def whole_prompt_hits(patch: pytest.MonkeyPatch) -> None:
    """A prompt that is known to its end leaves no token to compute."""
    real = PagedManager.admit
    patch.setattr(PagedManager, "admit", lambda self, i, tokens, *more: real(self, i, [*tokens, 0], *more))


def change_inputs(change: Callable[[Any], Any]) -> Plant:
    """The engine hands wrong inputs to the model and to memory."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        real = engine_module.Engine.prepare_inputs
        patch.setattr(engine_module.Engine, "prepare_inputs", lambda self, plan: change(real(self, plan)))

    return plant


def positions_from_zero(inputs: Any) -> Any:
    """RoPE counts each chunk from 0."""
    return replace(inputs, positions=np.arange(len(inputs.positions), dtype=np.int32))


def change_addresses(change: Callable[[Any], Any]) -> Plant:
    return change_inputs(lambda inputs: replace(inputs, addresses=change(inputs.addresses)))


def one_key_too_many(addresses: Any) -> Any:
    return replace(addresses, seq_lens=addresses.seq_lens + 1)


def keys_to_the_end_of_the_block(addresses: Any) -> Any:
    return replace(addresses, seq_lens=-(-addresses.seq_lens // 4) * 4)


def rows_of_the_table_mixed_up(addresses: Any) -> Any:
    return replace(addresses, block_tables=addresses.block_tables[::-1])


def kernels_read(change: Callable[[Any], Any]) -> Plant:
    """The inputs are right, and the kernels read by other addresses."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        real = KVCache.attend

        def attend(
            self: KVCache, layer: int, query: Any, key: Any, value: Any, addresses: Any, window: int | None
        ) -> Any:
            return real(self, layer, query, key, value, change(addresses), window)

        patch.setattr(KVCache, "attend", attend)

    return plant


def shared_block_counted_twice(patch: pytest.MonkeyPatch) -> None:
    real = PagedManager.fork

    def fork(self: PagedManager, parent_id: int, child_id: int) -> None:
        real(self, parent_id, child_id)
        for block_id in self.tables[child_id].blocks:
            self.pool.share(block_id)

    patch.setattr(PagedManager, "fork", fork)


def fork_without_counting(patch: pytest.MonkeyPatch) -> None:
    real = PagedManager.fork

    def fork(self: PagedManager, parent_id: int, child_id: int) -> None:
        real(self, parent_id, child_id)
        for block_id in self.tables[child_id].blocks:
            self.pool.release(block_id)

    patch.setattr(PagedManager, "fork", fork)


def no_copy_on_write(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PagedManager, "writes_shared_block", lambda self, table, count: False)


def change_transfers(change: Callable[[list[Any]], list[Any]]) -> Plant:
    """The cache gets other transfers than the plan has; the sanitizer gets the plan's."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        real = KVCache.apply
        patch.setattr(KVCache, "apply", lambda self, transfers: real(self, change(list(transfers))))

    return plant


def without(kind: str) -> Plant:
    return change_transfers(lambda transfers: [t for t in transfers if t.kind != kind])


def swap_outs_last(transfers: list[Any]) -> list[Any]:
    """Blocks that were given to others in the same step are overwritten before they are saved."""
    return sorted(transfers, key=lambda t: t.kind == "swap_out")


def late(kind: str) -> Plant:
    """Transfers of this kind are made after the step instead of before it."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        real_apply, real_sample = KVCache.apply, engine_module.Engine._sample
        pending: list[Any] = []

        def apply_others(self: KVCache, transfers: Sequence[Any]) -> None:
            pending.extend(t for t in transfers if t.kind == kind)
            real_apply(self, [t for t in transfers if t.kind != kind])

        def sample(self: Any, plan: Any, logits: Any) -> Any:
            real_apply(self.kv.inner, pending)
            pending.clear()
            return real_sample(self, plan, logits)

        patch.setattr(KVCache, "apply", apply_others)
        patch.setattr(engine_module.Engine, "_sample", sample)

    return plant


def hash_without_its_parent(patch: pytest.MonkeyPatch) -> None:
    def without_parent(tokens: Sequence[int], block_size: int, parent: bytes = b"") -> Iterator[bytes]:
        for start in range(0, len(tokens) - block_size + 1, block_size):
            yield from block_digests(tokens[start : start + block_size], block_size)

    patch.setattr(prefix_cache_module, "block_digests", without_parent)


def free_in_the_wrong_pool(patch: pytest.MonkeyPatch) -> None:
    """A sequence that is freed while swapped gives its host blocks back to the device."""

    def free(self: SwappablePagedManager, seq_id: int) -> None:
        table = self.tables.pop(seq_id, None) or self.swapped.pop(seq_id)
        for block_id in reversed(table.blocks):
            if self.pool.ref_count[block_id]:
                self.pool.release(block_id)

    patch.setattr(SwappablePagedManager, "free", free)


def eviction_that_keeps_the_digest(patch: pytest.MonkeyPatch) -> None:
    """An evicted block can still be looked up."""

    def allocate(self: CachingBlockPool) -> int:
        if not self._free and self.cached:
            block_id, _ = self.cached.popitem(last=False)
            del self.digest_of[block_id]
            self._free.append(block_id)
            if self.on_evicted:
                self.on_evicted(block_id)
        return BlockPool.allocate(self)

    patch.setattr(CachingBlockPool, "allocate", allocate)


def hit_that_stays_cached(patch: pytest.MonkeyPatch) -> None:
    """A block that is used again still stands first in line to be evicted."""
    patch.setattr(CachingBlockPool, "share", BlockPool.share)


def copy_not_logged(patch: pytest.MonkeyPatch) -> None:
    """A copy on write that the log leaves out."""
    real = LoggedManager._appended

    def appended(self: LoggedManager, seq_id: int, count: int, transfers: Any) -> Any:
        return structs.replace(real(self, seq_id, count, transfers), copied=())

    patch.setattr(LoggedManager, "_appended", appended)


def recompute_that_skips_a_token(patch: pytest.MonkeyPatch) -> None:
    """After a preemption the first token counts as computed already."""
    real = Scheduler._admit

    def admit(self: Scheduler, group: Any, plan: Any) -> None:
        real(self, group, plan)
        if group.num_preemptions and group.status is Status.WAITING:
            self.manager.append([(group.leader.seq_id, 1)])
            group.leader.num_computed += 1

    patch.setattr(Scheduler, "_admit", admit)


def one_stream_for_all_samples(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(llm_module, "random_generator", lambda params, sample: np.random.default_rng(params.seed))


@dataclass(frozen=True)
class Bug:
    """`by` which check it is caught, with which words; and by which one where integrity and replay are not checked."""

    name: str
    plant: Plant
    scenario: Scenario
    by: str
    words: str = ""
    without_books: str = ""  # the same, if empty


BUGS = [
    Bug(
        "dangling table after de-duplication",
        commit_that_replaces_duplicates(keeps_pointing_to_the_freed_block),
        SAME_STEP, "integrity", r"block \d+ has ref_count \d and \d table entr", "sanitizer",
    ),
    Bug(
        "de-duplication that does not count the block it takes",
        commit_that_replaces_duplicates(forgets_to_count_the_other_block),
        SAME_STEP, "integrity", r"block \d+ has ref_count 1 and 2 table entries", "engine",
    ),
    Bug(
        "de-duplication that leaks the block it gives up",
        commit_that_replaces_duplicates(forgets_to_release_its_own),
        SAME_STEP, "integrity", r"block \d+ has ref_count 1 and 0 table entries", "nothing",
    ),
    Bug("append off by one at a full block", no_block_at_a_full_block, ALONE, "engine", "IndexError"),
    Bug(
        "slot behind a full block", slot_behind_a_full_block, SCATTERED,
        "sanitizer", r"reads position 4 from block \d+, offset 0, but nothing was written there",
    ),
    Bug(
        "zero tokens left to run after a full prefix hit", whole_prompt_hits, AGAIN,
        "engine", "no sequence can run, though some wait",
    ),
    Bug(
        "inputs with one key too many", change_addresses(one_key_too_many), ALONE,
        "sanitizer", r"sequence 0 has 7 tokens in .*; the kernels are given 8 in",
    ),
    Bug(
        "inputs with keys to the end of the block", change_addresses(keys_to_the_end_of_the_block), ALONE,
        "sanitizer", r"sequence 0 has 7 tokens in .*; the kernels are given 8 in",
    ),
    Bug(
        "inputs with the tables of other sequences", change_addresses(rows_of_the_table_mixed_up), ALIKE,
        "sanitizer", r"sequence 0 has 7 tokens in .*; the kernels are given 7 in",
    ),
    Bug(
        "inputs with tables that are too short", change_addresses(rows_of_the_table_mixed_up), BESIDE,
        "engine", r"ValueError: block_tables\[0, 1\] is -1; the cache has blocks 0 to 63",
    ),
    Bug("NaN tail, one key too many", kernels_read(one_key_too_many), ALONE, "sanitizer", "NaN in its attention"),
    Bug(
        "NaN tail, the rest of the last block", kernels_read(keys_to_the_end_of_the_block), ALONE,
        "sanitizer", "NaN in its attention",
    ),
    Bug("tables of another sequence", kernels_read(rows_of_the_table_mixed_up), BESIDE, "sanitizer", "NaN in its"),
    Bug(
        "shared block counted twice", shared_block_counted_twice, SAMPLES,
        "integrity", r"block \d+ has ref_count \d and \d table entr", "nothing",
    ),
    Bug(
        "fork without counting", fork_without_counting, SAMPLES,
        "integrity", r"block \d+ has ref_count 1 and 3 table entries", "sanitizer",
    ),
    Bug(
        "copy on write forgotten", no_copy_on_write, SAMPLES,
        "sanitizer", r"sequence \d reads position 9 from block \d, offset 1, but sequence \d wrote there, after other",
    ),
    Bug("copy on write forgotten, in beam search", no_copy_on_write, BEAMS, "sanitizer", "wrote there, after other"),
    Bug("copy on write planned and not made", without("copy"), SAMPLES, "sanitizer", "is not the K and V that"),
    Bug("swapped-in block mapped, and never copied", without("swap_in"), SWAPPED, "sanitizer", "is not the K and V"),
    Bug("swapped-in block mapped before its copy", late("swap_in"), SWAPPED, "sanitizer", "is not the K and V that"),
    Bug("swapped-out block never saved", without("swap_out"), SWAPPED, "sanitizer", "is not the K and V that"),
    Bug(
        "block freed while its copy to the host is in flight", late("swap_out"), SWAPPED,
        "sanitizer", "is not the K and V that",
    ),
    Bug(
        "block given to a copy before it is saved", change_transfers(swap_outs_last), COPIED_OVER,
        "sanitizer", "is not the K and V that",
    ),
    Bug(
        "hash without its parent", hash_without_its_parent, SAME_MIDDLE,
        "sanitizer", r"sequence 2 reads position 4 from block \d+, offset 0, but sequence 1 wrote there, after other",
    ),
    Bug(
        "swapped sequence freed in the device's pool", free_in_the_wrong_pool, ABORTED,
        "integrity", "table entr", "sanitizer",
    ),
    Bug(
        "stale prefix after eviction", eviction_that_keeps_the_digest, EVICTED,
        "integrity", "a digest and a block that do not point at each other", "sanitizer",
    ),
    Bug(
        "prefix block evicted while in use", hit_that_stays_cached, REUSED,
        "integrity", "are not each of the 10 blocks once", "sanitizer",
    ),
    Bug("log that leaves out the copy on write", copy_not_logged, SAMPLES, "replay", "", "nothing"),
    Bug(
        "recompute that skips a token", recompute_that_skips_a_token, RECOMPUTED,
        "sanitizer", "reads position 0 from block .*, but ",
    ),
    Bug("positions that begin at 0 with each chunk", change_inputs(positions_from_zero), ALONE, "contract"),
    Bug("samples that draw from one stream", one_stream_for_all_samples, SAMPLES, "contract"),
]  # fmt: skip


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_planted_bug_is_caught(bug: Bug, monkeypatch: pytest.MonkeyPatch) -> None:
    verdict, wanted = run(bug.scenario)
    assert verdict == Verdict("nothing"), "without the bug, no check complains"
    bug.plant(monkeypatch)
    for books, by in ((True, bug.by), (False, bug.without_books or bug.by)):
        verdict, tokens = run(bug.scenario, books)
        if verdict.by == "nothing" and not verdict.words and tokens != wanted:
            verdict = Verdict("contract")
        assert verdict.by == by, verdict.words
        if books:
            assert re.search(bug.words, verdict.words)

"""Bugs of real engines, planted one at a time: each is caught, and the test says by what.

Four things watch a run: the sanitizer (what is read), the integrity check (the books), the replay (the events),
and the contract (the tokens are those of the engine without the bug). Besides, the engine may stop by itself.
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
from paged_ref import llm as llm_module
from paged_ref.core.device import xp
from paged_ref.core.engine.scheduler import Scheduler
from paged_ref.core.engine.sequence import Status
from paged_ref.core.memory import paged as paged_module
from paged_ref.core.memory.kv import KVCache
from paged_ref.core.memory.paged import PagedManager, Table
from paged_ref.extras.prefix_cache import PrefixCache, block_digests
from paged_ref.extras.sanitizer import SanitizerError
from paged_ref.llm import LLM
from paged_ref.timeline.events import SequenceFreed
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
    for request in list(engine.llm._requests.values()):
        if request.groups[0].status is Status.SWAPPED:
            engine.llm.abort(request.output.request_id)


ALONE = Scenario([(PAPER, greedy(12))])
BESIDE = Scenario([(PAPER, greedy(12)), ("The cat", greedy(12))])
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
# The third request finds the first one's blocks, and grows with the second until someone has to make room.
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
    """Who stopped the run first, and with which words."""

    by: str
    words: str = ""


def run(scenario: Scenario, books: bool = True) -> tuple[Verdict, list[list[list[int]]]]:
    """Run it under all watchers, or without the `books`: integrity and replay."""
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
            return Verdict("nobody", "it never ends"), []
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
    return Verdict("nobody"), [[sample.token_ids for sample in output.outputs] for output in outputs]


class ReplayError(Exception):
    """The events tell something else than the manager holds."""


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
            first = self.tables[seq_id].num_digested
            real(self, seq_id, tokens, num_written)
            table = self.tables[seq_id]
            assert self.cache is not None
            for place in range(first, table.num_digested):
                digests = list(block_digests(tokens, self.block_size))
                known = self.cache.block_of[digests[place]]
                if known != table.blocks[place]:
                    swap(self, table, place, known)

        patch.setattr(PagedManager, "commit", commit)

    return plant


def keeps_pointing_to_the_freed_block(manager: PagedManager, table: Table, place: int, known: int) -> None:
    manager.pool.share(known)
    manager._release(table.blocks[place])


def forgets_to_count_the_other_block(manager: PagedManager, table: Table, place: int, known: int) -> None:
    manager._release(table.blocks[place])
    table.blocks[place] = known


def forgets_to_release_its_own(manager: PagedManager, table: Table, place: int, known: int) -> None:
    manager.pool.share(known)
    table.blocks[place] = known


def no_block_at_a_full_block(patch: pytest.MonkeyPatch) -> None:
    """Room for one token more than there is."""
    patch.setattr(PagedManager, "blocks_for", lambda self, n: -(-(n - 1) // self.block_size))


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
    patch.setattr(PagedManager, "admit", lambda self, seq_id, tokens, most: real(self, seq_id, [*tokens, 0], most))


def change_inputs(change: Callable[[Any], Any]) -> Plant:
    def plant(patch: pytest.MonkeyPatch) -> None:
        real = LLM._inputs
        patch.setattr(LLM, "_inputs", lambda self, plan: change(real(self, plan)))

    return plant


def one_key_too_many(inputs: Any) -> Any:
    return replace(inputs, seq_lens=inputs.seq_lens + 1)


def keys_to_the_end_of_the_block(inputs: Any) -> Any:
    return replace(inputs, seq_lens=-(-inputs.seq_lens // 4) * 4)


def positions_from_zero(inputs: Any) -> Any:
    """RoPE counts each chunk from 0."""
    return replace(inputs, positions=xp.arange(len(inputs.positions), dtype=np.int32))


def rows_of_the_table_mixed_up(inputs: Any) -> Any:
    return replace(inputs, block_tables=inputs.block_tables[::-1])


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
    patch.setattr(PagedManager, "_writes_shared_block", lambda self, table, count: False)


def change_transfers(change: Callable[[list[Any]], list[Any]]) -> Plant:
    """What storage is told to move; the sanitizer is told the truth."""

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
        real_apply, real_commit = KVCache.apply, LLM._sample
        pending: list[Any] = []

        def apply_others(self: KVCache, transfers: Sequence[Any]) -> None:
            pending.extend(t for t in transfers if t.kind == kind)
            real_apply(self, [t for t in transfers if t.kind != kind])

        def sample(self: LLM, plan: Any, logits: Any) -> Any:
            real_apply(self.storage, pending)
            pending.clear()
            return real_commit(self, plan, logits)

        patch.setattr(KVCache, "apply", apply_others)
        patch.setattr(LLM, "_sample", sample)

    return plant


def hash_without_its_parent(patch: pytest.MonkeyPatch) -> None:
    def without_parent(tokens: Sequence[int], block_size: int, parent: bytes = b"") -> Iterator[bytes]:
        for start in range(0, len(tokens) - block_size + 1, block_size):
            yield from block_digests(tokens[start : start + block_size], block_size)

    patch.setattr(paged_module, "block_digests", without_parent)


def free_in_the_wrong_pool(patch: pytest.MonkeyPatch) -> None:
    """Whoever is freed while swapped gives host blocks back to the device."""

    def free(self: PagedManager, seq_id: int) -> None:
        for block_id in reversed(self.tables.pop(seq_id).blocks):
            if self.pool.ref_count[block_id]:
                self._release(block_id)
        if self.log:
            self.log(SequenceFreed(seq_id))

    patch.setattr(PagedManager, "free", free)


def eviction_that_keeps_the_key(patch: pytest.MonkeyPatch) -> None:
    def evict(self: PrefixCache) -> int:
        block_id, _ = self.idle.popitem(last=False)
        self._key_of.pop(block_id)
        return block_id

    patch.setattr(PrefixCache, "evict", evict)


def hit_that_stays_idle(patch: pytest.MonkeyPatch) -> None:
    """A block that is used again still stands first in line to be evicted."""
    patch.setattr(PrefixCache, "now_used", lambda self, block_id: None)


def append_untold(patch: pytest.MonkeyPatch) -> None:
    """A copy on write that no event tells of."""
    real = PagedManager.append

    def append(self: PagedManager, appends: Any) -> Any:
        log = self.log
        if log and any(self._writes_shared_block(self.tables[seq_id], count) for seq_id, count in appends):

            def tell_less(event: Any) -> None:
                log(structs.replace(event, copied=()) if hasattr(event, "copied") else event)

            self.log = tell_less
        transfers = real(self, appends)
        self.log = log
        return transfers

    patch.setattr(PagedManager, "append", append)


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
    patch.setattr(llm_module, "generator", lambda params, sample: np.random.default_rng(params.seed))


@dataclass(frozen=True)
class Bug:
    """`by` whom it is caught with which words; and by whom when nobody looks at the books."""

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
        SAME_STEP, "integrity", r"block \d+ has ref_count \d; \d tables point to it", "sanitizer",
    ),
    Bug(
        "de-duplication that does not count the block it takes",
        commit_that_replaces_duplicates(forgets_to_count_the_other_block),
        SAME_STEP, "integrity", r"block \d+ has ref_count 1; 2 tables point to it", "engine",
    ),
    Bug(
        "de-duplication that leaks the block it gives up",
        commit_that_replaces_duplicates(forgets_to_release_its_own),
        SAME_STEP, "integrity", r"block \d+ has ref_count 1; 0 tables point to it", "nobody",
    ),
    Bug("append off by one at a full block", no_block_at_a_full_block, ALONE, "engine", "IndexError"),
    Bug(
        "slot behind a full block", slot_behind_a_full_block, SCATTERED,
        "sanitizer", r"reads position 4 from block \d+, offset 0, but nobody has written it",
    ),
    Bug(
        "zero tokens left to run after a full prefix hit", whole_prompt_hits, AGAIN,
        "engine", "no sequence can run, though some wait",
    ),
    Bug("NaN tail, one key too many", change_inputs(one_key_too_many), ALONE, "sanitizer", "NaN among its logits"),
    Bug(
        "NaN tail, the rest of the last block", change_inputs(keys_to_the_end_of_the_block), ALONE,
        "sanitizer", "NaN among its logits",
    ),
    Bug(
        "shared block counted twice", shared_block_counted_twice, SAMPLES,
        "integrity", r"block \d+ has ref_count \d; \d tables point to it", "nobody",
    ),
    Bug(
        "fork without counting", fork_without_counting, SAMPLES,
        "integrity", r"block \d+ has ref_count 1; 3 tables point to it", "sanitizer",
    ),
    Bug(
        "copy on write forgotten", no_copy_on_write, SAMPLES,
        "sanitizer", r"sequence \d reads position 9 from block \d, offset 1, but sequence \d wrote it, after other",
    ),
    Bug("copy on write forgotten, in beam search", no_copy_on_write, BEAMS, "sanitizer", "wrote it, after other"),
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
        "sanitizer", r"sequence 2 reads position 4 from block \d+, offset 0, but sequence 1 wrote it, after other",
    ),
    Bug(
        "swapped sequence freed in the device's pool", free_in_the_wrong_pool, ABORTED,
        "integrity", "tables point to it", "sanitizer",
    ),
    Bug(
        "stale prefix after eviction", eviction_that_keeps_the_key, EVICTED,
        "integrity", "a key and a block that do not point at each other", "sanitizer",
    ),
    Bug(
        "prefix block evicted while in use", hit_that_stays_idle, REUSED,
        "integrity", "are not each of the 10 blocks once", "sanitizer",
    ),
    Bug("event that leaves out the copy on write", append_untold, SAMPLES, "replay", "", "nobody"),
    Bug(
        "recompute that skips a token", recompute_that_skips_a_token, RECOMPUTED,
        "sanitizer", "reads position 0 from block .*, but ",
    ),
    Bug("tables of another sequence", change_inputs(rows_of_the_table_mixed_up), BESIDE, "sanitizer", "NaN among"),
    Bug("positions that begin at 0 with each chunk", change_inputs(positions_from_zero), ALONE, "contract"),
    Bug("samples that draw from one stream", one_stream_for_all_samples, SAMPLES, "contract"),
]  # fmt: skip


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_planted_bug_is_caught(bug: Bug, monkeypatch: pytest.MonkeyPatch) -> None:
    verdict, wanted = run(bug.scenario)
    assert verdict == Verdict("nobody"), "without the bug, nobody complains"
    bug.plant(monkeypatch)
    for books, by in ((True, bug.by), (False, bug.without_books or bug.by)):
        verdict, tokens = run(bug.scenario, books)
        if verdict.by == "nobody" and not verdict.words and tokens != wanted:
            verdict = Verdict("contract")
        assert verdict.by == by, verdict.words
        if books:
            assert re.search(bug.words, verdict.words)

"""The prefix cache: what is found again, what is evicted first, and how often a real day of requests hits."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence

import pytest
from conftest import SHARED
from support.books import books

from paged_ref.core.memory.block_pool import OutOfBlocks
from paged_ref.core.memory.paged import PagedManager
from paged_ref.extras.host_swap import SwappablePagedManager
from paged_ref.extras.prefix_cache import CachingBlockPool, block_digests

BLOCK_SIZE = 4
A, B, C = [1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]  # the tokens of whole blocks
TRACE = SHARED / "traces" / "mooncake_conversation.jsonl.gz"


def compute(manager: PagedManager, seq_id: int, tokens: Sequence[int]) -> int:
    """Admit a sequence and compute all its tokens in one step. Returns how many need not be computed."""
    known = manager.admit(seq_id, tokens, len(tokens) + 8)
    manager.append([(seq_id, len(tokens) - known)])
    manager.commit(seq_id, tokens, len(tokens))
    manager.check_integrity()
    return known


def cached(num_blocks: int = 8) -> PagedManager:
    return PagedManager(CachingBlockPool(num_blocks), BLOCK_SIZE)


def pool_of(manager: PagedManager) -> CachingBlockPool:
    assert isinstance(manager.pool, CachingBlockPool)
    return manager.pool


def events_of(manager: PagedManager) -> list[tuple[str, int]]:
    """Filled with what the pool says through its hooks."""
    events: list[tuple[str, int]] = []
    pool = pool_of(manager)
    pool.on_cached = lambda block_id, digest: events.append(("cached", block_id))
    pool.on_evicted = lambda block_id: events.append(("evicted", block_id))
    return events


# --- digests -------------------------------------------------------------------------------------------


def test_only_full_blocks_have_a_digest() -> None:
    assert list(block_digests([], 4)) == []
    assert list(block_digests(A[:3], 4)) == []
    assert len(list(block_digests(A + B + C[:3], 4))) == 2
    assert len(list(block_digests(A, 1))) == 4


def test_the_same_tokens_after_different_beginnings_differ() -> None:
    """K and V of a token depend on all tokens before it, so the parent's digest goes into the child's."""
    (_, after_a), (_, after_c) = block_digests(A + B, 4), block_digests(C + B, 4)
    (alone,) = block_digests(B, 4)
    assert len({after_a, after_c, alone}) == 3
    first, second = block_digests(A + A, 4)
    assert first != second


def test_digests_go_on_from_a_parent() -> None:
    whole = list(block_digests(A + B + C, 4))
    assert list(block_digests(B + C, 4, whole[0])) == whole[1:]
    assert list(block_digests(C, 4, whole[1])) == whole[2:]
    assert list(block_digests(C, 4, whole[0])) != whole[2:]


def test_the_digests_of_many_blocks_are_all_different() -> None:
    """All pairs of blocks over a small alphabet: order and place count, not only which tokens there are."""
    contents = [[i, j] for i in range(8) for j in range(8)]
    digests = {digest for x in contents for y in contents for digest in block_digests(x + y, 2)}
    assert len(digests) == 64 + 64 * 64


# --- the pool itself -----------------------------------------------------------------------------------


def fill(pool: CachingBlockPool, *contents: list[int]) -> list[int]:
    """One block for each content, which follow one another in one sequence."""
    blocks = [pool.allocate() for _ in contents]
    pool.filled(blocks, len(blocks), [token for content in contents for token in content], BLOCK_SIZE)
    return blocks


def test_a_lookup_ends_at_the_first_unknown_block() -> None:
    pool = CachingBlockPool(4)
    blocks = fill(pool, A, B)
    assert pool.lookup(A + B + C, BLOCK_SIZE) == blocks
    assert pool.lookup(A + C + B, BLOCK_SIZE) == blocks[:1]
    assert pool.lookup(C + A + B, BLOCK_SIZE) == []
    assert pool.lookup(A[:3], BLOCK_SIZE) == pool.lookup([], BLOCK_SIZE) == []


def test_the_first_block_of_a_digest_wins() -> None:
    pool = CachingBlockPool(4)
    (first,), (second,) = fill(pool, A), fill(pool, A)
    assert pool.lookup(A, BLOCK_SIZE) == [first]
    pool.release(second)
    assert pool.free_blocks[0] == second  # private, so free
    pool.release(first)
    assert (first in pool.free_blocks, list(pool.cached)) == (False, [first])
    assert pool.lookup(A, BLOCK_SIZE) == [first]
    pool.check_integrity([])


def test_the_least_recently_used_block_is_evicted_first() -> None:
    pool = CachingBlockPool(3)
    blocks = [fill(pool, content)[0] for content in (A, B, C)]
    for block in blocks:
        pool.release(block)
    assert (pool.num_free, pool.num_cached, pool.free_blocks) == (3, 3, [])
    pool.share(blocks[0])
    pool.release(blocks[0])  # used again: now the last to go
    assert [pool.allocate() for _ in range(3)] == [blocks[1], blocks[2], blocks[0]]
    assert pool.lookup(A, BLOCK_SIZE) == pool.lookup(B, BLOCK_SIZE) == []
    assert (pool.digest_of, pool.block_of) == ({}, {})
    pool.check_integrity(blocks)


def test_free_blocks_are_handed_out_before_a_cached_one() -> None:
    pool = CachingBlockPool(3)
    (block,) = fill(pool, A)
    pool.release(block)
    assert block not in [pool.allocate(), pool.allocate()]
    assert pool.lookup(A, BLOCK_SIZE) == [block]


def test_a_block_in_use_is_never_evicted() -> None:
    pool = CachingBlockPool(2)
    (used,), (unused,) = fill(pool, A), fill(pool, B)
    pool.release(unused)
    assert pool.allocate() == unused
    with pytest.raises(OutOfBlocks, match="no block is free; the pool has 2"):
        pool.allocate()
    assert pool.lookup(A, BLOCK_SIZE) == [used]


def test_hooks_are_called_with_what_can_be_found_and_what_no_longer_can() -> None:
    pool = CachingBlockPool(2)
    calls: list[tuple[int, bytes | None]] = []
    pool.on_cached = lambda block_id, digest: calls.append((block_id, digest))
    pool.on_evicted = lambda block_id: calls.append((block_id, None))
    (digest,) = block_digests(A, BLOCK_SIZE)
    (first,), (second,) = fill(pool, A), fill(pool, A)
    assert calls == [(first, digest)]  # the second block with this content is not found
    pool.release(first)
    pool.release(second)
    pool.allocate()
    pool.allocate()
    assert calls[1:] == [(first, None)]


def test_integrity_finds_a_digest_without_its_block_and_a_cached_block_without_a_digest() -> None:
    pool = CachingBlockPool(2)
    blocks = fill(pool, A)
    pool.block_of[b"another"] = blocks[0]
    with pytest.raises(AssertionError, match="do not point at each other"):
        pool.check_integrity(blocks)
    pool = CachingBlockPool(2)
    pool.cached[1] = None
    with pytest.raises(AssertionError, match="keeps a block whose content it does not know"):
        pool.check_integrity([])


def test_without_a_log_nothing_grows() -> None:
    """2,000 requests through 8 blocks: every container of manager and pool stays as small as the pool."""
    manager = cached(8)
    pool = pool_of(manager)
    for seq_id in range(2_000):
        compute(manager, seq_id, [seq_id % 97, *range(seq_id, seq_id + 8 + seq_id % 20)])
        manager.free(seq_id)
        for owner in (manager, pool):
            for name, value in vars(owner).items():
                if hasattr(value, "__len__"):
                    assert len(value) <= pool.num_blocks, name
    assert pool.num_free == 8
    assert not manager.tables


# --- in the manager ------------------------------------------------------------------------------------


def test_a_freed_prompt_is_found_again_in_the_same_blocks() -> None:
    manager = cached()
    assert compute(manager, 0, A + B + [1]) == 0
    blocks = manager.placement(0).copy()
    manager.free(0)
    assert set(pool_of(manager).cached) == set(blocks[:2])  # the third was not full
    assert len(manager.pool.free_blocks) == 6
    assert manager.pool.num_free == 8
    assert compute(manager, 1, A + B + [2]) == 8
    assert manager.placement(1)[:2] == blocks[:2]
    assert not pool_of(manager).cached
    usage = manager.snapshot().usage({})
    assert (usage.tokens, usage.cached) == (9, 0)


def test_unused_blocks_count_as_cached_and_the_parts_sum_to_the_pool() -> None:
    manager = cached()
    compute(manager, 0, A + B)
    manager.free(0)
    compute(manager, 1, C[:2])
    usage = manager.snapshot().usage({})
    assert (usage.tokens, usage.internal, usage.cached, usage.free) == (2, 2, 8, 20)
    assert usage.total == manager.num_slots


def test_a_prompt_that_begins_alike_hits_only_so_far() -> None:
    manager = cached()
    compute(manager, 0, A + B + C)
    manager.free(0)
    assert compute(manager, 1, A + C + B) == 4
    assert manager.admit(2, B + C, 20) == 0  # known blocks, but not at this place


@pytest.mark.parametrize(("length", "known"), [(1, 0), (4, 0), (5, 4), (8, 4), (9, 8), (11, 8), (12, 8)])
def test_a_prompt_that_is_known_to_its_end_still_computes_its_last_token(length: int, known: int) -> None:
    """Something must be computed, to say what comes next: the last block is then computed again, privately."""
    manager = cached()
    prompt = A + B + C
    compute(manager, 0, prompt)
    manager.free(0)
    assert compute(manager, 1, prompt[:length]) == known
    assert manager.length(1) == length


def test_the_block_that_a_full_hit_computes_again_is_private() -> None:
    """It must not be written into the known block, which another sequence may be reading."""
    manager = cached()
    compute(manager, 0, A + B)
    assert compute(manager, 1, A + B) == 4
    assert manager.placement(1)[0] == manager.placement(0)[0]
    assert manager.placement(1)[1] != manager.placement(0)[1]
    assert manager.slots(1, 4, 4) != manager.slots(0, 4, 4)


def test_a_block_in_use_by_others_is_hit_and_counted() -> None:
    manager = cached()
    compute(manager, 0, [*A, 1])
    assert compute(manager, 1, [*A, 2]) == 4
    assert compute(manager, 2, [*A, 3]) == 4
    shared = manager.placement(0)[0]
    assert manager.placement(1)[0] == manager.placement(2)[0] == shared
    assert manager.pool.ref_count[shared] == 3
    assert manager.snapshot().shared == 2 * BLOCK_SIZE
    manager.free(0)  # the sequence that came first may go first
    manager.check_integrity()
    assert manager.pool.ref_count[shared] == 2
    manager.free(2)
    manager.free(1)
    assert manager.pool.num_free == 8


def test_tails_are_evicted_before_heads_and_older_before_newer() -> None:
    """A head is of use without its tail, and a tail is of none without its head."""
    manager = cached(6)
    events = events_of(manager)
    compute(manager, 0, A + B + C)
    compute(manager, 1, C + B + A)
    first, second = manager.placement(0).copy(), manager.placement(1).copy()
    manager.free(1)  # used longest ago
    manager.free(0)
    manager.admit(2, [0] * 24, 24)
    manager.append([(2, 24)])
    assert [block_id for what, block_id in events if what == "evicted"] == second[::-1] + first[::-1]


def test_a_hit_makes_a_block_recent_again() -> None:
    manager = cached(4)
    compute(manager, 0, A)
    manager.free(0)
    compute(manager, 1, B)
    manager.free(1)
    compute(manager, 2, [*A, 1])  # hits the older block
    manager.free(2)
    compute(manager, 3, [0] * 12)  # two are free: one known block has to go, and that is B's
    manager.free(3)
    assert manager.admit(4, [*B, 1], 8) == 0
    assert manager.admit(5, [*A, 1], 8) == 4


def test_same_step_duplicates_stay_private_and_never_dangle() -> None:
    """Two prompts alike, computed in one step: the first to commit is known, the other keeps its own blocks."""
    manager = cached()
    events = events_of(manager)
    prompt = A + B + [1]
    assert manager.admit(0, prompt, 12) == manager.admit(1, prompt, 12) == 0  # nothing is written yet
    manager.append([(0, 9)])
    manager.append([(1, 9)])
    manager.commit(0, prompt, 9)
    manager.commit(1, prompt, 9)
    first, second = manager.placement(0).copy(), manager.placement(1).copy()
    assert not set(first) & set(second)
    assert [block_id for what, block_id in events if what == "cached"] == first[:2]
    manager.free(0)  # the known ones are cached now
    manager.check_integrity()
    manager.admit(2, [0] * 20, 24)
    manager.append([(2, 20)])  # evicts a known block, though 1 has the same content
    manager.check_integrity()
    assert manager.placement(1) == second
    assert not set(manager.placement(2)) & set(second)
    manager.free(1)  # private: free immediately, and no lookup finds them
    manager.check_integrity()
    assert set(second) <= set(manager.pool.free_blocks)


def test_a_duplicate_does_not_take_over_when_the_known_block_is_evicted() -> None:
    manager = cached(3)
    prompt = [*A, 1]
    for seq_id in (0, 1):
        manager.admit(seq_id, A, 4)
        manager.append([(seq_id, 4)])
    for seq_id in (0, 1):
        manager.commit(seq_id, A, 4)
    manager.free(0)
    compute(manager, 2, [0] * 8)  # the known block is evicted
    manager.free(2)
    assert manager.admit(3, prompt, 8) == 0
    manager.check_integrity()


def test_no_stale_hit_after_a_block_got_other_content() -> None:
    manager = cached(2)
    compute(manager, 0, A + B)
    blocks = set(manager.placement(0))
    manager.free(0)
    compute(manager, 1, C + B)  # the same two blocks, other tokens in them
    assert set(manager.placement(1)) == blocks
    manager.free(1)
    assert manager.admit(2, A + B, 8) == 0
    manager.free(2)
    assert manager.admit(3, C + B, 8) == 4


def test_a_block_that_a_truncated_sequence_writes_again_is_not_found_any_more() -> None:
    manager = cached()
    events = events_of(manager)
    compute(manager, 0, A + B)
    manager.fork(0, 1)
    manager.truncate(0, 6)
    manager.commit(1, A + B, 8)  # block 1 is still full in this table
    manager.free(1)
    assert manager.append([(0, 2)]) == []  # other tokens than the last two of B, in place
    assert events == [("cached", 0), ("cached", 1), ("evicted", 1)]
    assert manager.admit(2, A + B + C, 16) == 4
    manager.check_integrity()


def test_only_written_blocks_are_found() -> None:
    """A block that has room for tokens, but whose K and V are not computed yet, must not be hit."""
    manager = cached()
    prompt = A + B + C
    manager.admit(0, prompt, 16)
    manager.append([(0, 12)])
    assert manager.admit(1, prompt, 16) == 0
    manager.commit(0, prompt, 7)  # a chunk: one full block, and three tokens of the next
    assert manager.admit(2, prompt, 16) == 4
    manager.commit(0, prompt, 8)
    assert manager.admit(3, prompt, 16) == 8
    manager.check_integrity()


def test_what_was_generated_is_found_too() -> None:
    """The next turn of a conversation begins with the prompt and the answer of the last."""
    manager = cached()
    tokens = A.copy()
    compute(manager, 0, tokens)
    for token in B + C:
        manager.append([(0, 1)])
        tokens.append(token)
        manager.commit(0, tokens, len(tokens))
    manager.free(0)
    assert manager.admit(1, A + B + C + [1], 20) == 12


def test_forks_are_cached_once_and_go_on_apart() -> None:
    manager = cached()
    compute(manager, 0, A + B[:2])
    manager.fork(0, 1)
    manager.append([(0, 2), (1, 2)])
    manager.commit(0, A + B, 8)
    manager.commit(1, A + B[:2] + [0, 0], 8)
    manager.check_integrity()
    for seq_id in (0, 1):
        manager.free(seq_id)
    assert manager.admit(2, A + B + [1], 12) == 8
    assert manager.admit(3, A + B[:2] + [0, 0, 1], 12) == 8
    assert manager.placement(2)[0] == manager.placement(3)[0]
    assert manager.placement(2)[1] != manager.placement(3)[1]


def swappable(num_blocks: int, num_host_blocks: int) -> SwappablePagedManager:
    return SwappablePagedManager(CachingBlockPool(num_blocks), BLOCK_SIZE, num_host_blocks)


def test_swapped_out_blocks_stay_known_until_they_are_evicted() -> None:
    manager = swappable(4, 4)
    compute(manager, 0, A + B)
    manager.swap_out([0])
    assert manager.pool.num_free == 4
    assert compute(manager, 1, [*A, 1]) == 4  # the host has a copy; this one is still there
    manager.free(1)
    manager.swap_in([0])
    manager.commit(0, A + B, 8)  # computed already; the new blocks are known where the old ones are not
    manager.check_integrity()


def test_what_comes_back_from_the_host_is_cached_again() -> None:
    manager = swappable(3, 2)
    compute(manager, 0, A + B)
    manager.swap_out([0])
    compute(manager, 1, [0] * 12)  # evicts what was known on the device
    manager.free(1)
    manager.swap_in([0])
    manager.commit(0, A + B, 8)
    manager.check_integrity()
    assert manager.admit(2, [*A, 1], 8) == 4
    assert manager.placement(2)[0] == manager.placement(0)[0]


def test_admission_counts_cached_blocks_that_it_hits_only_once() -> None:
    """Cached blocks that are hit are not room for the rest of the prompt."""
    manager = cached(3)
    compute(manager, 0, A + B)
    manager.free(0)
    before = books(manager)
    with pytest.raises(OutOfBlocks, match="no room for 2 blocks: 1 available"):
        manager.admit(1, A + B + C + [1], 16)
    assert books(manager) == before
    assert manager.admit(1, A + B + C, 12) == 8


# --- a real day of requests ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mooncake() -> list[list[int]]:
    """For each request the ids of its 512-token blocks; leading ids that are equal are a shared prefix."""
    if not TRACE.is_file():
        pytest.skip(f"no ../shared/traces/{TRACE.name} beside the project")
    with gzip.open(TRACE, "rt", encoding="utf-8") as lines:
        return [json.loads(line)["hash_ids"] for line in lines]


def hits_of(requests: Sequence[Sequence[int]], capacity: int) -> int:
    """Leading blocks found, when the least recently used go after each request until `capacity` are left.

    A block of one token stands for a block of 512. The pool has room for the longest request on top.
    """
    longest = max(map(len, requests))
    pool = CachingBlockPool(capacity + longest)
    spare = [pool.allocate() for _ in range(longest)]  # lent to one request after another
    hits = 0
    for keys in requests:
        hits += len(pool.lookup(keys, 1))
        # Blocks behind the first unknown one are used again, too: the least recently used are what is measured.
        found = [pool.block_of.get(digest) for digest in block_digests(keys, 1)]
        for block in found:
            if block is not None:
                pool.share(block)
        num_new = found.count(None)
        for block in spare[:num_new]:
            pool.release(block)
        blocks = [pool.allocate() if block is None else block for block in found]
        for i, known in enumerate(found):
            if known is None:
                pool.filled(blocks, i + 1, keys, 1)
        for block in blocks:
            pool.release(block)
        spare[:num_new] = [pool.allocate() for _ in range(num_new)]
    pool.check_integrity(spare)
    return hits


def test_the_trace_is_the_one_that_was_measured(mooncake: list[list[int]]) -> None:
    assert len(mooncake) == 12_031
    assert sum(len(keys) for keys in mooncake) == 288_500
    assert len({key for keys in mooncake for key in keys}) == 182_790


LRU_CURVE = (1_000, 4.45), (5_000, 11.04), (30_000, 32.57), (50_000, 35.46)


def test_a_cache_that_never_evicts_hits_36_64_percent_of_the_conversations(mooncake: list[list[int]]) -> None:
    hits = hits_of(mooncake, 182_790)
    assert hits == 105_710
    assert round(100 * hits / 288_500, 2) == 36.64


@pytest.mark.parametrize(
    ("capacity", "percent"),
    [(10_000, 21.12), *(pytest.param(*point, marks=pytest.mark.slow) for point in LRU_CURVE)],
)
def test_the_lru_curve_of_the_conversations(mooncake: list[list[int]], capacity: int, percent: float) -> None:
    assert round(100 * hits_of(mooncake, capacity) / 288_500, 2) == percent

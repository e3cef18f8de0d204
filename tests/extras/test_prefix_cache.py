"""The prefix cache: who is known by what, what is given up first, and how often a real day of requests hits."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence

import pytest
from conftest import SHARED

from paged_ref.core.memory.block_pool import OutOfBlocks
from paged_ref.core.memory.paged import PagedManager
from paged_ref.extras.prefix_cache import PrefixCache, block_digests
from paged_ref.timeline.events import BlockCached, Event, SequenceAdmitted, TokensAppended
from paged_ref.timeline.replay import replay, state_of

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


def cached(num_blocks: int = 8, log: list[Event] | None = None) -> PagedManager:
    return PagedManager(num_blocks, BLOCK_SIZE, prefix_cache=True, log=None if log is None else log.append)


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


# --- the cache itself ----------------------------------------------------------------------------------


def test_a_match_ends_at_the_first_unknown_key() -> None:
    cache = PrefixCache()
    for block, key in enumerate("abd"):
        assert cache.insert(key, block)
    assert cache.match("abcd") == [0, 1]
    assert cache.match("cab") == []
    assert cache.match("") == []


def test_the_first_block_of_a_key_wins() -> None:
    cache = PrefixCache()
    assert cache.insert("a", 3)
    assert not cache.insert("a", 5)
    assert cache.match("a") == [3]
    assert cache.knows(3)
    assert not cache.knows(5)
    cache.check_integrity()


def test_the_least_recently_used_block_is_given_up_first() -> None:
    cache = PrefixCache()
    for block, key in enumerate("abc"):
        cache.insert(key, block)
        cache.now_idle(block)
    cache.now_used(0)
    cache.now_idle(0)  # used again: now the last to go
    assert [cache.evict() for _ in range(3)] == [1, 2, 0]
    assert cache.match("abc") == []
    assert not cache.knows(0)
    cache.check_integrity()


def test_a_block_in_use_is_never_given_up() -> None:
    cache = PrefixCache()
    for block, key in enumerate("ab"):
        cache.insert(key, block)
        cache.now_idle(block)
    cache.now_used(0)
    assert cache.evict() == 1
    with pytest.raises(KeyError):
        cache.evict()
    assert cache.match("a") == [0]


def test_integrity_finds_a_key_without_its_block_and_an_idle_stranger() -> None:
    cache = PrefixCache()
    cache.insert("a", 0)
    cache.block_of["b"] = 0
    with pytest.raises(AssertionError, match="do not point at each other"):
        cache.check_integrity()
    cache = PrefixCache()
    cache.now_idle(7)
    with pytest.raises(AssertionError, match="knows nothing of"):
        cache.check_integrity()


# --- in the manager ------------------------------------------------------------------------------------


def test_a_freed_prompt_is_found_again_in_the_same_blocks() -> None:
    manager = cached()
    assert compute(manager, 0, A + B + [1]) == 0
    blocks = manager.block_table(0).copy()
    manager.free(0)
    assert manager.cache is not None
    assert set(manager.cache.idle) == set(blocks[:2])  # the third was not full
    assert manager.pool.num_free == 6
    assert manager.num_available == 8
    assert compute(manager, 1, A + B + [2]) == 8
    assert manager.block_table(1)[:2] == blocks[:2]
    assert not manager.cache.idle
    usage = manager.snapshot().usage({})
    assert (usage.tokens, usage.cached) == (9, 0)


def test_idle_blocks_count_as_cached_and_the_parts_sum_to_the_pool() -> None:
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
    assert manager.block_table(1)[0] == manager.block_table(0)[0]
    assert manager.block_table(1)[1] != manager.block_table(0)[1]
    assert manager.slots(1, 4, 4) != manager.slots(0, 4, 4)


def test_a_block_in_use_by_others_is_hit_and_counted() -> None:
    manager = cached()
    compute(manager, 0, [*A, 1])
    assert compute(manager, 1, [*A, 2]) == 4
    assert compute(manager, 2, [*A, 3]) == 4
    shared = manager.block_table(0)[0]
    assert manager.block_table(1)[0] == manager.block_table(2)[0] == shared
    assert manager.pool.ref_count[shared] == 3
    assert manager.snapshot().shared == 2 * BLOCK_SIZE
    manager.free(0)  # who came first may go first
    manager.check_integrity()
    assert manager.pool.ref_count[shared] == 2
    manager.free(2)
    manager.free(1)
    assert manager.num_available == 8


def test_tails_are_given_up_before_heads_and_older_before_newer() -> None:
    """A head is of use without its tail, and a tail is of none without its head."""
    events: list[Event] = []
    manager = cached(6, events)
    compute(manager, 0, A + B + C)
    compute(manager, 1, C + B + A)
    first, second = manager.block_table(0).copy(), manager.block_table(1).copy()
    manager.free(1)  # used longest ago
    manager.free(0)
    manager.admit(2, [0] * 24, 24)
    manager.append([(2, 24)])
    appended = events[-1]
    assert isinstance(appended, TokensAppended)
    assert list(appended.evicted) == second[::-1] + first[::-1]
    assert replay(events) == state_of(manager)


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
    events: list[Event] = []
    manager = cached(log=events)
    prompt = A + B + [1]
    assert manager.admit(0, prompt, 12) == manager.admit(1, prompt, 12) == 0  # nothing is written yet
    manager.append([(0, 9)])
    manager.append([(1, 9)])
    manager.commit(0, prompt, 9)
    manager.commit(1, prompt, 9)
    first, second = manager.block_table(0).copy(), manager.block_table(1).copy()
    assert not set(first) & set(second)
    assert [event.block_id for event in events if isinstance(event, BlockCached)] == first[:2]
    manager.free(0)  # the known ones are idle now
    manager.check_integrity()
    manager.admit(2, [0] * 20, 24)
    manager.append([(2, 20)])  # gives up a known block, though 1 has the same content
    manager.check_integrity()
    assert manager.block_table(1) == second
    assert not set(manager.block_table(2)) & set(second)
    manager.free(1)  # private: free at once, and nobody finds them
    manager.check_integrity()
    assert set(second) <= set(manager.pool.free_blocks)
    assert replay(events) == state_of(manager)


def test_a_duplicate_does_not_take_over_when_the_known_block_is_given_up() -> None:
    manager = cached(3)
    prompt = [*A, 1]
    for seq_id in (0, 1):
        manager.admit(seq_id, A, 4)
        manager.append([(seq_id, 4)])
    for seq_id in (0, 1):
        manager.commit(seq_id, A, 4)
    manager.free(0)
    compute(manager, 2, [0] * 8)  # the known block is given up
    manager.free(2)
    assert manager.admit(3, prompt, 8) == 0
    manager.check_integrity()


def test_no_stale_hit_after_a_block_got_other_content() -> None:
    manager = cached(2)
    compute(manager, 0, A + B)
    blocks = set(manager.block_table(0))
    manager.free(0)
    compute(manager, 1, C + B)  # the same two blocks, other tokens in them
    assert set(manager.block_table(1)) == blocks
    manager.free(1)
    assert manager.admit(2, A + B, 8) == 0
    manager.free(2)
    assert manager.admit(3, C + B, 8) == 4


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


def test_forks_are_told_to_the_cache_once_and_go_on_apart() -> None:
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
    assert manager.block_table(2)[0] == manager.block_table(3)[0]
    assert manager.block_table(2)[1] != manager.block_table(3)[1]


def test_swapped_out_blocks_stay_known_until_they_are_given_up() -> None:
    events: list[Event] = []
    manager = PagedManager(4, BLOCK_SIZE, prefix_cache=True, num_host_blocks=4, log=events.append)
    compute(manager, 0, A + B)
    manager.swap_out([0])
    assert manager.num_available == 4
    assert compute(manager, 1, [*A, 1]) == 4  # the host has a copy; this one is still there
    manager.free(1)
    manager.swap_in([0])
    manager.commit(0, A + B, 8)  # computed already; the new blocks are known where the old ones are not
    manager.check_integrity()
    assert replay(events) == state_of(manager)


def test_what_comes_back_from_the_host_is_told_to_the_cache_again() -> None:
    manager = PagedManager(3, BLOCK_SIZE, prefix_cache=True, num_host_blocks=2)
    compute(manager, 0, A + B)
    manager.swap_out([0])
    compute(manager, 1, [0] * 12)  # gives up what was known on the device
    manager.free(1)
    manager.swap_in([0])
    manager.commit(0, A + B, 8)
    manager.check_integrity()
    assert manager.admit(2, [*A, 1], 8) == 4
    assert manager.block_table(2)[0] == manager.block_table(0)[0]


def test_admission_counts_idle_blocks_that_it_hits_only_once() -> None:
    """Idle blocks that are hit are not room for the rest of the prompt."""
    manager = cached(3)
    compute(manager, 0, A + B)
    manager.free(0)
    before = state_of(manager)
    with pytest.raises(OutOfBlocks, match="13 tokens need 2 blocks; 1 can be had"):
        manager.admit(1, A + B + C + [1], 16)
    assert state_of(manager) == before
    assert manager.admit(1, A + B + C, 12) == 8


def test_whoever_has_the_device_alone_may_take_all_of_it_past_the_watermark() -> None:
    """Sequences on the host hold nothing on the device: nothing is kept for them, or nobody could begin."""
    manager = PagedManager(4, BLOCK_SIZE, num_host_blocks=1, watermark=1)
    manager.admit(0, A, 8)
    manager.append([(0, 4)])
    with pytest.raises(OutOfBlocks, match="12 tokens need 3 blocks; 3 can be had, and 1 are kept"):
        manager.admit(1, A + B + C, 12)
    manager.swap_out([0])
    assert manager.admit(1, [0] * 16, 16) == 0
    manager.append([(1, 16)])
    manager.free(1)
    manager.swap_in([0])
    manager.check_integrity()


def test_events_tell_what_was_found() -> None:
    events: list[Event] = []
    manager = cached(log=events)
    compute(manager, 0, A + B)
    compute(manager, 1, A + C)
    admitted = [event for event in events if isinstance(event, SequenceAdmitted)]
    assert [(event.seq_id, event.length) for event in admitted] == [(0, 0), (1, 4)]
    assert admitted[1].blocks == (manager.block_table(0)[0],)
    assert replay(events) == state_of(manager)


# --- a real day of requests ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mooncake() -> list[list[int]]:
    """For each request the ids of its 512-token blocks; leading ids that are equal are a shared prefix."""
    if not TRACE.is_file():
        pytest.skip(f"no ../shared/traces/{TRACE.name} beside the project")
    with gzip.open(TRACE, "rt", encoding="utf-8") as lines:
        return [json.loads(line)["hash_ids"] for line in lines]


def hits_of(requests: Sequence[Sequence[int]], capacity: int | None) -> int:
    """Leading blocks found, when the least recently used go after each request until `capacity` are left."""
    cache = PrefixCache()
    hits = next_block = 0
    for keys in requests:
        hits += len(cache.match(keys))
        for key in keys:
            block = cache.block_of.get(key)
            if block is None:
                block, next_block = next_block, next_block + 1
                cache.insert(key, block)
            else:
                cache.now_used(block)
            cache.now_idle(block)
        while capacity is not None and len(cache.idle) > capacity:
            cache.evict()
    cache.check_integrity()
    return hits


def test_the_trace_is_the_one_that_was_measured(mooncake: list[list[int]]) -> None:
    assert len(mooncake) == 12_031
    assert sum(len(keys) for keys in mooncake) == 288_500
    assert len({key for keys in mooncake for key in keys}) == 182_790


def test_a_cache_that_never_evicts_hits_36_64_percent_of_the_conversations(mooncake: list[list[int]]) -> None:
    hits = hits_of(mooncake, None)
    assert hits == 105_710
    assert round(100 * hits / 288_500, 2) == 36.64


@pytest.mark.parametrize(
    ("capacity", "percent"), [(1_000, 4.45), (5_000, 11.04), (10_000, 21.12), (30_000, 32.57), (50_000, 35.46)]
)
def test_the_lru_curve_of_the_conversations(mooncake: list[list[int]], capacity: int, percent: float) -> None:
    assert round(100 * hits_of(mooncake, capacity) / 288_500, 2) == percent

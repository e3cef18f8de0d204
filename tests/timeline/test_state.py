"""The state of a run follows its events, decides nothing, and refuses events that contradict earlier ones."""

from __future__ import annotations

import random

import pytest
from support.logged_managers import logged_paged
from support.manager_state import replay, state_of

from paged_ref.core.memory.block_pool import OutOfBlocks
from paged_ref.core.memory.manager import KVCacheManager
from paged_ref.timeline.events import (
    BlockCached,
    Event,
    PoolOpened,
    RegionPlaced,
    RegionSwappedIn,
    RegionSwappedOut,
    SequenceAdmitted,
    SequenceForked,
    SequenceFreed,
    StepTimed,
    SwappedIn,
    SwappedOut,
    TokensAppended,
)

# --- logs that contradict themselves -------------------------------------------------------------------

OPENED = PoolOpened("paged", 4, 2, 2, (0, 1, 2, 3))
REGIONS = PoolOpened("swapping", 32, 1, 16, ())


def begun(seq_id: int, *blocks: int) -> list[Event]:
    """A sequence that fills the blocks."""
    return [SequenceAdmitted(seq_id, (), 0), TokensAppended(seq_id, 2 * len(blocks), blocks)]


@pytest.mark.parametrize(
    ("log", "bad", "message"),
    [
        ([OPENED], OPENED, "opened before"),
        ([], SequenceAdmitted(0, (1,), 2), "block 1 is not in the pool"),
        ([OPENED], TokensAppended(5, 1, (0,)), "sequence 5 is not there"),
        ([OPENED, *begun(0, 1)], TokensAppended(0, 1, (1,)), "block 1 is not free"),
        ([OPENED, *begun(0, 1)], TokensAppended(0, 1, (4,)), "block 4 is not in the pool"),
        ([OPENED, *begun(0)], TokensAppended(0, 3, (0,)), "sequence 0 of length 3 has 1 block"),
        ([OPENED, *begun(0)], TokensAppended(0, 1, (0, 1)), "sequence 0 of length 1 has 2 blocks"),
        ([OPENED, *begun(0, 0, 1, 2, 3)], TokensAppended(0, 1, (0,)), "block 0 is not free"),
        ([OPENED, *begun(0, 0)], TokensAppended(0, 2, (1,), (), (1,)), "block 1 is not cached"),
        ([OPENED, *begun(0, 0)], TokensAppended(0, 0, (), (3, 1)), "block 3 was copied; the last .* is 0"),
        ([OPENED, *begun(0, 0), *begun(1, 1)], TokensAppended(0, 0, (), (0, 1)), "block 1 is not free"),
        ([OPENED, *begun(0, 0)], TokensAppended(0, 0, (), (0,)), "not enough values"),
        ([OPENED, *begun(0, 0)], SequenceAdmitted(0, (), 0), "sequence 0 is there already"),
        ([OPENED, *begun(0, 0)], SequenceAdmitted(1, (1,), 2), "block 1 is free"),
        ([OPENED, *begun(0, 0)], SequenceAdmitted(1, (-4,), 2), "block -4 is not in the pool"),
        ([OPENED, *begun(0, 0)], SequenceAdmitted(1, (9,), 2), "block 9 is not in the pool"),
        ([OPENED, *begun(0, 0)], SequenceAdmitted(1, (0,), 6), "sequence 1 of length 6 has 1 block"),
        ([OPENED, *begun(0, 0)], SequenceForked(3, 1), "sequence 3 is not there"),
        ([OPENED, *begun(0, 0), *begun(1, 1)], SequenceForked(0, 1), "sequence 1 is there already"),
        ([OPENED, *begun(0, 0), SequenceFreed(0)], SequenceFreed(0), "sequence 0 is not there"),
        ([OPENED, *begun(0, 0)], BlockCached(1, "ab"), "block 1 is in no table"),
        ([OPENED, *begun(0, 0)], BlockCached(7, "ab"), "block 7 is not in the pool"),
        ([OPENED, *begun(0, 0)], BlockCached(-1, "ab"), "block -1 is not in the pool"),
        ([OPENED, *begun(0, 0)], SwappedOut((0,), ()), "block 0 of sequence 0 is not among the blocks that moved"),
        (
            [OPENED, *begun(0, 0), SwappedOut((0,), ((0, 1),)), *begun(1, 0)],
            SwappedOut((1,), ((0, 1),)),
            "block 1 is not free",
        ),
        ([OPENED, *begun(0, 0)], SwappedOut((0,), ((0, 2),)), "block 2 is not in the pool"),
        ([OPENED, *begun(0, 0)], SwappedIn((0,), ((0, 1),)), "sequence 0 is on the device"),
        ([OPENED, *begun(0, 0), SwappedOut((0,), ((0, 0),))], SwappedOut((0,), ((0, 1),)), "0 is on the host"),
        ([OPENED, *begun(0, 0), SwappedOut((0,), ((0, 0),))], TokensAppended(0, 1, (0,)), "0 is on the host"),
        ([OPENED, *begun(0, 0), SwappedOut((0,), ((0, 0),))], SequenceForked(0, 1), "0 is on the host"),
        (
            [OPENED, *begun(0, 0), SwappedOut((0,), ((0, 0),)), *begun(1, 3)],
            SwappedIn((0,), ((0, 3),)),
            "block 3 is not free",
        ),
        ([REGIONS], RegionPlaced(0, 30, 4), "slots 30 to 33 are not all in the pool"),
        ([REGIONS], RegionPlaced(0, -1, 4), "slots -1 to 2 are not all in the pool"),
        ([REGIONS, RegionPlaced(0, 0, 8)], RegionPlaced(1, 7, 8), "sequences 1 and 0 lie in the same slots"),
        ([REGIONS, RegionPlaced(0, 0, 8)], TokensAppended(0, 9), "sequence 0 of length 9 has a region of 8"),
        ([REGIONS, RegionPlaced(0, 0, 8)], RegionSwappedIn(0, 0, 8), "sequence 0 is on the device"),
        ([REGIONS, RegionPlaced(0, 0, 8)], RegionSwappedOut(0, 16, 8), "slots 16 to 23 are not all in the pool"),
        ([REGIONS, RegionPlaced(0, 0, 8), RegionSwappedOut(0, 0, 8)], RegionPlaced(0, 0, 16), "0 is on the host"),
        ([REGIONS], RegionSwappedOut(0, 0, 8), "sequence 0 is not there"),
    ],
)
def test_replay_stops_at_the_event_that_contradicts_what_came_before(
    log: list[Event], bad: Event, message: str
) -> None:
    passed_over = [StepTimed(0, 1)]  # the engine's events count, though they change no memory
    replay([*passed_over, *log])
    number = len(log) + 2
    place = f"^event {number}, {type(bad).__name__}, does not fit what came before: .*{message}"
    with pytest.raises(ValueError, match=place):
        replay([*passed_over, *log, bad, StepTimed(1, 1)])


def random_log(seed: int) -> tuple[list[Event], KVCacheManager]:
    """A small paged life with everything in it."""
    rng = random.Random(seed)
    events: list[Event] = []
    manager = logged_paged(events.append, 8, 2, num_host_blocks=4, prefix_cache=True)
    tokens: dict[int, list[int]] = {}
    swapped: set[int] = set()
    for step in range(60):
        seq_id = rng.choice(list(tokens)) if tokens else -1
        on_host = seq_id in swapped
        choice = rng.random()
        try:
            if choice < 0.3 or not tokens:
                prompt = [rng.randrange(2) for _ in range(rng.randrange(1, 6))]
                known = manager.admit(step, prompt, 20)
                tokens[step] = prompt
                manager.append([(step, len(prompt) - known)])
                manager.commit(step, prompt, len(prompt))
            elif choice < 0.5 and not on_host:
                manager.append([(seq_id, 1)])
                tokens[seq_id].append(rng.randrange(2))
            elif choice < 0.65 and not on_host:
                manager.fork(seq_id, step)
                tokens[step] = tokens[seq_id].copy()
            elif choice < 0.85:
                (manager.swap_in if on_host else manager.swap_out)([seq_id])
                swapped ^= {seq_id}
            else:
                manager.free(seq_id)
                del tokens[seq_id]
                swapped.discard(seq_id)
        except OutOfBlocks:
            pass
    return events, manager


@pytest.mark.parametrize("seed", range(5))
def test_every_event_is_needed_and_few_can_be_lost_or_doubled_unnoticed(seed: int) -> None:
    """A lost append inside a block, of a sequence that is freed later, cannot be noticed; most can."""
    events, manager = random_log(seed)
    assert replay(events) == state_of(manager)
    stopped = 0
    for i, event in enumerate(events):
        if not (isinstance(event, TokensAppended) and event.count == 0):
            assert replay(events[:i]) != replay(events[: i + 1])
        for changed in (events[:i] + events[i + 1 :], events[: i + 1] + events[i:]):
            try:
                replay(changed)
            except ValueError:
                stopped += 1
    assert stopped > len(events)


def test_a_log_may_hand_out_blocks_in_any_order() -> None:
    """Which free block is taken is the manager's decision; the state follows it."""
    memory = replay([OPENED, *begun(0, 2, 0), SequenceForked(0, 1), SwappedOut((0, 1), ((2, 1), (0, 0)))])
    assert [place.blocks for place in memory.sequences.values()] == [[1, 0], [1, 0]]
    assert memory.host.ref_count == [2, 2]
    assert sorted(memory.free) == [0, 1, 2, 3]

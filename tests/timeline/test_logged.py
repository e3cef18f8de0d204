"""What the log of a manager says is what the manager holds, after every operation, for all managers."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support.manager_state import replay, state_of

import paged_ref
from paged_ref import SamplingParams
from paged_ref.core.engine.engine import Engine
from paged_ref.core.engine.llm import LLM
from paged_ref.core.engine.scheduler import Scheduler
from paged_ref.core.memory.block_pool import BlockPool, OutOfBlocks
from paged_ref.core.memory.manager import KVCacheManager
from paged_ref.core.memory.paged import PagedManager
from paged_ref.core.memory.standard import StandardManager
from paged_ref.extras.buddy import BuddyPool
from paged_ref.extras.host_swap import SwappablePagedManager
from paged_ref.extras.prefix_cache import CachingBlockPool
from paged_ref.extras.swapping import SwappingManager
from paged_ref.timeline.events import (
    BlockCached,
    Event,
    ModelOpened,
    PoolCleared,
    PoolOpened,
    RegionPlaced,
    RegionSwappedIn,
    RegionSwappedOut,
    RequestArrived,
    SequenceAdmitted,
    SequenceFinished,
    SequenceForked,
    SequenceFreed,
    SequenceTruncated,
    StepPlanned,
    StepTimed,
    SwappedIn,
    SwappedOut,
    TokenNamed,
    TokenSampled,
    TokensAppended,
)
from paged_ref.timeline.logged import LoggedManager, LoggedSteps
from paged_ref.timeline.state import RunState

MANAGERS: dict[str, Callable[[random.Random], KVCacheManager]] = {
    "paged": lambda rng: PagedManager(BlockPool(10), rng.choice([1, 2, 4])),
    "paged, free order": lambda rng: PagedManager(BlockPool(10, rng.sample(range(10), 10)), 2, watermark=1),
    "paged, prefix cache": lambda rng: PagedManager(CachingBlockPool(10), 2),
    "paged, prefix cache, swap": lambda rng: SwappablePagedManager(CachingBlockPool(10), 2, 6),
    "standard": lambda rng: StandardManager(40, 12, rng.choice(["max", "pow2", "exact"])),
    "standard, buddy": lambda rng: StandardManager(64, 12, "pow2", BuddyPool(64)),
    "swapping": lambda rng: SwappingManager(24, 16, alignment=rng.choice([1, 4])),
}


class Life:
    """Random operations on a logged manager; its state is followed from the events."""

    def __init__(self, manager: KVCacheManager, rng: random.Random) -> None:
        self.events: list[Event] = []
        self.manager = LoggedManager(manager, self.events.append)
        self.rng = rng
        self.tokens: dict[int, list[int]] = {}
        self.on_host: set[int] = set()
        self.next_id = 0
        self.refused = 0

    def operate(self) -> None:
        """One operation that the manager may refuse."""
        rng, device = self.rng, [seq_id for seq_id in self.tokens if seq_id not in self.on_host]
        choice = rng.random()
        if rng.random() < 0.02:
            self.manager.clear()
            self.tokens.clear()
            self.on_host.clear()
            return
        if choice < 0.3 or not device:
            self.admit()
        elif choice < 0.6:
            some = rng.sample(device, min(len(device), rng.choice([1, 1, 2])))
            self.append([(seq_id, rng.choice([1, 1, 3])) for seq_id in some])
        elif choice < 0.7 and self.manager.can_fork:
            parent = rng.choice(device)
            self.manager.fork(parent, self.next_id)
            self.tokens[self.next_id] = self.tokens[parent].copy()
            self.next_id += 1
        elif choice < 0.8 and self.manager.can_swap:
            some = rng.sample(device, min(len(device), rng.choice([1, 2])))
            self.manager.swap_out(some)
            self.on_host.update(some)
        elif choice < 0.9 and self.on_host:
            some = [rng.choice(list(self.on_host))]
            self.manager.swap_in(some)
            self.on_host.difference_update(some)
        elif choice < 0.95 and self.manager.paged:
            seq_id = rng.choice(device)
            length = rng.randrange(len(self.tokens[seq_id]) + 1)
            self.manager.truncate(seq_id, length)
            del self.tokens[seq_id][length:]
        else:
            seq_id = rng.choice(list(self.tokens))
            self.manager.free(seq_id)
            self.on_host.discard(seq_id)
            del self.tokens[seq_id]

    def admit(self) -> None:
        tokens = [self.rng.randrange(2) for _ in range(self.rng.randrange(1, 9))]
        known = self.manager.admit(self.next_id, tokens, 12)
        self.tokens[self.next_id] = tokens[:known]
        self.next_id += 1
        self.append([(self.next_id - 1, len(tokens) - known)], tokens[known:])

    def append(self, appends: list[tuple[int, int]], tokens: list[int] | None = None) -> None:
        appends = [(seq_id, count) for seq_id, count in appends if len(self.tokens[seq_id]) + count <= 12]
        self.manager.append(appends)
        for seq_id, count in appends:
            self.tokens[seq_id] += tokens or [self.rng.randrange(2) for _ in range(count)]
            self.manager.commit(seq_id, self.tokens[seq_id], len(self.tokens[seq_id]))


def lives(name: str) -> Iterator[tuple[Life, RunState]]:
    """Many short lives, after each operation; a refused operation is not logged."""
    for seed in range(40):
        rng = random.Random(seed)
        life, state, applied = Life(MANAGERS[name](rng), rng), RunState(), 0
        for _ in range(60):
            try:
                life.operate()
            except OutOfBlocks:
                life.refused += 1
            for event in life.events[applied:]:
                state.apply(event)
            applied = len(life.events)
            yield life, state


@pytest.mark.parametrize("name", MANAGERS)
def test_the_log_says_what_the_manager_holds(name: str) -> None:
    refused, kinds = 0, set()
    for life, state in lives(name):
        life.manager.check_integrity()
        assert state.memory == state_of(life.manager)
        assert list(state.memory.cached) == list(state_of(life.manager).cached)
        snapshot = life.manager.snapshot()
        if name not in ("standard, buddy", "standard"):  # what is external depends on the next request
            assert state.memory.snapshot() == snapshot
        refused += life.refused
        kinds |= {type(event) for event in life.events}
    assert refused
    wanted = {PoolOpened, TokensAppended, SequenceFreed, PoolCleared}
    wanted |= {SequenceAdmitted, SequenceForked, SequenceTruncated} if name.startswith("paged") else {RegionPlaced}
    wanted |= {BlockCached} if "prefix" in name else set()
    wanted |= {SwappedOut, SwappedIn} if name.endswith(", swap") else set()
    wanted |= {RegionSwappedOut, RegionSwappedIn} if name == "swapping" else set()
    assert kinds == wanted


def test_the_events_of_each_operation() -> None:
    events: list[Event] = []
    pool = CachingBlockPool(4)
    manager = LoggedManager(SwappablePagedManager(pool, 2, 4), events.append)
    assert events == [PoolOpened("paged", 4, 2, 4, (0, 1, 2, 3))]

    def logged() -> list[Event]:
        found = events.copy()
        events.clear()
        return found

    logged()
    assert manager.admit(0, [1, 2, 3], 6) == 0
    manager.append([(0, 3)])
    assert logged() == [SequenceAdmitted(0, (), 0), TokensAppended(0, 3, (0, 1))]
    manager.commit(0, [1, 2, 3], 3)
    assert logged() == [BlockCached(0, pool.digest_of[0].hex())]
    manager.fork(0, 1)
    manager.append([(0, 1), (1, 1)])  # the first copies the shared block, the second then has it alone
    assert logged() == [SequenceForked(0, 1), TokensAppended(0, 1, (), (1, 2)), TokensAppended(1, 1)]
    with pytest.raises(OutOfBlocks):
        manager.append([(0, 1), (1, 1)])
    assert logged() == []
    manager.swap_out([1, 0])
    assert logged() == [SwappedOut((1, 0), ((0, 0), (1, 1), (2, 2)))]
    manager.swap_in([0])
    assert logged() == [SwappedIn((0,), ((0, 2), (2, 1)))]
    manager.admit(2, [1, 2, 9], 6)
    assert logged() == [SequenceAdmitted(2, (0,), 2)]
    manager.free(2)
    manager.append([(0, 1)])
    manager.append([(0, 2)])  # no block is free any more, so the cached one is evicted
    assert logged() == [SequenceFreed(2), TokensAppended(0, 1, (3,)), TokensAppended(0, 2, (0,), (), (0,))]


def test_a_truncated_sequence_fills_a_known_block_again() -> None:
    events: list[Event] = []
    manager = LoggedManager(PagedManager(CachingBlockPool(4), 2), events.append)
    manager.admit(0, [1, 2, 3, 4], 6)
    manager.append([(0, 4)])
    manager.commit(0, [1, 2, 3, 4], 4)
    manager.truncate(0, 3)
    manager.append([(0, 1)])  # the second block was known, and gets another token
    assert events[-2:] == [SequenceTruncated(0, 3), TokensAppended(0, 1, evicted=(1,))]
    manager.truncate(0, 0)
    assert replay(events) == state_of(manager)
    with pytest.raises(ValueError, match="length is 5; that of sequence 0 is 0"):
        manager.truncate(0, 5)
    assert events[-1] == SequenceTruncated(0, 0)
    with pytest.raises(NotImplementedError, match="SwappingManager cannot truncate a sequence"):
        LoggedManager(SwappingManager(12), print).truncate(0, 0)


def test_an_admission_says_what_was_found() -> None:
    events: list[Event] = []
    manager = LoggedManager(PagedManager(CachingBlockPool(8), 4), events.append)
    for seq_id, tokens in enumerate(([1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 9, 10, 11, 12])):
        known = manager.admit(seq_id, tokens, 16)
        manager.append([(seq_id, len(tokens) - known)])
        manager.commit(seq_id, tokens, len(tokens))
    admitted = [event for event in events if isinstance(event, SequenceAdmitted)]
    assert [(event.seq_id, event.length) for event in admitted] == [(0, 0), (1, 4)]
    assert admitted[1].blocks == (manager.placement(0)[0],)
    assert replay(events) == state_of(manager)


def test_the_events_of_regions() -> None:
    events: list[Event] = []
    manager = LoggedManager(SwappingManager(12, 8, alignment=4), events.append)
    manager.admit(0, [1] * 4, 12)
    manager.append([(0, 4)])
    manager.append([(0, 1)])  # grows in place
    manager.swap_out([0])
    manager.swap_in([0])
    manager.free(0)
    assert events == [
        PoolOpened("swapping", 12, 1, 8, ()),
        RegionPlaced(0, 0, 4),
        TokensAppended(0, 4),
        RegionPlaced(0, 0, 8),
        TokensAppended(0, 1),
        RegionSwappedOut(0, 0, 5),
        RegionSwappedIn(0, 0, 8),
        SequenceFreed(0),
    ]
    events.clear()
    LoggedManager(StandardManager(32, 8), events.append)
    assert events == [PoolOpened("standard", 32, 1, 0, ())]


def test_a_manager_without_tables_and_regions_is_refused() -> None:
    manager = LoggedManager(PagedManager(BlockPool(4), 2), print)
    with pytest.raises(ValueError, match="LoggedManager is no PagedManager and no RegionManager; it cannot be logged"):
        LoggedManager(manager, print)


# --- an engine ---------------------------------------------------------------------------------------------


def test_the_steps_of_an_engine_are_logged_in_their_order() -> None:
    events: list[Event] = []
    llm = LLM()
    scheduler = Scheduler(LoggedManager(llm.engine.manager, events.append), 512, 16)
    steps = LoggedSteps(events.append, llm.tokenizer, scheduler)
    engine = Engine(llm.engine.model, llm.engine.kv, scheduler, llm.config.eos_token_ids, [steps])
    steps.model_opened("tiny", 7)
    llm.open(engine, llm.config, llm.tokenizer, 64)
    prompt = llm.tokenizer.encode("Four score")
    (output,) = llm.generate("Four score", None)
    tokens = output.outputs[0].token_ids
    assert [type(event) for event in events[:2]] == [PoolOpened, ModelOpened]
    named = [event for event in events if isinstance(event, TokenNamed)]
    assert len(named) == len({*prompt, *tokens}) == len({event.token_id for event in named})
    rest = [event for event in events[2:] if not isinstance(event, TokenNamed)]
    assert rest[0] == RequestArrived(0, (0,), tuple(prompt))
    kinds = [type(event) for event in rest[1:]]
    assert kinds[:5] == [SequenceAdmitted, TokensAppended, StepPlanned, TokenSampled, StepTimed]
    assert kinds[5 : 5 + 4] == [TokensAppended, StepPlanned, TokenSampled, StepTimed]
    assert kinds[-4:] == [TokenSampled, SequenceFreed, SequenceFinished, StepTimed]
    assert [event.token_id for event in rest if isinstance(event, TokenSampled)] == tokens
    planned = [event for event in rest if isinstance(event, StepPlanned)]
    assert planned[0] == StepPlanned(0, ((0, len(prompt)),))
    assert [event.step for event in planned] == list(range(len(tokens)))
    assert [event.step for event in rest if isinstance(event, StepTimed)] == list(range(len(tokens)))
    # Without the log, the tokens are the same.
    assert LLM().generate("Four score", None)[0].outputs[0].token_ids == tokens


@pytest.mark.parametrize("manager", ["paged", "standard", "swapping", "streaming"])
def test_a_step_that_is_undone_is_undone_in_the_state(manager: Any) -> None:
    """Forks, beams, ends and tokens of the step, and hits in the prefix cache before and after."""
    events: list[Event] = []
    failing = False

    def on_step(record: object) -> None:
        if failing:
            raise OSError("the disk is full")

    options: dict[str, Any] = {"manager": manager, "block_size": 4, "kv_cache_tokens": 200}
    options |= {"prefix_cache": True} if manager == "paged" else {"reserve": "exact"}
    if manager == "streaming":
        options = {"device_blocks": 4, "host_blocks": 40, "block_size": 4, "max_model_len": 48}
    llm = paged_ref.LLM("tiny", log=events.append, on_step=on_step, **options)
    samples = SamplingParams(max_tokens=9, temperature=0.9, seed=1, n=3, ignore_eos=True)
    beams = SamplingParams(max_tokens=8, beam_width=3) if manager == "paged" else SamplingParams(max_tokens=8)
    outputs = [llm.output_of(llm.add_request("Once upon a time", params)) for params in (samples, beams)]
    state, applied, number = RunState(), 0, 0
    while llm.has_unfinished:
        number += 1
        failing = number in (1, 3, 8, 10)  # to compute all again takes more than one step
        if failing:
            with pytest.raises(OSError, match="the disk is full"):
                llm.step()
        else:
            llm.step()
        for event in events[applied:]:
            state.apply(event)
        applied = len(events)
        assert state.memory == state_of(llm.engine.manager)
        unfinished = {
            seq.seq_id: seq.tokens for request in llm.engine.requests.values() for seq in request.unfinished()
        }
        views = {view.seq_id: view.tokens for view in state.sequences.values() if view.status != "finished"}
        assert views == unfinished
    assert number > 10
    ended = [view.tokens[view.prompt_len :] for view in state.sequences.values() if view.reason == "length"]
    wanted = [sample.token_ids for output in outputs for sample in output.outputs if len(sample.token_ids) == 9]
    assert [tokens for tokens in ended if len(tokens) == 9] == wanted

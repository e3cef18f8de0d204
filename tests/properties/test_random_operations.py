"""Random operations on tiny pools: nothing leaks, nobody reads what is not their own, replay never differs.

First small lives that hypothesis makes up and makes smaller when one fails; then a long seeded fuzz of more
than a million operations, on the managers alone and through the scheduler.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from support.watched import Oracle, Watched

from paged_ref.core.engine.scheduler import Preemption, Scheduler
from paged_ref.core.engine.sequence import Group, Sequence, Status
from paged_ref.core.memory.manager import Forkable, KVCacheManager, Swappable
from paged_ref.core.memory.paged import PagedManager
from paged_ref.core.memory.standard import Reserve, StandardManager
from paged_ref.core.memory.swapping import SwappingManager
from paged_ref.timeline.events import Log

# --- lives that hypothesis makes up ----------------------------------------------------------------------

SMALL = settings(max_examples=60, stateful_step_count=50, deadline=None, derandomize=True, database=None)
TOKENS = st.integers(0, 1)  # so few that prompts often begin alike


class Life(RuleBasedStateMachine):
    """What every manager can do. After each rule: integrity, replay, usage, and everyone's own values."""

    watched: Watched

    @rule(data=st.data())
    def admit(self, data: st.DataObject) -> None:
        largest = min(10, self.watched.manager.num_slots)
        tokens = data.draw(st.lists(TOKENS, min_size=1, max_size=largest))
        limit = data.draw(st.integers(len(tokens), min(2 * largest, self.watched.manager.num_slots)))
        self.watched.admit(tokens, limit)

    @precondition(lambda self: self.watched.device())
    @rule(data=st.data(), token=TOKENS)
    def append(self, data: st.DataObject, token: int) -> None:
        largest = 4 if isinstance(self.watched.manager, (PagedManager, StandardManager)) else 1
        ids = data.draw(some_of(self.watched.device(), largest))
        room = [self.watched.limits[seq_id] - self.watched.lengths[seq_id] for seq_id in ids]
        counts = [data.draw(st.integers(0, min(3, most))) for most in room]
        self.watched.append(list(zip(ids, counts, strict=True)), token)

    @precondition(lambda self: self.watched.tokens)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        """At its end, or aborted: on the device or on the host."""
        self.watched.free(data.draw(st.sampled_from(list(self.watched.tokens))))

    @invariant()
    def everything_is_as_it_should_be(self) -> None:
        if hasattr(self, "watched"):
            self.watched.check_everyone()

    def teardown(self) -> None:
        if hasattr(self, "watched"):
            self.watched.end()


class StandardLife(Life):
    @initialize(num_slots=st.integers(8, 24), reserve=st.sampled_from(["max", "pow2", "exact"]))
    def open(self, num_slots: int, reserve: Reserve) -> None:
        self.watched = Watched(lambda log: StandardManager(num_slots, num_slots // 2, reserve, log))


class SwappingLife(Life):
    @initialize(num_slots=st.integers(4, 24), num_host_slots=st.integers(0, 16), granule=st.integers(1, 5))
    def open(self, num_slots: int, num_host_slots: int, granule: int) -> None:
        self.watched = Watched(lambda log: SwappingManager(num_slots, num_host_slots, granule=granule, log=log))

    def to_swap(self) -> list[int]:
        """A sequence is swapped while it wants to grow, and has something to bring along."""
        w = self.watched
        return [seq_id for seq_id in w.device() if 0 < w.lengths[seq_id] < w.manager.num_slots]

    @precondition(lambda self: self.to_swap())
    @rule(data=st.data())
    def swap_out(self, data: st.DataObject) -> None:
        self.watched.swap_out([data.draw(st.sampled_from(self.to_swap()))])

    @precondition(lambda self: self.watched.host)
    @rule(data=st.data())
    def swap_in(self, data: st.DataObject) -> None:
        self.watched.swap_in([data.draw(st.sampled_from(sorted(self.watched.host)))])


class PagedLife(Life):
    @initialize(
        order=st.integers(2, 9).flatmap(lambda n: st.permutations(range(n))),
        block_size=st.integers(1, 4),
        num_host_blocks=st.integers(0, 6),
        watermark=st.integers(0, 2),
        prefix_cache=st.booleans(),
    )
    def open(self, order: list[int], block_size: int, num_host_blocks: int, watermark: int, prefix_cache: bool) -> None:
        self.watched = Watched(
            lambda log: PagedManager(
                len(order),
                block_size,
                free_order=order,
                num_host_blocks=num_host_blocks,
                watermark=watermark,
                prefix_cache=prefix_cache,
                log=log,
            )
        )

    @precondition(lambda self: self.watched.device())
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        seq_id = data.draw(st.sampled_from(self.watched.device()))
        self.watched.commit_some(seq_id, data.draw(st.integers(0, self.watched.lengths[seq_id])))

    @precondition(lambda self: self.watched.device())
    @rule(data=st.data())
    def commit_all(self, data: st.DataObject) -> None:
        seq_id = data.draw(st.sampled_from(self.watched.device()))
        self.watched.commit_some(seq_id, self.watched.lengths[seq_id])

    @precondition(lambda self: self.watched.device())
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        self.watched.fork(data.draw(st.sampled_from(self.watched.device())))

    @precondition(lambda self: self.watched.device())
    @rule(data=st.data())
    def reorder(self, data: st.DataObject) -> None:
        beams = data.draw(some_of(self.watched.device(), 4))
        chosen = data.draw(st.lists(st.sampled_from(beams), min_size=1, max_size=4))
        tokens = data.draw(st.lists(TOKENS, min_size=len(chosen), max_size=len(chosen)))
        self.watched.reorder(beams, chosen, tokens)

    @precondition(lambda self: self.watched.device())
    @rule(data=st.data())
    def swap_out(self, data: st.DataObject) -> None:
        self.watched.swap_out(data.draw(some_of(self.watched.device(), 4)))

    @precondition(lambda self: self.watched.host)
    @rule(data=st.data())
    def swap_in(self, data: st.DataObject) -> None:
        self.watched.swap_in(data.draw(some_of(sorted(self.watched.host), 4)))


def some_of(ids: list[int], most: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.sampled_from(ids), min_size=1, max_size=most, unique=True)


@pytest.mark.parametrize("life", [PagedLife, SwappingLife, StandardLife])
def test_no_short_life_breaks_a_manager(life: type[Life]) -> None:
    run_state_machine_as_test(life, settings=SMALL)


# --- the long fuzz: managers alone -----------------------------------------------------------------------


def prompt_of(rng: random.Random, longest: int) -> list[int]:
    """Few beginnings and many ends."""
    beginning = [rng.randrange(3)] * rng.randrange(longest)
    return beginning + [rng.randrange(3) for _ in range(rng.randrange(1, max(2, longest - len(beginning))))]


def new_manager(kind: str, rng: random.Random, log: Log) -> KVCacheManager:
    """A tiny pool of 16 to 96 slots, with a host pool of up to that size."""
    num_slots = rng.randrange(16, 97)
    if kind == "standard":
        return StandardManager(num_slots, min(24, num_slots), rng.choice(["max", "pow2", "exact"]), log)
    if kind == "swapping":
        return SwappingManager(num_slots, rng.randrange(num_slots), granule=rng.choice([1, 3, 8, 16]), log=log)
    block_size = rng.choice([1, 2, 3, 4, 4, 4, 8])
    num_blocks = num_slots // block_size
    order = list(range(num_blocks))
    rng.shuffle(order)
    return PagedManager(
        num_blocks,
        block_size,
        free_order=order,
        num_host_blocks=rng.randrange(num_blocks + 1),
        watermark=rng.choice([0, 0, 1, 2]),
        prefix_cache=kind == "paged with prefix cache",
        log=log,
    )


def live(watched: Watched, rng: random.Random, num_operations: int) -> None:
    """One random operation after another, until there were so many."""
    manager = watched.manager
    longest = min(24, manager.num_slots)
    paged, swaps = isinstance(manager, Forkable), isinstance(manager, Swappable)
    while watched.num_operations < num_operations:
        device = watched.device()
        choice = rng.random()
        if choice < 0.12 or not device:
            if watched.host and choice < 0.06:
                watched.free(rng.choice(list(watched.host)))  # aborted while swapped
            tokens = prompt_of(rng, min(16, longest))
            watched.admit(tokens, min(len(tokens) + rng.randrange(24), longest))
            if not device and watched.host:  # else a full host pool would keep everyone out
                watched.swap_in([next(iter(watched.host))])
        elif choice < 0.62:
            ids = rng.sample(device, min(len(device), rng.choice([1, 1, 2, 3]))) if paged else [rng.choice(device)]
            appends = []
            for seq_id in ids:
                length = watched.lengths[seq_id]
                most = min(watched.limits[seq_id] - length, max(2, len(watched.tokens[seq_id]) - length))
                appends.append((seq_id, rng.randrange(most + 1)))
            watched.append(appends, rng.randrange(3))
        elif choice < 0.70 and paged:
            seq_id = rng.choice(device)
            length = watched.lengths[seq_id]
            watched.commit_some(seq_id, length if rng.random() < 0.7 else rng.randrange(length + 1))
        elif choice < 0.76 and paged:
            watched.fork(rng.choice(device))
        elif choice < 0.79 and paged:
            beams = rng.sample(device, min(len(device), 4))
            chosen = [rng.choice(beams) for _ in beams]
            watched.reorder(beams, chosen, [rng.randrange(3) for _ in beams])
        elif choice < 0.85 and swaps:
            ids = rng.sample(device, min(len(device), 3)) if paged else [rng.choice(device)]
            if paged or 0 < watched.lengths[ids[0]] < manager.num_slots:
                watched.swap_out(ids)
        elif choice < 0.92 and watched.host:
            ids = rng.sample(sorted(watched.host), min(len(watched.host), 3 if paged else 1))
            watched.swap_in(ids)
        else:
            watched.free(rng.choice(device))
        if not watched.num_operations % 256:
            watched.check_everyone()


OPERATIONS = {"paged": 160_000, "paged with prefix cache": 200_000, "swapping": 140_000, "standard": 100_000}
STEPS_EVENTS = 70_000  # for each way to schedule
PER_LIFE = 4_000


@pytest.mark.parametrize("kind", OPERATIONS)
def test_long_random_lives_leave_nothing_behind(kind: str) -> None:
    rng = random.Random(kind)
    done = refused = 0
    while done < OPERATIONS[kind]:
        watched = Watched(lambda log: new_manager(kind, rng, log))
        live(watched, rng, PER_LIFE)
        watched.end()
        done += watched.num_operations
        refused += watched.num_refused
    assert done >= OPERATIONS[kind]
    assert done // 100 < refused < done // 2  # pools were full at times, and not always


# --- the long fuzz: through the scheduler ----------------------------------------------------------------


@dataclass(eq=False)
class Request:
    """A group, the samples that begin when its prompt is computed, and whether it is a beam search."""

    group: Group
    beams: bool
    to_fork: list[Sequence] = field(default_factory=list)


class Day:
    """Random requests through the real scheduler. Tokens are made up; all else is as in the engine."""

    def __init__(self, kind: str, preemption: Preemption, rng: random.Random) -> None:
        self.rng = rng
        self.oracle = Oracle(lambda log: new_manager(kind, rng, log))
        self.scheduler = Scheduler(
            self.oracle.manager,
            max_batch_tokens=rng.choice([1, 2, 5, 16, 64]),
            max_batch_seqs=rng.randrange(4, 12),
            preemption=preemption,
        )
        self.requests: dict[Group, Request] = {}
        self.next_id = 0
        self.num_preempted = self.num_refused = self.num_hits = 0

    def arrive(self) -> None:
        """A request that fits; one that never could is refused, and leaves no trace."""
        rng, manager = self.rng, self.oracle.manager
        shares = isinstance(manager, Forkable)
        width = rng.choice([1, 1, 2, 3, 4]) if shares else 1
        beams = width > 1 and rng.random() < 0.5
        prompt = prompt_of(rng, 16)
        max_tokens = len(prompt) + rng.randrange(1, 25)
        seqs = [
            Sequence(self.next_id + i, prompt.copy(), len(prompt), max_tokens) for i in range(1 if beams else width)
        ]
        request = Request(Group(seqs[:1], width), beams, seqs[1:])
        try:
            self.scheduler.add(request.group)
        except ValueError:
            self.num_refused += 1
            assert manager.max_slots_needed(len(prompt), max_tokens - 1, width) > manager.num_slots
            assert request.group not in self.scheduler.waiting
            return
        self.next_id += len(seqs)
        self.requests[request.group] = request

    def step(self) -> None:
        """One step of the engine: plan, move, write, read, sample."""
        oracle, scheduler = self.oracle, self.scheduler
        plan = scheduler.schedule()
        oracle.settle()
        assert plan.chunks, "some wait, and nobody runs"
        assert sum(count for _, count in plan.chunks) <= scheduler.max_batch_tokens
        assert sum(len(group.seqs) for group in scheduler.running) <= scheduler.max_batch_seqs
        self.num_preempted += len(plan.preempted)
        oracle.memory.follow(plan.transfers)
        for seq, count in plan.chunks:
            values = oracle.learn(seq.seq_id, seq.tokens)
            oracle.memory.write(seq.seq_id, seq.num_computed, values[seq.num_computed : seq.num_computed + count])
        for seq, count in plan.chunks:
            seq.num_computed += count
            assert oracle.manager.length(seq.seq_id) == seq.num_computed
            oracle.check_read(seq.seq_id, seq.num_computed)
        for seq, _ in plan.chunks:
            oracle.commit(seq.seq_id, seq.tokens, seq.num_computed)
        group_of = {seq.seq_id: group for group in scheduler.running for seq in group.seqs}
        for seq, _ in plan.chunks:
            request = self.requests.get(group_of[seq.seq_id])
            if request is not None and seq.num_uncomputed == 0:
                self.sample(request, seq)
        oracle.settle()

    def sample(self, request: Request, seq: Sequence) -> None:
        """As LLM._take_row: the samples begin, each gets a token, some end."""
        if self.rng.random() < 0.002:
            self.abort(request)  # an exception in a hook
        elif request.beams:
            if all(beam.num_uncomputed == 0 for beam in request.group.seqs):
                self.step_beams(request)
        else:
            group, siblings = request.group, request.to_fork
            for sibling in siblings:
                self.fork(group, seq, sibling)
            request.to_fork = []
            for each in (seq, *siblings):
                each.tokens.append(self.rng.randrange(3))
                if len(each.tokens) >= each.max_tokens or self.rng.random() < 0.03:
                    self.finish(request, each)

    def step_beams(self, request: Request) -> None:
        """As LLM._step_beams: parents chosen twice are forked, those not chosen are freed."""
        group, rng = request.group, self.rng
        beams = group.seqs.copy()
        if len(beams[0].tokens) + 1 >= beams[0].max_tokens:
            self.abort(request)
            return
        going_on: list[Sequence] = []
        for _ in range(group.width):
            parent = rng.choice(beams)
            if parent in going_on:
                child = Sequence(self.next_id, parent.tokens.copy(), parent.prompt_len, parent.max_tokens)
                self.next_id += 1
                self.fork(group, parent, child)
                going_on.append(child)
            else:
                going_on.append(parent)
        for seq in beams:
            if seq not in going_on:
                self.finish(request, seq)
        for seq in going_on:
            seq.tokens.append(rng.randrange(3))
        group.seqs.sort(key=going_on.index)

    def fork(self, group: Group, parent: Sequence, child: Sequence) -> None:
        self.scheduler.fork(group, parent, child)
        self.oracle.values[child.seq_id] = self.oracle.values[parent.seq_id][: parent.num_computed]

    def finish(self, request: Request, seq: Sequence) -> None:
        self.scheduler.finish(request.group, seq)
        self.oracle.values.pop(seq.seq_id, None)
        if not request.group.seqs:
            assert request.group.status is Status.FINISHED
            del self.requests[request.group]

    def abort(self, request: Request) -> None:
        """Wherever it is: running, waiting, or on the host."""
        for seq in request.group.seqs.copy():
            self.finish(request, seq)

    def check(self) -> None:
        oracle = self.oracle
        oracle.check()
        admitted = [seq for request in self.requests.values() for seq in request.group.seqs if seq.admitted]
        assert sorted(seq.seq_id for seq in admitted) == sorted(oracle.replayed.sequences)
        for seq in admitted:
            oracle.check_read(seq.seq_id, seq.num_computed)


@pytest.mark.parametrize(
    ("kind", "preemption"),
    [
        ("paged", "recompute"),
        ("paged", "swap"),
        ("paged with prefix cache", "recompute"),
        ("paged with prefix cache", "swap"),
        ("swapping", "swap"),
        ("swapping", "recompute"),
        ("standard", "recompute"),
    ],
)
def test_long_random_days_end_for_everyone(kind: str, preemption: Any) -> None:
    """Everybody gets to the end, on pools that are far too small for all."""
    rng = random.Random(f"{kind}, {preemption}")
    done = preempted = refused = 0
    while done < STEPS_EVENTS:
        day = Day(kind, preemption, rng)
        num_steps = 0
        while num_steps < 300 or day.requests:
            if num_steps < 300 and len(day.requests) < 8 and rng.random() < 0.5:
                day.arrive()
            if day.requests:
                if rng.random() < 0.01:
                    day.abort(rng.choice(list(day.requests.values())))
                else:
                    day.step()
            num_steps += 1
            assert num_steps < 20_000, "nobody gets to the end"
            if num_steps % 32 == 0:
                day.check()
        day.oracle.check_empty()
        done += day.oracle.num_events
        preempted += day.num_preempted
        refused += day.num_refused
    assert done >= STEPS_EVENTS
    assert (preempted > 100) == (kind != "standard")  # a region is never taken back
    assert refused > 0 or kind == "standard"


def test_the_long_fuzz_is_a_million_operations() -> None:
    """Each test above asserts its own part."""
    ways = 7
    assert sum(OPERATIONS.values()) + ways * STEPS_EVENTS >= 1_000_000

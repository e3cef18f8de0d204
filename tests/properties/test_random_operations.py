"""Random operations on tiny pools: nothing leaks, no sequence reads what is not its own, no refusal changes a thing.

First small lives that hypothesis makes up and makes smaller when one fails; then a long seeded fuzz of more
than a million operations, on the managers alone and through the scheduler; and the paged manager beside a plain
model of it.
"""

from __future__ import annotations

import random
from collections.abc import Callable
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
from support.books import held_on_device, held_on_host
from support.plain_paged import PlainPaged, Refused
from support.watched import Oracle, Watched

from paged_ref.core.engine.scheduler import Preemption, Scheduler
from paged_ref.core.engine.sequence import Group, Sequence, Status
from paged_ref.core.memory.block_pool import BlockPool, OutOfBlocks
from paged_ref.core.memory.manager import KVCacheManager
from paged_ref.core.memory.standard import Reserve, StandardManager
from paged_ref.extras.host_swap import SwappablePagedManager
from paged_ref.extras.prefix_cache import CachingBlockPool
from paged_ref.extras.swapping import SwappingManager

# --- lives that hypothesis makes up ----------------------------------------------------------------------

SMALL = settings(max_examples=60, stateful_step_count=50, deadline=None, derandomize=True, database=None)
TOKENS = st.integers(0, 1)  # so few that prompts often begin alike


class Life(RuleBasedStateMachine):
    """What every manager can do. After each rule: integrity, usage, and each sequence's own values."""

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
        largest = 4
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
            self.watched.check_all()

    def teardown(self) -> None:
        if hasattr(self, "watched"):
            self.watched.end()


class StandardLife(Life):
    @initialize(num_slots=st.integers(8, 24), reserve=st.sampled_from(["max", "pow2", "exact"]))
    def open(self, num_slots: int, reserve: Reserve) -> None:
        self.watched = Watched(lambda: StandardManager(num_slots, num_slots // 2, reserve))


class SwappingLife(Life):
    @initialize(num_slots=st.integers(4, 24), num_host_slots=st.integers(0, 16), alignment=st.integers(1, 5))
    def open(self, num_slots: int, num_host_slots: int, alignment: int) -> None:
        self.watched = Watched(lambda: SwappingManager(num_slots, num_host_slots, alignment))

    def to_swap(self) -> list[int]:
        """A sequence is swapped while it wants to grow, and has something to bring along."""
        w = self.watched
        return [seq_id for seq_id in w.device() if 0 < w.lengths[seq_id] < w.manager.num_slots]

    @precondition(lambda self: self.to_swap())
    @rule(data=st.data())
    def swap_out(self, data: st.DataObject) -> None:
        self.watched.swap_out(data.draw(some_of(self.to_swap(), 3)))

    @precondition(lambda self: self.watched.host)
    @rule(data=st.data())
    def swap_in(self, data: st.DataObject) -> None:
        self.watched.swap_in(data.draw(some_of(sorted(self.watched.host), 3)))


class PagedLife(Life):
    @initialize(
        order=st.integers(2, 9).flatmap(lambda n: st.permutations(range(n))),
        block_size=st.integers(1, 4),
        num_host_blocks=st.integers(0, 6),
        watermark=st.integers(0, 2),
        prefix_cache=st.booleans(),
    )
    def open(self, order: list[int], block_size: int, num_host_blocks: int, watermark: int, prefix_cache: bool) -> None:
        pool = (CachingBlockPool if prefix_cache else BlockPool)(len(order), order)
        self.watched = Watched(lambda: SwappablePagedManager(pool, block_size, num_host_blocks, watermark))

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


def new_manager(kind: str, rng: random.Random) -> KVCacheManager:
    """A tiny pool of 16 to 96 slots, with a host pool of up to that size."""
    num_slots = rng.randrange(16, 97)
    if kind == "standard":
        return StandardManager(num_slots, min(24, num_slots), rng.choice(["max", "pow2", "exact"]))
    if kind == "swapping":
        return SwappingManager(num_slots, rng.randrange(num_slots), rng.choice([1, 3, 8, 16]))
    return new_paged(kind, rng, num_slots)


def new_paged(kind: str, rng: random.Random, num_slots: int) -> SwappablePagedManager:
    block_size = rng.choice([1, 2, 3, 4, 4, 4, 8])
    num_blocks = num_slots // block_size
    order = list(range(num_blocks))
    rng.shuffle(order)
    pool = (CachingBlockPool if kind == "paged with prefix cache" else BlockPool)(num_blocks, order)
    return SwappablePagedManager(pool, block_size, rng.randrange(num_blocks + 1), rng.choice([0, 0, 1, 2]))


def live(watched: Watched, rng: random.Random, num_operations: int) -> None:
    """One random operation after another, until there were so many."""
    manager = watched.manager
    longest = min(24, manager.num_slots)
    paged, swaps = manager.can_fork, manager.can_swap
    while watched.num_operations < num_operations:
        device = watched.device()
        choice = rng.random()
        if choice < 0.12 or not device:
            if watched.host and choice < 0.06:
                watched.free(rng.choice(list(watched.host)))  # aborted while swapped
            tokens = prompt_of(rng, min(16, longest))
            watched.admit(tokens, min(len(tokens) + rng.randrange(24), longest))
            if not device and watched.host:  # else a full host pool would keep them all out
                watched.swap_in([next(iter(watched.host))])
        elif choice < 0.62:
            ids = rng.sample(device, min(len(device), rng.choice([1, 1, 2, 3])))
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
            ids = rng.sample(device, min(len(device), 3))
            if paged or all(0 < watched.lengths[seq_id] < manager.num_slots for seq_id in ids):
                watched.swap_out(ids)
        elif choice < 0.92 and watched.host:
            ids = rng.sample(sorted(watched.host), min(len(watched.host), 3))
            watched.swap_in(ids)
        else:
            watched.free(rng.choice(device))
        if not watched.num_operations % 256:
            watched.check_all()


OPERATIONS = {"paged": 160_000, "paged with prefix cache": 200_000, "swapping": 140_000, "standard": 100_000}
STEPS_CHANGES = 70_000  # for each way to schedule
PER_LIFE = 4_000


@pytest.mark.slow
@pytest.mark.parametrize("kind", OPERATIONS)
def test_long_random_lives_leave_nothing_behind(kind: str) -> None:
    rng = random.Random(kind)
    done = refused = 0
    while done < OPERATIONS[kind]:
        watched = Watched(lambda: new_manager(kind, rng))
        live(watched, rng, PER_LIFE)
        watched.end()
        done += watched.num_operations
        refused += watched.num_refused
    assert done >= OPERATIONS[kind]
    assert done // 100 < refused < done // 2  # pools were full at times, and not always


# --- the paged manager beside a plain model of it ----------------------------------------------------------

AGREED = 72_000  # operations, for each kind


class Pair:
    """The manager and the plain model, which get the same operations."""

    def __init__(self, kind: str, rng: random.Random) -> None:
        self.rng = rng
        manager = self.manager = new_paged(kind, rng, rng.randrange(16, 97))
        self.plain = PlainPaged(
            manager.pool.free_blocks, manager.block_size, manager.host_pool.num_blocks, manager.watermark,
            remembers=isinstance(manager.pool, CachingBlockPool),
        )  # fmt: skip
        self.tokens: dict[int, list[int]] = {}
        self.next_id = self.num_operations = self.num_refused = 0

    def both(self, ours: Callable[[], Any], theirs: Callable[[], Any]) -> Any:
        """The answer of both, which must be the same; None where both refuse."""
        self.num_operations += 1
        try:
            answer = ours()
        except OutOfBlocks:
            self.num_refused += 1
            with pytest.raises(Refused):
                theirs()
            return None
        if isinstance(answer, list):
            answer = [(transfer.source, transfer.destination) for transfer in answer]
        assert answer == theirs()
        return answer

    def operate(self) -> None:
        manager, plain, rng = self.manager, self.plain, self.rng
        here, away, choice = list(manager.tables), list(manager.swapped), rng.random()
        if choice < 0.15 or not here + away:
            seq_id, tokens = self.next_id, prompt_of(rng, 16)
            self.next_id += 1
            known = self.both(lambda: manager.admit(seq_id, tokens, 30), lambda: plain.admit(seq_id, tokens))
            if known is not None:
                self.tokens[seq_id] = tokens
        elif choice < 0.55 and here:
            self.append(rng.sample(here, min(len(here), rng.choice([1, 1, 2, 3]))))
        elif choice < 0.65 and here:
            seq_id = rng.choice(here)
            arguments = (seq_id, self.tokens[seq_id], rng.randrange(manager.length(seq_id) + 1))
            self.both(lambda: manager.commit(*arguments), lambda: plain.commit(*arguments))
        elif choice < 0.74 and here:
            parent, child = rng.choice(here), self.next_id
            self.next_id += 1
            self.both(lambda: manager.fork(parent, child), lambda: plain.fork(parent, child))
            self.tokens[child] = self.tokens[parent][: manager.length(parent)]
        elif choice < 0.82 and here:
            ids = rng.sample(here, min(len(here), 3))
            self.both(lambda: manager.swap_out(ids), lambda: plain.swap_out(ids))
        elif choice < 0.90 and away:
            ids = rng.sample(away, min(len(away), 3))
            self.both(lambda: manager.swap_in(ids), lambda: plain.swap_in(ids))
        else:
            seq_id = rng.choice(here + away)
            self.both(lambda: manager.free(seq_id), lambda: plain.free(seq_id))
            del self.tokens[seq_id]

    def append(self, ids: list[int]) -> None:
        appends = []
        for seq_id in ids:
            length, tokens = self.manager.length(seq_id), self.tokens[seq_id]
            count = self.rng.randrange(max(2, len(tokens) - length) + 1)
            tokens += [self.rng.randrange(3) for _ in range(length + count - len(tokens))]
            appends.append((seq_id, count))
        self.both(lambda: self.manager.append(appends), lambda: self.plain.append(appends))

    def compare(self) -> None:
        manager, plain, size = self.manager, self.plain, self.manager.block_size
        assert {seq_id: table.blocks for seq_id, table in manager.tables.items()} == plain.tables
        assert {seq_id: table.blocks for seq_id, table in manager.swapped.items()} == plain.swapped
        assert {seq_id: manager.length(seq_id) for seq_id in self.tokens} == plain.lengths
        assert (manager.pool.free_blocks, manager.host_pool.free_blocks) == (plain.free_list, plain.host_free)
        if isinstance(manager.pool, CachingBlockPool):
            assert list(manager.pool.cached) == plain.unused
        held = {block for table in plain.tables.values() for block in table}
        snapshot, entries = manager.snapshot(), sum(map(len, plain.tables.values()))
        assert snapshot.free == len(plain.free_list) * size
        assert snapshot.cached == len(plain.unused) * size
        assert snapshot.shared == (entries - len(held)) * size
        assert snapshot.usage({}).total == manager.num_slots


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["paged", "paged with prefix cache"])
def test_the_manager_and_a_plain_model_of_it_agree(kind: str) -> None:
    """The same tables, transfers, hits, refusals, free lists and snapshots after each operation."""
    rng = random.Random(f"plain, {kind}")
    done = refused = 0
    while done < AGREED:
        pair = Pair(kind, rng)
        while pair.num_operations < 1_000:
            pair.operate()
            pair.compare()
        done += pair.num_operations
        refused += pair.num_refused
    assert done >= AGREED
    assert done // 100 < refused < done // 2


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
        self.oracle = Oracle(lambda: new_manager(kind, rng))
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
        shares = manager.can_fork
        width = rng.choice([1, 1, 2, 3, 4]) if shares else 1
        beams = width > 1 and rng.random() < 0.5
        prompt = prompt_of(rng, 16)
        max_len = len(prompt) + rng.randrange(1, 25)
        seqs = [Sequence(self.next_id + i, prompt.copy(), len(prompt), max_len) for i in range(1 if beams else width)]
        request = Request(Group(seqs[:1], width), beams, seqs[1:])
        try:
            self.scheduler.add(request.group)
        except ValueError:
            self.num_refused += 1
            assert manager.max_slots_needed(len(prompt), max_len - 1, width) > manager.num_slots
            assert request.group not in self.scheduler.waiting
            return
        self.next_id += len(seqs)
        self.requests[request.group] = request

    def step(self) -> None:
        """One step of the engine: plan, move, write, read, sample."""
        oracle, scheduler = self.oracle, self.scheduler
        plan = scheduler.schedule()
        assert plan.chunks, "some wait, and none runs"
        assert sum(count for _, count in plan.chunks) <= scheduler.max_batch_tokens
        assert sum(len(group.seqs) for group in scheduler.running) <= scheduler.max_batch_seqs
        self.num_preempted += len(plan.preempted)
        oracle.num_changes += len(plan.chunks) + len(plan.preempted)
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

    def sample(self, request: Request, seq: Sequence) -> None:
        """As Request.take_logits: the samples begin, each gets a token, some end."""
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
                if len(each.tokens) >= each.max_len or self.rng.random() < 0.03:
                    self.finish(request, each)

    def step_beams(self, request: Request) -> None:
        """As BeamRequest: parents chosen twice are forked, those not chosen are freed."""
        group, rng = request.group, self.rng
        beams = group.seqs.copy()
        if len(beams[0].tokens) + 1 >= beams[0].max_len:
            self.abort(request)
            return
        going_on: list[Sequence] = []
        for _ in range(group.width):
            parent = rng.choice(beams)
            if parent in going_on:
                child = Sequence(self.next_id, parent.tokens.copy(), parent.prompt_len, parent.max_len)
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
        self.oracle.num_changes += 1
        self.oracle.values[child.seq_id] = self.oracle.values[parent.seq_id][: parent.num_computed]

    def finish(self, request: Request, seq: Sequence) -> None:
        self.scheduler.finish(request.group, seq)
        self.oracle.num_changes += 1
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
        held = held_on_device(oracle.manager) + held_on_host(oracle.manager)
        assert sorted(seq.seq_id for seq in admitted) == sorted(held)
        for seq in admitted:
            oracle.check_read(seq.seq_id, seq.num_computed)


@pytest.mark.slow
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
def test_long_random_days_end_for_every_request(kind: str, preemption: Any) -> None:
    """Every request gets to its end, on pools that are far too small for all."""
    rng = random.Random(f"{kind}, {preemption}")
    done = preempted = refused = 0
    while done < STEPS_CHANGES:
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
            assert num_steps < 20_000, "no request gets to its end"
            if num_steps % 32 == 0:
                day.check()
        day.oracle.check_empty()
        done += day.oracle.num_changes
        preempted += day.num_preempted
        refused += day.num_refused
    assert done >= STEPS_CHANGES
    assert (preempted > 100) == (kind != "standard")  # a region is never taken back
    assert refused > 0 or kind == "standard"


def test_the_long_fuzz_is_a_million_operations() -> None:
    """Each test above asserts its own part."""
    ways = 7
    assert sum(OPERATIONS.values()) + ways * STEPS_CHANGES >= 1_000_000

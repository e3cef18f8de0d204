"""Residency: whatever is done in whatever order, each page has its own contents where it is said to be."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from paged_ref.beyond_device.residency import Priority, Residency
from paged_ref.core.memory.block_pool import OutOfBlocks
from paged_ref.core.memory.manager import OutOfHostBlocks, Transfer
from paged_ref.timeline.events import Event, PagesFreed, PagesPlaced


class Memory:
    """A device and a host of one number a block, and what each page should hold."""

    def __init__(self, num_device: int, num_host: int, priority: Priority | None = None) -> None:
        self.events: list[Event] = []
        self.residency = Residency(num_device, num_host, priority, self.events.append)
        self.device, self.host = [0] * num_device, [0] * num_host
        self.expected: dict[int, int] = {}
        self.num_written = 0
        self.moved: list[Transfer] = []

    def apply(self, transfers: list[Transfer]) -> None:
        for t in transfers:
            if t.kind == "swap_out":
                self.host[t.destination] = self.device[t.source]
            else:
                assert t.kind == "swap_in"
                self.device[t.destination] = self.host[t.source]
        self.moved += transfers

    def add(self, count: int = 1, keep: Sequence[int] = ()) -> list[int]:
        pages, transfers = self.residency.add(count, keep)
        assert all(self.residency.device_of[page] >= 0 for page in keep)
        assert not self.expected.keys() & set(pages)
        self.apply(transfers)
        self.expected.update(dict.fromkeys(pages, 0))
        self.write(pages)
        return pages

    def need(self, *pages: int) -> None:
        self.apply(self.residency.need(pages))
        assert all(self.residency.device_of[page] >= 0 for page in pages)

    def write(self, pages: list[int]) -> None:
        self.residency.written(pages)
        for page in pages:
            self.num_written += 1
            self.device[self.residency.device_of[page]] = self.expected[page] = self.num_written

    def free(self, pages: list[int]) -> None:
        self.residency.free(pages)
        for page in pages:
            del self.expected[page]

    def state(self) -> object:
        r = self.residency
        return (
            r.device_of.tolist(), r.host_of.tolist(), r.device.free_blocks, r.host.free_blocks,
            r.device.ref_count.copy(), list(r.eviction_order()), len(self.events),
        )  # fmt: skip

    def check(self) -> None:
        self.residency.check_integrity()
        assert self.residency.num_pages == len(self.expected)
        placed: dict[int, tuple[int, int]] = {}
        for event in self.events:
            if isinstance(event, PagesPlaced):
                triples = zip(event.pages, event.device_blocks, event.host_blocks, strict=True)
                placed.update({page: (device, host) for page, device, host in triples})
            elif isinstance(event, PagesFreed):
                for page in event.pages:
                    del placed[page]
        assert placed.keys() == self.expected.keys()
        for page, value in self.expected.items():
            device, host = self.residency.device_of[page], self.residency.host_of[page]
            assert placed[page] == (device, host)
            assert device < 0 or self.device[device] == value
            assert host < 0 or self.host[host] == value


# --- one thing at a time -----------------------------------------------------------------------------------


def test_a_page_that_is_on_both_sides_leaves_without_a_copy() -> None:
    memory = Memory(2, 3)
    a, b = memory.add(2)
    (c,) = memory.add()  # a leaves: the host has no copy
    assert [t.kind for t in memory.moved] == ["swap_out"]
    memory.need(a)  # b leaves for it
    assert [t.kind for t in memory.moved] == ["swap_out", "swap_out", "swap_in"]
    memory.moved.clear()
    memory.need(c)
    memory.need(b)  # a leaves, which is on both sides
    assert [t.kind for t in memory.moved] == ["swap_in"]
    memory.check()


def test_a_page_that_is_written_has_to_be_copied_again() -> None:
    memory = Memory(1, 2)
    (a,) = memory.add()
    (b,) = memory.add()
    memory.need(a)
    memory.write([a])
    assert memory.residency.host_of[a] == -1
    memory.moved.clear()
    memory.need(b)
    assert [t.kind for t in memory.moved] == ["swap_out", "swap_in"]
    memory.check()


def test_pages_to_keep_stay_and_too_many_are_refused_with_the_numbers() -> None:
    memory = Memory(3, 9)
    pages = memory.add(3)
    others = memory.add(keep=pages[:2])
    assert memory.residency.device_of[pages[2]] == -1
    before = memory.state()
    with pytest.raises(OutOfBlocks, match="4 pages needed on the device at the same time; the device has 3 blocks"):
        memory.residency.need([*pages, *others])
    with pytest.raises(OutOfBlocks, match="4 pages needed on the device at the same time; the device has 3 blocks"):
        memory.residency.add(2, keep=pages[:2])
    with pytest.raises(ValueError, match="page 11 is nowhere; it cannot be freed"):
        memory.residency.free([others[0], 11])
    with pytest.raises(ValueError, match=f"page {pages[2]} is not on the device"):
        memory.residency.written([others[0], pages[2]])
    assert memory.state() == before
    memory.need(pages[2], *others)
    memory.check()


def test_a_full_host_is_refused_with_the_numbers_and_nothing_is_lost() -> None:
    memory = Memory(2, 2)
    pages = memory.add(2)
    pages += memory.add()
    before = memory.state()
    with pytest.raises(OutOfHostBlocks, match="1 page to add to 3; the room is 3, with 2 blocks on the device and 2"):
        memory.residency.add()
    assert memory.state() == before
    for page in pages * 3:  # as full as can be, and still all of them come round
        memory.need(page)
        memory.check()


def test_without_a_host_the_device_is_all_there_is() -> None:
    memory = Memory(2, 0)
    pages = memory.add(2)
    memory.need(*pages)
    assert not memory.moved
    with pytest.raises(OutOfHostBlocks):
        memory.residency.add()
    memory.free(pages)
    memory.add(2)
    memory.check()


def test_all_pages_can_change_places_at_once_through_one_free_block() -> None:
    memory = Memory(3, 4)
    first = memory.add(3)
    second = memory.add(3)
    assert memory.residency.num_pages == memory.residency.capacity
    for _ in range(3):
        memory.need(*first)
        memory.check()
        memory.write(first)
        memory.need(*second)
        memory.check()
        memory.write(second)


def test_prefetch_brings_what_fits_and_never_raises() -> None:
    memory = Memory(3, 9)
    pages = memory.add(3) + memory.add(3)
    memory.apply(memory.residency.prefetch(pages))
    assert [page for page in pages if memory.residency.device_of[page] >= 0] == pages[:3]
    memory.check()


@pytest.mark.parametrize(
    ("device", "host", "word"), [(0, 1, "num_device_blocks is 0"), (1, -1, "num_host_blocks is -1")]
)
def test_sizes_that_cannot_be_are_refused(device: int, host: int, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        Residency(device, host)


# --- which page leaves -------------------------------------------------------------------------------------


def test_the_least_recently_used_leaves() -> None:
    memory = Memory(3, 9)
    a, b, c = memory.add(3)
    memory.need(a)
    memory.add()
    assert memory.residency.device_of[b] == -1
    memory.need(c)
    memory.add()
    assert memory.residency.device_of[a] == -1


def test_the_lowest_priority_leaves_and_may_change_its_mind() -> None:
    priority = {0: 2.0, 1: 0.0, 2: 1.0, 3: 5.0, 4: 5.0}
    memory = Memory(3, 9, priority.__getitem__)
    memory.add(3)
    memory.add()
    assert memory.residency.device_of[1] == -1
    priority[0] = 0.5
    memory.add()
    assert memory.residency.device_of[0] == -1


def moves(priority: Priority | None, needs: list[int], clock: list[int]) -> int:
    """Pages that come back from the host when pages are needed in this order, with room for four."""
    memory = Memory(4, 16, priority)
    for _ in range(10):
        memory.add()
    memory.moved.clear()
    for clock[0], page in enumerate(needs):
        memory.need(page)
    memory.check()
    return sum(t.kind == "swap_in" for t in memory.moved)


def test_whoever_knows_what_is_needed_next_moves_least() -> None:
    rng = random.Random(0)
    needs = [min(int(rng.expovariate(0.4)), 9) for _ in range(400)]
    clock = [0]

    def next_need(page: int) -> float:
        return -next((i for i in range(clock[0], len(needs)) if needs[i] == page), len(needs))

    recent, best = moves(None, needs, clock), moves(next_need, needs, clock)
    assert best < recent
    worst = moves(lambda page: -next_need(page), needs, clock)
    assert recent < worst


def test_leaving_in_the_order_of_use_serves_a_backward_pass_best() -> None:
    """Layers forwards, then backwards: the last are needed first, so the first leave first."""
    memory = Memory(4, 16, lambda page: page)
    for page in range(12):
        assert memory.add() == [page]
    assert sum(t.kind == "swap_out" for t in memory.moved) == 8
    memory.moved.clear()
    for page in range(11, -1, -1):
        memory.need(page)
        memory.free([page])
    assert [t.kind for t in memory.moved] == ["swap_in"] * 8


# --- anything in any order ---------------------------------------------------------------------------------


class Life(RuleBasedStateMachine):
    memory: Memory

    @initialize(device=st.integers(1, 5), host=st.integers(0, 6), lru=st.booleans())
    def open(self, device: int, host: int, lru: bool) -> None:
        self.memory = Memory(device, host, None if lru else lambda page: page * 7 % 5)

    def some(self, data: st.DataObject, pages: list[int]) -> list[int]:
        return data.draw(st.lists(st.sampled_from(pages), max_size=4)) if pages else []

    @rule(data=st.data(), what=st.sampled_from(["add", "need", "prefetch", "write", "free"]))
    def act(self, data: st.DataObject, what: str) -> None:
        memory = self.memory
        pages = sorted(memory.expected)
        here = [page for page in pages if memory.residency.device_of[page] >= 0]
        before = memory.state()
        try:
            if what == "add":
                memory.add(data.draw(st.integers(0, 3)), self.some(data, here))
            elif what == "need":
                memory.need(*self.some(data, pages))
            elif what == "prefetch":
                memory.apply(memory.residency.prefetch(self.some(data, pages)))
            elif what == "write":
                memory.write(self.some(data, here))
            elif what == "free":
                memory.free(list(dict.fromkeys(self.some(data, pages))))
        except OutOfBlocks:
            assert memory.state() == before

    @invariant()
    def each_page_has_its_contents(self) -> None:
        if hasattr(self, "memory"):
            self.memory.check()

    def teardown(self) -> None:
        if hasattr(self, "memory"):
            self.memory.free(list(self.memory.expected))
            self.memory.check()
            assert self.memory.residency.num_pages == 0


def test_lives_that_hypothesis_makes_up() -> None:
    run_state_machine_as_test(
        Life, settings=settings(max_examples=80, stateful_step_count=40, deadline=None, derandomize=True, database=None)
    )


@pytest.mark.parametrize("seed", range(4))
def test_a_refusal_names_a_room_that_is_really_missing(seed: int) -> None:
    """Any pages that fit on the device can be loaded, and as many as the capacity holds can be added."""
    rng = random.Random(seed)
    memory = Memory(rng.randint(1, 8), rng.randint(1, 8))
    while memory.residency.num_pages < memory.residency.capacity:
        memory.add()
    for _ in range(500):
        pages = rng.sample(sorted(memory.expected), rng.randint(1, min(8, memory.residency.device.num_blocks)))
        memory.need(*pages)
        if rng.random() < 0.5:
            memory.write(pages)
    memory.events.clear()
    memory.residency.check_integrity()

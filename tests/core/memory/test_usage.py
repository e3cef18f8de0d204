"""Where the slots are: the parts of the paper's Fig. 2 from a snapshot and the final lengths."""

from __future__ import annotations

from paged_ref.core.memory.usage import MemoryUsage, PartialAllocation, Snapshot


def test_empty_slots_are_reserved_as_far_as_their_sequence_will_fill_them() -> None:
    snapshot = Snapshot(full=8, partial=[PartialAllocation(0, 10, 2, 6)], external=3, free=5)
    for final, reserved in ((10, 0), (12, 2), (14, 4), (99, 4), (7, 0)):  # 4 slots are empty
        usage = snapshot.usage({0: final})
        assert usage == MemoryUsage(10, reserved, 4 - reserved, 3, 0, 5)
        assert usage.total == 8 + 6 + 3 + 5


def test_a_sequence_that_is_not_named_is_at_its_end() -> None:
    snapshot = Snapshot(full=0, partial=[PartialAllocation(3, 1, 1, 4)], external=0, free=0)
    assert snapshot.usage({}) == MemoryUsage(1, 0, 3, 0, 0, 0)


def test_cached_and_shared_slots_are_passed_on_and_shared_ones_are_no_part() -> None:
    usage = Snapshot(full=4, partial=[], external=0, free=8, cached=4, shared=12).usage({})
    assert (usage.cached, usage.shared, usage.total) == (4, 12, 16)

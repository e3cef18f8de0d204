"""The manager of sequences that may be longer than the device."""

from __future__ import annotations

import pytest

from paged_ref.beyond_device.streaming import StreamingManager
from paged_ref.core.memory.block_pool import OutOfBlocks


def test_the_manager_says_how_many_blocks_are_missing_and_changes_nothing() -> None:
    manager = StreamingManager(1, 1, 4, 2, 3)  # 4 blocks: one of the host's stays free
    manager.admit(0, [1] * 12, 16)
    manager.append([(0, 12)])
    with pytest.raises(OutOfBlocks, match=r"no room for 2 blocks \(an admission\): 1 of 4 free on device and host"):
        manager.admit(1, [1] * 8, 8)
    with pytest.raises(OutOfBlocks, match=r"no room for 2 blocks \(seq_id 0\): 1 of 4 free"):
        manager.append([(0, 8)])
    assert manager.length(0) == 12
    manager.free(0)
    manager.check_integrity()
    assert manager.num_free_blocks == 4


def test_a_sequence_has_no_slots_and_no_blocks_of_its_own() -> None:
    manager = StreamingManager(1, 1, 4, 2, 3)
    manager.admit(0, [1] * 5, 8)
    manager.append([(0, 5)])
    assert manager.placement(0) == []
    assert manager.slots(0, 2, 3) == [0, 0, 0]
    assert not manager.can_fork
    assert not manager.can_swap

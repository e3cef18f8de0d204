"""The formula: position to slot."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from paged_ref.core.attention.addressing import slot_of


@given(st.data(), st.integers(1, 20), st.integers(1, 8))
def test_slot_of_numbers_every_slot_of_its_blocks_once(data: st.DataObject, block_size: int, blocks: int) -> None:
    table = data.draw(st.permutations(range(12)))[:blocks]
    slots = [slot_of(table, position, block_size) for position in range(blocks * block_size)]
    assert slots == [block * block_size + offset for block in table for offset in range(block_size)]
    at_once = slot_of(np.array(table), np.arange(blocks * block_size), block_size)
    assert at_once.tolist() == slots

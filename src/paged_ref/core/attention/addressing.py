"""The whole idea of paging in two lines: from a position in a sequence to a slot in memory.

A slot is the place of one token's K and V. Caches are [num_blocks, block_size, num_kv_heads, head_size];
seen as [num_slots, num_kv_heads, head_size] the same memory has one row for each slot.
"""

from __future__ import annotations

from typing import Any


def slot_of(block_table: Any, position: Any, block_size: int) -> Any:
    """The slot that holds `position` of a sequence.

    `block_table [max_blocks]` maps a logical block to a physical one; `position` is an int or an integer
    array (then so is the answer). The table stands for its sequence; nothing is checked. Kwon et al. 2023, §4.2.
    """
    block = block_table[position // block_size]
    return block * block_size + position % block_size

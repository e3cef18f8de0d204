"""One of the managers by its name, for the same pool of slots."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from ..core.checks import plural, require, require_one_of
from ..core.memory.block_pool import BlockPool
from ..core.memory.manager import KVCacheManager
from ..core.memory.standard import Reserve, StandardManager
from .arguments import finite_number, items, whole_number
from .buddy import BuddyPool
from .host_swap import SwappablePagedManager
from .memory_limit import require_memory
from .prefix_cache import CachingBlockPool
from .swapping import SwappingManager

ManagerName = Literal["paged", "standard", "swapping"]
Allocator = Literal["first fit", "buddy"]
MANAGERS = ("paged", "standard", "swapping")
BLOCK_BYTES = 64  # that a pool keeps for each block: its number, and its places in two lists
WATERMARK = 0.01  # of the blocks, as vLLM keeps


def make_manager(
    name: ManagerName,
    num_slots: int,
    *,
    max_model_len: int,
    block_size: int = 16,
    num_host_slots: int = 0,
    reserve: Reserve = "max",
    allocator: Allocator = "first fit",
    free_order: Sequence[int] | None = None,
    watermark: float = WATERMARK,
    prefix_cache: bool = False,
) -> KVCacheManager:
    """`num_slots` on the device and `num_host_slots` on the host, rounded down to whole blocks.

    `reserve` and `allocator` (how regions find their place: the paper assumes "buddy" of others, "first fit" wastes
    less) are for the standard manager; `block_size`, `free_order`, `watermark` (a share of the blocks) and
    `prefix_cache` for the paged one. Raises ValueError with the argument, the value and the bound.
    """
    require_one_of(MANAGERS, manager=name)
    require_one_of(("first fit", "buddy"), allocator=allocator)
    require_one_of(get_args(Reserve), reserve=reserve)
    if prefix_cache and name != "paged":
        raise ValueError(f"prefix_cache is on; the {name} manager cannot share, only paged can")
    if not 0 <= finite_number("watermark", watermark) < 1:
        raise ValueError(f"watermark is {watermark}; 0 up to 1 is needed, a share of the blocks")
    require(block_size=(block_size, 1))
    unit = block_size if name == "paged" else 1
    if num_slots < unit:
        raise ValueError(f"the KV cache has {plural(num_slots, 'slot')}; at least one block of {unit} is needed")
    if num_host_slots < 0:
        raise ValueError(f"the host pool has room for {num_host_slots} tokens; at least 0 is needed")
    if name == "standard":
        regions = BuddyPool(num_slots) if allocator == "buddy" else None
        return StandardManager(num_slots, max_model_len, reserve, regions)
    if name == "swapping":
        return SwappingManager(num_slots, num_host_slots)
    num_blocks, num_host_blocks = num_slots // block_size, num_host_slots // block_size
    what = f"a KV cache of {num_slots} tokens and {num_host_slots} on the host, in blocks of {block_size}: its list"
    require_memory(what, BLOCK_BYTES * (num_blocks + num_host_blocks))
    if free_order is not None:
        free_order = [whole_number("a block in free_order", i) for i in items("free_order", free_order, "block ids")]
    pool = (CachingBlockPool if prefix_cache else BlockPool)(num_blocks, free_order)
    kept = max(1, int(watermark * num_blocks)) if watermark > 0 else 0  # of few blocks, a share is less than one
    return SwappablePagedManager(pool, block_size, num_host_blocks, kept)

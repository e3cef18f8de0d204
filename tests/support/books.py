"""All that a manager keeps of its sequences and its pool, as plain values: two of them are equal if nothing changed."""

from __future__ import annotations

from typing import Any

from paged_ref.core.memory.block_pool import BlockPool
from paged_ref.core.memory.manager import KVCacheManager
from paged_ref.core.memory.paged import PagedManager, Table
from paged_ref.core.memory.regions import Region, RegionManager, RegionPool
from paged_ref.extras.buddy import BuddyPool
from paged_ref.extras.host_swap import SwappablePagedManager
from paged_ref.extras.prefix_cache import CachingBlockPool
from paged_ref.extras.swapping import SwappingManager


def books(manager: KVCacheManager) -> tuple[Any, ...]:
    """Tables or regions, counts, free lists in their order, and what the prefix cache knows."""
    if isinstance(manager, PagedManager):
        swapped: tuple[Any, ...] = ()
        if isinstance(manager, SwappablePagedManager):
            swapped = (_tables(manager.swapped), _blocks(manager.host_pool))
        return (_tables(manager.tables), _blocks(manager.pool), *swapped)
    assert isinstance(manager, RegionManager)
    if isinstance(manager, SwappingManager):
        swapped = (_regions(manager.swapped), tuple(manager.host_pool.holes))
        return (_regions(manager.regions), tuple(manager.pool.holes), *swapped)
    return (_regions(manager.regions), _holes(manager.pool))


def held_on_host(manager: KVCacheManager) -> list[int]:
    """The sequences that wait in host memory."""
    return list(manager.swapped) if isinstance(manager, (SwappablePagedManager, SwappingManager)) else []


def held_on_device(manager: KVCacheManager) -> list[int]:
    """The sequences that hold memory on the device."""
    if isinstance(manager, PagedManager):
        return list(manager.tables)
    assert isinstance(manager, RegionManager)
    return list(manager.regions)


def _tables(tables: dict[int, Table]) -> dict[int, tuple[tuple[int, ...], int]]:
    return {seq_id: (tuple(table.blocks), table.length) for seq_id, table in tables.items()}


def _regions(regions: dict[int, Region]) -> dict[int, tuple[int, int, int]]:
    return {seq_id: (region.start, region.size, region.length) for seq_id, region in regions.items()}


def _blocks(pool: BlockPool) -> tuple[Any, ...]:
    counts = (tuple(pool.ref_count), tuple(pool.free_blocks))
    if isinstance(pool, CachingBlockPool):
        return (*counts, pool.digest_of.copy(), pool.block_of.copy(), tuple(pool.cached))
    return counts


def _holes(pool: RegionPool) -> Any:
    return {size: set(starts) for size, starts in pool.free.items()} if isinstance(pool, BuddyPool) else [*pool.holes]

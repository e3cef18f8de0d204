"""What a manager holds, as the state of a log has it: read off the manager, or followed from its events."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from paged_ref.beyond_device.streaming import StreamingManager
from paged_ref.core.memory.manager import KVCacheManager
from paged_ref.core.memory.paged import PagedManager
from paged_ref.core.memory.standard import StandardManager
from paged_ref.core.memory.swapping import SwappingManager
from paged_ref.timeline.events import Event
from paged_ref.timeline.state import KnownBlock, MemoryState, PageState, Placement, RunState


def replay(events: Iterable[Event]) -> MemoryState:
    """The memory after `events`. Raises ValueError, with the event's place, where they contradict themselves."""
    state = RunState()
    for number, event in enumerate(events, start=1):
        state.apply(event, number)
    return state.memory


def state_of(manager: KVCacheManager) -> MemoryState:
    """The same, read off a manager."""
    if isinstance(manager, PagedManager):
        known = manager.cache.block_of if manager.cache else {}
        return MemoryState(
            manager="paged",
            num_blocks=manager.pool.num_blocks,
            block_size=manager.block_size,
            num_host_blocks=manager.host_pool.num_blocks,
            sequences={
                seq_id: Placement(table.length, table.blocks.copy(), on_host=table.on_host)
                for seq_id, table in manager.tables.items()
            },
            ref_count=manager.pool.ref_count.copy(),
            free=manager.pool.free_blocks[::-1],
            host_ref_count=manager.host_pool.ref_count.copy(),
            host_free=manager.host_pool.free_blocks[::-1],
            known={block_id: KnownBlock(block_id, digest.hex()) for digest, block_id in known.items()},
            cached=OrderedDict(manager.cache.idle) if manager.cache else OrderedDict(),
        )
    if isinstance(manager, StreamingManager):
        return MemoryState(
            manager="streaming",
            num_blocks=manager.residency.device.num_blocks,
            block_size=manager.block_size,
            num_host_blocks=manager.residency.host.num_blocks,
            sequences={seq_id: Placement(table.length) for seq_id, table in manager.tables.items()},
            pages=pages_of(manager),
        )
    assert isinstance(manager, (StandardManager, SwappingManager))
    return MemoryState(
        manager="swapping" if isinstance(manager, SwappingManager) else "standard",
        num_blocks=manager.num_slots,
        num_host_blocks=manager.host_pool.num_slots if isinstance(manager, SwappingManager) else 0,
        sequences={
            seq_id: Placement(region.length, start=region.start, size=region.size, on_host=region.on_host)
            for seq_id, region in manager.regions.items()
        },
    )


def pages_of(manager: StreamingManager) -> PageState:
    """The pages of a manager whose sequences are longer than the device."""
    residency = manager.residency
    tables = {
        (seq_id, layer, head): list(pages)
        for seq_id, table in manager.tables.items()
        for layer, heads in enumerate(table.pages)
        for head, pages in enumerate(heads)
        if pages
    }
    places = {p: (residency.device_of[p], residency.host_of[p]) for pages in tables.values() for p in pages}
    return PageState(residency.device.num_blocks, residency.host.num_blocks, places, tables)

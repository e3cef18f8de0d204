"""What a manager holds, as the state of a log has it: read off the manager, or followed from its events."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from paged_ref.beyond_device.streaming import StreamingManager
from paged_ref.core.memory.manager import KVCacheManager
from paged_ref.core.memory.paged import PagedManager
from paged_ref.core.memory.regions import Region, RegionManager
from paged_ref.extras.host_swap import SwappablePagedManager
from paged_ref.extras.prefix_cache import CachingBlockPool
from paged_ref.extras.swapping import SwappingManager
from paged_ref.timeline.events import Event
from paged_ref.timeline.logged import LoggedManager
from paged_ref.timeline.memory_state import Blocks, KnownBlock, MemoryState, Placement
from paged_ref.timeline.page_state import PageState
from paged_ref.timeline.state import RunState


def replay(events: Iterable[Event]) -> MemoryState:
    """The memory after `events`. Raises ValueError, with the event's place, where they contradict themselves."""
    state = RunState()
    for number, event in enumerate(events, start=1):
        state.apply(event, number)
    return state.memory


def state_of(manager: KVCacheManager) -> MemoryState:
    """The same, read off a manager."""
    if isinstance(manager, LoggedManager):
        return state_of(manager.manager)
    if isinstance(manager, StreamingManager):
        return MemoryState(
            manager="streaming",
            num_blocks=manager.residency.device.num_blocks,
            block_size=manager.block_size,
            num_host_blocks=manager.residency.host.num_blocks,
            sequences={seq_id: Placement(length=table.length) for seq_id, table in manager.tables.items()},
            pages=pages_of(manager),
        )
    if isinstance(manager, PagedManager):
        return _paged_state(manager)
    assert isinstance(manager, RegionManager)
    swaps = isinstance(manager, SwappingManager)
    state = MemoryState(manager="swapping" if swaps else "standard", num_blocks=manager.num_slots)
    state.sequences = {seq_id: _placement(region) for seq_id, region in manager.regions.items()}
    if isinstance(manager, SwappingManager):
        state.num_host_blocks = manager.host_pool.num_slots
        state.sequences |= {seq_id: _placement(region, on_host=True) for seq_id, region in manager.swapped.items()}
    return state


def _paged_state(manager: PagedManager) -> MemoryState:
    pool = manager.pool
    state = MemoryState(manager="paged", num_blocks=pool.num_blocks, block_size=manager.block_size)
    state.ref_count, state.free = pool.ref_count.copy(), pool.free_blocks[::-1]
    state.sequences = {s: Placement(table.blocks.copy(), table.length) for s, table in manager.tables.items()}
    if isinstance(pool, CachingBlockPool):
        state.known = {block_id: KnownBlock(block_id, digest.hex()) for digest, block_id in pool.block_of.items()}
        state.cached = OrderedDict(pool.cached)
    if isinstance(manager, SwappablePagedManager):
        host = manager.host_pool
        state.num_host_blocks = host.num_blocks
        state.host = Blocks(host.ref_count.copy(), host.free_blocks[::-1])
        swapped = manager.swapped.items()
        state.sequences |= {s: Placement(table.blocks.copy(), table.length, on_host=True) for s, table in swapped}
    return state


def _placement(region: Region, on_host: bool = False) -> Placement:
    return Placement(length=region.length, start=region.start, size=region.size, on_host=on_host)


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

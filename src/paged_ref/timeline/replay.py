"""From events back to state: what a manager held at any point of a run, without the manager.

The visualizer, the monitor and the lessons see a run only through this. `state_of` reads the same state off
a living manager, so a test can hold the two against each other after every step.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from ..beyond_device.streaming import StreamingManager
from ..core.memory.manager import KVCacheManager
from ..core.memory.paged import PagedManager
from ..core.memory.standard import StandardManager
from ..core.memory.swapping import SwappingManager
from .events import (
    BlockCached,
    Event,
    PoolOpened,
    RegionPlaced,
    RegionSwappedIn,
    RegionSwappedOut,
    SequenceAdmitted,
    SequenceForked,
    SequenceFreed,
    SwappedIn,
    SwappedOut,
    TokensAppended,
)
from .page_state import PageState, apply_to_pages


@dataclass(slots=True)
class Placement:
    """Where one sequence lies: in blocks, or in a region (then `blocks` is empty)."""

    length: int = 0
    blocks: list[int] = field(default_factory=list)
    start: int = 0
    size: int = 0
    on_host: bool = False


@dataclass(slots=True)
class MemoryState:
    """All that a manager knows, as plain values."""

    manager: str = ""
    num_blocks: int = 0
    block_size: int = 1
    num_host_blocks: int = 0
    sequences: dict[int, Placement] = field(default_factory=dict)
    ref_count: list[int] = field(default_factory=list)
    free: list[int] = field(default_factory=list)  # blocks, the next to be handed out last
    host_ref_count: list[int] = field(default_factory=list)
    host_free: list[int] = field(default_factory=list)
    digest_of: dict[int, str] = field(default_factory=dict)  # blocks that the prefix cache knows
    idle: OrderedDict[int, None] = field(default_factory=OrderedDict)  # of these, in no table; first to go first
    pages: PageState = field(default_factory=PageState)  # of the streaming manager


def replay(events: Iterable[Event]) -> MemoryState:
    """The state after `events`. Raises ValueError, with the event's place, where they contradict themselves."""
    state = MemoryState()
    for number, event in enumerate(events, start=1):
        apply(state, event, number)
    return state


def apply(state: MemoryState, event: Event, number: int = 0) -> None:
    """Advance `state` by one event. Events of the engine change no memory and are passed over."""
    change = _CHANGES.get(type(event))
    try:
        if change is not None:
            change(state, event)
        apply_to_pages(state.pages, event)
    except (KeyError, IndexError, ValueError) as error:
        why = f"{error} is not there" if isinstance(error, KeyError) else error
        raise ValueError(f"event {number}, {type(event).__name__}, does not fit what came before: {why}") from None


def state_of(manager: KVCacheManager) -> MemoryState:
    """The same, read off a manager."""
    if isinstance(manager, PagedManager):
        cached = manager.cache.block_of if manager.cache else {}
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
            digest_of={block_id: digest.hex() for digest, block_id in cached.items()},
            idle=OrderedDict(manager.cache.idle) if manager.cache else OrderedDict(),
        )
    if isinstance(manager, StreamingManager):
        return MemoryState(
            manager="streaming",
            num_blocks=manager.residency.device.num_blocks,
            block_size=manager.block_size,
            num_host_blocks=manager.residency.host.num_blocks,
            sequences={seq_id: Placement(table.length) for seq_id, table in manager.tables.items()},
            pages=PageState.of(manager),
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


# --- one function for each event that changes memory -----------------------------------------------------


def _pool_opened(state: MemoryState, event: PoolOpened) -> None:
    if state.manager:
        raise ValueError("the pool was opened before")
    state.manager, state.num_blocks, state.block_size = event.manager, event.num_blocks, event.block_size
    state.num_host_blocks = event.num_host_blocks
    if event.free_order:  # there are blocks
        state.ref_count = [0] * event.num_blocks
        state.free = list(reversed(event.free_order))
        state.host_ref_count = [0] * event.num_host_blocks
        state.host_free = list(reversed(range(event.num_host_blocks)))


def _admitted(state: MemoryState, event: SequenceAdmitted) -> None:
    _begin(state, event.seq_id, Placement(event.length, list(event.blocks)))


def _appended(state: MemoryState, event: TokensAppended) -> None:
    place = _find(state, event.seq_id, on_host=False)
    evicted: list[int] = []
    if event.copied:
        source, destination = event.copied
        if place.blocks[-1] != source:
            raise ValueError(f"block {source} was copied; the last of sequence {event.seq_id} is {place.blocks[-1]}")
        evicted += _take(state, destination)
        place.blocks[-1] = destination
        _release(state, source)
    for block_id in event.new_blocks:
        evicted += _take(state, block_id)
        place.blocks.append(block_id)
    place.length += event.count
    _check_evicted(evicted, event.evicted)
    _check_room(state, event.seq_id, place)


def _forked(state: MemoryState, event: SequenceForked) -> None:
    parent = _find(state, event.parent_id, on_host=False)
    _begin(state, event.child_id, Placement(parent.length, parent.blocks.copy()))


def _cached(state: MemoryState, event: BlockCached) -> None:
    if state.ref_count[event.block_id] < 1:
        raise ValueError(f"block {event.block_id} is in no table")
    state.digest_of[event.block_id] = event.digest


def _freed(state: MemoryState, event: SequenceFreed) -> None:
    place = state.sequences.pop(event.seq_id)
    for block_id in reversed(place.blocks):
        _release(state, block_id, place.on_host)


def _swapped_out(state: MemoryState, event: SwappedOut) -> None:
    _rehouse(state, event.seq_ids, dict(event.blocks), to_host=True)


def _swapped_in(state: MemoryState, event: SwappedIn) -> None:
    evicted = _rehouse(state, event.seq_ids, dict(event.blocks), to_host=False)
    _check_evicted(evicted, event.evicted)


def _laid(state: MemoryState, event: RegionPlaced | RegionSwappedOut | RegionSwappedIn) -> None:
    """A sequence's region is here now, where no other may be."""
    if isinstance(event, RegionPlaced):
        state.sequences.setdefault(event.seq_id, Placement())
    place = _find(state, event.seq_id, on_host=isinstance(event, RegionSwappedIn))
    place.start, place.size, place.on_host = event.start, event.size, isinstance(event, RegionSwappedOut)
    stop = event.start + event.size
    if event.start < 0 or stop > (state.num_host_blocks if place.on_host else state.num_blocks):
        raise ValueError(f"slots {event.start} to {stop - 1} are not all in the pool")
    for seq_id, other in state.sequences.items():
        overlap = other.start < stop and event.start < other.start + other.size
        if overlap and other is not place and other.on_host == place.on_host:
            raise ValueError(f"sequences {event.seq_id} and {seq_id} lie in the same slots")
    _check_room(state, event.seq_id, place)


_CHANGES: dict[type[Event], Callable[[MemoryState, Any], None]] = {
    PoolOpened: _pool_opened,
    SequenceAdmitted: _admitted,
    TokensAppended: _appended,
    SequenceForked: _forked,
    BlockCached: _cached,
    SequenceFreed: _freed,
    SwappedOut: _swapped_out,
    SwappedIn: _swapped_in,
    RegionPlaced: _laid,
    RegionSwappedOut: _laid,
    RegionSwappedIn: _laid,
}


# --- the pool's moves ------------------------------------------------------------------------------------


def _begin(state: MemoryState, seq_id: int, place: Placement) -> None:
    if seq_id in state.sequences:
        raise ValueError(f"sequence {seq_id} is there already")
    for block_id in place.blocks:
        _share(state, block_id)
    state.sequences[seq_id] = place
    _check_room(state, seq_id, place)


def _find(state: MemoryState, seq_id: int, on_host: bool) -> Placement:
    place = state.sequences[seq_id]
    if place.on_host != on_host:
        raise ValueError(f"sequence {seq_id} is on the {'host' if place.on_host else 'device'}")
    return place


def _check_room(state: MemoryState, seq_id: int, place: Placement) -> None:
    """A table has just enough blocks; a region has enough slots; pages come later, layer by layer."""
    if state.manager == "streaming":
        return
    if not state.ref_count:
        if place.length > place.size:
            raise ValueError(f"sequence {seq_id} has {place.length} tokens in {place.size} slots")
    elif len(place.blocks) != -(-place.length // state.block_size):
        raise ValueError(f"sequence {seq_id} has {place.length} tokens in {len(place.blocks)} blocks")


def _check_evicted(evicted: list[int], told: tuple[int, ...]) -> None:
    if tuple(evicted) != told:
        raise ValueError(f"the prefix cache gave up {evicted or 'nothing'}; told was {list(told) or 'nothing'}")


def _take(state: MemoryState, block_id: int, on_host: bool = False) -> list[int]:
    """`block_id` is handed out. Returns the block that the prefix cache gave up for it, if any."""
    free, ref_count = (state.host_free, state.host_ref_count) if on_host else (state.free, state.ref_count)
    given_up = []
    if not free and not on_host and state.idle:
        evicted, _ = state.idle.popitem(last=False)
        del state.digest_of[evicted]
        free.append(evicted)
        given_up = [evicted]
    if not free or free[-1] != block_id:
        raise ValueError(f"block {block_id} was handed out; next on the free list is {free[-1:] or 'nothing'}")
    free.pop()
    ref_count[block_id] = 1
    return given_up


def _share(state: MemoryState, block_id: int) -> None:
    if not 0 <= block_id < len(state.ref_count):
        raise ValueError(f"block {block_id} is not in the pool")
    if not state.ref_count[block_id]:
        if block_id not in state.idle:
            raise ValueError(f"block {block_id} is free")
        del state.idle[block_id]
    state.ref_count[block_id] += 1


def _release(state: MemoryState, block_id: int, on_host: bool = False) -> None:
    ref_count = state.host_ref_count if on_host else state.ref_count
    if ref_count[block_id] < 1:
        raise ValueError(f"block {block_id} is in no table")
    ref_count[block_id] -= 1
    if ref_count[block_id]:
        return
    if on_host:
        state.host_free.append(block_id)
    elif block_id in state.digest_of:
        state.idle[block_id] = None
    else:
        state.free.append(block_id)


def _rehouse(state: MemoryState, seq_ids: Iterable[int], new_of: dict[int, int], to_host: bool) -> list[int]:
    """Move tables from one pool to the other. Returns the blocks that the prefix cache gave up."""
    taken = set()
    evicted: list[int] = []
    for seq_id in seq_ids:
        for block_id in _find(state, seq_id, on_host=not to_host).blocks:
            new = new_of[block_id]
            if new in taken:
                (state.host_ref_count if to_host else state.ref_count)[new] += 1
            else:
                evicted += _take(state, new, on_host=to_host)
                taken.add(new)
    for seq_id in seq_ids:
        place = state.sequences[seq_id]
        for block_id in reversed(place.blocks):
            _release(state, block_id, on_host=not to_host)
        place.blocks, place.on_host = [new_of[block_id] for block_id in place.blocks], to_host
    return evicted

"""What one event changed in memory: what screens mark as new, copied, given up or moved."""

from __future__ import annotations

import msgspec

from . import events
from .memory_state import MemoryState, Placement


class Change(msgspec.Struct, frozen=True):
    """What one event did to memory. Blocks are of the device."""

    seq_ids: tuple[int, ...] = ()  # the sequences that the event is about
    before: dict[int, int] = {}  # device block -> its ref count before, where it changed
    written: range = range(0)  # positions of the sequence that got a slot
    new_entries: range = range(0)  # logical blocks of the sequence whose entry in the table is new
    copied: tuple[int, ...] = ()  # (source, destination) of a copy on write
    evicted: tuple[int, ...] = ()  # blocks that the prefix cache gave up
    hits: tuple[int, ...] = ()  # blocks that the prefix cache found
    known: tuple[int, ...] = ()  # blocks that the prefix cache knows from now on
    place_before: Placement | None = None  # of the sequence that was freed, or whose region changed

    @classmethod
    def of(cls, event: events.Event, memory: MemoryState, place_before: Placement | None) -> Change:
        """What the event did, which `memory` has followed already."""
        seq_ids = events.sequences_of(event)
        written = new_entries = range(0)
        if isinstance(event, events.TokensAppended):
            place = memory.sequences[event.seq_id]
            written = range(place.length - event.count, place.length)
            new_entries = range(len(place.blocks) - len(event.new_blocks) - bool(event.copied), len(place.blocks))
        elif isinstance(event, (events.SwappedOut, events.SwappedIn)) and len(seq_ids) == 1:
            new_entries = range(len(memory.sequences[seq_ids[0]].blocks))
        return cls(
            seq_ids,
            before={block: old for block, old in memory.counts_before.items() if memory.ref_count[block] != old},
            written=written,
            new_entries=new_entries,
            copied=getattr(event, "copied", ()),
            evicted=getattr(event, "evicted", ()),
            hits=event.blocks if isinstance(event, events.SequenceAdmitted) else (),
            known=(event.block_id,) if isinstance(event, events.BlockCached) else (),
            place_before=place_before,
        )

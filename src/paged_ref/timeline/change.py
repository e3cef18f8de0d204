"""What one event did to memory, seen from before and after it: the marks on screen come from this."""

from __future__ import annotations

from dataclasses import dataclass, field

from .events import (
    BeamsReordered,
    BlockCached,
    Event,
    SequenceAdmitted,
    SequenceForked,
    StepPlanned,
    SwappedIn,
    TokensAppended,
)
from .replay import Placement
from .run_state import RunState, advance


@dataclass(frozen=True, slots=True)
class Change:
    """What one event did to memory, for the marks on screen."""

    before: dict[int, int] = field(default_factory=dict)  # device block -> its ref_count before, where it changed
    written: frozenset[tuple[int, int]] = frozenset()  # (sequence, position) of slots that were given out
    copied: tuple[int, ...] = ()  # (source, destination) of a copy on write
    evicted: tuple[int, ...] = ()  # blocks that the prefix cache gave up
    hits: tuple[int, ...] = ()  # blocks that the prefix cache found
    cached: tuple[int, ...] = ()  # blocks that it knows from now on
    seq_ids: tuple[int, ...] = ()  # whom the event is about
    place_before: Placement | None = None  # of the one sequence, where it had one
    free_before: int = 0  # blocks on the free list


def advance_and_tell(state: RunState, event: Event, number: int = 0) -> Change:
    """The same, and what it did."""
    memory = state.memory
    seq_ids = sequences_of(event)
    evicted: tuple[int, ...] = getattr(event, "evicted", ())
    copied: tuple[int, ...] = getattr(event, "copied", ())
    concerned = {block for s in seq_ids if (p := memory.sequences.get(s)) and not p.on_host for block in p.blocks}
    concerned |= {*getattr(event, "new_blocks", ()), *copied, *evicted}
    hits = event.blocks if isinstance(event, SequenceAdmitted) else ()
    concerned |= set(hits)
    if isinstance(event, SwappedIn):
        concerned |= {device for _, device in event.blocks}
    before = {block: memory.ref_count[block] for block in concerned if 0 <= block < len(memory.ref_count)}
    place = memory.sequences.get(seq_ids[0]) if len(seq_ids) == 1 else None
    if place is not None:
        place = Placement(place.length, place.blocks.copy(), place.start, place.size, place.on_host)
    free_before = len(memory.free)
    advance(state, event, number)
    written: frozenset[tuple[int, int]] = frozenset()
    if isinstance(event, TokensAppended):
        length = memory.sequences[event.seq_id].length
        written = frozenset((event.seq_id, position) for position in range(length - event.count, length))
    return Change(
        before={block: count for block, count in before.items() if memory.ref_count[block] != count},
        written=written,
        copied=copied,
        evicted=evicted,
        hits=hits,
        cached=(event.block_id,) if isinstance(event, BlockCached) else (),
        seq_ids=seq_ids,
        place_before=place,
        free_before=free_before,
    )


def sequences_of(event: Event) -> tuple[int, ...]:
    """Whom an event is about."""
    if isinstance(event, SequenceForked):
        return (event.parent_id, event.child_id)
    if isinstance(event, StepPlanned):
        return tuple(seq_id for seq_id, _ in event.chunks)
    if isinstance(event, BeamsReordered):
        return tuple(dict.fromkeys(seq_id for _, seq_id in event.chosen))
    seq_id: int | None = getattr(event, "seq_id", None)
    seq_ids: tuple[int, ...] = getattr(event, "seq_ids", ())
    return seq_ids if seq_id is None else (seq_id,)

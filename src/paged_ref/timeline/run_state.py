"""What the screen knows of a run at one point of its log: the memory, and the tokens that the engine told.

`advance` moves a `RunState` by one event. The memory part is memory/replay.py; here come the sequences'
tokens and status, the blocks that the prefix cache knows with what lies in them, and running totals.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ..core.memory.regions import RegionPool
from ..core.memory.usage import PartialAllocation, Snapshot
from ..extras.prefix_cache import block_digests
from .events import (
    BlockCached,
    Event,
    PagesAttended,
    RegionPlaced,
    RegionSwappedIn,
    RegionSwappedOut,
    RequestArrived,
    SequenceAdmitted,
    SequenceFinished,
    SequenceForked,
    SequenceFreed,
    StepPlanned,
    SwappedIn,
    SwappedOut,
    TokenSampled,
    TokensAppended,
)
from .replay import MemoryState, Placement, apply

Status = Literal["waiting", "running", "swapped", "finished"]


@dataclass(slots=True)
class SequenceView:
    """One sequence as the log tells it. `tokens` is empty where only a manager told, and no engine."""

    seq_id: int
    request_id: int
    prompt_len: int
    tokens: list[int]
    status: Status = "waiting"
    reason: str = ""  # why it finished
    digest: tuple[int, bytes] = (0, b"")  # leading blocks, and the digest of the last of them

    def copy(self) -> SequenceView:
        tokens = self.tokens.copy()
        return SequenceView(
            self.seq_id, self.request_id, self.prompt_len, tokens, self.status, self.reason, self.digest
        )


@dataclass(frozen=True, slots=True)
class KnownBlock:
    """A full block in the prefix cache. `parent` is the digest of the block before it, "" for the first."""

    block_id: int
    digest: str
    parent: str
    tokens: tuple[int, ...]


@dataclass(slots=True)
class Totals:
    """Counted from the beginning of the log."""

    forks: int = 0
    copies: int = 0  # on write
    rows_out: int = 0  # to the host: blocks, or slots of a manager without blocks
    rows_in: int = 0
    rows_moved: int = 0  # on the device, by the swapping manager
    hits: int = 0  # tokens found in the prefix cache
    asked: int = 0  # tokens of sequences that were admitted
    evicted: int = 0  # blocks that the prefix cache gave up
    preemptions: int = 0  # sequences


@dataclass(slots=True)
class RunState:
    """All that frames draw from."""

    memory: MemoryState = field(default_factory=MemoryState)
    sequences: dict[int, SequenceView] = field(default_factory=dict)
    writer: dict[int, tuple[int, int]] = field(default_factory=dict)  # block -> (sequence, logical block)
    known: dict[int, KnownBlock] = field(default_factory=dict)  # by block
    plan: StepPlanned | None = None  # the last one
    attended: dict[int, PagesAttended] = field(default_factory=dict)  # by sequence: what was watched last
    totals: Totals = field(default_factory=Totals)

    @property
    def paged(self) -> bool:
        return bool(self.memory.ref_count)

    def copy(self) -> RunState:
        """A state of its own. What can no longer change is shared: finished sequences, known blocks."""
        memory = replace(
            self.memory,
            sequences={
                seq_id: Placement(place.length, place.blocks.copy(), place.start, place.size, place.on_host)
                for seq_id, place in self.memory.sequences.items()
            },
            ref_count=self.memory.ref_count.copy(),
            free=self.memory.free.copy(),
            host_ref_count=self.memory.host_ref_count.copy(),
            host_free=self.memory.host_free.copy(),
            digest_of=self.memory.digest_of.copy(),
            idle=OrderedDict(self.memory.idle),
            pages=self.memory.pages.copy(),
        )
        sequences = {
            seq_id: view if view.status == "finished" else view.copy() for seq_id, view in self.sequences.items()
        }
        return RunState(
            memory,
            sequences,
            self.writer.copy(),
            self.known.copy(),
            self.plan,
            self.attended.copy(),
            replace(self.totals),
        )

    def snapshot(self, needed: int = 0) -> Snapshot:
        """What the manager's own snapshot() says. Holes smaller than `needed` slots count as external. For pages that
        stream: how full the device is."""
        if self.memory.manager == "streaming":
            here = sum(device >= 0 for device, _ in self.memory.pages.places.values())
            size = self.memory.block_size
            return Snapshot(here * size, [], external=0, free=(self.memory.num_blocks - here) * size)
        return _paged_snapshot(self.memory) if self.paged else _region_snapshot(self.memory, needed)


def advance(state: RunState, event: Event, number: int = 0) -> None:
    """Move `state` by one event. Raises ValueError where the event contradicts what came before."""
    change = _CHANGES.get(type(event))
    try:
        if isinstance(event, RegionPlaced):  # what moves on the device shows only before it has
            place = state.memory.sequences.get(event.seq_id)
            state.totals.rows_moved += place.length if place and place.start != event.start else 0
        apply(state.memory, event, number)
        if change is not None:
            change(state, event)
    except (KeyError, IndexError) as error:
        why = error.args[0] if error.args else error
        raise ValueError(f"event {number}, {type(event).__name__}, does not fit what came before: {why}") from None


# --- one function for each event that tells of sequences --------------------------------------------------


def _view(state: RunState, seq_id: int) -> SequenceView:
    """The sequence, made where no engine told of it."""
    return state.sequences.setdefault(seq_id, SequenceView(seq_id, -1, 0, []))


def _arrived(state: RunState, event: RequestArrived) -> None:
    for seq_id in event.seq_ids:
        state.sequences[seq_id] = SequenceView(seq_id, event.request_id, len(event.prompt), list(event.prompt))


def _admitted(state: RunState, event: SequenceAdmitted) -> None:
    view = _view(state, event.seq_id)
    view.status = "running"
    state.totals.hits += event.length
    state.totals.asked += len(view.tokens)


def _appended(state: RunState, event: TokensAppended) -> None:
    place = state.memory.sequences[event.seq_id]
    if place.blocks:
        for index in range((place.length - event.count) // state.memory.block_size, len(place.blocks)):
            state.writer[place.blocks[index]] = (event.seq_id, index)
    state.totals.copies += bool(event.copied)
    _forget(state, event.evicted)


def _forked(state: RunState, event: SequenceForked) -> None:
    parent = _view(state, event.parent_id)
    if event.child_id not in state.sequences:  # a beam; a sample has arrived with its request
        state.sequences[event.child_id] = replace(parent, seq_id=event.child_id, tokens=parent.tokens.copy())
    state.sequences[event.child_id].status = "running"
    state.totals.forks += 1


def _cached(state: RunState, event: BlockCached) -> None:
    seq_id, index = state.writer[event.block_id]
    view, size = state.sequences[seq_id], state.memory.block_size
    tokens = tuple(view.tokens[index * size : (index + 1) * size])
    parent = b""
    if len(tokens) == size:
        done, digest = view.digest if view.digest[0] <= index else (0, b"")
        chain = [digest, *block_digests(view.tokens[done * size : (index + 1) * size], size, digest)]
        parent = chain[-2]
        if view.status != "finished":
            view.digest = (index + 1, chain[-1])
    state.known[event.block_id] = KnownBlock(event.block_id, event.digest, parent.hex(), tokens)


def _swapped_out(state: RunState, event: SwappedOut) -> None:
    for seq_id in event.seq_ids:
        _view(state, seq_id).status = "swapped"
    state.totals.rows_out += len(event.blocks)
    state.totals.preemptions += len(event.seq_ids)


def _swapped_in(state: RunState, event: SwappedIn) -> None:
    for seq_id in event.seq_ids:
        _view(state, seq_id).status = "running"
        for index, block_id in enumerate(state.memory.sequences[seq_id].blocks):
            state.writer[block_id] = (seq_id, index)
    state.totals.rows_in += len(event.blocks)
    _forget(state, event.evicted)


def _freed(state: RunState, event: SequenceFreed) -> None:
    view = _view(state, event.seq_id)
    view.status = "waiting"  # if it does not finish now, it was preempted
    if view.request_id < 0:  # no engine will tell that it finished
        del state.sequences[event.seq_id]


def _placed(state: RunState, event: RegionPlaced) -> None:
    _view(state, event.seq_id).status = "running"


def _region_out(state: RunState, event: RegionSwappedOut) -> None:
    _view(state, event.seq_id).status = "swapped"
    state.totals.rows_out += state.memory.sequences[event.seq_id].length
    state.totals.preemptions += 1


def _region_in(state: RunState, event: RegionSwappedIn) -> None:
    _view(state, event.seq_id).status = "running"
    state.totals.rows_in += state.memory.sequences[event.seq_id].length


def _planned(state: RunState, event: StepPlanned) -> None:
    for seq_id, _ in event.chunks:
        if seq_id not in state.memory.sequences or seq_id not in state.sequences:
            raise KeyError(f"sequence {seq_id} holds nothing")
    for seq_id in (*event.preempted, *event.waiting):
        if seq_id not in state.sequences:
            raise KeyError(f"sequence {seq_id} never arrived")
    state.plan = event
    # Those that were swapped out were counted then.
    state.totals.preemptions += sum(_view(state, seq_id).status == "waiting" for seq_id in event.preempted)


def _attended(state: RunState, event: PagesAttended) -> None:
    state.attended[event.seq_id] = event


def _sampled(state: RunState, event: TokenSampled) -> None:
    state.sequences[event.seq_id].tokens.append(event.token_id)


def _finished(state: RunState, event: SequenceFinished) -> None:
    # A new object: other checkpoints may share a finished one, so it never changes again.
    state.sequences[event.seq_id] = replace(state.sequences[event.seq_id], status="finished", reason=event.reason)


_CHANGES: dict[type[Event], Callable[[RunState, Any], None]] = {
    RequestArrived: _arrived,
    SequenceAdmitted: _admitted,
    TokensAppended: _appended,
    SequenceForked: _forked,
    BlockCached: _cached,
    SwappedOut: _swapped_out,
    SwappedIn: _swapped_in,
    SequenceFreed: _freed,
    RegionPlaced: _placed,
    RegionSwappedOut: _region_out,
    RegionSwappedIn: _region_in,
    StepPlanned: _planned,
    PagesAttended: _attended,
    TokenSampled: _sampled,
    SequenceFinished: _finished,
}


def _forget(state: RunState, evicted: Iterable[int]) -> None:
    for block_id in evicted:
        state.known.pop(block_id, None)
        state.totals.evicted += 1


# --- where the slots are ----------------------------------------------------------------------------------


def _paged_snapshot(memory: MemoryState) -> Snapshot:
    pieces: dict[int, PartialAllocation] = {}
    entries = 0
    for seq_id, place in memory.sequences.items():
        if place.on_host:
            continue
        entries += len(place.blocks)
        filled = place.length % memory.block_size
        if filled:
            pieces[place.blocks[-1]] = PartialAllocation(seq_id, place.length, filled, memory.block_size)
    cached, size = len(memory.idle), memory.block_size
    held = memory.num_blocks - len(memory.free) - cached
    return Snapshot(
        full=(held - len(pieces)) * size,
        open=list(pieces.values()),
        external=0,
        free=len(memory.free) * size,
        cached=cached * size,
        shared=(entries - held) * size,
    )


def _region_snapshot(memory: MemoryState, needed: int) -> Snapshot:
    pieces = [
        PartialAllocation(seq_id, place.length, place.length, place.size)
        for seq_id, place in memory.sequences.items()
        if not place.on_host
    ]
    pool = RegionPool(memory.num_blocks)
    pool.holes = holes(memory)
    external, free = pool.split_free(needed)
    return Snapshot(0, pieces, external, free)


def holes(memory: MemoryState, on_host: bool = False) -> list[tuple[int, int]]:
    """(start, size) of what lies between the regions of one pool."""
    found, position = [], 0
    here = [(p.start, p.size) for p in memory.sequences.values() if p.on_host == on_host]
    for start, size in [*sorted(here), (memory.num_host_blocks if on_host else memory.num_blocks, 0)]:
        if start > position:
            found.append((position, start - position))
        position = start + size
    return found

"""One moment of a run, as its log says it: memory, tokens, pages and totals.

`RunState.apply` moves the state by one event, and returns what changed. The state follows the events and decides
nothing: the event says which block was taken, copied or given up. An event that contradicts an earlier one is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import msgspec

from ..core.checks import require
from ..extras.memory_limit import require_memory
from ..extras.prefix_cache import block_digests
from .events import (
    BlockCached,
    Event,
    PagesAttended,
    PagesFreed,
    PagesNamed,
    PagesPlaced,
    PoolCleared,
    PoolOpened,
    RanksOpened,
    RegionPlaced,
    RegionSwappedIn,
    RegionSwappedOut,
    RequestArrived,
    ResidencyOpened,
    SequenceAdmitted,
    SequenceFinished,
    SequenceForked,
    SequenceFreed,
    SequenceTruncated,
    StepPlanned,
    StepTimed,
    SwappedIn,
    SwappedOut,
    TokenSampled,
    TokensAppended,
    sequences_of,
)
from .memory_state import BLOCK_BYTES, Blocks, KnownBlock, MemoryState, PageEvent, Placement, require_each_once

Status = Literal["waiting", "running", "swapped", "finished"]


@dataclass(slots=True)
class SequenceView:
    """One sequence as the log says it. `tokens` is empty where only a manager was logged, and no engine."""

    seq_id: int
    request_id: int  # -1: no engine was logged
    prompt_len: int
    tokens: list[int]
    status: Status = "waiting"
    reason: str = ""  # why it finished
    digest: tuple[int, bytes] = (0, b"")  # leading blocks, and the digest of the last of them

    def copy(self) -> SequenceView:
        return replace(self, tokens=self.tokens.copy())


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


class Change(msgspec.Struct, frozen=True):
    """What one event did to memory, for the marks on screen."""

    seq_ids: tuple[int, ...] = ()  # the sequences that the event is about
    before: dict[int, int] = {}  # device block -> its ref count before, where it changed
    written: range = range(0)  # positions of the sequence that got a slot
    new_entries: range = range(0)  # logical blocks of the sequence whose entry in the table is new
    copied: tuple[int, ...] = ()  # (source, destination) of a copy on write
    evicted: tuple[int, ...] = ()  # blocks that the prefix cache gave up
    hits: tuple[int, ...] = ()  # blocks that the prefix cache found
    known: tuple[int, ...] = ()  # blocks that the prefix cache knows from now on
    place_before: Placement | None = None  # of the sequence that was freed, or whose region changed


@dataclass(slots=True)
class RunState:
    """All that is drawn of one moment."""

    memory: MemoryState = field(default_factory=MemoryState)
    sequences: dict[int, SequenceView] = field(default_factory=dict)
    writer: dict[int, tuple[int, int]] = field(default_factory=dict)  # block -> (sequence, logical block)
    plan: StepPlanned | None = None  # the last one
    attended: dict[int, PagesAttended] = field(default_factory=dict)  # by sequence: what was watched last
    totals: Totals = field(default_factory=Totals)
    in_step: bool = False  # a step is planned, and not over
    got: list[Event] = field(default_factory=list)  # tokens, new beams and ends, by the step under way

    @property
    def paged(self) -> bool:
        return self.memory.paged

    def copy(self) -> RunState:
        """A state of its own. Finished sequences never change, and are shared."""
        views = {seq_id: v if v.status == "finished" else v.copy() for seq_id, v in self.sequences.items()}
        totals = replace(self.totals)
        attended, got = self.attended.copy(), self.got.copy()
        return RunState(self.memory.copy(), views, self.writer.copy(), self.plan, attended, totals, self.in_step, got)

    def apply(self, event: Event, number: int = 0) -> Change:
        """Move the state by one event. Raises ValueError, with `number` as the event's place in the log, where the
        event contradicts what came before."""
        follow = _FOLLOW.get(type(event))
        if follow is None:
            return Change(sequences_of(event))
        place_before = None
        if isinstance(event, _PLACE_CHANGES) and event.seq_id in self.memory.sequences:
            place_before = self.memory.sequences[event.seq_id].copy()
        self.memory.counts_before.clear()
        try:
            follow(self, event)
        except (KeyError, IndexError, ValueError) as error:
            why = f"{error} is not there" if isinstance(error, KeyError) else error
            raise ValueError(f"event {number}, {type(event).__name__}, does not fit what came before: {why}") from None
        return self._change(event, place_before)

    def _change(self, event: Event, place_before: Placement | None) -> Change:
        ref_count, seq_ids = self.memory.ref_count, sequences_of(event)
        written = new_entries = range(0)
        if isinstance(event, TokensAppended):
            place = self.memory.sequences[event.seq_id]
            written = range(place.length - event.count, place.length)
            new_entries = range(len(place.blocks) - len(event.new_blocks) - bool(event.copied), len(place.blocks))
        elif isinstance(event, (SwappedOut, SwappedIn)) and len(seq_ids) == 1:
            new_entries = range(len(self.memory.sequences[seq_ids[0]].blocks))
        return Change(
            seq_ids,
            before={block: old for block, old in self.memory.counts_before.items() if ref_count[block] != old},
            written=written,
            new_entries=new_entries,
            copied=getattr(event, "copied", ()),
            evicted=getattr(event, "evicted", ()),
            hits=event.blocks if isinstance(event, SequenceAdmitted) else (),
            known=(event.block_id,) if isinstance(event, BlockCached) else (),
            place_before=place_before,
        )

    # --- one method for each event that changes something ------------------------------------------------

    def _pool_opened(self, event: PoolOpened) -> None:
        memory = self.memory
        if memory.manager:
            raise ValueError("a pool was opened before")
        require(block_size=(event.block_size, 1), num_blocks=(event.num_blocks, 0))
        require(num_host_blocks=(event.num_host_blocks, 0))
        if event.free_order:
            require_each_once(event.free_order, event.num_blocks)
            what = f"num_host_blocks is {event.num_host_blocks}: a list of so many"
            require_memory(what, BLOCK_BYTES * event.num_host_blocks)
        memory.manager, memory.block_size = event.manager, event.block_size
        memory.num_blocks, memory.num_host_blocks = event.num_blocks, event.num_host_blocks
        if event.free_order:
            memory.ref_count = [0] * event.num_blocks
            memory.free = list(reversed(event.free_order))
            memory.host = Blocks([0] * event.num_host_blocks, list(reversed(range(event.num_host_blocks))))

    def _ranks_opened(self, event: RanksOpened) -> None:
        if not event.heads or len(event.heads) != len(event.kv_heads):
            raise ValueError(f"{len(event.heads)} ranks have heads, and {len(event.kv_heads)} have KV heads")

    def _request_arrived(self, event: RequestArrived) -> None:
        for seq_id in event.seq_ids:
            self.sequences[seq_id] = SequenceView(seq_id, event.request_id, len(event.prompt), list(event.prompt))

    def _admitted(self, event: SequenceAdmitted) -> None:
        self.memory.begin(event.seq_id, Placement(list(event.blocks), event.length))
        view = self._set_status(event.seq_id, "running")
        self.totals.hits += event.length
        self.totals.asked += len(view.tokens)

    def _appended(self, event: TokensAppended) -> None:
        memory = self.memory
        place = memory.find(event.seq_id, on_host=False)
        self._give_up(event.evicted)
        if event.copied:
            source, destination = event.copied
            if place.blocks[-1] != source:
                last = place.blocks[-1]
                raise ValueError(f"block {source} was copied; the last of sequence {event.seq_id} is {last}")
            memory.take(destination)
            place.blocks[-1] = destination
            memory.release(source)
            self.totals.copies += 1
        for block_id in event.new_blocks:
            memory.take(block_id)
        place.blocks += event.new_blocks
        for index in range(place.length // memory.block_size, len(place.blocks)):
            self.writer[place.blocks[index]] = (event.seq_id, index)
        place.length += event.count
        memory.check_fit(event.seq_id, place)

    def _truncated(self, event: SequenceTruncated) -> None:
        memory = self.memory
        place = memory.find(event.seq_id, on_host=False)
        if not 0 <= event.length <= place.length:
            raise ValueError(f"sequence {event.seq_id} has {place.length} tokens, and cannot keep {event.length}")
        place.length = event.length
        while len(place.blocks) > -(-event.length // memory.block_size):
            memory.release(place.blocks.pop())

    def _forked(self, event: SequenceForked) -> None:
        place, parent = self.memory.find(event.parent_id, on_host=False), self._arrived(event.parent_id)
        self.memory.begin(event.child_id, place.copy())
        if event.child_id not in self.sequences:  # a beam; a sample has arrived with its request
            self.sequences[event.child_id] = replace(parent, seq_id=event.child_id, tokens=parent.tokens.copy())
            self._keep(event)
        self._set_status(event.child_id, "running")
        self.totals.forks += 1

    def _block_cached(self, event: BlockCached) -> None:
        self.memory.check_held(event.block_id)
        view, index = self._writer_of(event.block_id)
        size = self.memory.block_size
        tokens = tuple(view.tokens[index * size : (index + 1) * size])
        parent = b""
        if len(tokens) == size:
            done, digest = view.digest if view.digest[0] <= index else (0, b"")
            chain = [digest, *block_digests(view.tokens[done * size : (index + 1) * size], size, digest)]
            parent = chain[-2]
            if view.status != "finished":
                view.digest = (index + 1, chain[-1])
        self.memory.known[event.block_id] = KnownBlock(event.block_id, event.digest, parent.hex(), tokens)

    def _swapped_out(self, event: SwappedOut) -> None:
        self.memory.move_tables(event.seq_ids, event.blocks, to_host=True)
        for seq_id in event.seq_ids:
            self._set_status(seq_id, "swapped")
        self.totals.rows_out += len(event.blocks)
        self.totals.preemptions += len(event.seq_ids)

    def _swapped_in(self, event: SwappedIn) -> None:
        self._give_up(event.evicted)
        self.memory.move_tables(event.seq_ids, event.blocks, to_host=False)
        for seq_id in event.seq_ids:
            self._set_status(seq_id, "running")
            for index, block_id in enumerate(self.memory.sequences[seq_id].blocks):
                self.writer[block_id] = (seq_id, index)
        self.totals.rows_in += len(event.blocks)

    def _freed(self, event: SequenceFreed) -> None:
        place = self.memory.sequences.pop(event.seq_id, None)
        if place is None:
            raise ValueError(f"sequence {event.seq_id} is not there")
        for block_id in reversed(place.blocks):  # managers free the last block first
            (self.memory.host if place.on_host else self.memory).release(block_id)
        self.memory.pages.end(event.seq_id)
        self._now_waits(event.seq_id)  # preempted, unless SequenceFinished follows

    def _cleared(self, event: PoolCleared) -> None:
        for seq_id in self.memory.sequences:
            self._now_waits(seq_id)
        self.memory.clear(event.free_order)
        self.writer.clear()
        for undone in reversed(self.got):
            if isinstance(undone, SequenceForked):
                self.sequences.pop(undone.child_id, None)
            elif isinstance(undone, (TokenSampled, SequenceFinished)) and undone.seq_id in self.sequences:
                view = self.sequences[undone.seq_id]
                tokens = view.tokens[:-1] if isinstance(undone, TokenSampled) else view.tokens.copy()
                self.sequences[undone.seq_id] = replace(
                    view, tokens=tokens, status="waiting", reason="", digest=(0, b"")
                )
        self._end_step()

    def _region_moved(self, event: RegionPlaced | RegionSwappedOut | RegionSwappedIn) -> None:
        """The region of the sequence lies here now, where no other region may lie."""
        memory, totals = self.memory, self.totals
        from_host, to_host = isinstance(event, RegionSwappedIn), isinstance(event, RegionSwappedOut)
        if isinstance(event, RegionPlaced):
            memory.sequences.setdefault(event.seq_id, Placement())
        place = memory.find(event.seq_id, on_host=from_host)
        if from_host != to_host:
            memory.now_last(event.seq_id)
            totals.rows_in += place.length * from_host
            totals.rows_out += place.length * to_host
            totals.preemptions += to_host
        elif place.start != event.start:
            totals.rows_moved += place.length
        place.start, place.size, place.on_host = event.start, event.size, to_host
        stop = event.start + event.size
        if event.start < 0 or stop > (memory.num_host_blocks if to_host else memory.num_blocks):
            raise ValueError(f"slots {event.start} to {stop - 1} are not all in the pool")
        for seq_id, other in memory.sequences.items():
            overlap = other.start < stop and event.start < other.start + other.size
            if overlap and other is not place and other.on_host == to_host:
                raise ValueError(f"sequences {event.seq_id} and {seq_id} lie in the same slots")
        memory.check_fit(event.seq_id, place)
        self._set_status(event.seq_id, "swapped" if to_host else "running")

    def _pages_changed(self, event: PageEvent) -> None:
        if isinstance(event, PagesNamed):
            self.memory.find(event.seq_id, on_host=False)
        self.memory.pages.apply(event)

    def _pages_attended(self, event: PagesAttended) -> None:
        self.memory.find(event.seq_id, on_host=False)
        if wrong := {*event.chosen, *event.resident} - set(range(len(event.mass))):
            raise ValueError(f"block {min(wrong)} is not among the {len(event.mass)} whose mass it says")
        require(mass=(min(event.mass, default=0), 0))
        self.attended[event.seq_id] = event

    def _planned(self, event: StepPlanned) -> None:
        for seq_id, _ in event.chunks:
            if seq_id not in self.memory.sequences:
                raise ValueError(f"sequence {seq_id} holds nothing")
        for seq_id in (*(seq_id for seq_id, _ in event.chunks), *event.preempted, *event.waiting):
            self._arrived(seq_id)
        self.plan = event
        self._end_step()  # the one before, where the log has no times
        self.in_step = True
        # A sequence that was swapped out is counted by that event.
        self.totals.preemptions += sum(self.sequences[seq_id].status == "waiting" for seq_id in event.preempted)

    def _sampled(self, event: TokenSampled) -> None:
        self._arrived(event.seq_id).tokens.append(event.token_id)
        self._keep(event)

    def _finished(self, event: SequenceFinished) -> None:
        # A new object, which never changes again: copies of the state share finished sequences.
        self.sequences[event.seq_id] = replace(self._arrived(event.seq_id), status="finished", reason=event.reason)
        self._keep(event)

    def _timed(self, event: StepTimed) -> None:
        require(microseconds=(event.microseconds, 0))
        self._end_step()

    # --- what several of them do -----------------------------------------------------------------------

    def _keep(self, event: Event) -> None:
        """The event is undone if the step is. A request that is aborted between steps ends for good."""
        if self.in_step:
            self.got.append(event)

    def _end_step(self) -> None:
        self.in_step = False
        self.got.clear()

    def _set_status(self, seq_id: int, status: Status) -> SequenceView:
        """The sequence, made where no engine was logged, with this status from now on."""
        view = self.sequences.setdefault(seq_id, SequenceView(seq_id, -1, 0, []))
        view.status = status
        return view

    def _now_waits(self, seq_id: int) -> None:
        """The sequence holds nothing. Where no engine was logged, that is its end."""
        if self._set_status(seq_id, "waiting").request_id < 0:
            del self.sequences[seq_id]

    def _arrived(self, seq_id: int) -> SequenceView:
        """The sequence, which must be there."""
        if seq_id not in self.sequences:
            raise ValueError(f"sequence {seq_id} never arrived")
        return self.sequences[seq_id]

    def _writer_of(self, block_id: int) -> tuple[SequenceView, int]:
        """The sequence that wrote the block, or one that shares it, and the block's place in the table."""
        seq_id, index = self.writer[block_id]
        if seq_id not in self.sequences:  # it was freed before another sequence committed the block
            tables = self.memory.sequences.items()
            seq_id = next(s for s, p in tables if not p.on_host and p.blocks[index : index + 1] == [block_id])
        return self.sequences[seq_id], index

    def _give_up(self, evicted: Sequence[int]) -> None:
        self.memory.give_up(evicted)
        self.totals.evicted += len(evicted)


_PLACE_CHANGES = (SequenceFreed, SequenceTruncated, RegionPlaced, RegionSwappedOut, RegionSwappedIn)
_FOLLOW: dict[type[Event], Callable[[RunState, Any], None]] = {
    PoolOpened: RunState._pool_opened,
    RanksOpened: RunState._ranks_opened,
    RequestArrived: RunState._request_arrived,
    SequenceAdmitted: RunState._admitted,
    TokensAppended: RunState._appended,
    SequenceTruncated: RunState._truncated,
    SequenceForked: RunState._forked,
    BlockCached: RunState._block_cached,
    SwappedOut: RunState._swapped_out,
    SwappedIn: RunState._swapped_in,
    SequenceFreed: RunState._freed,
    **dict.fromkeys((RegionPlaced, RegionSwappedOut, RegionSwappedIn), RunState._region_moved),
    **dict.fromkeys((ResidencyOpened, PagesPlaced, PagesFreed, PagesNamed), RunState._pages_changed),
    PagesAttended: RunState._pages_attended,
    StepPlanned: RunState._planned,
    TokenSampled: RunState._sampled,
    SequenceFinished: RunState._finished,
    StepTimed: RunState._timed,
    PoolCleared: RunState._cleared,
}

"""One moment of a run, as its log says it: memory, tokens, pages and totals.

`RunState.apply` moves the state by one event, and returns what changed. The state follows the events and decides
nothing: the event says which block was taken, copied or given up. An event that contradicts an earlier one is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from ..core.checks import require
from ..extras.prefix_cache import block_digests
from . import events
from .change import Change
from .memory_state import KnownBlock, MemoryState, Placement
from .page_state import PageEvent

Status = Literal["waiting", "running", "swapped", "finished"]
RegionEvent = events.RegionPlaced | events.RegionSwappedOut | events.RegionSwappedIn


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


@dataclass(slots=True)
class RunState:
    """All that is drawn of one moment."""

    memory: MemoryState = field(default_factory=MemoryState)
    sequences: dict[int, SequenceView] = field(default_factory=dict)
    writer: dict[int, tuple[int, int]] = field(default_factory=dict)  # block -> (sequence, logical block)
    plan: events.StepPlanned | None = None  # the last one
    attended: dict[int, events.PagesAttended] = field(default_factory=dict)  # by sequence: what was watched last
    totals: Totals = field(default_factory=Totals)
    in_step: bool = False  # a step is planned, and not over
    undoable: list[events.Event] = field(default_factory=list)  # tokens, new beams and ends, by the step under way

    def copy(self) -> RunState:
        """A state of its own. Finished sequences never change, and are shared."""
        views = {seq_id: v if v.status == "finished" else v.copy() for seq_id, v in self.sequences.items()}
        return replace(
            self,
            memory=self.memory.copy(),
            sequences=views,
            writer=self.writer.copy(),
            attended=self.attended.copy(),
            totals=replace(self.totals),
            undoable=self.undoable.copy(),
        )

    def apply(self, event: events.Event, number: int = 0) -> Change:
        """Move the state by one event. Raises ValueError, with `number` as the event's place in the log, where the
        event contradicts what came before."""
        follow = _FOLLOW.get(type(event))
        if follow is None:
            return Change(events.sequences_of(event))
        place_before = None
        if isinstance(event, _PLACE_CHANGES) and event.seq_id in self.memory.sequences:
            place_before = self.memory.sequences[event.seq_id].copy()
        self.memory.counts_before.clear()
        try:
            follow(self, event)
        except (KeyError, IndexError, ValueError) as error:
            why = f"{error} is not there" if isinstance(error, KeyError) else error
            raise ValueError(f"event {number}, {type(event).__name__}, does not fit what came before: {why}") from None
        return Change.of(event, self.memory, place_before)

    # --- one method for each event that changes something ------------------------------------------------

    def _ranks_opened(self, event: events.RanksOpened) -> None:
        if not event.heads or len(event.heads) != len(event.kv_heads):
            raise ValueError(f"ranks with heads: {len(event.heads)}; with KV heads: {len(event.kv_heads)}")

    def _request_arrived(self, event: events.RequestArrived) -> None:
        for seq_id in event.seq_ids:
            self.sequences[seq_id] = SequenceView(seq_id, event.request_id, len(event.prompt), list(event.prompt))

    def _admitted(self, event: events.SequenceAdmitted) -> None:
        self.memory.begin(event.seq_id, Placement(list(event.blocks), event.length))
        view = self._set_status(event.seq_id, "running")
        self.totals.hits += event.length
        self.totals.asked += len(view.tokens)

    def _appended(self, event: events.TokensAppended) -> None:
        place = self.memory.append(event)
        self.totals.evicted += len(event.evicted)
        self.totals.copies += bool(event.copied)
        for index in range((place.length - event.count) // self.memory.block_size, len(place.blocks)):
            self.writer[place.blocks[index]] = (event.seq_id, index)

    def _forked(self, event: events.SequenceForked) -> None:
        place, parent = self.memory.find(event.parent_id, on_host=False), self._arrived(event.parent_id)
        self.memory.begin(event.child_id, place.copy())
        if event.child_id not in self.sequences:  # a beam; a sample has arrived with its request
            self.sequences[event.child_id] = replace(parent, seq_id=event.child_id, tokens=parent.tokens.copy())
            self._keep(event)
        self._set_status(event.child_id, "running")
        self.totals.forks += 1

    def _block_cached(self, event: events.BlockCached) -> None:
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

    def _swapped_out(self, event: events.SwappedOut) -> None:
        self.memory.move_tables(event.seq_ids, event.blocks, to_host=True)
        for seq_id in event.seq_ids:
            self._set_status(seq_id, "swapped")
        self.totals.rows_out += len(event.blocks)
        self.totals.preemptions += len(event.seq_ids)

    def _swapped_in(self, event: events.SwappedIn) -> None:
        self.memory.give_up(event.evicted)
        self.totals.evicted += len(event.evicted)
        self.memory.move_tables(event.seq_ids, event.blocks, to_host=False)
        for seq_id in event.seq_ids:
            self._set_status(seq_id, "running")
            for index, block_id in enumerate(self.memory.sequences[seq_id].blocks):
                self.writer[block_id] = (seq_id, index)
        self.totals.rows_in += len(event.blocks)

    def _freed(self, event: events.SequenceFreed) -> None:
        place = self.memory.sequences.pop(event.seq_id, None)
        if place is None:
            raise ValueError(f"sequence {event.seq_id} is not there")
        for block_id in reversed(place.blocks):  # managers free the last block first
            (self.memory.host if place.on_host else self.memory).release(block_id)
        self.memory.pages.end(event.seq_id)
        self._now_waits(event.seq_id)  # preempted, unless SequenceFinished follows

    def _cleared(self, event: events.PoolCleared) -> None:
        for seq_id in self.memory.sequences:
            self._now_waits(seq_id)
        self.memory.clear(event.free_order)
        self.writer.clear()
        for undone in reversed(self.undoable):
            if isinstance(undone, events.SequenceForked):
                self.sequences.pop(undone.child_id, None)
            elif isinstance(undone, (events.TokenSampled, events.SequenceFinished)) and undone.seq_id in self.sequences:
                view = self.sequences[undone.seq_id]
                tokens = view.tokens[:-1] if isinstance(undone, events.TokenSampled) else view.tokens.copy()
                self.sequences[undone.seq_id] = replace(
                    view, tokens=tokens, status="waiting", reason="", digest=(0, b"")
                )
        self._end_step()

    def _region_moved(self, event: RegionEvent) -> None:
        memory, totals = self.memory, self.totals
        from_host, to_host = isinstance(event, events.RegionSwappedIn), isinstance(event, events.RegionSwappedOut)
        if isinstance(event, events.RegionPlaced):
            memory.sequences.setdefault(event.seq_id, Placement())
        place = memory.find(event.seq_id, on_host=from_host)
        if from_host != to_host:
            memory.now_last(event.seq_id)
            totals.rows_in += place.length * from_host
            totals.rows_out += place.length * to_host
            totals.preemptions += to_host
        elif place.start != event.start:
            totals.rows_moved += place.length
        memory.place_region(event.seq_id, event.start, event.size, to_host)
        self._set_status(event.seq_id, "swapped" if to_host else "running")

    def _pages_changed(self, event: PageEvent) -> None:
        if isinstance(event, events.PagesNamed):
            self.memory.find(event.seq_id, on_host=False)
        self.memory.pages.apply(event)

    def _pages_attended(self, event: events.PagesAttended) -> None:
        self.memory.find(event.seq_id, on_host=False)
        if wrong := {*event.chosen, *event.resident} - set(range(len(event.mass))):
            raise ValueError(f"block {min(wrong)} is not among the {len(event.mass)} whose mass it says")
        require(mass=(min(event.mass, default=0), 0))
        self.attended[event.seq_id] = event

    def _planned(self, event: events.StepPlanned) -> None:
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

    def _sampled(self, event: events.TokenSampled) -> None:
        self._arrived(event.seq_id).tokens.append(event.token_id)
        self._keep(event)

    def _finished(self, event: events.SequenceFinished) -> None:
        # A new object, which never changes again: copies of the state share finished sequences.
        self.sequences[event.seq_id] = replace(self._arrived(event.seq_id), status="finished", reason=event.reason)
        self._keep(event)

    def _timed(self, event: events.StepTimed) -> None:
        require(microseconds=(event.microseconds, 0))
        self._end_step()

    # --- what several of them do -----------------------------------------------------------------------

    def _keep(self, event: events.Event) -> None:
        """The event is undone if the step is. A request that is aborted between steps ends for good."""
        if self.in_step:
            self.undoable.append(event)

    def _end_step(self) -> None:
        self.in_step = False
        self.undoable.clear()

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


_PLACE_CHANGES = (events.SequenceFreed, events.SequenceTruncated, *get_args(RegionEvent))
_FOLLOW: dict[type[events.Event], Callable[[RunState, Any], None]] = {
    events.PoolOpened: lambda state, event: state.memory.open(event),
    events.RanksOpened: RunState._ranks_opened,
    events.RequestArrived: RunState._request_arrived,
    events.SequenceAdmitted: RunState._admitted,
    events.TokensAppended: RunState._appended,
    events.SequenceTruncated: lambda state, event: state.memory.truncate(event),
    events.SequenceForked: RunState._forked,
    events.BlockCached: RunState._block_cached,
    events.SwappedOut: RunState._swapped_out,
    events.SwappedIn: RunState._swapped_in,
    events.SequenceFreed: RunState._freed,
    **dict.fromkeys(get_args(RegionEvent), RunState._region_moved),
    **dict.fromkeys(
        (events.ResidencyOpened, events.PagesPlaced, events.PagesFreed, events.PagesNamed), RunState._pages_changed
    ),
    events.PagesAttended: RunState._pages_attended,
    events.StepPlanned: RunState._planned,
    events.TokenSampled: RunState._sampled,
    events.SequenceFinished: RunState._finished,
    events.StepTimed: RunState._timed,
    events.PoolCleared: RunState._cleared,
}

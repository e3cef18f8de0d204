"""The log of one run as a timeline: any moment of the run, forwards and backwards.

One pass over the log checks it, and keeps a copy of the state after every `interval` events: a checkpoint. A step
forward applies one event; a step back takes the nearest checkpoint and applies the events after it. There are never
more than `max_checkpoints` checkpoints, so memory is bounded, and never more than `interval` events to apply.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..core.memory.usage import MemoryUsage, Snapshot
from . import events
from .change import Change
from .events import Event, PoolOpened, RanksOpened, StepPlanned
from .following import Follower
from .marks import marks_of
from .spans import Spans
from .state import RunState

NumberedEvent = tuple[int, Event]  # the line of the log, and its event
CHECKPOINT_BUDGET = 4_000_000  # list entries that all checkpoints of a run may hold together, about


@dataclass(frozen=True, slots=True)
class SlotUse:
    """Where the slots were at one moment, as far as the log says it up to there."""

    snapshot: Snapshot
    holes: tuple[int, ...]  # sizes of the free regions; none for blocks
    head: int | None  # the sequence that is first in the queue for a region

    @classmethod
    def of(cls, state: RunState) -> SlotUse:
        order = state.plan.waiting if state.plan else ()
        queue = (s for s in (*order, *state.sequences) if state.sequences[s].status in ("waiting", "swapped"))
        holes = () if state.memory.paged else tuple(size for _, size in state.memory.holes())
        return cls(state.memory.snapshot(), holes, next(queue, None))


@dataclass(slots=True)
class Moment:
    """The state of a run after the event at `position`. It is good until the history is asked for another moment."""

    history: History
    position: int
    event: Event
    state: RunState
    change: Change

    @property
    def next_event(self) -> Event | None:
        following = self.history.events[self.position + 1 : self.position + 2]
        return following[0] if following else None

    @property
    def step(self) -> int:
        """The last step that is planned by now: the column of the timeline. -1 before the first."""
        return bisect_right(self.history.step_positions, self.position) - 1

    @property
    def usage(self) -> MemoryUsage:
        """Where the slots are now, given the final length of each sequence."""
        return self.history.usage(self.position, SlotUse.of(self.state))


@dataclass(slots=True)
class History:
    """A run. All but the moment that was asked for last is fixed when the history is made."""

    events: list[Event] = field(default_factory=list)
    model: str = ""
    bytes_per_token: int = 0  # of K and V; 0: the log does not say
    token_texts: dict[int, str] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)  # of sequences: A, B, or A1, A2 for samples of a request
    final_lengths: dict[int, int] = field(default_factory=dict)  # the most slots that each sequence came to hold
    steps: list[SlotUse] = field(default_factory=list)  # after the plan of each step
    plans: list[StepPlanned] = field(default_factory=list)  # of the steps
    step_positions: list[int] = field(default_factory=list)  # of these events
    spans: Spans = field(default_factory=Spans)
    marks: list[tuple[int, str]] = field(default_factory=list)  # (position, letter of MARKS in marks.py)
    ranks: RanksOpened | None = None  # None: one process holds all heads
    caches: bool = False  # a prefix cache is on
    cut_off: bool = False  # the log ends in the middle of a line: its program still writes, or was stopped
    interval: int = 256  # events between two checkpoints
    max_checkpoints: int = 128
    num_applied: int = 0  # events, since the beginning: what stepping costs
    _checkpoints: list[RunState] = field(default_factory=list)  # after every `interval` events, the first after none
    _sizes: dict[int, list[tuple[int, int]]] = field(default_factory=dict)  # sequence -> (position, region size)
    _members: dict[int, list[int]] = field(default_factory=dict)  # request -> its sequences
    _now: RunState = field(default_factory=RunState)
    _num_in_now: int = 0
    _shown: Moment | None = None  # the last one, still good: drawing it again costs nothing

    @classmethod
    def of(cls, numbered: Iterable[NumberedEvent]) -> History:
        """The history of these events. Raises ValueError, with the number of the line, where they contradict
        themselves."""
        self = cls()
        for line, event in numbered:
            self._take(line, event)
        self._num_in_now = len(self.events)
        for request_id, members in self._members.items():
            self.names |= names_of(request_id, members)
        self.names = dict(sorted(self.names.items()))
        return self

    def __len__(self) -> int:
        return len(self.events)

    @property
    def opened(self) -> PoolOpened:
        """The first event: which manager the run had, and how much memory."""
        first = self.events[0]
        assert isinstance(first, PoolOpened)
        return first

    def moment(self, position: int) -> Moment:
        """The run after the event at `position`, which is cut to what there is."""
        position = max(0, min(position, len(self.events) - 1))
        if self._shown is not None and self._shown.position == position:
            return self._shown
        if not position - self.interval <= self._num_in_now <= position:
            nearest = min(position // self.interval, len(self._checkpoints) - 1)
            self._now, self._num_in_now = self._checkpoints[nearest].copy(), nearest * self.interval
        change = Change()
        while self._num_in_now <= position:
            change = self._now.apply(self.events[self._num_in_now])
            self._num_in_now += 1
            self.num_applied += 1
        self._shown = Moment(self, position, self.events[position], self._now, change)
        return self._shown

    def usage_of_step(self, step: int) -> MemoryUsage:
        return self.usage(self.step_positions[step], self.steps[step])

    def usage(self, position: int, used: SlotUse) -> MemoryUsage:
        """The parts of memory after the event at `position`. Which holes are too small is said later in the log: it
        depends on the size of the region that the head of the queue gets next."""
        sizes = self._sizes.get(used.head, []) if used.head is not None else []
        i = bisect_left(sizes, (position + 1, 0))
        external = sum(size for size in used.holes if size < sizes[i][1]) if i < len(sizes) else 0
        snapshot = replace(used.snapshot, external=external, free=used.snapshot.free - external)
        return snapshot.usage(self.final_lengths)

    def text(self, token_id: int) -> str:
        return self.token_texts.get(token_id, f"<{token_id}>")

    def name(self, seq_id: int) -> str:
        return self.names.get(seq_id, f"#{seq_id}")

    def find(self, what: str) -> int | None:
        """The sequence of this name (A, b2) or number (#3, 3), else the first whose name begins so."""
        wanted = what.strip().casefold()
        names = {seq_id: name.casefold() for seq_id, name in self.names.items()}
        exact = (seq_id for seq_id, name in names.items() if wanted in (name, f"#{seq_id}", str(seq_id)))
        similar = (seq_id for seq_id, name in names.items() if wanted and name.startswith(wanted))
        return next(exact, next(similar, None))

    # --- the first pass ------------------------------------------------------------------------------

    def _take(self, line: int, event: Event) -> None:
        if not self.events and not isinstance(event, PoolOpened):
            raise ValueError(f"line {line}: a run begins with PoolOpened; this is {type(event).__name__}")
        match event:  # three kinds change nothing in a frame, so they are no moments
            case events.TokenNamed():
                self.token_texts[event.token_id] = event.text
            case events.ModelOpened():
                self.model, self.bytes_per_token = event.model, event.kv_bytes_per_token
            case events.StepTimed():
                pass
            case _:
                self._keep_checkpoint()
                try:
                    change = self._now.apply(event, line)
                except ValueError as error:
                    raise ValueError(f"line {line}: {error}") from None
                for seq_id in change.seq_ids:
                    self.names.setdefault(seq_id, f"#{seq_id}")
                self._note(event)
                self.marks += ((len(self.events), mark) for mark in marks_of(event, self._now))
                self.events.append(event)

    def _keep_checkpoint(self) -> None:
        """A copy of the state, if one is due. When there are too many, every second one goes."""
        if len(self.events) % self.interval == 0 and len(self._checkpoints) == self.max_checkpoints:
            del self._checkpoints[1::2]
            self.interval *= 2
        if len(self.events) % self.interval == 0:
            self._checkpoints.append(self._now.copy())

    # --- what frames need of the whole run ---------------------------------------------------------------

    def _note(self, event: Event) -> None:
        match event:
            case events.TokensAppended():
                length = self._now.memory.sequences[event.seq_id].length
                self.final_lengths[event.seq_id] = max(length, self.final_lengths.get(event.seq_id, 0))
            case events.RequestArrived():
                self._members[event.request_id] = list(event.seq_ids)
                for seq_id in event.seq_ids:
                    self.spans.begin(seq_id, len(self.steps), "w")
            case StepPlanned():
                self.spans.plan(event, self._now)
                self.steps.append(SlotUse.of(self._now))
                self.plans.append(event)
                self.step_positions.append(len(self.events))
            case events.SequenceForked():
                members = self._members.get(self._now.sequences[event.child_id].request_id, [event.child_id])
                if event.child_id not in members:
                    members.append(event.child_id)
            case events.RegionPlaced() | events.RegionSwappedIn():
                self._sizes.setdefault(event.seq_id, []).append((len(self.events), event.size))
            case events.BlockCached():
                self.caches = True
            case events.SequenceFinished():
                self.spans.begin(event.seq_id, len(self.steps), "F")
                self.spans.begin(event.seq_id, len(self.steps) + 1, " ")
            case RanksOpened():
                self.ranks = event
            case PoolOpened():
                # Far fewer copies of a state with a million blocks than of one with a dozen.
                size = 6 * (event.num_blocks if event.free_order else 1) + 2 * event.num_host_blocks
                self.max_checkpoints = max(16, min(128, CHECKPOINT_BUDGET // size))


def names_of(request_id: int, seq_ids: Sequence[int]) -> dict[int, str]:
    """The names of a request's sequences: A, or A1, A2 ... for several."""
    numbers = range(1, len(seq_ids) + 1) if len(seq_ids) > 1 else [""]
    return {seq_id: f"{letters(request_id)}{number}" for seq_id, number in zip(seq_ids, numbers, strict=True)}


def letters(number: int) -> str:
    """0 is A, 25 is Z, 26 is AA: how requests are named."""
    name = ""
    number += 1
    while number > 0:
        number, digit = divmod(number - 1, 26)
        name = chr(ord("A") + digit) + name
    return name


# --- files ------------------------------------------------------------------------------------------------


def histories(log: Iterable[Event]) -> list[History]:
    """The runs of a log, one after another: each begins with PoolOpened. Raises ValueError with the line."""
    runs: list[list[NumberedEvent]] = []
    for line, event in enumerate(log, start=1):
        if isinstance(event, PoolOpened) or not runs:
            runs.append([])
        runs[-1].append((line, event))
    return [History.of(run) for run in runs]


def read_histories(path: Path) -> list[History]:
    """The runs in a file of JSON lines, up to its end or to where it was cut off. Raises ValueError: one sentence with
    the file and the line."""
    follower = Follower(path)
    log = list(follower.to_the_end())
    try:
        found = histories(log)
    except ValueError as error:
        raise ValueError(f"{path}, {error}") from None
    found[-1].cut_off = follower.in_partial_line
    return found

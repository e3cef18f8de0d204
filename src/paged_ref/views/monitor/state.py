"""What the monitor knows: the state of the run after the last event, and a sample of each step.

The monitor takes events one at a time and keeps no log, so a run of any length fits in memory. The state is that of
timeline/state.py.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass

from ...timeline import events
from ...timeline.change import Change
from ...timeline.history import History, Moment, names_of
from ...timeline.state import RunState

KEPT = 1024  # samples: more steps than a screen has columns
WINDOW = 32  # steps over which rates are taken


@dataclass(slots=True)
class StepSample:
    """One step, as it was planned. Its new tokens and its time are added when the log says them."""

    step: int
    slots: dict[str, int]  # by what is in them
    computed: int  # tokens of this step
    sampled: int = 0  # new tokens
    microseconds: int = 0  # 0: the log does not say


class Monitor:
    """One run after another. `take` raises ValueError where an event contradicts what came before."""

    def __init__(self) -> None:
        self.num_runs = 0
        self.num_events = 0
        self._begin()

    def _begin(self) -> None:
        self.state = RunState()
        self.history = History()  # only the names, by which frames call the sequences
        self.samples: deque[StepSample] = deque(maxlen=KEPT)
        self.opened: events.PoolOpened | None = None
        self.num_steps = 0
        self.computed = 0  # tokens, since the run began
        self.sampled = 0
        self.finished = 0  # sequences
        self.microseconds = 0  # of all steps that say
        self._before_step = (0, 0, 0, 0)  # the first four of these numbers
        self._ended: list[int] = []  # sequences that the step under way ended, which it gives back if it is undone

    def take(self, event: events.Event) -> None:
        if isinstance(event, events.PoolOpened):
            self._begin()
            self.num_runs += 1
            self.opened = event
        self.num_events += 1
        if isinstance(event, (events.TokenNamed, events.ModelOpened)):
            if isinstance(event, events.ModelOpened):
                self.history.model, self.history.bytes_per_token = event.model, event.kv_bytes_per_token
            return
        is_undone = isinstance(event, events.PoolCleared) and self.state.in_step
        self.state.apply(event, self.num_events)
        if isinstance(event, events.RequestArrived):
            self.history.names |= names_of(event.request_id, event.seq_ids)
        elif isinstance(event, events.StepPlanned):
            self._sample(event)
        elif isinstance(event, events.TokenSampled):
            self.sampled += 1
            if self.samples:
                self.samples[-1].sampled += 1
        elif isinstance(event, events.StepTimed) and self.samples:
            self.samples[-1].microseconds = event.microseconds
            self.microseconds += event.microseconds
        elif isinstance(event, events.SequenceFinished):
            self.finished += 1
            self._ended.append(event.seq_id)
        elif is_undone:
            self.num_steps, self.computed, self.sampled, self.finished = self._before_step
            self.samples.pop()
            self._ended.clear()
        if isinstance(event, events.StepPlanned) or not self.state.in_step:
            self._drop_ended()

    def _drop_ended(self) -> None:
        """Forget the sequences that ended: they stay as they are, and a run may be long."""
        for seq_id in self._ended:
            del self.state.sequences[seq_id]
            self.history.names.pop(seq_id, None)
        self._ended.clear()

    def _sample(self, event: events.StepPlanned) -> None:
        self._before_step = (self.num_steps, self.computed, self.sampled, self.finished)
        computed = sum(count for _, count in event.chunks)
        self.samples.append(StepSample(event.step, self.slots, computed))
        self.num_steps += 1
        self.computed += computed

    # --- to be shown ---------------------------------------------------------------------------------

    @property
    def last(self) -> StepSample | None:
        return self.samples[-1] if self.samples else None

    @property
    def num_slots(self) -> int:
        return self.state.memory.num_blocks * self.state.memory.block_size

    @property
    def slots(self) -> dict[str, int]:
        """Slots by what is in them now: tokens, empty (allocated, no token yet), cached, free."""
        snapshot = self.state.memory.snapshot()
        in_open = sum(piece.tokens for piece in snapshot.partial)
        return {
            "tokens": snapshot.full + in_open,
            "empty": sum(piece.slots for piece in snapshot.partial) - in_open,
            "cached": snapshot.cached,
            "free": snapshot.free + snapshot.external,
        }

    @property
    def sequences(self) -> dict[str, int]:
        """How many sequences are in each state now."""
        now = Counter(view.status for view in self.state.sequences.values())
        return {status: now[status] for status in ("running", "waiting", "swapped")} | {"finished": self.finished}

    @property
    def all_finished(self) -> bool:
        """Nothing runs or waits. A log does not say that its run is over: more requests may come."""
        return bool(self.finished and len(self._ended) == len(self.state.sequences))

    @property
    def moved(self) -> dict[str, int]:
        """Slots that were copied: out to the host, in from the host, and within the device."""
        size, totals = self.state.memory.block_size, self.state.totals
        return {"out": size * totals.rows_out, "in": size * totals.rows_in, "within": size * totals.rows_moved}

    def timed(self) -> list[StepSample]:
        """Those of the last steps that say how long they took."""
        return [sample for sample in list(self.samples)[-WINDOW:] if sample.microseconds]

    @property
    def tokens_per_second(self) -> float | None:
        """New tokens over the last steps' time; None where the log has no times."""
        timed = self.timed()
        return 1e6 * sum(s.sampled for s in timed) / sum(s.microseconds for s in timed) if timed else None

    @property
    def hit_rate(self) -> float | None:
        """Share of the admitted tokens that the prefix cache found; None where nothing was asked."""
        totals = self.state.totals
        return totals.hits / totals.asked if totals.asked and self.state.memory.paged else None

    def moment(self) -> Moment:
        """The state as frames take it, with nothing marked as changed."""
        return Moment(self.history, 0, self.opened or events.PoolOpened("", 0, 1, 0, ()), self.state, Change())

"""A log for the monitor's tests: real managers, and what an engine would tell around them, by hand.

No model is in it, so nothing here changes when the embedded one does.
"""

from __future__ import annotations

from paged_ref.core.memory.standard import StandardManager
from paged_ref.extras.swapping import SwappingManager
from paged_ref.timeline.events import (
    Event,
    ModelOpened,
    RequestArrived,
    SequenceFinished,
    StepPlanned,
    StepTimed,
    TokenSampled,
)
from paged_ref.timeline.logged import LoggedManager
from support.logged_managers import logged_paged

BYTES = 1024  # of K and V of a token
PROMPT = 10


class Engine:
    """Three requests of 10 prompt tokens: the log of `steps` steps of 1 ms, 2 ms, 3 ms, 1 ms ..."""

    def __init__(self, manager: str) -> None:
        self.events: list[Event] = []
        log = self.events.append
        self.paged = manager == "paged"
        self.manager: LoggedManager
        if self.paged:
            self.manager = logged_paged(log, 24, 4, num_host_blocks=12, prefix_cache=True)
        elif manager == "standard":
            self.manager = LoggedManager(StandardManager(96, 40), log)
        else:
            self.manager = LoggedManager(SwappingManager(96, 96, alignment=4), log)
        log(ModelOpened("model-1", BYTES))
        self.tokens = {seq_id: [*range(8), seq_id, 9] for seq_id in range(3)}  # the first eight tokens are the same
        for seq_id, tokens in self.tokens.items():
            log(RequestArrived(seq_id, (seq_id,), tuple(tokens)))
        self.step_number = 0

    def step(self, *seq_ids: int, waiting: tuple[int, ...] = (), preempted: tuple[int, ...] = ()) -> None:
        """One step: a sequence that has not begun computes its prompt, the others a token."""
        chunks = []
        for seq_id in seq_ids:
            tokens = self.tokens[seq_id]
            known = self._known(seq_id)
            if known is None:
                known = self.manager.admit(seq_id, tokens, 40)
            self.manager.append([(seq_id, len(tokens) - known)])
            chunks.append((seq_id, len(tokens) - known))
        log = self.events.append
        log(StepPlanned(self.step_number, tuple(chunks), preempted, waiting))
        for seq_id in seq_ids:
            tokens = self.tokens[seq_id]
            self.manager.commit(seq_id, tokens, len(tokens))
            tokens.append(100 + self.step_number)
            log(TokenSampled(seq_id, tokens[-1]))
        log(StepTimed(self.step_number, 1000 * (1 + self.step_number % 3)))
        self.step_number += 1

    def _known(self, seq_id: int) -> int | None:
        try:
            return self.manager.length(seq_id)
        except KeyError:
            return None

    def finish(self, seq_id: int) -> None:
        self.manager.free(seq_id)
        self.events.append(SequenceFinished(seq_id, "length"))


def hand_made(manager: str = "paged") -> list[Event]:
    """Sequence 0 runs from the beginning and ends; 1 joins; 2 waits, joins, is swapped out (where one can)."""
    engine = Engine(manager)
    engine.step(0, waiting=(1, 2))
    for _ in range(4):
        engine.step(0, 1, waiting=(2,))
    if manager == "standard":  # it has room for two of 40 slots
        engine.finish(0)
    for _ in range(6):
        engine.step(*((1, 2) if manager == "standard" else (0, 1, 2)))
    if engine.manager.can_swap:
        engine.manager.swap_out([2])
        engine.step(0, 1, waiting=(2,), preempted=(2,))
        engine.step(0, 1, waiting=(2,))
        engine.finish(0)
        engine.manager.swap_in([2])
        engine.step(1, 2)
    return engine.events

"""One sequence of tokens on its way through the engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class Status(Enum):
    WAITING = "waiting"  # holds no memory: not begun, or preempted
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False, slots=True)
class Sequence:
    """Tokens, and how far their K and V are computed. `seq_id` also orders sequences by arrival."""

    seq_id: int
    tokens: list[int]  # the prompt, then what was generated
    prompt_len: int
    max_tokens: int  # the length at which it ends at the latest, prompt included
    num_computed: int = 0  # tokens whose K and V are in the cache
    status: Status = Status.WAITING
    num_preemptions: int = field(default=0)

    @property
    def num_uncomputed(self) -> int:
        """What a step has to catch up with: the prompt at first, one token later, all after a preemption."""
        return len(self.tokens) - self.num_computed

    @property
    def max_slots(self) -> int:
        """The most slots that it will ever hold: the last token's K and V are never needed."""
        return self.max_tokens - 1

"""One sequence of tokens on its way through the engine, and the group of those that share a prompt."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Status(Enum):
    """Of a group: its sequences run, wait and are preempted together."""

    WAITING = "waiting"  # holds no memory: not begun, or preempted by recompute
    SWAPPED = "swapped"  # in host memory: preempted by swap
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False, slots=True)
class Sequence:
    """Tokens, and how far their K and V are computed. `seq_id` also orders sequences by arrival."""

    seq_id: int
    tokens: list[int]  # the prompt, then what was generated
    prompt_len: int
    max_len: int  # the length at which the sequence ends at the latest, prompt included
    num_computed: int = 0  # tokens whose K and V are in the cache
    admitted: bool = False  # the manager holds memory for the sequence

    @property
    def num_uncomputed(self) -> int:
        """Tokens that a step has to compute: the prompt at first, one token later, all after a preemption."""
        return len(self.tokens) - self.num_computed

    @property
    def max_slots(self) -> int:
        """The most slots that the sequence will ever hold: the last token's K and V are never needed."""
        return self.max_len - 1


@dataclass(eq=False, slots=True)
class Group:
    """The unfinished sequences of one request: samples or beams that share the blocks of their prompt.

    A group begins with one sequence, the leader; the others are forked from it when the prompt is computed.
    """

    seqs: list[Sequence]  # the first is the leader; beams are in the order of their rank
    width: int = 1  # sequences that the group may have at the same time, later on
    status: Status = Status.WAITING
    num_preemptions: int = 0

    @property
    def leader(self) -> Sequence:
        return self.seqs[0]

    def common_len(self) -> int:
        """Leading tokens that all sequences have in common, leaving each at least one to compute."""
        shortest = min(len(seq.tokens) for seq in self.seqs)
        first = self.leader.tokens
        for i in range(shortest - 1):
            if any(seq.tokens[i] != first[i] for seq in self.seqs):
                return i
        return shortest - 1

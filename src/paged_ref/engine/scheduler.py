"""Continuous batching: which sequences run in the next step, and for how many tokens each.

One rule covers prefill, chunked prefill, decode and recomputation: a sequence runs until its computed
tokens catch up with its tokens. Ints only; nothing here knows of K, V, models or text.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from dataclasses import dataclass, field

from ..memory.managers import BlockCopy, KVCacheManager, OutOfBlocks
from .sequence import Sequence, Status


@dataclass(slots=True)
class StepPlan:
    """What one step does."""

    chunks: list[tuple[Sequence, int]] = field(default_factory=list)  # sequence, tokens to compute
    copies: list[BlockCopy] = field(default_factory=list)  # to carry out first
    preempted: list[Sequence] = field(default_factory=list)


class Scheduler:
    """First come, first served. Invariant: everything running arrived before everything waiting."""

    def __init__(self, manager: KVCacheManager, max_batch_tokens: int, max_batch_seqs: int) -> None:
        if max_batch_tokens < 1:
            raise ValueError(f"max_batch_tokens is {max_batch_tokens}; at least 1 is needed")
        if max_batch_seqs < 1:
            raise ValueError(f"max_batch_seqs is {max_batch_seqs}; at least 1 is needed")
        self.manager = manager
        self.max_batch_tokens = max_batch_tokens
        self.max_batch_seqs = max_batch_seqs
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # by arrival

    def add(self, seq: Sequence) -> None:
        """Queue a new sequence. Raises ValueError if it could never fit, even alone."""
        if seq.max_slots > self.manager.longest:
            raise ValueError(
                f"a request of {seq.prompt_len} prompt tokens and up to {seq.max_tokens - seq.prompt_len} "
                f"new ones needs {seq.max_slots} slots of KV cache; the longest that can ever fit is "
                f"{self.manager.longest}"
            )
        self.waiting.append(seq)

    def schedule(self) -> StepPlan:
        """Plan the next step, and make room for it in the manager."""
        plan = StepPlan()
        budget = self.max_batch_tokens
        # Those that run come first, the earliest arrival first. By index: a preemption shortens the list.
        i = 0
        while i < len(self.running) and budget > 0:
            seq = self.running[i]
            num_tokens = min(seq.num_uncomputed, budget)
            if self._make_room(seq, num_tokens, plan):
                budget -= num_tokens
            i += 1
        # Whoever was preempted just now waits at the head of the queue, and there is no room for it.
        while self.waiting and budget > 0 and not plan.preempted and len(self.running) < self.max_batch_seqs:
            seq = self.waiting[0]
            try:
                self.manager.admit(seq.seq_id, len(seq.tokens), seq.max_slots)
            except OutOfBlocks:
                break
            self.waiting.popleft()
            self.running.append(seq)
            seq.status = Status.RUNNING
            num_tokens = min(seq.num_uncomputed, budget)
            if self._make_room(seq, num_tokens, plan):
                budget -= num_tokens
        return plan

    def _make_room(self, seq: Sequence, num_tokens: int, plan: StepPlan) -> bool:
        """Append to `seq`, preempting the latest arrivals as needed. False if it had to go itself."""
        while True:
            try:
                plan.copies += self.manager.append(seq.seq_id, num_tokens)
            except OutOfBlocks:
                victim = self.running[-1]
                self._preempt(victim)
                plan.preempted.append(victim)
                if victim is seq:
                    return False
            else:
                plan.chunks.append((seq, num_tokens))
                return True

    def _preempt(self, seq: Sequence) -> None:
        """Preemption by recompute: give all blocks back; later its tokens, old and new, are one prompt."""
        self.manager.free(seq.seq_id)
        self.running.remove(seq)
        seq.num_computed = 0
        seq.num_preemptions += 1
        seq.status = Status.WAITING
        self.waiting.appendleft(seq)

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """`child` goes on from where `parent` is, sharing its memory; the manager must be Forkable."""
        self.manager.fork(parent.seq_id, child.seq_id)  # type: ignore[attr-defined]
        child.num_computed = parent.num_computed
        child.status = Status.RUNNING
        insort(self.running, child, key=lambda seq: seq.seq_id)

    def finish(self, seq: Sequence) -> None:
        """Take `seq` out, wherever it is, and give its memory back."""
        if seq.status is Status.RUNNING:
            self.running.remove(seq)
            self.manager.free(seq.seq_id)
        elif seq.status is Status.WAITING:
            self.waiting.remove(seq)
        seq.status = Status.FINISHED

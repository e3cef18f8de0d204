"""Continuous batching: which sequences run in the next step, and for how many tokens each.

One rule covers prefill, chunked prefill, decode and recomputation: a sequence runs until its computed tokens catch up
with its tokens. Ints only; nothing here knows of K, V, models or text.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Literal

from ..checks import require, require_one_of
from ..memory.block_pool import OutOfBlocks
from ..memory.manager import KVCacheManager, OutOfHostBlocks, Transfer
from .sequence import Group, Sequence, Status

Preemption = Literal["recompute", "swap"]


@dataclass(slots=True)
class StepPlan:
    """What one step does."""

    chunks: list[tuple[Sequence, int]] = field(default_factory=list)  # sequence, num_scheduled_tokens
    transfers: list[Transfer] = field(default_factory=list)  # to carry out first, in order
    preempted: list[Group] = field(default_factory=list)


class Scheduler:
    """First come, first served. Invariant: every running group arrived before every waiting one."""

    def __init__(
        self,
        manager: KVCacheManager,
        max_batch_tokens: int = 512,
        max_batch_seqs: int = 256,
        preemption: Preemption = "recompute",
    ) -> None:
        """`preemption` by swap falls back to recompute when host memory is full."""
        require(max_batch_tokens=(max_batch_tokens, 1), max_batch_seqs=(max_batch_seqs, 1))
        require_one_of(("recompute", "swap"), preemption=preemption)
        if preemption == "swap" and not manager.can_swap:
            raise ValueError("preemption is 'swap'; this manager cannot swap, only recompute")
        self.manager = manager
        self.max_batch_tokens = max_batch_tokens
        self.max_batch_seqs = max_batch_seqs
        self.preemption = preemption
        self.waiting: deque[Group] = deque()  # by arrival; preempted groups come first
        self.running: list[Group] = []  # by arrival

    def add(self, group: Group) -> None:
        """Queue a new group. Raises ValueError if it could never fit, even alone."""
        seq = group.leader
        needed = self.manager.max_slots_needed(seq.prompt_len, seq.max_slots, group.width)
        if needed > self.manager.num_slots:
            samples = f", {group.width} times," if group.width > 1 else ""
            raise ValueError(
                f"a prompt of length {seq.prompt_len} and an output of length {seq.max_len - seq.prompt_len}{samples} "
                f"can need {needed} slots of KV cache; the cache has {self.manager.num_slots}"
            )
        if group.width > self.max_batch_seqs:
            raise ValueError(
                f"a request of {group.width} sequences; at most max_batch_seqs = {self.max_batch_seqs} can run"
            )
        self.waiting.append(group)

    # --- a step ----------------------------------------------------------------------------------------

    def schedule(self) -> StepPlan:
        """Plan the next step, and make room for it in the manager."""
        plan = StepPlan()
        budget = self._run_running(plan)
        if not plan.preempted:  # a group preempted in this step is now first in `waiting`
            self._admit_waiting(budget, plan)
        return plan

    def _admit_waiting(self, budget: int, plan: StepPlan) -> None:
        """Begin waiting groups, in order, while there is room."""
        width = sum(group.width for group in self.running)
        while self.waiting and budget > 0 and not plan.preempted:
            group = self.waiting[0]
            width += group.width
            comes_back = any(not seq.admitted for last in self.running[-1:] for seq in last.seqs)
            if width > self.max_batch_seqs or comes_back:  # a group that forks again in the next step comes first
                return
            try:
                self._admit(group, plan)
            except OutOfBlocks:
                return
            self.waiting.popleft()
            self.running.append(group)
            group.status = Status.RUNNING
            try:
                budget = self._run([group], budget, plan)
            except OutOfBlocks:
                self._preempt(group, plan)

    def _run_running(self, plan: StepPlan) -> int:
        """Plan this step's tokens of the running groups, the earliest arrival first, preempting the latest as needed.
        Returns what is left of the budget."""
        try:
            return self._run(self.running, self.max_batch_tokens, plan)  # mostly there is room for all
        except OutOfBlocks:
            budget, i = self.max_batch_tokens, 0
        while i < len(self.running):  # by index: a preemption shortens the list
            try:
                budget = self._run([self.running[i]], budget, plan)
                i += 1
            except OutOfBlocks:
                self._preempt(self.running[-1], plan)
        return budget

    def _admit(self, group: Group, plan: StepPlan) -> None:
        """Bring a group back from the host, or begin with its leader. Raises OutOfBlocks."""
        spare = self.room_to_return(group) if group.num_preemptions else 0
        if group.status is Status.SWAPPED:
            plan.transfers += self.manager.swap_in([seq.seq_id for seq in group.seqs if seq.admitted], spare)
            return
        seq = group.leader
        # In a preempted group, the leader computes what all sequences have in common; then the others fork again.
        tokens = seq.tokens if len(group.seqs) == 1 else seq.tokens[: group.common_len()]
        seq.num_computed = self.manager.admit(seq.seq_id, tokens, seq.max_slots, spare)  # num_cached_tokens
        seq.admitted = True

    def room_to_return(self, group: Group) -> int:
        """Slots that must stay free when a preempted group comes back. With less, it could be preempted again before it
        has computed a block's worth of tokens."""
        num_blocks, size = 0, self.manager.block_size
        for each in (*self.running, group):
            # A block for each sequence to grow into, and where samples share blocks, one to copy first.
            num_blocks += each.width if each.width == 1 else 2 * each.width
            common = each.common_len() if len(each.seqs) > 1 else len(each.leader.tokens)  # which admission asks for
            for seq in each.seqs:
                length = self.manager.length(seq.seq_id) if seq.admitted else common
                num_blocks += -(-len(seq.tokens) // size) - -(-length // size)
        return num_blocks * size

    def _run(self, groups: list[Group], budget: int, plan: StepPlan) -> int:
        """Plan this step's tokens of the groups, in their order; return what is left of the budget. Raises OutOfBlocks,
        and plans nothing, where there is no room for all of them."""
        chunks: list[tuple[Sequence, int]] = []
        for group in groups:
            if budget > 0:
                budget = self._add_chunks(group, budget, chunks)
        plan.transfers += self.manager.append([(seq.seq_id, num_tokens) for seq, num_tokens in chunks])
        plan.chunks += chunks
        return budget

    def _add_chunks(self, group: Group, budget: int, chunks: list[tuple[Sequence, int]]) -> int:
        """The one rule, for each sequence of the group, within the budget. Returns what is left of it."""
        if len(group.seqs) > 1:
            to_fork = [seq for seq in group.seqs if not seq.admitted]
            missing = group.common_len() - group.leader.num_computed if to_fork else 0
            if missing > 0:
                chunks.append((group.leader, min(missing, budget)))
                return budget - min(missing, budget)
            for seq in to_fork:
                self._fork(group.leader, seq)
        for seq in group.seqs:
            num_tokens = min(len(seq.tokens) - seq.num_computed, budget)  # num_uncomputed, without a call
            if num_tokens:
                chunks.append((seq, num_tokens))
                budget -= num_tokens
        return budget

    def _preempt(self, group: Group, plan: StepPlan) -> None:
        """Take all blocks of the group: to the host, or for good, and then its tokens are one long prompt later."""
        self.running.remove(group)
        self.waiting.appendleft(group)
        plan.preempted.append(group)
        group.num_preemptions += 1
        admitted = [seq for seq in group.seqs if seq.admitted]
        if self.preemption == "swap" and group.leader.num_computed > 0:
            try:
                plan.transfers += self.manager.swap_out([seq.seq_id for seq in admitted])
                group.status = Status.SWAPPED
                return
            except OutOfHostBlocks:
                pass
        group.status = Status.WAITING
        for seq in admitted:
            self.manager.free(seq.seq_id)
            seq.num_computed = 0
            seq.admitted = False

    # --- between steps ---------------------------------------------------------------------------------

    def _fork(self, parent: Sequence, child: Sequence) -> None:
        self.manager.fork(parent.seq_id, child.seq_id)
        child.num_computed = parent.num_computed
        child.admitted = True

    def fork(self, group: Group, parent: Sequence, child: Sequence) -> None:
        """`child` joins the running group, and goes on from where `parent` is, sharing the memory of `parent`."""
        self._fork(parent, child)
        group.seqs.append(child)

    def finish(self, group: Group, seq: Sequence) -> None:
        """Take `seq` out of its group and free its memory. The group ends with its last sequence."""
        group.seqs.remove(seq)
        if seq.admitted:
            self.manager.free(seq.seq_id)
            seq.admitted = False
        if not group.seqs:
            if group.status is Status.RUNNING:
                self.running.remove(group)
            else:
                self.waiting.remove(group)
            group.status = Status.FINISHED

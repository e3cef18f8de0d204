"""Sequences that only decode, in a simulation: for these, a step costs as much as the blocks that it takes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import attrgetter

from ..core.engine.scheduler import Scheduler
from ..core.engine.sequence import Group, Sequence
from ..core.memory.block_pool import OutOfBlocks
from ..core.memory.manager import KVCacheManager, Transfer
from ..core.memory.paged import PagedManager
from ..core.memory.regions import RegionManager
from ..extras.swapping import SwappingManager
from .traces import TraceRequest


@dataclass(eq=False, slots=True)
class SimulatedRequest:
    """One unfinished request."""

    request: TraceRequest
    group: Group
    seq: Sequence
    filler: list[int] | bytes  # the token id that stands for each generated token, alone
    begun: bool = False  # a first token was computed
    first_token: float | None = None  # time at which the first new token came out
    furthest: int = 0  # tokens that were computed before a preemption took them
    # For `Decoding`, which counts its steps:
    appended: int = 0  # manager and sequence have the tokens up to this step
    ending: int = 0  # the sequence's last step


class Decoding:
    """The first of the running sequences: those that decode. Each gets one token in each step, and whether there is
    memory for it is all that has to be asked.

    Most have room for the token in what they hold, so the append is postponed until the memory is sampled or the
    sequence ends; only a sequence that needs memory is appended in its step. So the cost of a step is that of the
    blocks that it takes. Where there is no memory, all go back to the scheduler, which preempts.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        manager: KVCacheManager,
        unfinished: Mapping[int, SimulatedRequest],
        *,
        prefix_cache: bool,
        enabled: bool,
    ) -> None:
        self._scheduler, self._manager, self._unfinished = scheduler, manager, unfinished
        self._prefix_cache, self._enabled, self._slack = prefix_cache, enabled, slack_in(manager)
        self.moves = isinstance(manager, SwappingManager)  # growth may move a region, which leaves a hole
        self.count = 0
        self.kv_tokens = 0  # read by the latest step
        self._clear()

    def _clear(self) -> None:
        self.count = self.kv_tokens = self._num_steps = 0
        self._full: defaultdict[int, list[SimulatedRequest]] = defaultdict(
            list
        )  # by the number of steps after which no slot is left
        self._ending: defaultdict[int, list[SimulatedRequest]] = defaultdict(list)  # by the step that is their last

    def join(self) -> None:
        """Take the running sequences that decode from now on, as long as they follow each other."""
        running = self._scheduler.running
        most = min(len(running), self._scheduler.max_batch_tokens) if self._enabled else 0
        while self.count < most:
            seq = running[self.count].leader
            simulated = self._unfinished[seq.seq_id]
            if seq.num_uncomputed != 1 or simulated.first_token is None:
                return
            simulated.appended = self._num_steps
            simulated.ending = self._num_steps + seq.max_len - len(seq.tokens)
            self._ending[simulated.ending].append(simulated)
            self._note_full(simulated)
            self.kv_tokens += seq.num_computed
            self.count += 1

    def _note_full(self, simulated: SimulatedRequest) -> None:
        """Note when no slot is left for the request's next token, if it does not end before."""
        full = simulated.appended + self._slack(simulated.seq.seq_id)
        if full < simulated.ending:
            self._full[full].append(simulated)

    def advance(self) -> bool:
        """Take one step in which nothing ends and nothing moves. False, and nothing changes, where the next step is not
        such a step."""
        if self._num_steps + 1 in self._ending:
            return False
        if self._num_steps in self._full and (self.moves or self._append_full() is None):
            return False
        self._num_steps += 1
        self.kv_tokens += self.count
        return True

    def grow(self) -> list[Transfer]:
        """The tokens of the next step. Where there is no memory for them, all sequences go back to the scheduler."""
        transfers: list[Transfer] = []
        if self._num_steps in self._full:
            found = self._append_full()
            if found is None:
                self.append_all()
                self._clear()
                return []
            transfers = found
        self._num_steps += 1
        self.kv_tokens += self.count
        return transfers

    def take_ended(self) -> list[SimulatedRequest]:
        """The requests whose last step this was, with all their tokens, in order of arrival."""
        ending = self._ending.pop(self._num_steps, [])
        if ending:
            ending.sort(key=in_order)
            self._append(ending, self._num_steps)
            self.kv_tokens -= sum(each.seq.num_computed for each in ending)
            self.count -= len(ending)
        return ending

    def append_all(self) -> None:
        """Give manager and sequences every token that was postponed."""
        running = self._scheduler.running[: self.count]
        self._append([self._unfinished[group.leader.seq_id] for group in running], self._num_steps)

    def _append_full(self) -> list[Transfer] | None:
        """Append the next token of the sequences that have no slot left for it. None, and nothing changes, where there
        is no memory for them."""
        full = self._full[self._num_steps]
        full.sort(key=in_order)
        if self.moves:
            self._append(full, self._num_steps)  # a region moves with all tokens that it has
        try:
            transfers = self._append(full, self._num_steps + 1)
        except OutOfBlocks:
            return None
        del self._full[self._num_steps]
        for simulated in full:
            self._note_full(simulated)
        return transfers

    def _append(self, requests: list[SimulatedRequest], upto: int) -> list[Transfer]:
        """Give manager and sequences the tokens of the steps up to `upto`. Raises OutOfBlocks, and changes nothing."""
        appends = [(each.seq.seq_id, upto - each.appended) for each in requests]
        transfers = self._manager.append(appends)
        for each, (seq_id, count) in zip(requests, appends, strict=True):
            each.seq.num_computed += count
            each.seq.tokens.extend(each.filler * count)
            each.appended = upto
            if self._prefix_cache:
                self._manager.commit(seq_id, each.seq.tokens, each.seq.num_computed)
        return transfers


in_order = attrgetter("seq.seq_id")  # of arrival


def slack_in(manager: KVCacheManager) -> Callable[[int], int]:
    """A function from a sequence to the tokens that fit into what it holds: for these, `append` takes nothing from the
    pool."""
    if isinstance(manager, PagedManager):
        tables = manager.tables
        return lambda seq_id: max(0, tables[seq_id].open_until - tables[seq_id].length)
    assert isinstance(manager, RegionManager)
    regions = manager.regions
    return lambda seq_id: regions[seq_id].size - regions[seq_id].length

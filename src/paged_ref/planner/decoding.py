"""Sequences that only decode, in a simulation: for these, a step costs as much as the blocks that it takes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter

from ..core.engine.scheduler import Scheduler
from ..core.engine.sequence import Group, Sequence
from ..core.memory.block_pool import OutOfBlocks
from ..core.memory.manager import KVCacheManager, Transfer
from ..core.memory.paged import PagedManager
from ..core.memory.standard import StandardManager
from ..extras.swapping import SwappingManager
from .traces import TraceRequest


@dataclass(eq=False, slots=True)
class SimulatedRequest:
    """One unfinished request."""

    request: TraceRequest
    group: Group
    seq: Sequence
    filler: int  # the token id that stands for each generated token
    begun: bool = False  # a first token was computed
    first_token: float | None = None  # time at which the first new token came out
    furthest: int = 0  # tokens that were computed before a preemption took them


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
        self._prefix_cache, self._enabled = prefix_cache, enabled
        self.moves = isinstance(manager, SwappingManager)  # growth may move a region, which leaves a hole
        self.count = 0
        self.kv_tokens = 0  # read by the latest step
        self._clear()

    def _clear(self) -> None:
        self.count = self.kv_tokens = self._num_steps = 0
        self._appended: dict[int, int] = {}  # seq_id -> steps whose token manager and sequence have
        self._full: defaultdict[int, list[Sequence]] = defaultdict(list)  # by the steps after which no slot is left
        self._ending: defaultdict[int, list[Sequence]] = defaultdict(list)  # by the step that is their last

    def join(self) -> None:
        """Take the running sequences that decode from now on, as long as they follow each other."""
        running = self._scheduler.running
        most = min(len(running), self._scheduler.max_batch_tokens) if self._enabled else 0
        while self.count < most:
            seq = running[self.count].leader
            simulated = self._unfinished[seq.seq_id]
            if seq.num_uncomputed != 1 or simulated.first_token is None:
                return
            self._appended[seq.seq_id] = self._num_steps
            self._full[self._num_steps + slack(self._manager, seq.seq_id)].append(seq)
            self._ending[self._num_steps + seq.max_len - len(seq.tokens)].append(seq)
            self.kv_tokens += seq.num_computed
            self.count += 1

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

    def take_ended(self) -> list[Sequence]:
        """The sequences whose last step this was, with all their tokens, in order of arrival."""
        ending = self._ending.pop(self._num_steps, [])
        if not ending:
            return ending
        ending.sort(key=attrgetter("seq_id"))
        self._append(ending, self._num_steps)
        for seq in ending:
            self.kv_tokens -= seq.num_computed
            self.count -= 1
            del self._appended[seq.seq_id]
        return ending

    def append_all(self) -> None:
        """Give manager and sequences every token that was postponed."""
        running = self._scheduler.running
        self._append([group.leader for group in running[: self.count]], self._num_steps)

    def _append_full(self) -> list[Transfer] | None:
        """Append the next token of the sequences that have no slot left for it. None, and nothing changes, where there
        is no memory for them."""
        full = [seq for seq in self._full[self._num_steps] if seq.seq_id in self._appended]
        full.sort(key=attrgetter("seq_id"))  # in order of arrival
        if self.moves:
            self._append(full, self._num_steps)  # a region moves with all tokens that it has
        upto = self._num_steps + 1
        try:
            transfers = self._append(full, upto)
        except OutOfBlocks:
            return None
        del self._full[self._num_steps]
        for seq in full:
            self._full[upto + slack(self._manager, seq.seq_id)].append(seq)
        return transfers

    def _append(self, seqs: list[Sequence], upto: int) -> list[Transfer]:
        """Give manager and sequences the tokens of the steps up to `upto`. Raises OutOfBlocks, and changes nothing."""
        appended = self._appended
        appends = [(seq.seq_id, upto - appended[seq.seq_id]) for seq in seqs]
        transfers = self._manager.append(appends)
        for seq, (seq_id, count) in zip(seqs, appends, strict=True):
            seq.num_computed += count
            seq.tokens.extend([self._unfinished[seq_id].filler] * count)
            appended[seq_id] = upto
            if self._prefix_cache:
                self._manager.commit(seq_id, seq.tokens, seq.num_computed)
        return transfers


def slack(manager: KVCacheManager, seq_id: int) -> int:
    """Tokens that fit into what the sequence holds: for these, `append` takes nothing from the pool."""
    if isinstance(manager, PagedManager):
        table = manager.tables[seq_id]
        if table.length % manager.block_size and manager.pool.ref_count[table.blocks[-1]] > 1:
            return 0  # the last block is shared, and the next token copies it
        return len(table.blocks) * manager.block_size - table.length
    assert isinstance(manager, (StandardManager, SwappingManager))
    region = manager.regions[seq_id]
    return region.size - region.length

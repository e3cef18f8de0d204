"""Logs what a manager and an engine do, from outside: neither knows that it is watched.

LoggedManager stands in for a manager, and logs what each operation changed: what the manager returns, and what it then
holds. test_logged.py holds the log against the managers.
LoggedSteps observes the steps of an engine.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from ..core.device import synchronize
from ..core.engine.engine import Observer
from ..core.engine.outputs import TokenOutput
from ..core.engine.request import Request
from ..core.engine.scheduler import Scheduler, StepPlan
from ..core.engine.sequence import Sequence as TokenSequence
from ..core.memory.manager import KVCacheManager, Transfer
from ..core.memory.paged import PagedManager, Table
from ..core.memory.regions import Region, RegionManager
from ..core.memory.usage import Snapshot
from ..core.model.llama import StepInputs
from ..core.model.tokenizer import Tokenizer
from ..extras.host_swap import SwappablePagedManager
from ..extras.plain_text import plain
from ..extras.prefix_cache import CachingBlockPool
from ..extras.swapping import SwappingManager
from ..extras.token_text import token_text
from . import events


class LoggedManager(KVCacheManager):
    """`manager` with a log. What the manager refuses is not logged."""

    def __init__(self, manager: KVCacheManager, log: events.Log) -> None:
        """Logs that `manager` opened, which must hold no sequence yet.

        Raises ValueError for a manager that keeps neither tables (PagedManager) nor regions (RegionManager).
        """
        self.manager = manager
        self.log = log
        self.paged, self.block_size, self.num_slots = manager.paged, manager.block_size, manager.num_slots
        self.can_fork, self.can_swap = manager.can_fork, manager.can_swap
        self._append = manager.append  # called for every token
        self._tables: dict[int, Table] = {}
        self._regions: dict[int, Region] = {}
        self._evicted: list[int] = []  # by the operation under way
        if isinstance(manager, PagedManager):
            name, self._tables = "paged", manager.tables
            if isinstance(manager.pool, CachingBlockPool):
                manager.pool.on_cached = lambda block_id, digest: log(events.BlockCached(block_id, digest.hex()))
                manager.pool.on_evicted = lambda block_id: self._evicted.append(block_id)
        elif isinstance(manager, RegionManager):
            name, self._regions = "swapping" if manager.can_swap else "standard", manager.regions
        else:
            raise ValueError(f"{type(manager).__name__} is no PagedManager and no RegionManager; it cannot be logged")
        num_blocks = self.num_slots // self.block_size
        log(events.PoolOpened(name, num_blocks, self.block_size, _host_size(manager), _free_order(manager)))

    # --- operations that are logged --------------------------------------------------------------------

    def admit(self, seq_id: int, tokens: Sequence[int], max_len: int, spare: int = 0) -> int:
        length = self.manager.admit(seq_id, tokens, max_len, spare)
        if self.paged:
            self.log(events.SequenceAdmitted(seq_id, tuple(self._tables[seq_id].blocks), length))
        else:
            self.log(events.RegionPlaced(seq_id, self._regions[seq_id].start, self._regions[seq_id].size))
        return length

    def append(self, appends: Sequence[tuple[int, int]]) -> list[Transfer]:
        if not self.paged:
            return self._append_to_regions(appends)
        transfers = self._append(appends)
        tables, size, log = self._tables, self.block_size, self.log
        is_plain = not (transfers or self._evicted)
        for seq_id, count in appends:
            used = (tables[seq_id].length - count) % size  # slots of the last block, before
            if is_plain and 0 < used <= size - count:  # nearly always
                log(events.TokensAppended(seq_id, count))
            else:
                log(self._appended(seq_id, count, transfers))
        return transfers

    def _appended(self, seq_id: int, count: int, transfers: Sequence[Transfer]) -> events.TokensAppended:
        """What changed in the table, which always has just enough blocks for its tokens."""
        blocks, before = self._tables[seq_id].blocks, self._tables[seq_id].length - count
        first_new = -(-before // self.block_size)
        copied: tuple[int, ...] = ()
        for transfer in transfers:
            if count and before % self.block_size and blocks[first_new - 1] == transfer.destination:
                copied = (transfer.source, transfer.destination)
        new_blocks, written = tuple(blocks[first_new:]), blocks[before // self.block_size :]
        evicted = tuple(block_id for block_id in written if block_id in self._evicted)
        self._evicted = [block_id for block_id in self._evicted if block_id not in evicted]
        return events.TokensAppended(seq_id, count, new_blocks, copied, evicted)

    def _append_to_regions(self, appends: Sequence[tuple[int, int]]) -> list[Transfer]:
        regions = self._regions
        before = [(regions[seq_id].start, regions[seq_id].size) for seq_id, _ in appends]
        transfers = self.manager.append(appends)
        for (seq_id, count), place in zip(appends, before, strict=True):
            region = regions[seq_id]
            if (region.start, region.size) != place:
                self.log(events.RegionPlaced(seq_id, region.start, region.size))
            self.log(events.TokensAppended(seq_id, count))
        return transfers

    def truncate(self, seq_id: int, length: int) -> None:
        self.manager.truncate(seq_id, length)
        self.log(events.SequenceTruncated(seq_id, length))

    def commit(self, seq_id: int, tokens: Sequence[int], num_written: int) -> None:
        self.manager.commit(seq_id, tokens, num_written)  # the pool calls on_cached

    def free(self, seq_id: int) -> None:
        self.manager.free(seq_id)
        self.log(events.SequenceFreed(seq_id))

    def clear(self) -> None:
        self.manager.clear()
        self._evicted.clear()
        self.log(events.PoolCleared(_free_order(self.manager)))

    def fork(self, parent_id: int, child_id: int) -> None:
        self.manager.fork(parent_id, child_id)
        self.log(events.SequenceForked(parent_id, child_id))

    def swap_out(self, seq_ids: Sequence[int]) -> list[Transfer]:
        transfers = self.manager.swap_out(seq_ids)
        if self.paged:
            self.log(events.SwappedOut(tuple(seq_ids), _pairs(transfers)))
        elif isinstance(self.manager, SwappingManager):
            for seq_id in seq_ids:
                region = self.manager.swapped[seq_id]
                self.log(events.RegionSwappedOut(seq_id, region.start, region.size))
        return transfers

    def swap_in(self, seq_ids: Sequence[int], spare: int = 0) -> list[Transfer]:
        transfers = self.manager.swap_in(seq_ids, spare)
        if self.paged:
            self.log(events.SwappedIn(tuple(seq_ids), _pairs(transfers), tuple(self._evicted)))
            self._evicted.clear()
        else:
            for seq_id in seq_ids:
                self.log(events.RegionSwappedIn(seq_id, self._regions[seq_id].start, self._regions[seq_id].size))
        return transfers

    # --- operations that change nothing ----------------------------------------------------------------

    def max_slots_needed(self, prompt_len: int, max_len: int, n: int = 1) -> int:
        return self.manager.max_slots_needed(prompt_len, max_len, n)

    def length(self, seq_id: int) -> int:
        return self.manager.length(seq_id)

    def placement(self, seq_id: int) -> list[int]:
        return self.manager.placement(seq_id)

    def slots(self, seq_id: int, first: int, count: int) -> list[int]:
        return self.manager.slots(seq_id, first, count)

    def snapshot(self, next_request: tuple[int, int] | None = None) -> Snapshot:
        return self.manager.snapshot(next_request)

    def check_integrity(self) -> None:
        self.manager.check_integrity()


def _free_order(manager: KVCacheManager) -> tuple[int, ...]:
    """The free blocks, the next one first; none for a manager without blocks."""
    return tuple(manager.pool.free_blocks) if isinstance(manager, PagedManager) else ()


def _host_size(manager: KVCacheManager) -> int:
    """Blocks in host memory, or slots for a manager without blocks."""
    if isinstance(manager, SwappablePagedManager):
        return manager.host_pool.num_blocks
    return manager.host_pool.num_slots if isinstance(manager, SwappingManager) else 0


def _pairs(transfers: Sequence[Transfer]) -> tuple[tuple[int, int], ...]:
    return tuple((transfer.source, transfer.destination) for transfer in transfers)


class LoggedSteps(Observer):
    """Logs requests, steps and tokens of the engine that `scheduler` works for. Token ids are logged with their text,
    so that a log can be read without the model."""

    def __init__(self, log: events.Log, tokenizer: Tokenizer, scheduler: Scheduler) -> None:
        self.log = log
        self.tokenizer = tokenizer
        self.scheduler = scheduler
        self._named: set[int] = set()  # token ids whose text is logged
        self._num_steps = 0
        self._began = 0.0

    def model_opened(self, model: str, kv_bytes_per_token: int) -> None:
        """The name of the model, and the bytes of K and V that a token has over all layers."""
        self.log(events.ModelOpened(plain(model), kv_bytes_per_token))

    def request_added(self, request: Request) -> None:
        prompt = tuple(request.output.prompt_token_ids)
        self._name(prompt)
        seq_ids = tuple(sorted(seq.seq_id for seq in request.unfinished()))
        self.log(events.RequestArrived(request.output.request_id, seq_ids, prompt))

    def before_step(self, plan: StepPlan, inputs: StepInputs) -> None:
        self._began = time.perf_counter()
        self.log(
            events.StepPlanned(
                self._num_steps,
                tuple((seq.seq_id, num_tokens) for seq, num_tokens in plan.chunks),
                tuple(seq.seq_id for group in plan.preempted for seq in group.seqs),
                tuple(seq.seq_id for group in self.scheduler.waiting for seq in group.seqs),
            )
        )

    def beams_reordered(self, chosen: Sequence[tuple[TokenSequence, TokenSequence]]) -> None:
        """Pairs of (beam of the last step, sequence that goes on from it), before the new tokens."""
        self.log(events.BeamsReordered(tuple((parent.seq_id, seq.seq_id) for parent, seq in chosen)))

    def token_sampled(self, seq: TokenSequence, token_id: int) -> None:
        self._name([token_id])
        self.log(events.TokenSampled(seq.seq_id, token_id))

    def sequence_finished(self, seq: TokenSequence, reason: str) -> None:
        self.log(events.SequenceFinished(seq.seq_id, reason))

    def after_step(self, plan: StepPlan, tokens: list[TokenOutput]) -> None:
        synchronize()
        self.log(events.StepTimed(self._num_steps, round(1e6 * (time.perf_counter() - self._began))))
        self._num_steps += 1

    def _name(self, token_ids: Iterable[int]) -> None:
        for token_id in token_ids:
            if token_id not in self._named:
                self._named.add(token_id)
                self.log(events.TokenNamed(token_id, token_text(self.tokenizer, token_id)))

"""Memory for sequences longer than the device: pages that are on the device, on the host, or on both.

A page here is the K and V of one block of tokens, in one layer, for one KV head. Residency is by page and not by
block, for two reasons. The layers of a step run one after another, so each can use all staging blocks. And which blocks
matter differs by layer and by head: a block that is kept for all heads because one head needs it would take
num_layers * num_kv_heads times the room. So what is kept and moved is exactly what attention reads.

The manager counts, in blocks, what sequences hold. Pages are made as each layer writes its keys (kv.py), and
`residency` knows where they are.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from .. import timeline
from ..core.checks import plural, require, require_one_of
from ..core.memory.block_pool import OutOfBlocks
from ..core.memory.manager import KVCacheManager, Transfer
from ..core.memory.usage import PartialAllocation, Snapshot
from .residency import Residency

if TYPE_CHECKING:
    from ..timeline.events import Log

Eviction = Literal["lru", "sliding", "relevance"]
EVICTIONS = ("lru", "sliding", "relevance")


@dataclass(slots=True)
class PageTable:
    """The pages of one sequence."""

    pages: list[list[array[int]]]  # [layer][KV head]: the page of each logical block that has been written
    length: int = 0  # tokens that have room


class StreamingManager(KVCacheManager):
    """Its sequences may be longer than the device. Slots are counted in the tokens that device and host hold together;
    a sequence lies in pages, and not in numbered slots."""

    paged = True

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        block_size: int,
        num_device_pages: int,
        num_host_pages: int,
        evict: Eviction = "lru",
        log: Log | None = None,
    ) -> None:
        """`evict`: which page leaves the device first: the page that was not used for the longest time ("lru"), the
        page of the oldest tokens ("sliding"), or the page that mattered least to the last query ("relevance": by
        `priority`, which StreamedKV sets)."""
        require(block_size=(block_size, 1))
        require_one_of(EVICTIONS, evict=evict)
        self.num_layers, self.num_kv_heads, self.block_size = num_layers, num_kv_heads, block_size
        self.evict = evict
        if log and num_device_pages > 0:
            log(timeline.events.PoolOpened("streaming", num_device_pages, block_size, num_host_pages, ()))
        self.priority = array("d", [0.0]) * max(0, num_device_pages + num_host_pages)  # by page
        priority = None if evict == "lru" else self.priority.__getitem__
        self.residency = Residency(num_device_pages, num_host_pages, priority, log)
        self.num_blocks = self.residency.capacity // (num_layers * num_kv_heads)
        self.num_slots = self.num_blocks * block_size
        self.tables: dict[int, PageTable] = {}
        self.log = log

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    @property
    def num_free_blocks(self) -> int:
        return self.num_blocks - sum(self.blocks_for(table.length) for table in self.tables.values())

    # --- KVCacheManager ------------------------------------------------------------------------------

    def max_slots_needed(self, prompt_len: int, max_len: int, n: int = 1) -> int:
        return n * self.blocks_for(max_len) * self.block_size

    def admit(self, seq_id: int, tokens: Sequence[int], max_len: int, spare: int = 0) -> int:
        needed = self.blocks_for(len(tokens))
        kept = self.blocks_for(spare) if self.tables else 0
        if needed + kept > self.num_free_blocks:
            raise OutOfBlocks(self._no_room(needed, "an admission"))
        heads = range(self.num_kv_heads)
        self.tables[seq_id] = PageTable([[array("q") for _ in heads] for _ in range(self.num_layers)])
        if self.log:
            self.log(timeline.events.SequenceAdmitted(seq_id, (), 0))
        return 0

    def _no_room(self, needed: int, what: str) -> str:
        free = f"{self.num_free_blocks} of {self.num_blocks} free on device and host"
        return f"no room for {plural(needed, 'block')} ({what}): {free}"

    def append(self, appends: Sequence[tuple[int, int]]) -> list[Transfer]:
        needed = 0
        for seq_id, count in appends:
            length = self.tables[seq_id].length
            needed += self.blocks_for(length + count) - self.blocks_for(length)
        if needed > self.num_free_blocks:
            raise OutOfBlocks(self._no_room(needed, f"seq_id {', '.join(str(seq_id) for seq_id, _ in appends)}"))
        for seq_id, count in appends:
            self.tables[seq_id].length += count
            if self.log:
                self.log(timeline.events.TokensAppended(seq_id, count))
        return []  # what moves is decided layer by layer

    def free(self, seq_id: int) -> None:
        table = self.tables.pop(seq_id)
        self.residency.free(page for layer in table.pages for pages in layer for page in pages)
        if self.log:
            self.log(timeline.events.SequenceFreed(seq_id))

    def clear(self) -> None:
        self.tables.clear()
        self.residency.clear()
        if self.log:
            self.log(timeline.events.PoolCleared(()))

    def length(self, seq_id: int) -> int:
        return self.tables[seq_id].length

    def placement(self, seq_id: int) -> list[int]:
        """Nothing: `tables` has the pages, and StreamedKV reads it."""
        return []

    def slots(self, seq_id: int, first: int, count: int) -> list[int]:
        """Zeros: pages have no slot numbers, and StreamedKV reads none."""
        return [0] * count

    def snapshot(self, next_request: tuple[int, int] | None = None) -> Snapshot:
        partial = [
            PartialAllocation(seq_id, table.length, table.length % self.block_size, self.block_size)
            for seq_id, table in self.tables.items()
            if table.length % self.block_size
        ]
        held = self.num_blocks - self.num_free_blocks
        size = self.block_size
        return Snapshot((held - len(partial)) * size, partial, external=0, free=self.num_free_blocks * size)

    def check_integrity(self) -> None:
        self.residency.check_integrity()
        pages = [p for table in self.tables.values() for layer in table.pages for head in layer for p in head]
        if len(set(pages)) != len(pages) or len(pages) != self.residency.num_pages:
            raise AssertionError(f"tables name {plural(len(pages), 'page')} of {self.residency.num_pages}")
        for seq_id, table in self.tables.items():
            for layer in table.pages:
                for head in layer:
                    if len(head) > self.blocks_for(table.length):
                        raise AssertionError(f"sequence {seq_id}, length {table.length}: {plural(len(head), 'page')}")

    # --- pages ---------------------------------------------------------------------------------------

    def prepare(self, layer: int, wanted: Sequence[tuple[int, int, int]]) -> tuple[list[int], list[Transfer]]:
        """Bring the pages of (sequence, KV head, logical block) to the device, where they are about to be written.

        At most as many as the device has blocks. Pages that do not exist yet are made, for each head in the order of
        its blocks. Returns the pages, and what must be copied first.
        """
        lists = [self.tables[seq_id].pages[layer][head] for seq_id, head, _ in wanted]
        old = [pages[block] for pages, (_, _, block) in zip(lists, wanted, strict=True) if block < len(pages)]
        transfers = self.residency.need(old)
        new, more = self.residency.add(len(wanted) - len(old), keep=old)
        fresh = iter(new)
        found = []
        named: dict[tuple[int, int], list[int]] = {}  # (sequence, KV head) -> its new pages
        for pages, (seq_id, head, block) in zip(lists, wanted, strict=True):
            if block == len(pages):
                pages.append(next(fresh))
                self.priority[pages[block]] = block if self.evict == "sliding" else 1.0
                named.setdefault((seq_id, head), []).append(pages[block])
            found.append(pages[block])
        self.residency.written(old)
        if self.log:
            for (seq_id, head), new_pages in named.items():
                self.log(timeline.events.PagesNamed(seq_id, layer, head, tuple(new_pages)))
        return found, transfers + more

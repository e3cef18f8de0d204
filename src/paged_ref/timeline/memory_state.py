"""The memory of one moment, as the log says it: tables, counts, the prefix cache, regions.

It follows the events and decides nothing. What contradicts an earlier event is refused with a ValueError.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from ..core.checks import plural, require
from ..core.memory.paged import Table, snapshot_of
from ..core.memory.usage import PartialAllocation, Snapshot
from ..extras.memory_limit import require_memory
from . import events
from .page_state import PageState

BLOCK_BYTES = 64  # that a state keeps for each block: its place in two lists, and its number


@dataclass(slots=True)
class Placement(Table):
    """Where one sequence lies: in blocks, or in a region (then `blocks` is empty)."""

    start: int = 0
    size: int = 0
    on_host: bool = False

    def copy(self) -> Placement:
        return replace(self, blocks=self.blocks.copy())


@dataclass(frozen=True, slots=True)
class KnownBlock:
    """A full block in the prefix cache. `parent` is the digest of the block before it, "" for the first."""

    block_id: int
    digest: str
    parent: str = field(default="", compare=False)  # this and the tokens are the log's, not the manager's
    tokens: tuple[int, ...] = field(default=(), compare=False)


@dataclass(slots=True)
class Blocks:
    """The blocks of the device, or of the host. A block is in tables, or free, or cached: in the prefix cache alone."""

    ref_count: list[int] = field(default_factory=list)  # tables that point to each block
    free: list[int] = field(default_factory=list)  # free[-1] was freed last; the managers allocate it next
    known: dict[int, KnownBlock] = field(default_factory=dict)  # blocks in the prefix cache, in tables or cached
    cached: OrderedDict[int, None] = field(default_factory=OrderedDict)  # the block unused longest first
    counts_before: dict[int, int] = field(default_factory=dict, compare=False)  # of blocks that this event touched

    def take(self, block_id: int) -> None:
        """A free block is in one table now."""
        if self._count_of(block_id) or block_id in self.cached:
            raise ValueError(f"block {block_id} is not free")
        if self.free[-1] == block_id:
            self.free.pop()
        else:
            self.free.remove(block_id)
        self.ref_count[block_id] = 1

    def share(self, block_id: int) -> None:
        """A block that is in a table, or cached, is in one table more."""
        if not self._count_of(block_id):
            if block_id not in self.cached:
                raise ValueError(f"block {block_id} is free")
            del self.cached[block_id]
        self.ref_count[block_id] += 1

    def release(self, block_id: int) -> None:
        """A block is in one table less. From its last table it goes to the free blocks, or to the cached ones."""
        self.check_held(block_id)
        self.ref_count[block_id] -= 1
        if self.ref_count[block_id]:
            return
        if block_id in self.known:
            self.cached[block_id] = None
        else:
            self.free.append(block_id)

    def give_up(self, blocks: Iterable[int]) -> None:
        """The prefix cache gave up these blocks. Those that are in no table are free."""
        for block_id in blocks:
            if block_id not in self.known:
                raise ValueError(f"block {block_id} is not cached, and cannot be given up")
            del self.known[block_id]
            if block_id in self.cached:
                del self.cached[block_id]
                self.free.append(block_id)

    def check_held(self, block_id: int) -> None:
        """Raise ValueError unless the block is in a table."""
        if not self._count_of(block_id):
            raise ValueError(f"block {block_id} is in no table")

    def _count_of(self, block_id: int) -> int:
        """Tables that point to a block that is about to change."""
        if not 0 <= block_id < len(self.ref_count):
            raise ValueError(f"block {block_id} is not in the pool")
        self.counts_before.setdefault(block_id, self.ref_count[block_id])
        return self.ref_count[block_id]


@dataclass(slots=True)
class MemoryState(Blocks):
    """What a manager holds, as plain values. The blocks of the device are its own, those of the host are in `host`."""

    manager: str = ""
    num_blocks: int = 0
    block_size: int = 1
    num_host_blocks: int = 0
    sequences: dict[int, Placement] = field(default_factory=dict)
    host: Blocks = field(default_factory=Blocks)
    pages: PageState = field(default_factory=PageState)

    @property
    def paged(self) -> bool:
        return bool(self.ref_count)

    def copy(self) -> MemoryState:
        """A state of its own. Known blocks never change, and are shared."""
        return replace(
            self,
            ref_count=self.ref_count.copy(),
            free=self.free.copy(),
            known=self.known.copy(),
            cached=self.cached.copy(),
            counts_before={},
            sequences={seq_id: place.copy() for seq_id, place in self.sequences.items()},
            host=Blocks(self.host.ref_count.copy(), self.host.free.copy()),
            pages=self.pages.copy(),
        )

    # --- the whole pool --------------------------------------------------------------------------------

    def open(self, event: events.PoolOpened) -> None:
        """The manager began, with nothing in it."""
        if self.manager:
            raise ValueError("a pool was opened before")
        require(block_size=(event.block_size, 1), num_blocks=(event.num_blocks, 0))
        require(num_host_blocks=(event.num_host_blocks, 0))
        self.manager, self.block_size = event.manager, event.block_size
        self.num_blocks, self.num_host_blocks = event.num_blocks, event.num_host_blocks
        if event.free_order:
            what = f"num_host_blocks is {event.num_host_blocks}: a list of so many"
            require_memory(what, BLOCK_BYTES * event.num_host_blocks)
            self._free_all(event.free_order, event.num_blocks)

    def clear(self, free_order: Sequence[int]) -> None:
        """No sequence is there, and all blocks are free, in this order."""
        for block_id in range(len(self.ref_count)):
            self._count_of(block_id)
        self._free_all(free_order, len(self.ref_count))
        self.sequences.clear()
        self.known.clear()
        self.cached.clear()
        self.pages.tables.clear()

    def _free_all(self, free_order: Sequence[int], num_blocks: int) -> None:
        """All blocks are free, in this order; those of the host in the order of their numbers."""
        if len(free_order) != num_blocks or sorted(free_order) != list(range(num_blocks)):
            raise ValueError(f"free_order does not name each of the {num_blocks} blocks once")
        num_host_blocks = self.num_host_blocks if free_order else 0
        self.ref_count, self.free = [0] * num_blocks, list(reversed(free_order))
        self.host = Blocks([0] * num_host_blocks, list(reversed(range(num_host_blocks))))

    # --- one sequence ----------------------------------------------------------------------------------

    def find(self, seq_id: int, on_host: bool) -> Placement:
        """The placement of a sequence that must be on this side."""
        place = self.sequences.get(seq_id)
        if place is None:
            raise ValueError(f"sequence {seq_id} is not there")
        if place.on_host != on_host:
            raise ValueError(f"sequence {seq_id} is on the {'host' if place.on_host else 'device'}")
        return place

    def begin(self, seq_id: int, place: Placement) -> None:
        """A new sequence, in blocks that exist already."""
        if seq_id in self.sequences:
            raise ValueError(f"sequence {seq_id} is there already")
        for block_id in place.blocks:
            self.share(block_id)
        self.sequences[seq_id] = place
        self.check_fit(seq_id, place)

    def append(self, event: events.TokensAppended) -> Placement:
        """The sequence has a slot for `count` more tokens, in the blocks that the event names."""
        place = self.find(event.seq_id, on_host=False)
        self.give_up(event.evicted)
        if event.copied:
            source, destination = event.copied
            if (last := place.blocks[-1]) != source:
                raise ValueError(f"block {source} was copied; the last of sequence {event.seq_id} is {last}")
            self.take(destination)
            place.blocks[-1] = destination
            self.release(source)
        for block_id in event.new_blocks:
            self.take(block_id)
        place.blocks += event.new_blocks
        place.length += event.count
        self.check_fit(event.seq_id, place)
        return place

    def truncate(self, event: events.SequenceTruncated) -> None:
        """The sequence keeps its first `length` tokens, and the blocks that hold them."""
        place = self.find(event.seq_id, on_host=False)
        if not 0 <= event.length <= place.length:
            raise ValueError(f"sequence {event.seq_id} has length {place.length}, and cannot keep {event.length}")
        place.length = event.length
        while len(place.blocks) > -(-event.length // self.block_size):
            self.release(place.blocks.pop())

    def place_region(self, seq_id: int, start: int, size: int, on_host: bool) -> None:
        """The region of the sequence lies here now, where no other region may lie."""
        place, stop = self.sequences[seq_id], start + size
        place.start, place.size, place.on_host = start, size, on_host
        if start < 0 or stop > (self.num_host_blocks if on_host else self.num_blocks):
            raise ValueError(f"slots {start} to {stop - 1} are not all in the pool")
        for other_id, other in self.sequences.items():
            overlap = other.start < stop and start < other.start + other.size
            if overlap and other is not place and other.on_host == on_host:
                raise ValueError(f"sequences {seq_id} and {other_id} lie in the same slots")
        self.check_fit(seq_id, place)

    def check_fit(self, seq_id: int, place: Placement) -> None:
        """A table has just enough blocks, a region has enough slots. Pages come later, layer by layer."""
        if self.manager == "streaming":
            return
        if not self.paged:
            if place.length > place.size:
                raise ValueError(f"sequence {seq_id} of length {place.length} has a region of {place.size}")
        elif len(place.blocks) != -(-place.length // self.block_size):
            raise ValueError(f"sequence {seq_id} of length {place.length} has {plural(len(place.blocks), 'block')}")

    def move_tables(self, seq_ids: Sequence[int], moved: events.Pairs, to_host: bool) -> None:
        """Tables move from one pool to the other. A block that several of the sequences share moves once."""
        source, destination = (self, self.host) if to_host else (self.host, self)
        new_of, taken = dict(moved), set()
        for seq_id in seq_ids:
            for block_id in self.find(seq_id, on_host=not to_host).blocks:
                if block_id not in new_of:
                    raise ValueError(f"block {block_id} of sequence {seq_id} is not among the blocks that moved")
                new = new_of[block_id]
                (destination.share if new in taken else destination.take)(new)
                taken.add(new)
        for seq_id in seq_ids:
            place = self.sequences[seq_id]
            for block_id in reversed(place.blocks):
                source.release(block_id)
            place.blocks, place.on_host = [new_of[block_id] for block_id in place.blocks], to_host
            self.now_last(seq_id)

    def now_last(self, seq_id: int) -> None:
        """The sequence is the last that came to its side, device or host; snapshots are in that order."""
        self.sequences[seq_id] = self.sequences.pop(seq_id)

    # --- where the slots are ---------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """What the manager's own snapshot() says, with no request waiting. For pages that stream: how full the device
        is."""
        if self.manager == "streaming":
            here = sum(device >= 0 for device, _ in self.pages.places.values())
            return Snapshot(here * self.block_size, [], external=0, free=(self.num_blocks - here) * self.block_size)
        on_device = {seq_id: place for seq_id, place in self.sequences.items() if not place.on_host}
        if self.paged:
            free, cached = len(self.free), len(self.cached)
            return snapshot_of(on_device, self.block_size, self.num_blocks - free - cached, free, cached)
        regions = [PartialAllocation(seq_id, p.length, p.length, p.size) for seq_id, p in on_device.items()]
        return Snapshot(0, regions, external=0, free=sum(size for _, size in self.holes()))

    def pieces(self, on_host: bool = False) -> list[tuple[int, int, int | None]]:
        """(start, size, sequence) of all regions and holes of one pool, in their order; a hole has no sequence."""
        regions = [(p.start, p.size, seq_id) for seq_id, p in self.sequences.items() if p.on_host == on_host]
        return sorted([*regions, *((*hole, None) for hole in self.holes(on_host))], key=lambda piece: piece[:2])

    def holes(self, on_host: bool = False) -> list[tuple[int, int]]:
        """(start, size) of the free slots between the regions of one pool."""
        found, position = [], 0
        here = [(place.start, place.size) for place in self.sequences.values() if place.on_host == on_host]
        for start, size in [*sorted(here), (self.num_host_blocks if on_host else self.num_blocks, 0)]:
            if start > position:
                found.append((position, start - position))
            position = start + size
        return found

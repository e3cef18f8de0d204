"""Physical blocks: which are free, and how many block tables point to each of the others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..checks import plural, require


class OutOfBlocks(Exception):  # noqa: N818  (a state of the pool that the scheduler acts on, not a fault)
    """No room in memory now. The operation that raised it changed nothing."""


class BlockPool:
    """`num_blocks` interchangeable blocks with reference counts.

    Invariant: a block is free, or `ref_count` tables point to it. The last four methods are what a pool may do that
    remembers what its blocks held; this pool remembers nothing.
    """

    def __init__(self, num_blocks: int, free_order: Sequence[int] | None = None) -> None:
        """`free_order`: all block ids in the order in which to hand them out (default 0, 1, ...)."""
        require(num_blocks=(num_blocks, 0))
        order = list(range(num_blocks)) if free_order is None else list(free_order)
        if free_order is not None and sorted(order) != list(range(num_blocks)):
            raise ValueError(f"free_order must name each of the blocks 0 to {num_blocks - 1} once")
        self.num_blocks = num_blocks
        self._first_order = order
        self.clear()

    def clear(self) -> None:
        """Every block is free, as at the beginning."""
        self.ref_count = [0] * self.num_blocks
        self._free = self._first_order[::-1]  # a stack: the block freed last is handed out first, still warm in caches

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can hand out."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks that no table points to, and whose K and V can be used again; `num_free` counts them."""
        return 0

    @property
    def free_blocks(self) -> list[int]:
        """The free list, the next block to be handed out first."""
        return self._free[::-1]

    def allocate(self) -> int:
        """Take a free block, count 1. Raises OutOfBlocks."""
        if not self._free:
            raise OutOfBlocks(f"no block is free; the pool has {self.num_blocks}")
        block_id = self._free.pop()
        self.ref_count[block_id] = 1
        return block_id

    def share(self, block_id: int) -> None:
        """One more table points to `block_id`."""
        self.ref_count[block_id] += 1

    def release(self, block_id: int) -> None:
        """One table less points to `block_id`. Raises ValueError where none does."""
        if self.ref_count[block_id] < 1:
            raise ValueError(f"block {block_id} is in no table; it cannot be released")
        self.ref_count[block_id] -= 1
        if not self.ref_count[block_id]:
            self._unused(block_id)

    def check_integrity(self, references: Iterable[int]) -> None:
        """Raise AssertionError unless `references`, a block id for each table entry, explain every count, and each
        block is free, cached or held."""
        counted = [0] * self.num_blocks
        for block_id in references:
            counted[block_id] += 1
        for block_id, (stored, found) in enumerate(zip(self.ref_count, counted, strict=True)):
            if stored != found:
                raise AssertionError(f"block {block_id} has ref_count {stored} and {plural(found, 'table entry')}")
        held = [block_id for block_id, count in enumerate(counted) if count]
        unheld = self._unheld()
        if sorted([*unheld, *held]) != list(range(self.num_blocks)):
            counts = f"{len(unheld)} free or cached + {len(held)} held blocks"
            raise AssertionError(f"{counts} are not each of the {self.num_blocks} blocks once")

    def _unheld(self) -> list[int]:
        """The blocks that no table points to."""
        return self._free

    def _unused(self, block_id: int) -> None:
        """No table points to `block_id` any more."""
        self._free.append(block_id)

    def lookup(self, tokens: Sequence[int], block_size: int) -> list[int]:
        """Blocks that already hold K and V of the leading full blocks of `tokens`."""
        return []

    def filled(self, blocks: Sequence[int], num_full: int, tokens: Sequence[int], block_size: int) -> None:
        """The first `num_full` of `blocks` now hold K and V of the leading `tokens`."""

    def reopened(self, block_id: int) -> None:
        """More tokens go into the block, which a truncated table may have filled before with others."""

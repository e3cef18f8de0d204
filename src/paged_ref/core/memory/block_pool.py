"""Physical blocks: which are free, and how many tables point to each of the others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class OutOfBlocks(Exception):  # noqa: N818  (a state of the pool that the scheduler acts on, not a fault)
    """No room in memory now. Whoever raised it changed nothing."""


class BlockPool:
    """`num_blocks` interchangeable blocks with reference counts.

    Invariant: a block is on the free list, or in use (count of at least 1), or idle: off the free list with
    count 0, because the prefix cache still knows what lies in it.
    """

    def __init__(self, num_blocks: int, free_order: Sequence[int] | None = None) -> None:
        """`free_order`: all block ids in the order in which to hand them out (default 0, 1, ...)."""
        if num_blocks < 0:
            raise ValueError(f"num_blocks is {num_blocks}; at least 0 is needed")
        order = list(range(num_blocks)) if free_order is None else list(free_order)
        if sorted(order) != list(range(num_blocks)):
            raise ValueError(f"free_order must name each of the blocks 0 to {num_blocks - 1} once")
        self.num_blocks = num_blocks
        self.ref_count = [0] * num_blocks
        self._free = order[::-1]  # a stack: the block freed last is handed out first, still warm in caches

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def free_blocks(self) -> list[int]:
        """The free list, the next block to be handed out first."""
        return self._free[::-1]

    def allocate(self) -> int:
        """Take a free block, count 1. Raises OutOfBlocks."""
        if not self._free:
            raise OutOfBlocks(f"none of the {self.num_blocks} blocks is free")
        block_id = self._free.pop()
        self.ref_count[block_id] = 1
        return block_id

    def share(self, block_id: int) -> None:
        """One more table points to `block_id`, which is in use or idle."""
        self.ref_count[block_id] += 1

    def release(self, block_id: int, keep_idle: bool = False) -> bool:
        """One table less points to `block_id`. True when nothing points to it now: it is free, or idle."""
        if self.ref_count[block_id] < 1:
            raise ValueError(f"block {block_id} is in no table; it cannot be released")
        self.ref_count[block_id] -= 1
        if self.ref_count[block_id]:
            return False
        if not keep_idle:
            self._free.append(block_id)
        return True

    def free_idle(self, block_id: int) -> None:
        """An idle block becomes free."""
        self._free.append(block_id)

    def check_integrity(self, references: Iterable[int], idle: Iterable[int] = ()) -> None:
        """Raise AssertionError unless `references` (a block id for each table entry) and `idle` explain all."""
        counted = [0] * self.num_blocks
        for block_id in references:
            counted[block_id] += 1
        for block_id, (stored, found) in enumerate(zip(self.ref_count, counted, strict=True)):
            if stored != found:
                raise AssertionError(f"block {block_id} has ref_count {stored}; {found} tables point to it")
        held = [block_id for block_id, count in enumerate(counted) if count]
        everything = sorted([*self._free, *held, *idle])
        if everything != list(range(self.num_blocks)):
            raise AssertionError(
                f"{len(self._free)} free + {len(held)} held + {len(list(idle))} cached blocks are not each of "
                f"the {self.num_blocks} blocks once"
            )

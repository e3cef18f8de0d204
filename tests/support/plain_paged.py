"""Paging once more, as plainly as it can be said: nothing is counted or remembered that can be looked up.

A reference count is how many tables name the block; what a block holds is the tokens themselves, not a digest of them.
Slow, and independent of the package: for the test that the manager does the same.
"""

from __future__ import annotations

from collections.abc import Sequence


class Refused(Exception):  # noqa: N818
    """There is no room."""


class PlainPaged:
    """`num_blocks` blocks on the device and `num_host_blocks` on the host."""

    def __init__(self, order: Sequence[int], size: int, num_host_blocks: int, watermark: int, remembers: bool) -> None:
        self.size, self.watermark, self.remembers = size, watermark, remembers
        self.num_blocks = len(order)
        self.free_list = list(order)  # the next one first
        self.host_free = list(range(num_host_blocks))
        self.unused: list[int] = []  # blocks that can be found again, the one that was released first comes first
        self.tables: dict[int, list[int]] = {}
        self.swapped: dict[int, list[int]] = {}
        self.lengths: dict[int, int] = {}
        self.content: dict[int, tuple[int, ...]] = {}  # of full blocks: all tokens up to the block's end
        self.found: dict[tuple[int, ...], int] = {}  # the block that is found for such tokens

    # --- what is looked up ---

    def count(self, block: int) -> int:
        return sum(table.count(block) for table in self.tables.values())

    @property
    def available(self) -> int:
        return len(self.free_list) + len(self.unused)

    # --- blocks ---

    def take(self) -> int:
        if self.free_list:
            return self.free_list.pop(0)
        block = self.unused.pop(0)
        del self.found[self.content.pop(block)]
        return block

    def drop(self, blocks: Sequence[int]) -> None:
        """Tables no longer name these blocks: the last one goes back first."""
        for block in reversed(blocks):
            if self.count(block) == 0:
                if block in self.content and self.found.get(self.content[block]) == block:
                    self.unused.append(block)
                else:
                    self.content.pop(block, None)
                    self.free_list.insert(0, block)

    def release_table(self, seq_id: int) -> None:
        """Take the entries away one by one, from the end, so that each is seen when it is the last."""
        table = self.tables[seq_id]
        while table:
            self.drop([table.pop()])
        del self.tables[seq_id]

    # --- what a manager does ---

    def admit(self, seq_id: int, tokens: Sequence[int]) -> int:
        known: list[int] = []
        while self.remembers and (len(known) + 1) * self.size < len(tokens):
            block = self.found.get(tuple(tokens[: (len(known) + 1) * self.size]))
            if block is None:
                break
            known.append(block)
        room = self.available - sum(block in self.unused for block in known)
        self.require(-(-len(tokens) // self.size) - len(known), room)
        self.unused = [block for block in self.unused if block not in known]
        self.tables[seq_id] = known
        self.lengths[seq_id] = len(known) * self.size
        return self.lengths[seq_id]

    def require(self, needed: int, room: int) -> None:
        spare = self.watermark if any(self.tables.values()) else 0
        if needed + spare > room:
            raise Refused

    def append(self, appends: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """Block copies to make first, as (source, destination). Tried on a copy: all or none."""
        saved = self.free_list.copy(), self.unused.copy(), self.content.copy(), self.found.copy()
        saved_tables, saved_lengths = {k: v.copy() for k, v in self.tables.items()}, self.lengths.copy()
        copies = []
        try:
            for seq_id, count in appends:
                table, length = self.tables[seq_id], self.lengths[seq_id]
                if count and length % self.size and self.count(table[-1]) > 1:
                    old, new = table[-1], self._take_or_refuse()
                    table[-1] = new
                    copies.append((old, new))
                elif count and length % self.size:  # its content changes: no prompt can find it any more
                    content = self.content.pop(table[-1], None)
                    if content is not None and self.found[content] == table[-1]:
                        del self.found[content]
                self.lengths[seq_id] = length + count
                while len(table) * self.size < length + count:
                    table.append(self._take_or_refuse())
        except Refused:
            self.free_list, self.unused, self.content, self.found = saved
            self.tables, self.lengths = saved_tables, saved_lengths
            raise
        return copies

    def _take_or_refuse(self) -> int:
        if not self.available:
            raise Refused
        return self.take()

    def commit(self, seq_id: int, tokens: Sequence[int], num_written: int) -> None:
        if self.remembers:
            for i, block in enumerate(self.tables[seq_id][: num_written // self.size]):
                if block not in self.content:
                    self.content[block] = tuple(tokens[: (i + 1) * self.size])
                    self.found.setdefault(self.content[block], block)

    def fork(self, parent: int, child: int) -> None:
        self.tables[child] = self.tables[parent].copy()
        self.lengths[child] = self.lengths[parent]

    def truncate(self, seq_id: int, length: int) -> None:
        self.lengths[seq_id] = length
        while len(self.tables[seq_id]) > -(-length // self.size):
            self.drop([self.tables[seq_id].pop()])

    def free(self, seq_id: int) -> None:
        del self.lengths[seq_id]
        if seq_id in self.tables:
            self.release_table(seq_id)
        else:
            self._release_host(seq_id)

    def _release_host(self, seq_id: int) -> None:
        for block in reversed(self.swapped.pop(seq_id)):
            if not any(block in table for table in self.swapped.values()):
                self.host_free.insert(0, block)

    def swap_out(self, seq_ids: Sequence[int]) -> list[tuple[int, int]]:
        blocks = list(dict.fromkeys(block for seq_id in seq_ids for block in self.tables[seq_id]))
        if len(blocks) > len(self.host_free):
            raise Refused
        new = {block: self.host_free.pop(0) for block in blocks}
        for seq_id in seq_ids:
            self.swapped[seq_id] = [new[block] for block in self.tables[seq_id]]
            self.release_table(seq_id)
        return list(new.items())

    def swap_in(self, seq_ids: Sequence[int]) -> list[tuple[int, int]]:
        blocks = list(dict.fromkeys(block for seq_id in seq_ids for block in self.swapped[seq_id]))
        self.require(len(blocks), self.available)
        new = {block: self.take() for block in blocks}
        for seq_id in seq_ids:
            self.tables[seq_id] = [new[block] for block in self.swapped[seq_id]]
            self._release_host(seq_id)
        return list(new.items())

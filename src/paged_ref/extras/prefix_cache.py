"""Prefix caching: a block pool that remembers what its full blocks hold, so that a prompt that begins like an earlier
one need not be computed again.

A block is known by a digest of its own tokens and of all that came before: the digest of the block before goes into
it. Without that, two blocks with the same tokens after different beginnings would look the same, and their K and V are
not. Digests belong to blocks. A block that no table points to stays `cached` until its room is needed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b

import numpy as np

from ..core.memory.block_pool import BlockPool


def block_digests(tokens: Sequence[int], block_size: int, parent: bytes = b"") -> Iterator[bytes]:
    """The digests of the full blocks of `tokens`, which follow a block with digest `parent` (none: b"")."""
    data = np.array(tokens, dtype=np.int64).tobytes()
    size = 8 * block_size
    for start in range(0, len(data) - size + 1, size):
        parent = blake2b(data[start : start + size], digest_size=16, key=parent).digest()
        yield parent


class CachingBlockPool(BlockPool):
    """A BlockPool whose `num_free` counts free and cached blocks: both can be handed out.

    Free blocks are handed out first; then the cached block that was released longest ago is evicted.
    """

    def __init__(self, num_blocks: int, free_order: Sequence[int] | None = None) -> None:
        super().__init__(num_blocks, free_order)
        self.on_cached: Callable[[int, bytes], None] | None = None  # called with a block that can be looked up now
        self.on_evicted: Callable[[int], None] | None = None
        self._read = True

    def clear(self) -> None:
        super().clear()
        self.digest_of: dict[int, bytes] = {}  # full blocks, while they are in use or cached
        self.block_of: dict[bytes, int] = {}  # the one block that is looked up for a digest
        self.cached: OrderedDict[int, None] = OrderedDict()  # the block to evict first comes first

    @property
    def num_cached(self) -> int:
        return len(self.cached)

    @property
    def num_free(self) -> int:
        return len(self._free) + len(self.cached)

    def allocate(self) -> int:
        if not self._free and self.cached:
            block_id, _ = self.cached.popitem(last=False)
            self.reopened(block_id)
            self._free.append(block_id)
        return super().allocate()

    @contextmanager
    def unread(self) -> Iterator[None]:
        """Inside, no lookup finds a block; blocks that fill up can be looked up later."""
        self._read = False
        try:
            yield
        finally:
            self._read = True

    def share(self, block_id: int) -> None:
        self.cached.pop(block_id, None)
        super().share(block_id)

    def _unused(self, block_id: int) -> None:
        digest = self.digest_of.get(block_id)
        if digest is not None and self.block_of.get(digest) == block_id:
            self.cached[block_id] = None
        else:  # not full, or a second block with the same content
            self.digest_of.pop(block_id, None)
            super()._unused(block_id)

    def lookup(self, tokens: Sequence[int], block_size: int) -> list[int]:
        blocks: list[int] = []
        for digest in block_digests(tokens, block_size) if self._read else ():
            block_id = self.block_of.get(digest)
            if block_id is None:
                break
            blocks.append(block_id)
        return blocks

    def filled(self, blocks: Sequence[int], num_full: int, tokens: Sequence[int], block_size: int) -> None:
        first = num_full  # of the blocks that have no digest yet
        while first and blocks[first - 1] not in self.digest_of:
            first -= 1
        parent = self.digest_of[blocks[first - 1]] if first else b""
        new_tokens = tokens[first * block_size : num_full * block_size]
        for block_id, digest in zip(blocks[first:num_full], block_digests(new_tokens, block_size, parent), strict=True):
            self.digest_of[block_id] = digest
            # The first block with this content wins; a second one, computed in the same step, stays private.
            if self.block_of.setdefault(digest, block_id) == block_id and self.on_cached:
                self.on_cached(block_id, digest)

    def reopened(self, block_id: int) -> None:
        digest = self.digest_of.pop(block_id, None)
        if digest is not None and self.block_of.get(digest) == block_id:
            del self.block_of[digest]
            if self.on_evicted:
                self.on_evicted(block_id)

    def _unheld(self) -> list[int]:
        for digest, block_id in self.block_of.items():
            if self.digest_of.get(block_id) != digest:
                raise AssertionError("the prefix cache has a digest and a block that do not point at each other")
        if not self.cached.keys() <= self.digest_of.keys():
            raise AssertionError("the prefix cache keeps a block whose content it does not know")
        return [*self._free, *self.cached]

"""Which full blocks are known by their content, so that a prompt that begins the same need not be computed.

A block is known by a digest of its own tokens and of all that came before: the digest of its parent goes
into its own. Without the parent, two blocks with the same tokens after different beginnings would look the
same, and their K and V are not.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np


def block_digests(tokens: Sequence[int], block_size: int, parent: bytes = b"") -> Iterator[bytes]:
    """The digests of the full blocks of `tokens`, which follow a block with digest `parent` (none: b"")."""
    data = np.array(tokens, dtype=np.int64).tobytes()
    size = 8 * block_size
    for start in range(0, len(data) - size + 1, size):
        parent = blake2b(data[start : start + size], digest_size=16, key=parent).digest()
        yield parent


class PrefixCache:
    """Digest to block. Idle blocks, in no table, are given up least recently used first.

    Knows nothing of tokens and tables: keys are any hashables, blocks are ints.
    """

    def __init__(self) -> None:
        self.block_of: dict[Any, int] = {}
        self._key_of: dict[int, Hashable] = {}
        self.idle: OrderedDict[int, None] = OrderedDict()  # the one to give up first, first

    def match(self, keys: Iterable[Hashable]) -> list[int]:
        """The blocks of the leading keys that are known."""
        blocks = []
        for key in keys:
            block_id = self.block_of.get(key)
            if block_id is None:
                break
            blocks.append(block_id)
        return blocks

    def knows(self, block_id: int) -> bool:
        return block_id in self._key_of

    def insert(self, key: Hashable, block_id: int) -> bool:
        """Know `block_id` by `key`. False, and nothing changes, if the key has a block already."""
        if key in self.block_of:
            return False
        self.block_of[key] = block_id
        self._key_of[block_id] = key
        return True

    def now_idle(self, block_id: int) -> None:
        """No table points to `block_id` any more: the last to be given up."""
        self.idle[block_id] = None

    def now_used(self, block_id: int) -> None:
        """A table points to `block_id` again."""
        self.idle.pop(block_id, None)

    def evict(self) -> int:
        """Forget the idle block that was used longest ago, and return it."""
        block_id, _ = self.idle.popitem(last=False)
        del self.block_of[self._key_of.pop(block_id)]
        return block_id

    def check_integrity(self) -> None:
        """Raise AssertionError unless keys and blocks point at each other, and every idle block is known."""
        if {block_id: key for key, block_id in self.block_of.items()} != self._key_of:
            raise AssertionError("the prefix cache has a key and a block that do not point at each other")
        if not self.idle.keys() <= self._key_of.keys():
            raise AssertionError("the prefix cache keeps a block that it knows nothing of")

"""Which blocks matter to a query: a bound on the scores of each block from two vectors.

For each block the largest and the smallest value of each key channel are kept as tokens are written. In each channel
one of the two gives the larger product with the query; no key of the block can score higher than the sum of these
products. So the blocks that could matter are found without reading a key (Quest, Tang et al. 2024). The two vectors
take the room of one token's K and V for each block: 1/16 of the cache at a block size of 16.
"""

from __future__ import annotations

import math
from numbers import Real

import numpy as np

from ..core.device import Array, to_host, xp

Attend = int | float | str  # "all", a budget in blocks, or a share of them


class Extremes:
    """The largest and the smallest value of each key channel in each block, for one sequence in one layer."""

    def __init__(self, num_kv_heads: int, head_size: int, block_size: int) -> None:
        self._block_size = block_size
        self._num_blocks = 0
        # [num_kv_heads, room, 2 * head_size]: the largest, then the smallest, so that one product bounds the scores
        self._values = xp.empty((num_kv_heads, 0, 2 * head_size), dtype=np.float32)

    @property
    def nbytes(self) -> int:
        return int(self._values.nbytes)

    def write(self, first: int, keys: Array) -> None:
        """Take in `keys [num_tokens, num_kv_heads, head_size]` of the positions from `first` on. Positions come in
        order."""
        num_tokens, num_kv_heads, head_size = keys.shape
        size, begin = self._block_size, first // self._block_size
        num_blocks = -(-(first + num_tokens) // size)
        if num_blocks > (room := self._values.shape[1]):
            more = xp.empty((num_kv_heads, max(num_blocks - room, room // 8), 2 * head_size), dtype=np.float32)
            self._values = xp.concatenate([self._values, more], axis=1)
        offset = first - begin * size
        padded = xp.full(((num_blocks - begin) * size, num_kv_heads, head_size), -np.inf, dtype=np.float32)
        padded[offset : offset + num_tokens] = keys
        highest = padded.reshape(-1, size, num_kv_heads, head_size).max(axis=1)  # [new blocks, num_kv_heads, head_size]
        padded[:offset], padded[offset + num_tokens :] = np.inf, np.inf
        lowest = padded.reshape(-1, size, num_kv_heads, head_size).min(axis=1)
        new = xp.concatenate([highest, lowest], axis=-1).transpose(1, 0, 2)
        if offset:  # the first block had keys before
            old = self._values[:, begin]
            new[:, 0, :head_size] = xp.maximum(new[:, 0, :head_size], old[:, :head_size])
            new[:, 0, head_size:] = xp.minimum(new[:, 0, head_size:], old[:, head_size:])
        self._values[:, begin:num_blocks] = new
        self._num_blocks = num_blocks

    def bounds(self, query: Array) -> Array:
        """The product with the query that no key of a block exceeds: [num_kv_heads, group_size, num_blocks].

        `query [num_kv_heads, group_size, head_size]`, the query heads that share each KV head.
        """
        zero = np.float32(0)
        query = query.astype(np.float32, copy=False)
        halves = xp.concatenate([xp.maximum(query, zero), xp.minimum(query, zero)], axis=-1)
        # Blocks are the rows: BLAS is many times slower at few rows times many columns.
        columns = xp.ascontiguousarray(halves.transpose(0, 2, 1))  # [num_kv_heads, 2 * head_size, group_size]
        bounds: Array = self._values[:, : self._num_blocks] @ columns
        return bounds.transpose(0, 2, 1)


def shares(bounds: Array, scale: float) -> np.ndarray:
    """How much of the attention each block would get if its bounds were its scores: [num_kv_heads, num_blocks].

    The mean over the query heads of a group, which read the same blocks. In a mean of shares, a head with a sharp
    preference counts more than a head without one; in a mean of bounds it does not. Measured, shares find most of the
    attention (`paged-ref long --recall`).
    """
    scores = to_host(bounds) * np.float32(scale)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    mean: np.ndarray = weights.mean(axis=1)
    return mean


def choose(scores: np.ndarray, budget: int) -> np.ndarray:
    """The `budget` best blocks of each row, in order: [num_rows, budget]. `scores [num_rows, num_blocks]`.

    The most recent block is always among them, then the first (attention sinks, Xiao et al. 2023), and from a budget
    of 16 on, the most recent two.
    """
    num_blocks = scores.shape[1]
    budget = min(budget, num_blocks)
    wanted = scores.astype(np.float64)
    wanted[:, num_blocks - max(1, min(2, budget // 8)) :] = np.inf
    if budget > 1:
        wanted[:, 0] = np.inf
    best = np.argpartition(-wanted, budget - 1, axis=1)[:, :budget]
    return np.sort(best, axis=1)


def check_attend(attend: Attend) -> None:
    """Raise ValueError unless it is "all", a number of blocks from 1, or a share above 0 and up to 1."""
    right = attend == "all"
    if isinstance(attend, Real) and not isinstance(attend, bool):
        right = attend >= 1 if isinstance(attend, int) else 0 < attend <= 1
    if not right:
        raise ValueError(
            f"attend is {attend!r}; 'all', a budget of at least 1 block, or a share above 0 and up to 1 is needed"
        )


def budget_of(attend: Attend, num_blocks: int) -> int:
    """The number of blocks that may be attended to, of `num_blocks`."""
    if attend == "all":
        return num_blocks
    assert not isinstance(attend, str)
    return min(attend, num_blocks) if isinstance(attend, int) else max(1, math.ceil(attend * num_blocks))

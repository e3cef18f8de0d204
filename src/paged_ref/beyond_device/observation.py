"""What attention read of a long context, beside what it would have read of everything."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .. import timeline


class HeadPages(NamedTuple):
    """What one KV head of one sequence reads: pages in the order of their blocks, and how many keys in all."""

    blocks: np.ndarray  # logical
    pages: np.ndarray
    num_keys: int


class Observation(NamedTuple):
    """Attention of one layer for the last token of a sequence."""

    seq_id: int
    layer: int
    mass: np.ndarray  # [num_kv_heads, group_size, num_blocks] the true share of each block
    scores: np.ndarray  # [num_kv_heads, num_blocks] the share that its bound promises
    chosen: list[np.ndarray]  # for each KV head: the logical blocks that were read
    resident: list[np.ndarray]  # for each KV head: all logical blocks that were on the device before

    def event(self, query_head: int) -> timeline.events.PagesAttended:
        """The event of one query head. Shares are in millionths."""
        head, group = divmod(query_head, self.mass.shape[1])
        chosen, resident = tuple(self.chosen[head].tolist()), tuple(self.resident[head].tolist())
        mass = tuple(np.round(self.mass[head, group] * 1e6).astype(int).tolist())
        return timeline.events.PagesAttended(self.seq_id, self.layer, query_head, chosen, resident, mass)


def attention_mass(query: np.ndarray, keys: np.ndarray, read: HeadPages, window: int | None) -> np.ndarray:
    """[group_size, num_blocks]: the share of each block in the attention of a sequence's last token.

    `query [group_size, head_size]`, `keys [len(read.pages), block_size, 1, head_size]` of consecutive blocks.
    """
    head_size, num_pages = keys.shape[-1], len(keys)
    by_key = keys.reshape(-1, head_size)  # [num_pages * block_size, head_size]
    scores = query.astype(np.float32) @ by_key.T * np.float32(head_size**-0.5)
    seen = slice(max(0, read.num_keys - (window or read.num_keys)), read.num_keys)
    weights = np.zeros_like(scores)
    weights[:, seen] = np.exp(scores[:, seen] - scores[:, seen].max(axis=1, keepdims=True))
    weights = (weights / weights.sum(axis=1, keepdims=True)).reshape(len(query), num_pages, -1)
    mass = np.zeros((len(query), int(read.blocks[-1]) + 1), dtype=np.float32)
    mass[:, read.blocks] = weights.sum(axis=2)
    return mass

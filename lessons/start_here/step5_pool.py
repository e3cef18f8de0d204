"""Step 5: blocks come from a pool, one more when the last is full; one step serves several sequences.

A sequence holds only the blocks that its tokens need. This is PagedAttention.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from decoder import Decoder

from paged_ref.core.memory.block_pool import BlockPool
from paged_ref.kernels import paged_attention, slot_of, write_kv

NUM_BLOCKS, BLOCK_SIZE = 256, 16


class Cache:
    """K and V: [num_layers, NUM_BLOCKS, BLOCK_SIZE, num_kv_heads, head_size], and the pool of free blocks."""

    def __init__(self, config) -> None:
        self.pool = BlockPool(NUM_BLOCKS)
        shape = (config.num_layers, NUM_BLOCKS, BLOCK_SIZE, config.num_kv_heads, config.head_size)
        self.keys = np.full(shape, np.nan, dtype=np.float32)  # NaN: a stray read will show
        self.values = np.full(shape, np.nan, dtype=np.float32)


@dataclass
class Sequence:
    """Tokens, of which the first `length` are in the cache, and the sequence's table."""

    tokens: list[int]
    length: int = 0
    block_table: list[int] = field(default_factory=list)

    def grow(self, pool: BlockPool) -> None:
        """Take blocks until there is a slot for each token."""
        while len(self.block_table) * BLOCK_SIZE < len(self.tokens):
            self.block_table.append(pool.allocate())


def forward(model: Decoder, seqs: list[Sequence], cache: Cache) -> np.ndarray:
    """Run the new tokens of all sequences, packed in one row; logits [num_seqs, vocab_size] of their last."""
    fresh = [np.arange(seq.length, len(seq.tokens)) for seq in seqs]
    positions = np.concatenate(fresh)
    slot_mapping = np.concatenate(
        [slot_of(np.array(seq.block_table), new, BLOCK_SIZE) for seq, new in zip(seqs, fresh, strict=True)]
    )
    block_tables = np.array([(seq.block_table + [-1] * NUM_BLOCKS)[:NUM_BLOCKS] for seq in seqs])
    seq_lens, query_start_loc = np.array([len(seq.tokens) for seq in seqs]), np.cumsum([0, *map(len, fresh)])
    x = model.embed([token for seq in seqs for token in seq.tokens[seq.length :]])
    for layer in range(model.config.num_layers):
        query, key, value = model.project(layer, x, positions)
        keys, values = cache.keys[layer], cache.values[layer]
        write_kv(key, value, keys, values, slot_mapping)
        mixed = paged_attention(query, keys, values, block_tables, seq_lens, query_start_loc)
        x = model.finish(layer, x, mixed)
    for seq in seqs:
        seq.length = len(seq.tokens)
    return model.logits(x[query_start_loc[1:] - 1])


def generate(model: Decoder, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    """Greedy continuations of all prompts together, token ids in and out."""
    cache = Cache(model.config)
    seqs = [Sequence(list(prompt)) for prompt in prompts]
    for _ in range(max_tokens):
        for seq in seqs:
            seq.grow(cache.pool)
        for seq, logits in zip(seqs, forward(model, seqs, cache), strict=True):
            seq.tokens.append(int(logits.argmax()))
    return [seq.tokens[len(prompt) :] for seq, prompt in zip(seqs, prompts, strict=True)]

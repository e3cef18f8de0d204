"""Step 4: attention reads through the block table. The dense copy and our own attention function go.

Nothing is copied to be read. But the table still has all its blocks from the first token on.
"""

from __future__ import annotations

import numpy as np
from decoder import Decoder

from paged_ref.kernels import paged_attention, slot_of, write_kv

NUM_BLOCKS, BLOCK_SIZE = 256, 16


class Cache:
    """K and V: [num_layers, NUM_BLOCKS, BLOCK_SIZE, num_kv_heads, head_size], and one sequence's table."""

    def __init__(self, config, max_len: int) -> None:
        self.length = 0
        blocks = np.random.default_rng().permutation(NUM_BLOCKS)  # any will do, in any order
        self.block_table = blocks[: -(-max_len // BLOCK_SIZE)]
        shape = (config.num_layers, NUM_BLOCKS, BLOCK_SIZE, config.num_kv_heads, config.head_size)
        self.keys = np.full(shape, np.nan, dtype=np.float32)  # NaN: a stray read will show
        self.values = np.full(shape, np.nan, dtype=np.float32)


def forward(model: Decoder, token_ids: list[int], cache: Cache) -> np.ndarray:
    """Run new tokens of a sequence; logits [vocab_size] of the last."""
    positions = np.arange(cache.length, cache.length + len(token_ids))
    slot_mapping = slot_of(cache.block_table, positions, BLOCK_SIZE)
    seq_lens, query_start_loc = np.array([cache.length + len(token_ids)]), np.array([0, len(token_ids)])
    x = model.embed(token_ids)
    for layer in range(model.config.num_layers):
        query, key, value = model.project(layer, x, positions)
        keys, values = cache.keys[layer], cache.values[layer]
        write_kv(key, value, keys, values, slot_mapping)
        mixed = paged_attention(query, keys, values, cache.block_table[None], seq_lens, query_start_loc)
        x = model.finish(layer, x, mixed)
    cache.length += len(token_ids)
    return model.logits(x[-1:])[0]


def generate(model: Decoder, prompt: list[int], max_tokens: int) -> list[int]:
    """Greedy continuation of one prompt, token ids in and out."""
    cache = Cache(model.config, len(prompt) + max_tokens)
    tokens = list(prompt)
    fresh = tokens
    while len(tokens) < len(prompt) + max_tokens:
        fresh = [int(forward(model, fresh, cache).argmax())]
        tokens += fresh
    return tokens[len(prompt) :]

"""Step 3: a block table. The slots of a sequence no longer lie side by side.

Each token gathers the slots into a dense copy in every layer: the result is right, and slow. Step 4 ends that.
"""

from __future__ import annotations

import numpy as np
from decoder import Decoder

from paged_ref.kernels import slot_of, write_kv

NUM_BLOCKS, BLOCK_SIZE = 256, 16


class Cache:
    """K and V: [num_layers, num_slots, num_kv_heads, head_size]; `block_table` says where the sequence is."""

    def __init__(self, config, max_len: int) -> None:
        self.length = 0
        blocks = np.random.default_rng().permutation(NUM_BLOCKS)  # any will do, in any order
        self.block_table = blocks[: -(-max_len // BLOCK_SIZE)]
        shape = (config.num_layers, NUM_BLOCKS * BLOCK_SIZE, config.num_kv_heads, config.head_size)
        self.keys = np.full(shape, np.nan, dtype=np.float32)  # NaN: a stray read will show
        self.values = np.full(shape, np.nan, dtype=np.float32)

    def update(self, layer: int, key: np.ndarray, value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Add the new tokens' K and V; return those of all tokens."""
        slots = slot_of(self.block_table, np.arange(self.length + len(key)), BLOCK_SIZE)
        write_kv(key, value, self.keys[layer], self.values[layer], slots[self.length :])
        return self.keys[layer, slots], self.values[layer, slots]


def attention(query: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Causal attention of the last tokens of one sequence: [num_tokens, num_heads, head_size]."""
    group_size = query.shape[1] // keys.shape[1]
    keys, values = keys.repeat(group_size, axis=1), values.repeat(group_size, axis=1)
    scores = np.einsum("qhd,khd->hqk", query, keys) / np.sqrt(np.float32(query.shape[2]))
    visible = np.tri(len(query), len(keys), len(keys) - len(query), dtype=bool)
    scores = np.where(visible, scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("hqk,khd->qhd", weights, values)


def forward(model: Decoder, token_ids: list[int], cache: Cache) -> np.ndarray:
    """Run new tokens of a sequence; logits [vocab_size] of the last."""
    positions = np.arange(cache.length, cache.length + len(token_ids))
    x = model.embed(token_ids)
    for layer in range(model.config.num_layers):
        query, key, value = model.project(layer, x, positions)
        keys, values = cache.update(layer, key, value)
        x = model.finish(layer, x, attention(query, keys, values))
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

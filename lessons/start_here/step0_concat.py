"""Step 0: the KV cache grows by concatenation, as in many programs.

Each new token makes new arrays and copies all K and V into these. One sequence runs at a time.
"""

from __future__ import annotations

import numpy as np
from decoder import Decoder


class Cache:
    """K and V of one sequence: for each layer [length, num_kv_heads, head_size]."""

    def __init__(self, config) -> None:
        self.length = 0
        empty = np.zeros((0, config.num_kv_heads, config.head_size), dtype=np.float32)
        self.keys = [empty] * config.num_layers
        self.values = [empty] * config.num_layers

    def update(self, layer: int, key: np.ndarray, value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Add the new tokens' K and V; return those of all tokens."""
        self.keys[layer] = np.concatenate([self.keys[layer], key])
        self.values[layer] = np.concatenate([self.values[layer], value])
        return self.keys[layer], self.values[layer]


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
    cache = Cache(model.config)
    tokens = list(prompt)
    fresh = tokens
    while len(tokens) < len(prompt) + max_tokens:
        fresh = [int(forward(model, fresh, cache).argmax())]
        tokens += fresh
    return tokens[len(prompt) :]

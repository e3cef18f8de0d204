"""Runs a model over whole sequences, step by step, as an engine would: the tests' own small engine."""

from __future__ import annotations

from typing import Any

import numpy as np

from paged_ref.core.attention.attention import Addresses
from paged_ref.core.device import to_host, xp
from paged_ref.core.memory.kv import KVCache
from paged_ref.core.model.llama import Llama, StepInputs


class Stepper:
    """A KV cache for sequences of at most `max_len` tokens; paged with shuffled tables, or one region for each.

    Every slot starts as NaN, so that a read of what was never written shows.
    """

    def __init__(
        self,
        model: Llama,
        num_seqs: int,
        max_len: int,
        *,
        layout: str = "paged",
        block_size: int = 4,
        backend: str = "reference",
        variants: list[Any] | None = None,
    ) -> None:
        config = model.config
        self.model = model
        self.lens = [0] * num_seqs
        self.paged, self.block_size = layout == "paged", block_size
        blocks_each = -(-max_len // block_size)
        num_blocks = num_seqs * blocks_each
        order = np.arange(num_blocks)
        if self.paged:
            np.random.default_rng(1).shuffle(order)
        self.tables = order.reshape(num_seqs, blocks_each).astype(np.int32)
        sizes = (config.num_layers, num_blocks, block_size, config.num_kv_heads, config.head_size)
        self.kv = KVCache(*sizes, model.dtype.name, backend=backend)
        self.kv.variants = variants or self.kv.variants

    def inputs(self, new_tokens: list[list[int]]) -> StepInputs:
        """The step that appends these tokens to each sequence, with logits for each of them."""
        positions, slots = [], []
        for s, tokens in enumerate(new_tokens):
            for position in range(self.lens[s], self.lens[s] + len(tokens)):
                positions.append(position)
                block = int(self.tables[s, position // self.block_size])
                slots.append(block * self.block_size + position % self.block_size)
        ends = np.cumsum([0] + [len(tokens) for tokens in new_tokens])
        where: dict[str, Any] = {"block_tables": xp.asarray(self.tables)}
        if not self.paged:
            where = {"starts": xp.asarray(self.tables[:, 0] * self.block_size)}
        lens = [done + len(tokens) for done, tokens in zip(self.lens, new_tokens, strict=True)]
        return StepInputs(
            token_ids=xp.asarray([token for tokens in new_tokens for token in tokens]),
            positions=xp.asarray(positions),
            logits_rows=xp.arange(len(positions)),
            addresses=Addresses(
                seq_lens=xp.asarray(lens, dtype=np.int32),
                query_start_loc=xp.asarray(ends, dtype=np.int32),
                slot_mapping=xp.asarray(slots),
                **where,
            ),
        )

    def step(self, new_tokens: list[list[int]]) -> list[np.ndarray]:
        """Append tokens to each sequence; give each one's logits, [new tokens, vocab_size]."""
        inputs = self.inputs(new_tokens)
        logits = to_host(self.model.forward(inputs, self.kv))
        self.lens = [done + len(tokens) for done, tokens in zip(self.lens, new_tokens, strict=True)]
        ends = to_host(inputs.addresses.query_start_loc)
        return [logits[ends[s] : ends[s + 1]] for s in range(len(new_tokens))]


def logits_of(model: Llama, sequences: list[list[int]], *, chunk: int | None = None, **how: Any) -> list[np.ndarray]:
    """Logits of every token of every sequence, fed `chunk` tokens at a time (None: all in one step)."""
    longest = max(len(tokens) for tokens in sequences)
    stepper = Stepper(model, len(sequences), longest, **how)
    parts: list[list[np.ndarray]] = [[] for _ in sequences]
    chunk = chunk or longest
    for begin in range(0, longest, chunk):
        for s, logits in enumerate(stepper.step([tokens[begin : begin + chunk] for tokens in sequences])):
            parts[s].append(logits)
    return [np.concatenate(p) for p in parts]

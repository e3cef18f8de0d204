"""Step 6: the same in a Hugging Face model, whose attention is replaced and whose code stays as it is.

This needs the extra `compare` (PyTorch and transformers). vLLM runs the models of transformers in this way, too.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import AttentionInterface, PreTrainedModel

from paged_ref.core.memory.block_pool import BlockPool
from paged_ref.kernels import paged_attention, slot_of, write_kv

NUM_BLOCKS, BLOCK_SIZE = 256, 16


class Cache:
    """K and V: [num_layers, NUM_BLOCKS, BLOCK_SIZE, num_kv_heads, head_size], and the pool of free blocks."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.pool = BlockPool(NUM_BLOCKS)
        config, like = model.config, {"dtype": model.dtype, "device": model.device}
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (config.num_hidden_layers, NUM_BLOCKS, BLOCK_SIZE, config.num_key_value_heads, head_size)
        self.keys = torch.full(shape, torch.nan, **like)  # NaN: a stray read will show
        self.values = torch.full(shape, torch.nan, **like)


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


def attention(module, query, key, value, attention_mask, scaling, *, paged, sliding_window=None, **kwargs):
    """What each layer calls instead of its own attention. [1, heads, num_tokens, head_size] in."""
    cache, slot_mapping, block_tables, seq_lens, query_start_loc = paged
    query, key, value = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    keys, values = cache.keys[module.layer_idx], cache.values[module.layer_idx]
    write_kv(key, value, keys, values, slot_mapping)
    mixed = paged_attention(
        query, keys, values, block_tables, seq_lens, query_start_loc, scale=scaling, sliding_window=sliding_window
    )
    return mixed[None], None


AttentionInterface.register("paged_ref", attention)


def forward(model: PreTrainedModel, seqs: list[Sequence], cache: Cache) -> torch.Tensor:
    """Run the new tokens of all sequences, packed in one row; logits [num_seqs, vocab_size] of their last."""
    fresh = [np.arange(seq.length, len(seq.tokens)) for seq in seqs]
    positions = np.concatenate(fresh)
    slot_mapping = np.concatenate(
        [slot_of(np.array(seq.block_table), new, BLOCK_SIZE) for seq, new in zip(seqs, fresh, strict=True)]
    )
    block_tables = np.array([(seq.block_table + [-1] * NUM_BLOCKS)[:NUM_BLOCKS] for seq in seqs])
    seq_lens, query_start_loc = np.array([len(seq.tokens) for seq in seqs]), np.cumsum([0, *map(len, fresh)])
    token_ids = [token for seq in seqs for token in seq.tokens[seq.length :]]
    step = [
        torch.tensor(array, device=model.device) for array in (slot_mapping, block_tables, seq_lens, query_start_loc)
    ]
    with torch.no_grad():
        logits = model(
            torch.tensor([token_ids], device=model.device),
            position_ids=torch.tensor(positions[None], device=model.device),
            use_cache=False,  # the model keeps no cache of its own
            paged=(cache, *step),  # handed through to `attention`
        ).logits[0]
    for seq in seqs:
        seq.length = len(seq.tokens)
    return logits[query_start_loc[1:] - 1]


def generate(model: PreTrainedModel, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    """Greedy continuations of all prompts together, token ids in and out."""
    model.set_attn_implementation("paged_ref")  # from here on the model needs `paged`; "sdpa" undoes it
    cache = Cache(model)
    seqs = [Sequence(list(prompt)) for prompt in prompts]
    for _ in range(max_tokens):
        for seq in seqs:
            seq.grow(cache.pool)
        for seq, logits in zip(seqs, forward(model, seqs, cache), strict=True):
            seq.tokens.append(int(logits.argmax()))
    return [seq.tokens[len(prompt) :] for seq, prompt in zip(seqs, prompts, strict=True)]

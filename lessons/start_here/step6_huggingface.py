"""Step 6: the same in a Hugging Face model, whose attention and cache are replaced and whose code stays as it is.

This needs the extra `compare` (PyTorch and transformers). vLLM runs the models of transformers in this way, too.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from paged_ref.interop.huggingface import PagedCache, register

NUM_BLOCKS, BLOCK_SIZE = 256, 16


def generate(model: PreTrainedModel, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    """Greedy continuations of all prompts together, token ids in and out."""
    longest = max(map(len, prompts))
    token_ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])  # padded on the left
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])

    register()  # a name for the paged attention: its padded places take no slot
    model.set_attn_implementation("paged_ref")  # "sdpa" undoes it
    cache = PagedCache(NUM_BLOCKS, BLOCK_SIZE)  # a block pool, and a table for each prompt

    tokens = model.generate(
        token_ids, attention_mask=mask, cache=cache, max_new_tokens=max_tokens, do_sample=False, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    return tokens[:, longest:].tolist()

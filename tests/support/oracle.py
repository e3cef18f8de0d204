"""Attention by its definition, in float64: one query, one head, one key after another.

Written from the contract in `paged_attention`'s docstring, not from the package's code, and for sequences whose
K and V lie plainly in order: it knows no blocks. Slow, and meant to be read.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


def attend_one(
    query: Array,  # [head_size]
    query_position: int,
    keys: Array,  # [seq_len, head_size]
    values: Array,  # [seq_len, head_size]
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    slope: float = 0.0,
    sink: float | None = None,
) -> tuple[Array, float]:
    """The output [head_size] and the log of the sum of exponentials, for one query of one head."""
    scores: dict[int, float] = {}
    for key_position in range(len(keys)):
        if key_position > query_position:
            continue  # causal
        if sliding_window is not None and key_position <= query_position - sliding_window:
            continue
        score = scale * float(np.dot(query.astype(np.float64), keys[key_position].astype(np.float64)))
        if softcap is not None:
            score = softcap * math.tanh(score / softcap)
        scores[key_position] = score + slope * (key_position - query_position)

    logits = list(scores.values()) + ([] if sink is None else [sink])
    if not logits:
        return np.zeros(query.shape, np.float64), -math.inf
    highest = max(logits)
    total = math.fsum(math.exp(logit - highest) for logit in logits)
    output = np.zeros(query.shape, np.float64)
    for key_position, score in scores.items():
        output += math.exp(score - highest) / total * values[key_position].astype(np.float64)
    return output, highest + math.log(total)


def attention(
    query: Array,  # [num_tokens, num_heads, head_size]
    keys: list[Array],  # for each sequence [seq_len, num_kv_heads, head_size]
    values: list[Array],
    query_lens: list[int],
    *,
    scale: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: Array | None = None,
    sinks: Array | None = None,
) -> tuple[Array, Array]:
    """Output [num_tokens, num_heads, head_size] and lse [num_tokens, num_heads], float64."""
    _, num_heads, head_size = query.shape
    output = np.zeros(query.shape, np.float64)
    lse = np.zeros(query.shape[:2], np.float64)
    token = 0
    for s, query_len in enumerate(query_lens):
        seq_len, num_kv_heads = keys[s].shape[0], keys[s].shape[1]
        for i in range(query_len):
            for head in range(num_heads):
                kv_head = head // (num_heads // num_kv_heads)
                output[token, head], lse[token, head] = attend_one(
                    query[token, head],
                    i + seq_len - query_len,
                    keys[s][:, kv_head],
                    values[s][:, kv_head],
                    scale=1 / math.sqrt(head_size) if scale is None else scale,
                    sliding_window=sliding_window,
                    softcap=softcap,
                    slope=0.0 if alibi_slopes is None else float(alibi_slopes[head]),
                    sink=None if sinks is None else float(sinks[head]),
                )
            token += 1
    return output, lse

"""Backend `cpu`: the loop of the teaching kernels for one CPU thread, compiled by Numba.

Compare it with naive.py: the tiles, the barriers and the threads are gone, the online softmax is the same. Paged and
contiguous calls differ in the slots that they hand to the loop.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

from .addressing import slot_of
from .attention import AttentionCall, by_slot


def unavailable() -> str | None:
    """Why this backend cannot run on this machine; None where it can."""
    return None


def unsupported(call: AttentionCall) -> str | None:
    """Why this backend cannot run this call; None where it can."""
    if call.variant is not None:
        return f"it has no {call.variant}"
    for name, array in (("query", call.query), ("keys", call.keys), ("values", call.values)):
        if not isinstance(array, np.ndarray) or array.dtype != np.float32:
            return f"{name} is {array.dtype} or not in host memory; this backend computes in float32 there"
    return None


def attend(call: AttentionCall) -> None:
    """Fill `call.out` and `call.lse`."""
    addresses, seq_lens = call.addresses, call.addresses.seq_lens
    slots = np.zeros((len(seq_lens), seq_lens.max(initial=0)), np.int64)  # [num_seqs, longest] where each key lies
    for s, seq_len in enumerate(seq_lens):
        if addresses.block_tables is not None:
            table = addresses.block_tables[s].astype(np.int64)  # a slot may be beyond what int32 holds
            slots[s, :seq_len] = slot_of(table, np.arange(seq_len), call.keys.shape[1])
        elif addresses.starts is not None:
            slots[s, :seq_len] = addresses.starts[s] + np.arange(seq_len)
    lse = np.empty(call.out.shape[:2], np.float32) if call.lse is None else call.lse
    arrays = (call.out, lse, call.query, by_slot(call.keys), by_slot(call.values), slots)
    ends = (seq_lens, addresses.query_start_loc)
    attention_loop(*arrays, *ends, np.float32(call.scale), call.window or slots.shape[1] + 1)


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def attention_loop(
    out: Any, lse: Any, query: Any, keys: Any, values: Any, slots: Any, seq_lens: Any, query_start_loc: Any,
    scale: Any, window: int,
) -> None:  # fmt: skip
    """The arguments of naive.attention_kernel, with `slots` in place of `starts`, and how many keys a query sees."""
    group_size = query.shape[1] // keys.shape[1]  # GQA: a group of query heads shares one KV head
    acc = np.empty(query.shape[2], np.float32)  # the weighted sum of the values so far
    for seq in range(len(seq_lens)):
        for token in range(query_start_loc[seq], query_start_loc[seq + 1]):
            position = seq_lens[seq] - query_start_loc[seq + 1] + token  # of the query in its sequence
            for head in range(query.shape[1]):
                kv_head = head // group_size
                highest, total = np.float32(-math.inf), np.float32(0)
                acc[:] = 0
                for key in range(max(0, position - window + 1), position + 1):
                    slot = slots[seq, key]
                    score = np.float32(0)
                    for d in range(len(acc)):
                        score += query[token, head, d] * keys[slot, kv_head, d]
                    score *= scale
                    new_highest = max(highest, score)
                    shrink = np.float32(math.exp(highest - new_highest))  # what came before, relative to new_highest
                    weight = np.float32(math.exp(score - new_highest))
                    total = total * shrink + weight
                    for d in range(len(acc)):
                        acc[d] = acc[d] * shrink + weight * values[slot, kv_head, d]
                    highest = new_highest
                for d in range(len(acc)):
                    out[token, head, d] = acc[d] / total if total != 0 else np.float32(0)  # NaN shows
                lse[token, head] = highest + math.log(total) if total != 0 else np.float32(-math.inf)

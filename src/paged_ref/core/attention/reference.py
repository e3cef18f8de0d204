"""Backend `reference`: attention as plain array code, the oracle that every other backend is held against.

Written to be checked by eye, not to be fast. Computes in float64 where the query is float64, else in float32.
Runs on NumPy and on CuPy.
"""

from __future__ import annotations

import numpy as np

from ..device import module_of
from .addressing import slot_of
from .attention import AttentionCall, by_slot


def unavailable() -> str | None:
    """Why this backend cannot run on this machine; None where it can."""
    return None


def unsupported(call: AttentionCall) -> str | None:
    """Why this backend cannot run this call; None where it can."""
    return None if call.variant is None else f"it has no {call.variant}"


def attend(call: AttentionCall) -> None:
    """Fill `call.out` and `call.lse`, one sequence after another."""
    xp, addresses = module_of(call.query), call.addresses
    dtype = np.float64 if call.query.dtype == np.float64 else np.float32
    keys, values = by_slot(call.keys), by_slot(call.values)  # [num_slots, num_kv_heads, head_size] each
    group_size = call.query.shape[1] // keys.shape[1]  # query heads that share a KV head
    ends = addresses.query_start_loc.tolist()

    for s, seq_len in enumerate(addresses.seq_lens.tolist()):
        rows = slice(ends[s], ends[s + 1])
        query_len = rows.stop - rows.start
        if query_len == 0:
            continue
        key_position = xp.arange(seq_len)  # [seq_len]
        query_position = xp.arange(seq_len - query_len, seq_len)  # [query_len], aligned at the end

        # Only the slots of this sequence's own tokens are read: what lies in the others may be NaN, and a mask
        # does not remove it (0 * NaN is NaN).
        if addresses.block_tables is not None:
            table = addresses.block_tables[s].astype(np.int64)  # a slot may be beyond what int32 holds
            slots = slot_of(table, key_position, call.keys.shape[1])  # [seq_len]
        elif addresses.starts is not None:
            slots = addresses.starts[s] + key_position  # [seq_len]
        q = call.query[rows].astype(dtype, copy=False)  # [query_len, num_heads, head_size]
        k = xp.repeat(keys[slots].astype(dtype, copy=False), group_size, axis=1)  # [seq_len, num_heads, head_size]
        v = xp.repeat(values[slots].astype(dtype, copy=False), group_size, axis=1)  # [seq_len, num_heads, head_size]

        scores = xp.matmul(q.transpose(1, 0, 2), k.transpose(1, 2, 0)) * dtype(call.scale)
        distance = query_position[:, None] - key_position  # [query_len, seq_len]; 0 and more: a key of the past
        visible = distance >= 0
        if call.window is not None:
            visible &= distance < call.window
        scores = xp.where(visible, scores, -np.inf)  # [num_heads, query_len, seq_len]

        highest = scores.max(axis=-1) if seq_len else xp.full(scores.shape[:2], -np.inf)  # [num_heads, query_len]
        highest = xp.where(xp.isfinite(highest), highest, dtype(0))  # no visible key: -inf - -inf would be NaN
        weights = xp.exp(scores - highest[..., None])  # [num_heads, query_len, seq_len]
        total = weights.sum(axis=-1)  # [num_heads, query_len]; 0 where no key is visible
        mixed = xp.matmul(weights, v.transpose(1, 0, 2))  # [num_heads, query_len, head_size]
        mixed = mixed / xp.where(total > 0, total, dtype(1))[..., None]
        call.out[rows] = mixed.transpose(1, 0, 2)
        if call.lse is not None:
            with np.errstate(divide="ignore"):  # log(0) = -inf is the answer where no key is visible
                call.lse[rows] = (xp.log(total) + highest).T

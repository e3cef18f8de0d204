"""Attention as plain array code: the oracle that every other backend is held against.

Written to be checked by eye, not to be fast. Computes in float64 where the query is float64, else in
float32. Runs on NumPy and on CuPy.
"""

from __future__ import annotations

import numpy as np

from ...extras.formats import decode, encode
from ...interop.arguments import AttentionCall
from ..device import module_of, to_host
from .addressing import slot_of


def unavailable() -> str | None:
    """Why this backend cannot run on this machine; None where it can."""
    return None


def unsupported(call: AttentionCall) -> str | None:
    """Why this backend cannot run this call; None where it can."""
    return None


def attention(call: AttentionCall) -> None:
    """Fill `call.out` and `call.lse`, one sequence after another."""
    xp = module_of(call.query)
    dtype = np.float64 if call.query.dtype == np.float64 else np.float32
    group_size = call.num_heads // call.num_kv_heads
    query_start_loc, seq_lens = to_host(call.query_start_loc), to_host(call.seq_lens)

    for s in range(call.num_seqs):
        rows = slice(int(query_start_loc[s]), int(query_start_loc[s + 1]))
        query_len, seq_len = rows.stop - rows.start, int(seq_lens[s])
        if query_len == 0:
            continue
        key_position = xp.arange(seq_len)  # [seq_len]
        query_position = xp.arange(query_len) + (seq_len - query_len)  # [query_len], aligned at the end

        # Only the slots of this sequence's own tokens are read: whatever lies in the others may be NaN,
        # and a mask does not remove it (0 * NaN is NaN).
        if call.block_tables is not None:
            slots = slot_of(call.block_tables[s], key_position, call.block_size)
            keys = call.keys[slots // call.block_size, slots % call.block_size]
            values = call.values[slots // call.block_size, slots % call.block_size]
        else:
            assert call.starts is not None
            slots = call.starts[s] + key_position
            keys, values = call.keys[slots], call.values[slots]  # [seq_len, num_kv_heads, head_size]
        keys, values = decode(keys, call.key_scales, dtype), decode(values, call.value_scales, dtype)
        q = decode(call.query[rows], dtype=dtype)  # [query_len, num_heads, head_size]
        k = xp.repeat(keys, group_size, axis=1)  # [seq_len, num_heads, head_size]
        v = xp.repeat(values, group_size, axis=1)  # [seq_len, num_heads, head_size]

        scores = xp.matmul(q.transpose(1, 0, 2), k.transpose(1, 2, 0)) * dtype(call.scale)
        # [num_heads, query_len, seq_len], here and to the softmax
        if call.softcap is not None:
            scores = dtype(call.softcap) * xp.tanh(scores / dtype(call.softcap))
        distance = key_position[None, :] - query_position[:, None]  # [query_len, seq_len], <= 0 where visible
        if call.alibi_slopes is not None:
            scores = scores + call.alibi_slopes.astype(dtype)[:, None, None] * distance.astype(dtype)
        visible = distance <= 0
        if call.sliding_window is not None:
            visible &= distance > -call.sliding_window
        scores = xp.where(visible, scores, -np.inf)

        nothing = xp.full(scores.shape[:2], -np.inf, dtype)  # CuPy's max has no `initial`
        highest = scores.max(axis=-1) if seq_len else nothing  # [num_heads, query_len]
        if call.sinks is not None:
            highest = xp.maximum(highest, call.sinks.astype(dtype)[:, None])
        shift = xp.where(xp.isfinite(highest), highest, dtype(0))  # no visible key: -inf - -inf would be NaN
        weights = xp.exp(scores - shift[..., None])
        total = weights.sum(axis=-1)  # [num_heads, query_len]
        if call.sinks is not None:
            total = total + xp.exp(call.sinks.astype(dtype)[:, None] - shift)
        out = xp.matmul(weights, v.transpose(1, 0, 2))  # [num_heads, query_len, head_size]
        out = out / xp.where(total > 0, total, dtype(1))[..., None]
        call.out[rows] = encode(out.transpose(1, 0, 2), call.out.dtype)
        if call.lse is not None:
            with np.errstate(divide="ignore"):  # log(0) = -inf is the answer where no key is visible
                call.lse[rows] = (xp.log(total) + shift).T

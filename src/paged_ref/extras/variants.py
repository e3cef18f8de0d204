"""Attention beyond the plain one: softcap, ALiBi, sinks, and caches whose numbers have scales.

`Variant` is what a call says of it, as one value. The backend `reference` is replaced by the one in this file, which
knows every variant and every format: the oracle for all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..core.attention import reference
from ..core.attention.attention import AttentionCall, register
from ..core.attention.cuda import slots_follow
from ..core.device import Array, module_of
from .formats import decode, encode


@dataclass(frozen=True, slots=True)
class Variant:
    """What a call of attention adds to the plain one. Its text names what is there."""

    softcap: float | None = None  # c: scores become c * tanh(score / c), before ALiBi and the mask
    alibi_slopes: Array | None = None  # [num_heads] float32: slope * (key_position - query_position) is added
    sinks: Array | None = None  # [num_heads] float32: one more logit for each head, without a value
    key_scales: Array | None = None  # [num_kv_heads] float32, of int8 and float8 caches: value = stored * scale
    value_scales: Array | None = None  # [num_kv_heads] float32

    def __str__(self) -> str:
        return ", ".join(name for name in self.__slots__ if getattr(self, name) is not None)


PLAIN = Variant()
register("reference", "plain array code, NumPy or CuPy: the oracle, for every variant and format", __name__, rank=40)


def unavailable() -> str | None:
    """Why this backend cannot run on this machine; None where it can."""
    return None


def unsupported(call: AttentionCall) -> str | None:
    """Why this backend cannot run this call; None where it can."""
    return None


def attend(call: AttentionCall) -> None:
    """Fill `call.out` and `call.lse`."""
    floats = call.query.dtype.kind == call.keys.dtype.kind == call.values.dtype.kind == "f"
    whole = call.keys.flags.c_contiguous and call.values.flags.c_contiguous
    if call.variant is None and floats and (whole or (slots_follow(call.keys) and slots_follow(call.values))):
        reference.attend(call)
        return
    ends = call.addresses.query_start_loc.tolist()
    for s, seq_len in enumerate(call.addresses.seq_lens.tolist()):
        if ends[s] < ends[s + 1]:
            _attend_sequence(call, s, slice(ends[s], ends[s + 1]), seq_len)


def _attend_sequence(call: AttentionCall, s: int, rows: slice, seq_len: int) -> None:
    """Attention of sequence `s`, whose queries are `rows`, in the order of core/attention/reference.py."""
    xp, variant = module_of(call.query), call.variant or PLAIN
    dtype = np.float64 if call.query.dtype == np.float64 else np.float32
    query_len = rows.stop - rows.start
    key_position = xp.arange(seq_len)  # [seq_len]
    query_position = xp.arange(seq_len - query_len, seq_len)  # [query_len], aligned at the end
    group_size = call.query.shape[1] // call.keys.shape[-2]
    q = decode(call.query[rows], dtype=dtype)  # [query_len, num_heads, head_size]
    k, v = (
        xp.repeat(decode(_keys_of(call, cache, s, key_position), scales, dtype), group_size, axis=1)
        for cache, scales in ((call.keys, variant.key_scales), (call.values, variant.value_scales))
    )  # [seq_len, num_heads, head_size] each

    scores = xp.matmul(q.transpose(1, 0, 2), k.transpose(1, 2, 0)) * dtype(call.scale)
    if variant.softcap is not None:
        scores = dtype(variant.softcap) * xp.tanh(scores / dtype(variant.softcap))
    distance = query_position[:, None] - key_position  # [query_len, seq_len]; 0 and more: a key of the past
    if variant.alibi_slopes is not None:
        scores = scores - variant.alibi_slopes.astype(dtype)[:, None, None] * distance.astype(dtype)
    visible = (distance >= 0) & (distance < (call.window or seq_len + 1))
    scores = xp.where(visible, scores, -np.inf)  # [num_heads, query_len, seq_len]

    sinks = (
        xp.full(len(scores), -np.inf, dtype) if variant.sinks is None else variant.sinks.astype(dtype)
    )  # [num_heads]
    highest = xp.broadcast_to(sinks[:, None], scores.shape[:2])  # [num_heads, query_len]
    if seq_len:
        highest = xp.maximum(highest, scores.max(axis=-1))
    highest = xp.where(xp.isfinite(highest), highest, dtype(0))  # no visible key: -inf - -inf would be NaN
    weights = xp.exp(scores - highest[..., None])  # [num_heads, query_len, seq_len]
    total = weights.sum(axis=-1) + xp.exp(sinks[:, None] - highest)  # [num_heads, query_len]
    mixed = xp.matmul(weights, v.transpose(1, 0, 2))  # [num_heads, query_len, head_size]
    mixed = mixed / xp.where(total > 0, total, dtype(1))[..., None]
    call.out[rows] = encode(mixed.transpose(1, 0, 2), call.out.dtype)
    if call.lse is not None:
        with np.errstate(divide="ignore"):  # log(0) = -inf is the answer where no key is visible
            call.lse[rows] = (xp.log(total) + highest).T


def _keys_of(call: AttentionCall, cache: Array, s: int, position: Array) -> Array:
    """The rows of `cache` at these positions of sequence `s`: [len(position), num_kv_heads, head_size].

    By block and offset, since the blocks of a cache from elsewhere need not follow one another in memory.
    """
    tables = call.addresses.block_tables
    if tables is None:
        return cache[call.addresses.starts[s] + position]  # type: ignore[index]
    return cache[tables[s][position // cache.shape[1]], position % cache.shape[1]]

# mypy: ignore-errors
"""A plain paged decode kernel in Triton, for comparison: split over the keys, online softmax, one combine.

Written as in the tutorials of Triton: a tile of keys by tl.dot, whose rows are the query heads of a group.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

NUM_SPLITS_AT_MOST = 64


@triton.jit
def split_kernel(
    part_out, part_lse, query, keys, values, tables, seq_lens, scale,
    table_stride, num_splits,
    num_kv_heads: tl.constexpr, group: tl.constexpr, head_size: tl.constexpr, block_size: tl.constexpr,
    rows: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """Fill part_out [batch, num_heads, num_splits, head_size] and part_lse, for one sequence, KV head and split."""
    seq, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(seq_lens + seq)
    part = tl.cdiv(tl.cdiv(length, num_splits), tile) * tile
    begin, end = split * part, tl.minimum(split * part + part, length)
    row, dim = tl.arange(0, rows), tl.arange(0, head_size)
    head = kv_head * group + row
    mine = (row < group)[:, None]
    q_at = (seq * num_kv_heads * group + head)[:, None] * head_size + dim[None, :]
    q = tl.load(query + q_at, mask=mine, other=0.0)
    highest = tl.full((rows,), -1e30, tl.float32)
    total = tl.zeros((rows,), tl.float32)
    acc = tl.zeros((rows, head_size), tl.float32)
    for first in range(begin, end, tile):
        position = first + tl.arange(0, tile)
        seen = position < end
        block = tl.load(tables + seq * table_stride + position // block_size, mask=seen, other=0).to(tl.int64)
        slot = block * block_size + position % block_size
        at = (slot * num_kv_heads + kv_head)[:, None] * head_size + dim[None, :]
        k = tl.load(keys + at, mask=seen[:, None], other=0.0)
        v = tl.load(values + at, mask=seen[:, None], other=0.0)
        scores = tl.where(seen[None, :], tl.dot(q, tl.trans(k)) * scale, -1e30)
        new = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp(scores - new[:, None])
        shrink = tl.exp(highest - new)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v)
        highest = new
    part_at = (seq * num_kv_heads * group + head) * num_splits + split
    some = total > 0
    acc = acc / tl.where(some, total, 1.0)[:, None]
    tl.store(part_out + part_at[:, None] * head_size + dim[None, :], acc, mask=mine)
    tl.store(part_lse + part_at, tl.where(some, highest + tl.log(tl.where(some, total, 1.0)), -1e30), mask=row < group)


@triton.jit
def combine_kernel(out, part_out, part_lse, num_splits, head_size: tl.constexpr, most: tl.constexpr):
    """Fill out [batch, num_heads, head_size] from the parts, for one head of one sequence."""
    pair = tl.program_id(0)
    split, dim = tl.arange(0, most), tl.arange(0, head_size)
    there = split < num_splits
    lse = tl.load(part_lse + pair * num_splits + split, mask=there, other=-1e30)
    weights = tl.exp(lse - tl.max(lse, 0))
    weights = weights / tl.sum(weights, 0)
    at = (pair * num_splits + split)[:, None] * head_size + dim[None, :]
    parts = tl.load(part_out + at, mask=there[:, None], other=0.0)
    tl.store(out + pair * head_size + dim, tl.sum(parts * weights[:, None], 0))


def paged_decode(query: Any, keys: Any, values: Any, tables: Any, seq_lens: Any, num_splits: int) -> Any:
    """Attention of `query [batch, num_heads, head_size]` over blocks, as paged_attention has them."""
    batch, num_heads, head_size = query.shape
    block_size, num_kv_heads = keys.shape[1:3]
    group = num_heads // num_kv_heads
    part_out = torch.empty((batch, num_heads, num_splits, head_size), dtype=torch.float32, device=query.device)
    part_lse = torch.empty((batch, num_heads, num_splits), dtype=torch.float32, device=query.device)
    split_kernel[(batch, num_kv_heads, num_splits)](
        part_out, part_lse, query, keys, values, tables, seq_lens, head_size**-0.5, tables.stride(0), num_splits,
        num_kv_heads, group, head_size, block_size, max(16, triton.next_power_of_2(group)), 64,
        num_warps=4, num_stages=3,
    )  # fmt: skip
    out = torch.empty_like(query)
    most = triton.next_power_of_2(num_splits)
    combine_kernel[(batch * num_heads,)](out, part_out, part_lse, num_splits, head_size, most)
    return out

"""Peers, which attend to the same amounts of K and V: torch, FlexAttention over its pages, a plain Triton kernel.

Each peer reads the pool's memory in the order that suits it best: the numbers are random, so "heads first" and "tokens
first" are two readings of the same bytes. Each peer is checked on one sequence before it is timed.

`query`, `keys`, `values` and `tables` are those of a Batch.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

from ..core.device import Array
from .batch import Call
from .shapes import Shape

SDPA, FLEX, TRITON = "torch SDPA", "FlexAttention", "Triton"
FLEX_PAGE = 128  # FlexAttention's own block of keys: a page cannot be smaller


def tensor(array: Array, shape: Shape) -> Any:
    """A torch tensor on the same memory."""
    import torch

    result = torch.from_dlpack(array)
    return result.view(torch.bfloat16) if shape.dtype == "bfloat16" and result.dtype == torch.uint16 else result


def peers(
    shape: Shape, query: Array, keys: Array, values: Array, tables: Array
) -> tuple[dict[str, list[Call]], list[str]]:
    """The calls of each peer that is installed and takes this shape, by name and way, one call for each set; and
    a sentence for each peer that fails: the benchmark goes on without it."""
    if importlib.util.find_spec("torch") is None:
        return {}, []
    wanted: dict[str, Callable[[], dict[str, list[Call]]]] = {}
    if not shape.ragged:
        wanted[SDPA] = lambda: sdpa(shape, query, keys, values)
        if shape.block_size == FLEX_PAGE and shape.keys % FLEX_PAGE == 0:
            wanted[FLEX] = lambda: flex(shape, query, keys, values)
    if importlib.util.find_spec("triton") is not None:
        wanted[TRITON] = lambda: triton_paged(shape, query, keys, values, tables)
    found: dict[str, list[Call]] = {}
    failures = []
    for name, make in wanted.items():
        try:
            found |= make()
        except Exception as error:
            failures.append(f"{name} fails on {shape}: {type(error).__name__}: {str(error).splitlines()[0]}")
    return found, failures


def plain(query: Any, key: Any, value: Any) -> Any:
    """Attention in float32 of `query [num_heads, head_size]` over `key, value [num_kv_heads, length, head_size]`."""
    import torch

    group = query.shape[0] // key.shape[0]
    key, value = (t.float().repeat_interleave(group, 0) for t in (key, value))
    scores = torch.einsum("hd,hkd->hk", query.float(), key) / query.shape[-1] ** 0.5
    return torch.einsum("hk,hkd->hd", scores.softmax(-1), value)


def check(name: str, shape: Shape, got: Any, want: Any) -> None:
    """Raise RuntimeError if the two differ by more than rounding."""
    difference = float((got.float() - want).abs().max())
    if not difference < 2 * shape.tolerance:
        raise RuntimeError(f"{name} is off by {difference} on {shape}")


def sdpa(shape: Shape, query: Array, keys: Array, values: Array) -> dict[str, list[Call]]:
    """torch's own function on contiguous K and V: in each layout, and with each way to say what a group of heads is."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    num_heads, num_kv_heads, head_size = shape.heads
    heads_first = (len(keys), shape.batch, num_kv_heads, -1, head_size)
    tokens_first = (len(keys), shape.batch, -1, num_kv_heads, head_size)
    layouts = {  # [sets, batch, num_kv_heads, keys, head_size], two readings of the same bytes
        "heads first": [tensor(cache, shape).reshape(heads_first) for cache in (keys, values)],
        "tokens first": [tensor(cache, shape).reshape(tokens_first).transpose(2, 3) for cache in (keys, values)],
    }
    tokens = tensor(query, shape)
    q = tokens.reshape(shape.batch, shape.query_len, num_heads, head_size).transpose(1, 2).contiguous()
    mask = None
    if shape.query_len > 1:  # is_causal aligns at the start; a chunk at the end needs the mask in full
        mask = torch.ones(shape.query_len, shape.keys, dtype=torch.bool, device=q.device)
        mask = mask.tril(shape.keys - shape.query_len)
    grouped_mask = None if mask is None else mask.repeat(num_heads // num_kv_heads, 1)

    def shared(k: Any, v: Any) -> Any:
        with torch.inference_mode():
            out = scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=num_heads > num_kv_heads)
            return out.transpose(1, 2).reshape(tokens.shape)

    def grouped(k: Any, v: Any) -> Any:  # the heads of a group as queries of one head: no K is read twice
        with torch.inference_mode():
            rows = q.reshape(shape.batch, num_kv_heads, -1, head_size)
            out = scaled_dot_product_attention(rows, k, v, attn_mask=grouped_mask)
            return out.reshape(q.shape).transpose(1, 2).reshape(tokens.shape)

    ways = {"enable_gqa": shared} | ({"grouped": grouped} if num_heads > num_kv_heads else {})
    last = shape.query_len - 1  # of the first sequence: this query sees all keys
    calls: dict[str, list[Call]] = {}
    for layout, caches in layouts.items():
        ks, vs = (cache[:, :, :, : shape.keys] for cache in caches)
        for name, way in ways.items():
            check(name, shape, way(ks[0], vs[0])[last], plain(tokens[last], ks[0, 0], vs[0, 0]))
            calls[f"{SDPA}, {name}, {layout}"] = [partial(way, k, v) for k, v in zip(ks, vs, strict=True)]
    return calls


def flex(shape: Shape, query: Array, keys: Array, values: Array) -> dict[str, list[Call]]:
    """FlexAttention over its own paged cache, with pages in a shuffled order."""
    import torch
    from torch.nn.attention.experimental._paged_attention import PagedAttention
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention, noop_mask

    num_heads, num_kv_heads, head_size = shape.heads
    q = tensor(query, shape)
    slots = keys.shape[1]
    ks, vs = (tensor(cache, shape).reshape(len(keys), 1, num_kv_heads, slots, head_size) for cache in (keys, values))
    pages = PagedAttention(slots // FLEX_PAGE, FLEX_PAGE, shape.batch, device=str(q.device))
    order = torch.randperm(slots // FLEX_PAGE, device=q.device)
    per_seq = shape.keys // FLEX_PAGE
    table = order.reshape(shape.batch, per_seq)
    # What `reserve` does for one sequence after another, with a wait for each; here for all in one call.
    pages.page_table[:, :per_seq] = table
    places = torch.arange(per_seq, device=q.device).expand(shape.batch, -1)
    pages.physical_to_logical.scatter_(1, table, places)
    mask = create_block_mask(
        noop_mask, shape.batch, None, 1, shape.keys, device=str(q.device), BLOCK_SIZE=(FLEX_PAGE, FLEX_PAGE)
    )
    mask = pages.convert_logical_block_mask(mask)
    score_mod = pages.get_score_mod(None)
    function = flex_attention
    if q.is_cuda:
        torch._dynamo.reset()  # after eight shapes torch would stop compiling and run a slow fallback
        function = torch.compile(flex_attention)

    def call(k: Any, v: Any) -> Any:
        with torch.inference_mode():
            return function(
                q[:, :, None], k, v, score_mod=score_mod, block_mask=mask, enable_gqa=num_heads > num_kv_heads
            )[:, :, 0]

    gathered = (
        c[0, 0].reshape(num_kv_heads, -1, FLEX_PAGE, head_size)[:, table[0]].reshape(num_kv_heads, -1, head_size)
        for c in (ks, vs)
    )
    check(FLEX, shape, call(ks[0], vs[0])[0], plain(q[0], *gathered))
    return {FLEX: [partial(call, k, v) for k, v in zip(ks, vs, strict=True)]}


def triton_paged(shape: Shape, query: Array, keys: Array, values: Array, tables: Array) -> dict[str, list[Call]]:
    """A plain split-KV kernel in Triton, over our own layout."""
    import torch

    from .triton_attention import NUM_SPLITS_AT_MOST, paged_decode

    _, num_kv_heads, head_size = shape.heads
    q = tensor(query, shape)
    blocks = (len(keys), -1, shape.block_size, num_kv_heads, head_size)
    ks, vs = (tensor(cache, shape).reshape(blocks) for cache in (keys, values))
    tensors = torch.from_dlpack(tables)
    lens = torch.from_numpy(shape.seq_lens()).to(q.device)
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 4
    wanted = -(-4 * processors // (shape.batch * num_kv_heads))
    splits = max(1, min(NUM_SPLITS_AT_MOST, wanted, shape.keys // 256))

    def call(k: Any, v: Any, table: Any) -> Any:
        with torch.inference_mode():
            return paged_decode(q, k, v, table, lens, splits)

    rows = tensors[0, 0].long()
    k, v = (c[0][rows].reshape(-1, num_kv_heads, head_size)[: int(lens[0])].transpose(0, 1) for c in (ks, vs))
    check(TRITON, shape, call(ks[0], vs[0], tensors[0])[0], plain(q[0], k, v))
    return {TRITON: [partial(call, k, v, t) for k, v, t in zip(ks, vs, tensors, strict=True)]}

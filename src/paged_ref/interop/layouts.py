"""The K/V cache layouts of vLLM, FlashInfer, flash-attn and SGLang, from ours and back.

Ours is `keys` and `values`, each `[num_blocks, block_size, num_kv_heads, head_size]`, which is also what flash-attn and
FlashInfer (NHD) read. Most others are one expression away, with `xp` NumPy or CuPy::

    flash-attn          k_cache, v_cache [num_blocks, page_block_size, nheads_k, headdim]: ours; version 2 wants
                        page_block_size to be a multiple of 256
    flash-attn, batch   [batch, seqlen_cache, nheads_k, headdim]: for `naive_attention`, .reshape(-1, nheads_k, headdim)
                        with starts = xp.arange(batch) * seqlen_cache
    FlashInfer NHD      the pair: ours; or [num_pages, 2, page_size, ...]: xp.stack([keys, values], axis=1)
    FlashInfer HND      num_kv_heads before page_size: .swapaxes(-3, -2) of NHD, there and back
    vLLM, stacked       [2, num_blocks, ...] or [num_blocks, 2, ...]: xp.stack([keys, values], axis=0 or 1); back,
                        without a copy, kv[0], kv[1] or kv[:, 0], kv[:, 1]
    vLLM, packed        K [num_blocks, num_kv_heads, head_size/x, block_size, x], x = 16 bytes of elements
                        V [num_blocks, num_kv_heads, head_size, block_size]: `to_vllm_packed`; back, V without a copy,
                        K.transpose(0, 3, 1, 2, 4).reshape(ours), V.transpose(0, 3, 1, 2)
    SGLang              [num_slots, num_kv_heads, head_size]: .reshape(-1, *shape[2:]); back, with pages of page_size,
                        .reshape(-1, page_size, *shape[1:]). It never gives out page 0: leave block 0 unused

vLLM and flash-attn take `block_tables [num_seqs, max_blocks]` as they are, in int32. The others, with
`pages = -(-seq_lens // block_size)`::

    FlashInfer          used = xp.arange(max_blocks) < pages[:, None]
                        kv_indptr = xp.append(0, xp.cumsum(pages)), kv_indices = block_tables[used]
                        kv_last_page_len = seq_lens - (pages - 1) * block_size, of sequences that have tokens
                        back: pages = xp.diff(kv_indptr), tables = xp.full((num_seqs, max_blocks), -1), and
                        tables[used] = kv_indices; seq_lens = (pages - 1) * page_size + kv_last_page_len
    SGLang              req_to_token = (block_tables[..., None] * block_size + xp.arange(block_size)).reshape(num_seqs,
                        -1), the slot of each token; back: req_to_token[:, ::page_size] // page_size

Sources: vLLM `csrc/cache_kernels.cu` (reshape_and_cache) and the backends' `get_kv_cache_shape`; FlashInfer's
documentation, "KV-Cache Layout in FlashInfer"; flash-attn `flash_attn_with_kvcache`; SGLang
`srt/mem_cache/memory_pool.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..core.checks import require_one_of
from ..core.device import Array, module_of
from .array_checks import require_shape

PACK_BYTES = 16  # what one thread of the first kernel of vLLM loaded with one instruction


def to_vllm_packed(key_cache: Array, value_cache: Array, x: int | None = None) -> tuple[Array, Array]:
    """vLLM's original layout, of Kwon et al. 2023: copies.

    K [num_blocks, num_kv_heads, head_size/x, block_size, x]: the same x elements of all tokens of a block are
    neighbours, so threads that each load x elements of neighbouring tokens load one piece of memory.
    V [num_blocks, num_kv_heads, head_size, block_size]: a dimension's values of all tokens are neighbours.

    `x` defaults to 16 bytes of elements (8 for float16). head_size must be a multiple of it.
    """
    require_shape(key_cache.ndim == 4, "key_cache", key_cache, "[num_blocks, block_size, num_kv_heads, head_size]")
    if key_cache.shape != value_cache.shape or key_cache.dtype != value_cache.dtype:
        raise ValueError(
            f"value_cache is {value_cache.dtype}{list(value_cache.shape)}; "
            f"{key_cache.dtype}{list(key_cache.shape)} is needed, as key_cache is"
        )
    num_blocks, block_size, num_kv_heads, head_size = key_cache.shape
    x = pack_size(key_cache.dtype.itemsize) if x is None else x
    if x < 1 or head_size % x:
        raise ValueError(f"head_size is {head_size}; a multiple of x = {x} is needed ({PACK_BYTES} bytes of elements)")
    module = module_of(key_cache)
    grouped = key_cache.reshape(num_blocks, block_size, num_kv_heads, head_size // x, x)
    keys = module.ascontiguousarray(grouped.transpose(0, 2, 3, 1, 4))
    return keys, module.ascontiguousarray(value_cache.transpose(0, 2, 3, 1))


def pack_size(itemsize: int) -> int:
    """vLLM's x: how many elements of `itemsize` bytes make 16 bytes."""
    if not 1 <= itemsize <= PACK_BYTES or PACK_BYTES % itemsize:
        raise ValueError(f"itemsize is {itemsize}; a divisor of {PACK_BYTES} is needed")
    return PACK_BYTES // itemsize


# Each layout by its name on screen: what makes it of (key_cache, value_cache, itemsize), K first, then V, or both.
LAYOUTS: dict[str, Callable[[np.ndarray, np.ndarray, int], Any]] = {
    "ours": lambda k, v, _: (k, v),
    "vLLM [2, n, ...]": lambda k, v, _: np.stack([k, v]),
    "vLLM [n, 2, ...]": lambda k, v, _: np.stack([k, v], axis=1),
    "FlashInfer HND": lambda k, v, _: np.stack([k.swapaxes(1, 2), v.swapaxes(1, 2)], axis=1),
    "vLLM packed": lambda k, v, itemsize: to_vllm_packed(k, v, pack_size(itemsize)),
}


def element_offsets(layout: str, shape: tuple[int, int, int, int], itemsize: int) -> tuple[Array, Array]:
    """Where the elements of K and of V lie in `layout`: two arrays of bytes from the start of its array.

    `shape` is ours, [num_blocks, block_size, num_kv_heads, head_size], and so is the shape of both answers.
    Found by sending numbered elements through the conversion itself. Raises ValueError for a layout of
    another name, and where head_size does not fit the layout.
    """
    require_one_of(tuple(LAYOUTS), layout=layout)
    size = int(np.prod(shape))
    keys = np.arange(size).reshape(shape)
    made = LAYOUTS[layout](keys, keys + size, itemsize)
    offsets = np.empty(2 * size, dtype=np.int64)
    for array in made if isinstance(made, tuple) else (made,):
        offsets[array.ravel()] = np.arange(array.size) * itemsize
    return offsets[:size].reshape(shape), offsets[size:].reshape(shape)

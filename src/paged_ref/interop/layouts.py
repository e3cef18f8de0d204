"""To and from the K/V cache layouts of vLLM, FlashInfer, flash-attn and SGLang.

Ours is `[num_blocks, block_size, num_kv_heads, head_size]`, one array for K and one for V. It is also what
flash-attn and FlashInfer (NHD) read, so the way there is often a view: no bytes move. Each function says
whether it returns views or copies. Arrays are NumPy or CuPy; the answer is of the same kind::

    flash-attn          k_cache, v_cache [num_blocks, page_block_size, nheads_k, headdim]            ours
    FlashInfer NHD      [num_pages, 2, page_size, num_kv_heads, head_dim], or a pair                 pair: ours
    FlashInfer HND      [num_pages, 2, num_kv_heads, page_size, head_dim], or a pair                 a transposition
    vLLM, stacked       [2, num_blocks, block_size, num_kv_heads, head_size], or [num_blocks, 2, ...]
    vLLM, packed        K [num_blocks, num_kv_heads, head_size/x, block_size, x], x = 16 bytes of elements
                        V [num_blocks, num_kv_heads, head_size, block_size]
    SGLang              [num_slots, num_kv_heads, head_size], and a slot for each token              ours, by slots

The tables differ too: see `layout_tables.py`.

Sources: vLLM `csrc/cache_kernels.cu` (reshape_and_cache) and the backends' `get_kv_cache_shape`; FlashInfer's
documentation, "KV-Cache Layout in FlashInfer"; flash-attn `flash_attn_with_kvcache`; SGLang
`srt/mem_cache/memory_pool.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from ..core.checks import require, require_one_of
from ..core.device import Array, module_of

PACK_BYTES = 16  # what one thread of the first kernel of vLLM loaded with one instruction

KVLayout = Literal["NHD", "HND"]
KV_LAYOUTS = ("NHD", "HND")

# ---- vLLM


def to_vllm(key_cache: Array, value_cache: Array, axis: int = 0) -> Array:
    """One array for K and V, stacked along `axis`: a copy.

    axis 0: [2, num_blocks, block_size, num_kv_heads, head_size], vLLM's FlashAttention backend for long.
    axis 1: [num_blocks, 2, block_size, num_kv_heads, head_size], its FlashInfer backend; a block's K and V
    are neighbours, so a block moves to another device in one piece.
    """
    _check_pair(key_cache, value_cache)
    _check_axis(axis)
    return module_of(key_cache).stack([key_cache, value_cache], axis=axis)


def from_vllm(kv_cache: Array, axis: int = 0) -> tuple[Array, Array]:
    """K and V of a stacked cache, each [num_blocks, block_size, num_kv_heads, head_size]: views."""
    _check_axis(axis)
    require_shape(kv_cache, "kv_cache", 5, "[2, num_blocks, ...]" if axis == 0 else "[num_blocks, 2, ...]")
    if kv_cache.shape[axis] != 2:
        raise ValueError(f"kv_cache has {kv_cache.shape[axis]} entries along axis {axis}; 2 are needed, K and V")
    return (kv_cache[0], kv_cache[1]) if axis == 0 else (kv_cache[:, 0], kv_cache[:, 1])


def to_vllm_packed(key_cache: Array, value_cache: Array, x: int | None = None) -> tuple[Array, Array]:
    """vLLM's original layout, of Kwon et al. 2023: copies.

    K [num_blocks, num_kv_heads, head_size/x, block_size, x]: the same x elements of all tokens of a block are
    neighbours, so threads that each load x elements of neighbouring tokens load one piece of memory.
    V [num_blocks, num_kv_heads, head_size, block_size]: a dimension's values of all tokens are neighbours.

    `x` defaults to 16 bytes of elements (8 for float16). head_size must be a multiple of it.
    """
    num_blocks, block_size, num_kv_heads, head_size = _check_pair(key_cache, value_cache)
    x = pack_size(key_cache.dtype.itemsize) if x is None else x
    if x < 1 or head_size % x:
        raise ValueError(f"head_size is {head_size}; a multiple of x = {x} is needed ({PACK_BYTES} bytes of elements)")
    module = module_of(key_cache)
    grouped = key_cache.reshape(num_blocks, block_size, num_kv_heads, head_size // x, x)
    keys = module.ascontiguousarray(grouped.transpose(0, 2, 3, 1, 4))
    return keys, module.ascontiguousarray(value_cache.transpose(0, 2, 3, 1))


def from_vllm_packed(key_cache: Array, value_cache: Array) -> tuple[Array, Array]:
    """K and V, each [num_blocks, block_size, num_kv_heads, head_size]: K a copy, V a (transposed) view."""
    require_shape(key_cache, "key_cache", 5, "[num_blocks, num_kv_heads, head_size/x, block_size, x]")
    num_blocks, num_kv_heads, groups, block_size, x = key_cache.shape
    expected = (num_blocks, num_kv_heads, groups * x, block_size)
    if tuple(value_cache.shape) != expected:
        raise ValueError(f"value_cache has shape {list(value_cache.shape)}; {list(expected)} is needed, as K has")
    keys = key_cache.transpose(0, 3, 1, 2, 4).reshape(num_blocks, block_size, num_kv_heads, groups * x)
    return keys, value_cache.transpose(0, 3, 1, 2)


def pack_size(itemsize: int) -> int:
    """vLLM's x: how many elements of `itemsize` bytes make 16 bytes."""
    if not 1 <= itemsize <= PACK_BYTES or PACK_BYTES % itemsize:
        raise ValueError(f"itemsize is {itemsize}; a divisor of {PACK_BYTES} is needed")
    return PACK_BYTES // itemsize


# ---- FlashInfer


def swap_nhd_hnd(cache: Array) -> Array:
    """[..., page_size, num_kv_heads, head_dim] to [..., num_kv_heads, page_size, head_dim], or back: a view.

    FlashInfer calls the two NHD and HND. Its kernels want contiguous memory: copy the view for them.
    """
    if cache.ndim < 3:
        raise ValueError(f"cache has {cache.ndim} axes; at least 3 are needed, the last three of NHD or HND")
    return module_of(cache).swapaxes(cache, -3, -2)


def to_flashinfer(key_cache: Array, value_cache: Array, kv_layout: KVLayout = "NHD") -> Array:
    """FlashInfer's one-array form: a copy.

    NHD [num_pages, 2, page_size, num_kv_heads, head_dim], HND [num_pages, 2, num_kv_heads, page_size, head_dim].
    FlashInfer takes the pair (key_cache, value_cache), too: for NHD that is ours as it is, without a copy.
    """
    require_one_of(KV_LAYOUTS, kv_layout=kv_layout)
    stacked = to_vllm(key_cache, value_cache, axis=1)
    return stacked if kv_layout == "NHD" else module_of(stacked).ascontiguousarray(swap_nhd_hnd(stacked))


def from_flashinfer(kv_cache: Array, kv_layout: KVLayout = "NHD") -> tuple[Array, Array]:
    """K and V, each [num_blocks, block_size, num_kv_heads, head_size]: views."""
    require_one_of(KV_LAYOUTS, kv_layout=kv_layout)
    require_shape(kv_cache, "kv_cache", 5, "[num_pages, 2, ...]")
    return from_vllm(kv_cache if kv_layout == "NHD" else swap_nhd_hnd(kv_cache), axis=1)


# ---- flash-attn


def to_flash_attn(key_cache: Array, value_cache: Array) -> tuple[Array, Array]:
    """`k_cache, v_cache [num_blocks, page_block_size, nheads_k, headdim]`: ours, the very same arrays.

    `block_table` is our block_tables and `cache_seqlens` our seq_lens, both int32. flash-attn 2 documents that
    page_block_size must be a multiple of 256; flash-attn 3 and vLLM's build of it take smaller ones.
    """
    _check_pair(key_cache, value_cache)
    return key_cache, value_cache


def from_flash_attn(k_cache: Array, v_cache: Array) -> tuple[Array, Array]:
    """The paged form back: the very same arrays."""
    return to_flash_attn(k_cache, v_cache)


def from_flash_attn_batch(k_cache: Array, v_cache: Array) -> tuple[Array, Array, Array]:
    """flash-attn's form without pages, [batch, seqlen_cache, nheads_k, headdim], for `naive_attention`.

    Returns (keys, values, starts): keys and values [batch * seqlen_cache, nheads_k, headdim], views of
    contiguous memory, and starts [batch] int64. A row of the batch is one region, reserved to its full length.
    """
    batch, seqlen_cache, *row = _check_pair(k_cache, v_cache)
    starts = module_of(k_cache).arange(batch, dtype=np.int64) * seqlen_cache
    flat = (batch * seqlen_cache, *row)
    return k_cache.reshape(flat), v_cache.reshape(flat), starts


# ---- SGLang


def to_sglang(key_cache: Array, value_cache: Array) -> tuple[Array, Array]:
    """`k_buffer, v_buffer [num_slots, num_kv_heads, head_size]`: views of contiguous memory.

    SGLang never gives out page 0 (slot 0 with pages of one token): tokens that pad a batch are written there.
    A cache that shall live on in SGLang must leave block 0 unused.
    """
    num_blocks, block_size, *row = _check_pair(key_cache, value_cache)
    flat = (num_blocks * block_size, *row)
    return key_cache.reshape(flat), value_cache.reshape(flat)


def from_sglang(k_buffer: Array, v_buffer: Array, page_size: int = 1) -> tuple[Array, Array]:
    """K and V, each [num_pages, page_size, num_kv_heads, head_size]: views of contiguous memory."""
    require(page_size=(page_size, 1))
    require_shape(k_buffer, "k_buffer", 3, "[num_slots, num_kv_heads, head_size]")
    if k_buffer.shape != v_buffer.shape:
        raise ValueError(f"v_buffer has shape {list(v_buffer.shape)}; {list(k_buffer.shape)} is needed, as K has")
    num_slots, *row = k_buffer.shape
    if num_slots % page_size:
        raise ValueError(f"k_buffer has {num_slots} slots; a multiple of page_size = {page_size} is needed")
    paged = (num_slots // page_size, page_size, *row)
    return k_buffer.reshape(paged), v_buffer.reshape(paged)


# ---- where an element lies

# Each layout by its name on screen: what makes it of (key_cache, value_cache, itemsize), K first, then V, or both.
LAYOUTS: dict[str, Callable[[Array, Array, int], Any]] = {
    "ours": lambda k, v, _: (k, v),
    "vLLM [2, n, ...]": lambda k, v, _: to_vllm(k, v),
    "vLLM [n, 2, ...]": lambda k, v, _: to_vllm(k, v, axis=1),
    "FlashInfer HND": lambda k, v, _: to_flashinfer(k, v, "HND"),
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


# ---- checks


def _check_pair(key_cache: Array, value_cache: Array) -> tuple[int, int, int, int]:
    require_shape(key_cache, "key_cache", 4, "[num_blocks, block_size, num_kv_heads, head_size]")
    if key_cache.shape != value_cache.shape or key_cache.dtype != value_cache.dtype:
        raise ValueError(
            f"value_cache is {value_cache.dtype}{list(value_cache.shape)}; "
            f"{key_cache.dtype}{list(key_cache.shape)} is needed, as key_cache is"
        )
    num_blocks, block_size, num_kv_heads, head_size = key_cache.shape
    return num_blocks, block_size, num_kv_heads, head_size


def _check_axis(axis: int) -> None:
    if axis not in (0, 1):
        raise ValueError(f"axis is {axis}; 0 or 1 is needed")


def require_shape(array: Array, name: str, ndim: int, shape: str) -> None:
    if array.ndim != ndim:
        raise ValueError(f"{name} has shape {list(array.shape)}; {shape} is needed")

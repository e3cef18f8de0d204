"""What moves K and V on a GPU, by the kernels of store_kernels.py: into slots, and from block to block."""

from __future__ import annotations

import numpy as np

from ..core.attention.cuda import Launch
from ..core.device import Array, module_of
from . import launching
from .flat_views import address_of, flat_view

CHUNK = 16  # bytes that one instruction moves
Scales = tuple[Array | None, Array | None]  # of K and of V, [num_kv_heads] each: for int8 and float8


def write(
    key: Array, value: Array, key_cache: Array, value_cache: Array, slot_mapping: Array, scales: Scales = (None, None)
) -> bool:
    """Write `key, value [num_tokens, num_kv_heads, head_size]` to their slots; a negative slot is skipped. Caches
    `[num_blocks, block_size, num_kv_heads, head_size]`, or `[num_slots, ...]`. False, and nothing is written, where the
    kernels cannot.

    One kernel for both, by chunks of 16 bytes, where rows are stored as they are; otherwise one for each, by numbers.
    """
    if not launching.takes(key) or launching.unavailable() is not None:
        return False
    if key.dtype == np.float64 or min(*key.strides, *value.strides, *key_cache.strides, *value_cache.strides) < 0:
        return False
    from . import store_kernels

    slots = module_of(key).ascontiguousarray(slot_mapping)
    whole = key_cache.flags.c_contiguous and value_cache.flags.c_contiguous  # then slots are rows, too
    row_bytes = key.shape[1] * key.shape[2] * key.dtype.itemsize
    arrays = (key, value, key_cache, value_cache)
    if key.dtype == key_cache.dtype and whole and row_bytes % CHUNK == 0 and all(map(_in_chunks, arrays)):
        sizes = (np.int64(size // 4) for size in (row_bytes, key.strides[0], value.strides[0]))
        args = (*(flat_view(array, np.uint32) for array in arrays), slots, *sizes)
        launching.start(Launch(store_kernels.move_rows_kernel, (key.shape[0], 2), _threads(row_bytes), args))
        return True
    kernel = store_kernels.write_rows_kernel(key.dtype.name, key_cache.dtype.name)
    for new, cache, scale in ((key, key_cache, scales[0]), (value, value_cache, scales[1])):
        if cache.ndim == 3:  # slots are blocks of one
            cache = cache[:, None]
        if scale is None:  # the kernel has the parameter in every format
            scale = module_of(key).empty(key.shape[1], dtype=np.float32)
        steps = (stride // array.itemsize for array in (new, cache) for stride in array.strides)
        sizes = (np.int64(size) for size in (*key.shape[1:], cache.shape[1], *steps))
        args = (flat_view(new), flat_view(cache), slots, module_of(key).ascontiguousarray(scale), *sizes)
        launching.start(Launch(kernel, (key.shape[0], 1), 128, args))
    return True


def copy(cache: Array, pairs: np.ndarray) -> bool:
    """Copy blocks within `cache [num_planes, num_blocks, ...]`; a plane is K or V of one layer. `pairs [num_pairs, 2]`:
    (source, destination) block ids in host memory.

    False, and nothing is copied, where the kernel cannot: where a block is both source and destination (it must be read
    before it is written), or where blocks are not made of whole 16-byte chunks.
    """
    if not launching.takes(cache) or launching.unavailable() is not None:
        return False
    if not (cache.flags.c_contiguous and _in_chunks(cache[0])) or np.isin(pairs[:, 0], pairs[:, 1]).any():
        return False
    from . import store_kernels

    block_bytes = cache[0, 0].nbytes
    plane_words = cache.shape[1] * block_bytes // 4
    block_ids = module_of(cache).asarray(pairs.reshape(-1))
    args = (flat_view(cache, np.uint32), block_ids, np.int64(block_bytes // 4), np.int64(plane_words))
    grid = (len(pairs), cache.shape[0])
    launching.start(Launch(store_kernels.copy_blocks_kernel, grid, _threads(block_bytes), args))
    return True


def _in_chunks(array: Array) -> bool:
    """True where the rows array[i] are contiguous, made of 16-byte chunks, and begin at multiples of 16 bytes."""
    row = array[:1]
    whole = row.flags.c_contiguous and array.strides[0] >= 0
    return bool(whole and (address_of(array) | row.nbytes | array.strides[0]) % CHUNK == 0)


def _threads(row_bytes: int) -> int:
    """Threads for rows of this size: one for each chunk, in whole warps, at most 256."""
    return min(256, -(-row_bytes // (32 * CHUNK)) * 32)

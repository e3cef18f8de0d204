"""Writing and copying K and V as public functions, in the manner of kernel_api.py."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..core.attention.attention import by_slot
from ..core.attention.cuda import slots_follow
from ..core.device import Array, module_of, to_host
from ..extras.formats import encode, format_name
from ..tuned import store
from .array_checks import CACHES, FLOATS, check_scales, described, require_dtype, require_scales
from .dlpack import adopt


def write_kv(
    key: Any,
    value: Any,
    key_cache: Any,
    value_cache: Any,
    slot_mapping: Any,
    *,
    key_scales: Any = None,
    value_scales: Any = None,
    validate: bool | None = None,
) -> None:
    """Write this step's K and V into their slots.

    `key, value [num_tokens, num_kv_heads, head_size]`; `slot_mapping [num_tokens]`, a negative slot is skipped; caches
    `[num_blocks, block_size, num_kv_heads, head_size]`, or `[num_slots, ...]` without blocks. Numbers are rounded to
    the cache's format, int8 and float8 with `key_scales` and `value_scales [num_kv_heads]` (extras/formats.py). Raises
    ValueError for a slot outside the cache (checked in host memory, and on a GPU with `validate=True`). vLLM calls this
    reshape_and_cache.

    >>> import numpy as np
    >>> caches = np.zeros((2, 2, 4, 1, 1), np.float32)  # K and V: 2 blocks of 4 slots
    >>> write_kv(np.ones((2, 1, 1), np.float32), np.ones((2, 1, 1), np.float32), *caches, np.array([5, -1]))
    >>> caches[0, :, :, 0, 0]
    array([[0., 0., 0., 0.],
           [0., 1., 0., 0.]], dtype=float32)
    """
    key, value = adopt(key, "key"), adopt(value, "value")
    key_cache, value_cache = adopt(key_cache, "key_cache"), adopt(value_cache, "value_cache")
    slots = adopt(slot_mapping, "slot_mapping")
    _check_written(key, value, key_cache, value_cache)
    scales = _scales(key_cache, {"key_scales": key_scales, "value_scales": value_scales})
    if slots.shape != key.shape[:1] or slots.dtype.kind != "i":
        raise ValueError(f"slot_mapping is {slots.dtype}{list(slots.shape)}; [{key.shape[0]}] integers are needed")
    if validate or (validate is None and module_of(key) is np):
        check_scales(*scales)
        num_slots = int(np.prod(key_cache.shape[:-2]))
        if slots.size and slots.max() >= num_slots:
            raise ValueError(f"slot_mapping holds {int(slots.max())}; the cache has slots 0 to {num_slots - 1}")
    if key.size and key_cache.size:
        _store(key, value, key_cache, value_cache, slots, scales)


def _check_written(key: Array, value: Array, key_cache: Array, value_cache: Array) -> None:
    row = tuple(key_cache.shape[-2:])
    if key.ndim != 3 or key.shape != value.shape or tuple(key.shape[1:]) != row:
        raise ValueError(
            f"key is {list(key.shape)} and value {list(value.shape)}; [num_tokens, {row[0]}, {row[1]}] is needed"
        )
    if key.dtype != value.dtype:
        raise ValueError(f"key is {format_name(key.dtype)} and value {format_name(value.dtype)}; both must be alike")
    same = key_cache.shape == value_cache.shape and key_cache.dtype == value_cache.dtype
    if not same or key_cache.ndim not in (3, 4):
        raise ValueError(
            f"key_cache is {described(key_cache)} and value_cache {described(value_cache)}; both must be alike, "
            "[num_blocks, block_size, num_kv_heads, head_size] or [num_slots, num_kv_heads, head_size]"
        )
    for array, name, known in ((key, "key", FLOATS), (value, "value", FLOATS), (key_cache, "key_cache", CACHES)):
        require_dtype(array, name, known)


def _scales(key_cache: Array, given: dict[str, Any]) -> list[Array | None]:
    """The scales of K and V as float32 [num_kv_heads], for the caches that need them, and None for the others."""
    scales = {name: adopt(array, name) for name, array in given.items() if array is not None}
    require_scales(key_cache, "key_cache", scales)
    return [scales[name].astype(np.float32, copy=False) if name in scales else None for name in given]


def _store(key: Array, value: Array, key_cache: Array, value_cache: Array, slots: Array, scales: Any) -> None:
    """Write what is checked."""
    if store.write(key, value, key_cache, value_cache, slots, scales):
        return
    if slots.min() < 0:
        written = slots >= 0
        key, value, slots = key[written], value[written], slots[written]
    for new, cache, scale in ((key, key_cache, scales[0]), (value, value_cache, scales[1])):
        rows = encode(new, cache.dtype, scale)
        if slots_follow(cache):
            by_slot(cache)[slots] = rows
        else:  # blocks from elsewhere, which do not follow one another in memory
            cache[slots // cache.shape[1], slots % cache.shape[1]] = rows


def copy_blocks(key_cache: Any, value_cache: Any, block_mapping: Any) -> None:
    """Copy whole blocks: `block_mapping [num_pairs, 2]` of (source, destination) block ids.

    All sources are read before a destination is written, so a block may be both. Raises ValueError for a block id
    outside the cache and for a destination named twice. What copy on write does.

    >>> import numpy as np
    >>> caches = np.arange(3.0).reshape(1, 3, 1, 1, 1) * np.ones((2, 1, 1, 1, 1))  # K and V: 3 blocks of 1 slot
    >>> copy_blocks(*caches, [(0, 1), (1, 2)])
    >>> caches[0].ravel()
    array([0., 0., 1.])
    """
    key_cache, value_cache = adopt(key_cache, "key_cache"), adopt(value_cache, "value_cache")
    pairs = np.asarray(to_host(block_mapping) if hasattr(block_mapping, "shape") else block_mapping, dtype=np.int64)
    if pairs.size == 0:
        return
    if pairs.ndim != 2 or pairs.shape[1] != 2:
        raise ValueError(f"block_mapping has shape {list(pairs.shape)}; [num_pairs, 2] is needed")
    num_blocks = key_cache.shape[0]
    if pairs.min() < 0 or pairs.max() >= num_blocks:
        bad = int(pairs.min() if pairs.min() < 0 else pairs.max())
        raise ValueError(f"block_mapping holds block {bad}; the cache has blocks 0 to {num_blocks - 1}")
    if np.unique(pairs[:, 1]).size != len(pairs):
        raise ValueError(f"block_mapping names a destination twice: {pairs[:, 1].tolist()}")
    for cache in (key_cache, value_cache):
        if not store.copy(cache[None], pairs):
            sources, destinations = module_of(cache).asarray(pairs).T
            cache[destinations] = cache[sources]

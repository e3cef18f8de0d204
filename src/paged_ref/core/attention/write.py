"""What moves K and V: into slots, between blocks, and partial attention results into one.

Array code, and on a GPU the kernels of store_kernels.py. Each function changes the arrays that it is given.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ...extras.formats import decode, encode, word
from ...interop.arguments import CACHES, FLOATS, adopt, check_scales, like_caller, require_dtype, scales_of
from ...tuned import launching
from ...tuned.store import copy_launch, write_launches
from ..device import Array, module_of, to_host


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

    `key, value [num_tokens, num_kv_heads, head_size]`; `slot_mapping [num_tokens]`, a negative slot is
    skipped; caches `[num_blocks, block_size, num_kv_heads, head_size]`, or `[num_slots, ...]` without
    blocks. Numbers are rounded to the cache's format, int8 and float8 with `key_scales` and `value_scales
    [num_kv_heads]` (quantize.py). Raises ValueError for a slot outside the cache (checked in host memory,
    and on a GPU with `validate=True`). vLLM calls this reshape_and_cache.
    """
    key, value = adopt(key, "key"), adopt(value, "value")
    key_cache, value_cache = adopt(key_cache, "key_cache"), adopt(value_cache, "value_cache")
    slot_mapping = adopt(slot_mapping, "slot_mapping")
    xp = module_of(key)
    row = tuple(key_cache.shape[-2:])
    if key.ndim != 3 or key.shape != value.shape or tuple(key.shape[1:]) != row:
        raise ValueError(
            f"key is {list(key.shape)} and value {list(value.shape)}; [num_tokens, {row[0]}, {row[1]}] is needed"
        )
    if key.dtype != value.dtype:
        raise ValueError(f"key is {word(key.dtype)} and value {word(value.dtype)}; both must be alike")
    same = key_cache.shape == value_cache.shape and key_cache.dtype == value_cache.dtype
    if not same or key_cache.ndim not in (3, 4):
        raise ValueError(
            f"key_cache is {word(key_cache.dtype)}{list(key_cache.shape)} and value_cache "
            f"{word(value_cache.dtype)}{list(value_cache.shape)}; both must be alike, "
            "[num_blocks, block_size, num_kv_heads, head_size] or [num_slots, num_kv_heads, head_size]"
        )
    for array, name, known in ((key, "key", FLOATS), (value, "value", FLOATS), (key_cache, "key_cache", CACHES)):
        require_dtype(array, name, known)
    key_scales, value_scales = scales_of(key_cache.dtype, "key_cache", row[0], key_scales, value_scales)
    if slot_mapping.shape != key.shape[:1] or slot_mapping.dtype.kind != "i":
        raise ValueError(
            f"slot_mapping is {slot_mapping.dtype}{list(slot_mapping.shape)}; [{key.shape[0]}] integers are needed"
        )
    num_slots = int(np.prod(key_cache.shape[:-2]))
    if validate or (validate is None and xp is np):
        check_scales(key_scales, value_scales)
        if slot_mapping.size and slot_mapping.max() >= num_slots:
            raise ValueError(f"slot_mapping holds {int(slot_mapping.max())}; the cache has slots 0 to {num_slots - 1}")

    if key.size == 0 or key_cache.size == 0:
        return
    on_gpu = xp is not np and launching.unavailable() is None
    if on_gpu and key.dtype != np.float64 and min(*key.strides, *value.strides, *key_cache.strides) >= 0:
        for launch in write_launches(key, value, key_cache, value_cache, slot_mapping, key_scales, value_scales):
            launching.start(launch)
        return
    if slot_mapping.size and slot_mapping.min() < 0:
        written = slot_mapping >= 0
        key, value, slot_mapping = key[written], value[written], slot_mapping[written]
    if key_cache.ndim == 4:
        block_size = key_cache.shape[1]
        where: Any = (slot_mapping // block_size, slot_mapping % block_size)
    else:
        where = slot_mapping
    key_cache[where] = encode(key, key_cache.dtype, key_scales)
    value_cache[where] = encode(value, value_cache.dtype, value_scales)


def copy_blocks(key_cache: Any, value_cache: Any, block_mapping: Any) -> None:
    """Copy whole blocks: `block_mapping [num_pairs, 2]` of (source, destination) block ids.

    All sources are read before a destination is written, so a block may be both. Raises ValueError for a
    block id outside the cache and for a destination named twice. Copy on write runs through here.
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
        copy_planes(cache[None], pairs)


def copy_planes(cache: Array, pairs: np.ndarray) -> None:
    """copy_blocks for many layers at once: `cache [num_planes, num_blocks, ...]`, a plane being K or V of a layer.

    `pairs [num_pairs, 2]` in host memory; nothing is checked.
    """
    on_gpu = module_of(cache) is not np and launching.unavailable() is None
    launch = copy_launch(cache, pairs) if on_gpu else None
    if launch is not None:
        launching.start(launch)
    else:
        sources, destinations = module_of(cache).asarray(pairs).T
        cache[:, destinations] = cache[:, sources]


def merge_states(outputs: Any, lses: Any) -> tuple[Any, Any]:
    """Join attention over parts of the keys into attention over all of them.

    `outputs [num_parts, num_tokens, num_heads, head_size]` and `lses [num_parts, num_tokens, num_heads]`
    (natural log) come from attention over disjoint sets of keys; returns `(output, lse)` without the first
    axis. A part that saw no key (lse −inf) adds nothing; where all parts saw none, output is 0 and lse −inf.
    The split-KV combine of flash-decoding; FlashInfer's merge_states.
    """
    caller = outputs
    outputs, lses = adopt(outputs, "outputs"), adopt(lses, "lses")
    if outputs.ndim != 4 or outputs.shape[:3] != lses.shape:
        raise ValueError(
            f"outputs is {list(outputs.shape)} and lses {list(lses.shape)}; "
            "[num_parts, num_tokens, num_heads, head_size] and [num_parts, num_tokens, num_heads] are needed"
        )
    if outputs.shape[0] == 0:
        raise ValueError("outputs has 0 parts; at least 1 is needed")
    xp, dtype = module_of(outputs), outputs.dtype
    outputs = decode(outputs)
    highest = lses.max(axis=0)  # [num_tokens, num_heads]
    shift = xp.where(xp.isfinite(highest), highest, xp.zeros_like(highest))
    weights = xp.exp(lses - shift)  # [num_parts, num_tokens, num_heads]
    total = weights.sum(axis=0)  # [num_tokens, num_heads]
    mixed = (outputs * weights[..., None]).sum(axis=0)  # [num_tokens, num_heads, head_size]
    output = encode(mixed / xp.where(total > 0, total, xp.ones_like(total))[..., None], dtype)
    with np.errstate(divide="ignore"):
        lse = xp.log(total) + shift
    return like_caller(output, caller), like_caller(lse, caller)

"""Backend `cuda-flash`: the tuned kernels of `flash_kernels.py`, chosen and launched.

Decoding reads K and V once and does little else, so the yardstick is a copy of the same bytes. Four ideas bring
the kernel to it (the kernel's own docstring has the details):

* loads of 16 bytes, straight to registers; up to 8 KiB of K and V in flight for each of 12 warps;
* the heads of a group share each load, and the tensor cores do their products: groups of 1 to 8 cost the same;
* long sequences are split over CUDA blocks, so that one sequence fills the GPU (flash-decoding, Dao et al. 2023);
* paging costs one table entry for each tile, read two tiles ahead.

Why tensor cores for a single query? While an H200 reads a KiB of K and V it can issue 198 warp instructions, and the 8
heads of a group need 128 of them for multiply-adds alone, before any conversion or exponential. With tensor cores a KiB
of float16 takes 30 in all, whatever the group; `paged-ref bench sass` counts all formats from the machine code.

The first call of a variant compiles it, for seconds; the host never waits, so a CUDA graph may hold a call. All that
decides a launch is in the shapes.

float8: e4m3's two codes for not-a-number read as 480, so what is stored must be numbers. Float32 queries over a
16-bit or 8-bit cache are multiplied in the operands' range: up to 65504, unless the cache is bfloat16.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core import device
from ..core.attention.attention import AttentionCall
from ..core.attention.cuda import Launch
from ..core.device import Array, module_of
from ..extras.formats import BFLOAT16, FLOAT8, INT8, format_name
from ..extras.variants import PLAIN
from . import launching
from .flat_views import address_of, flat_view, span_bytes

if TYPE_CHECKING:
    from .flash_variant import KernelVariant

NAMES = {np.dtype(name): name for name in ("float16", "float32")} | {BFLOAT16: "bfloat16", INT8: "int8", FLOAT8: "e4m3"}
ITEM_BYTES = 16  # of a load
MAX_SPLITS = 128
MIN_KEYS = 256  # of a split: fewer, and beginning and end cost more than the middle
OLDEST = (8, 0)  # compute capability that has the `mma` shapes and bfloat16


def unavailable() -> str | None:
    """Why this backend cannot run on this machine; None where it can."""
    if (reason := launching.unavailable()) is not None:
        return reason
    major, minor = launching.capability(int(device.xp.cuda.Device().id))
    if (major, minor) < OLDEST:
        return f"the GPU has compute capability {major}.{minor}; {OLDEST[0]}.{OLDEST[1]} is needed"
    return None


def unsupported(call: AttentionCall) -> str | None:
    """Why this backend cannot run this call; None where it can."""
    if module_of(call.query) is np:
        return "query lies in host memory; the kernels read the GPU's (CuPy arrays)"
    return unsupported_by_kernels(call)


def unsupported_by_kernels(call: AttentionCall) -> str | None:
    """What of this call the tuned kernels leave out, on whatever they run; None if nothing."""
    if call.query.dtype not in NAMES:
        return f"query is {format_name(call.query.dtype)}; the tuned kernels compute in float32"
    if call.keys.dtype not in NAMES:
        return f"the cache is {format_name(call.keys.dtype)}; the tuned kernels read {', '.join(NAMES.values())}"
    itemsize, head_size = call.keys.dtype.itemsize, call.query.shape[-1]
    if head_size * itemsize % ITEM_BYTES:
        return f"head_size is {head_size}; a row of {format_name(call.keys.dtype)} must be a multiple of 16 bytes"
    if head_size * itemsize > 512:
        return f"head_size is {head_size}; rows of the cache may have 512 bytes at most"
    for name, cache_array in (("keys", call.keys), ("values", call.values)):
        if cache_array.size == 0:
            continue
        if cache_array.strides[-1] != itemsize and head_size > 1:
            return f"the numbers of a head do not follow one another in the memory of the {name}"
        if any(stride % ITEM_BYTES for stride in (address_of(cache_array), *cache_array.strides[:-1])):
            return f"the rows of the {name} do not begin at multiples of {ITEM_BYTES} bytes"
        if min(cache_array.strides) < 0 or span_bytes(cache_array) > ITEM_BYTES << 32:
            return f"the {name} span more than 64 GiB, or run backwards"
    return None


def kernel_variant_of(call: AttentionCall) -> KernelVariant:
    """The kernel's `KernelVariant` for this call, not split: mixed where there are more tokens than sequences.

    Two kernels run a mixed batch: this one, for sequences with few queries, and the same with `prefill`.
    """
    from .flash_variant import KernelVariant

    asked = call.variant or PLAIN
    return KernelVariant(
        cache=NAMES[call.keys.dtype],
        query=NAMES[call.query.dtype],
        head_size=call.query.shape[2],
        group_size=call.query.shape[1] // call.keys.shape[-2],
        block_size=call.keys.shape[1] if call.addresses.block_tables is not None else None,
        mixed=call.query.shape[0] > len(call.addresses.seq_lens),
        window=call.window is not None,
        softcap=asked.softcap is not None,
        alibi=asked.alibi_slopes is not None,
        sinks=asked.sinks is not None,
    )


@lru_cache(maxsize=1024)
def number_of_splits(blocks: int, max_keys: int, places: int) -> int:
    """Into how many parts to split each sequence, so that the GPU is busy to the end.

    `blocks` CUDA blocks without splits, of at most `max_keys` keys; `places` for CUDA blocks on the GPU. They
    run in waves, and the last wave is seldom full. Takes the fewest parts that come near the best share of full
    places. All from shapes: a look at `seq_lens` would make the host wait.
    """
    most = max(1, min(MAX_SPLITS, max_keys // MIN_KEYS))

    def share(splits: int) -> float:
        waves = blocks * splits / places
        return waves / math.ceil(waves)

    shares = [share(splits) for splits in range(1, most + 1)]
    return 1 + next(i for i, one in enumerate(shares) if one >= 0.9 * max(shares))


def launches(call: AttentionCall, num_splits: int | None = None, processors: int = 1) -> list[Launch]:
    """What to launch for this call, whose `out` must be contiguous. Also runs in the tracer, on NumPy arrays.

    `num_splits=None` chooses for a GPU with so many multiprocessors. Prefill is never split.
    """
    from .flash_combine import combine_kernel
    from .flash_kernels import attention_kernel
    from .flash_variant import MAX_SPLIT_QUERIES, NUM_THREADS

    xp, variant = module_of(call.query), kernel_variant_of(call)
    num_tokens, num_heads, head_size = call.query.shape
    num_seqs, num_kv_heads = len(call.addresses.seq_lens), call.keys.shape[-2]
    if num_tokens == 0 or num_seqs == 0:
        return []
    if num_splits is None:
        blocks = min(num_tokens, num_seqs) * num_kv_heads * -(-variant.group_size // variant.rows_per_block)
        places = processors * variant.blocks_per_multiprocessor
        num_splits = number_of_splits(blocks, _longest(call), places)
    variant = replace(variant, split=num_splits > 1)

    lse = call.lse if call.lse is not None else xp.empty((num_tokens, num_heads), dtype=np.float32)
    out, lse = _bits(call.out), lse.ravel()
    args, sinks = _arguments(call, variant, lse)
    found = []
    if variant.mixed:
        prefill = replace(variant, prefill=True, split=False)
        blocks = num_tokens * variant.group_size // prefill.rows_per_block + num_seqs
        found.append(Launch(attention_kernel(prefill), (blocks * num_kv_heads, 1), NUM_THREADS, (out, lse, *args)))
    items = num_seqs if variant.mixed else num_tokens
    grid = (items * variant.blocks_per_item * num_kv_heads, num_splits)
    if not variant.split:
        return [*found, Launch(attention_kernel(variant), grid, NUM_THREADS, (out, lse, *args))]
    items *= MAX_SPLIT_QUERIES if variant.mixed else 1
    part_out = xp.empty(items * num_heads * num_splits * head_size, dtype=np.float32)
    part_lse = xp.empty(items * num_heads * num_splits, dtype=np.float32)
    found.append(Launch(attention_kernel(variant), grid, NUM_THREADS, (part_out, part_lse, *args)))
    combine = combine_kernel(variant.query, variant.head_size, variant.sinks, variant.mixed)
    loc = xp.ascontiguousarray(call.addresses.query_start_loc)
    parts = (out, lse, part_out, part_lse, loc, np.int64(num_heads), np.int64(num_splits), sinks)
    return [*found, Launch(combine, (items * num_heads, 1), NUM_THREADS, parts)]


def _longest(call: AttentionCall) -> int:
    """Keys that a sequence may have, from shapes."""
    tables = call.addresses.block_tables
    if tables is not None:
        return int(tables.shape[1] * call.keys.shape[1])
    return int(call.keys.shape[0]) // len(call.addresses.seq_lens)  # an estimate: regions are about equal


def _arguments(call: AttentionCall, variant: KernelVariant, none: Array) -> tuple[tuple[Any, ...], Array]:
    """The attention kernel's arguments after `out` and `lse`, and the sinks. `none` stands for arrays not read."""
    xp, addresses, asked = module_of(call.query), call.addresses, call.variant or PLAIN
    query = _bits(xp.ascontiguousarray(call.query))
    if variant.exact:
        if address_of(query) % ITEM_BYTES:
            query = query.copy()
        query = query.view(np.uint32)
    tables, where_stride = addresses.block_tables, 1
    if tables is not None:
        if tables.strides[1] != tables.dtype.itemsize:
            tables = xp.ascontiguousarray(tables)
        where, where_stride = flat_view(tables), tables.strides[0] // tables.dtype.itemsize
    else:
        where = xp.ascontiguousarray(addresses.starts)

    def per_head(array: Array | None) -> Array:
        return none if array is None else xp.ascontiguousarray(array)

    sinks = per_head(asked.sinks)
    args = (
        query, flat_view(call.keys, np.uint32), flat_view(call.values, np.uint32),
        where, np.int64(where_stride),
        xp.ascontiguousarray(addresses.seq_lens), xp.ascontiguousarray(addresses.query_start_loc),
        np.int64(len(addresses.seq_lens)), np.int64(call.keys.shape[-2]), *_strides(call.keys), *_strides(call.values),
        np.float32(call.scale), np.int64(call.window or 0), np.float32(asked.softcap or 0),
        per_head(asked.alibi_slopes), sinks, per_head(asked.key_scales), per_head(asked.value_scales),
    )  # fmt: skip
    return args, sinks


def attend(call: AttentionCall) -> None:
    """Fill `call.out` and `call.lse`, in order with what CuPy's current stream does. The host waits for nothing."""
    xp = device.xp
    out = call.out
    if not out.flags.c_contiguous:
        call = replace(call, out=xp.empty(out.shape, dtype=out.dtype))
    number = int(xp.cuda.Device().id)
    processors = launching.properties(number)["multiProcessorCount"]
    for launch in launches(call, None, int(processors)):
        launching.start(launch)
    if call.out is not out:
        out[...] = call.out


def _bits(array: Array) -> Array:
    """A contiguous query or output, flat: 16-bit floats as their bits."""
    return array.ravel().view(np.uint16) if array.dtype.itemsize == 2 else array.ravel()


def _strides(cache_array: Array) -> list[np.uint32]:
    """The steps from a block to the next, from a slot and from a KV head, in chunks of 16 bytes."""
    strides = [np.uint32(stride // ITEM_BYTES) for stride in cache_array.strides[:-1]]
    return strides if cache_array.ndim == 4 else [np.uint32(0), *strides]

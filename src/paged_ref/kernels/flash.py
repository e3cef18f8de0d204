"""Backend `cuda-flash`: the tuned kernels of `flash_kernels.py`, chosen, launched and explained.

Decode is one read of K and V and little else, so the yardstick is a copy of the same bytes. Four ideas bring
the kernel to it (the kernels' own docstring has the details):

  16-byte loads, 8 KiB of K and V in flight for each warp, 12 warps on a multiprocessor, straight to registers;
  the heads of a group share each load, and the tensor cores do their products: groups of 1 to 8 cost the same;
  long sequences are split over CUDA blocks, so that one sequence fills the GPU (flash-decoding, Dao et al. 2023);
  the price of paging is one table entry for each tile, read a tile ahead.

Why tensor cores, for one query? A group of 8 heads has 16 multiplications and additions for each number of K or
V. On the ordinary units that alone is 8 * 512 / 32 = 128 warp instructions for each KiB of float16, and then come
conversions and shuffles. `paged-ref bench sass` counts what this kernel needs: about 40 for float16, whatever the
group, 90 for int8 and 100 for float8. And what a GPU can issue: an H200 reads 4.8 TB/s = 4.7e9 KiB/s, and
132 multiprocessors * 4 schedulers * 1.755 GHz issue 927e9 warp instructions a second: 198 for each KiB. So a
float16 decode fills a fifth of the issue slots, and an int8 one half; memory is the bound.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from .. import device
from ..device import Array, module_of
from .arguments import AttentionCall
from .quantize import BFLOAT16, FLOAT8, INT8, word

NAMES = {
    np.dtype("float16"): "float16", np.dtype("float32"): "float32",
    BFLOAT16: "bfloat16", INT8: "int8", FLOAT8: "e4m3",
}  # fmt: skip
ITEM_BYTES = 16  # of a load
MAX_SPLITS = 128
MIN_KEYS = 256  # of a split: fewer, and beginning and end cost more than the middle
OLDEST = (8, 0)  # compute capability that has the `mma` shapes and bfloat16


class Launch(NamedTuple):
    """A kernel with all that it needs."""

    kernel: Any
    grid: tuple[int, int, int]
    bounds: tuple[int, int]  # threads of a CUDA block, CUDA blocks that must fit on a multiprocessor
    args: tuple[Any, ...]


def unavailable() -> str | None:
    """Why this backend cannot run on this machine; None where it can."""
    if not device.on_gpu:
        return device.reason
    for module, package in (("numba_cuda", "numba-cuda"), ("cuda.bindings", "cuda-bindings")):
        if importlib.util.find_spec(module) is None:
            return f"it needs the package {package}"
    capability = _capability(int(device.xp.cuda.Device().id))
    if capability < OLDEST:
        return f"the GPU has compute capability {capability[0]}.{capability[1]}; {OLDEST[0]}.{OLDEST[1]} is needed"
    return None


def unsupported(call: AttentionCall) -> str | None:
    """Why this backend cannot run this call; None where it can."""
    if module_of(call.query) is np:
        return "query lies in host memory; the kernels read the GPU's (CuPy arrays)"
    return unsupported_by_kernels(call)


def unsupported_by_kernels(call: AttentionCall) -> str | None:
    """What of this call the tuned kernels leave out, on whatever they run; None if nothing."""
    if call.query.dtype not in NAMES:
        return f"query is {word(call.query.dtype)}; the tuned kernels compute in float32"
    if call.keys.dtype not in NAMES:
        return f"the cache is {word(call.keys.dtype)}; the tuned kernels read {', '.join(NAMES.values())}"
    itemsize = call.keys.dtype.itemsize
    if call.head_size * itemsize % ITEM_BYTES:
        return f"head_size is {call.head_size}; a row of {word(call.keys.dtype)} must be a multiple of 16 bytes"
    if call.head_size * itemsize > 512:
        return f"head_size is {call.head_size}; rows of the cache may have 512 bytes at most"
    for name, cache_array in (("keys", call.keys), ("values", call.values)):
        if cache_array.size == 0:
            continue
        if cache_array.strides[-1] != itemsize and call.head_size > 1:
            return f"the numbers of a head do not follow one another in the memory of the {name}"
        if any(stride % ITEM_BYTES for stride in (_address(cache_array), *cache_array.strides[:-1])):
            return f"the rows of the {name} do not begin at multiples of {ITEM_BYTES} bytes"
        if min(cache_array.strides) < 0 or _span(cache_array) > ITEM_BYTES << 31:
            return f"the {name} span more than 32 GiB, or run backwards"
    return None


def variant_of(call: AttentionCall, split: bool = False) -> Any:
    """The kernel's `Variant` for this call: prefill where there are more tokens than sequences."""
    from .flash_kernels import Variant

    return Variant(
        cache=NAMES[call.keys.dtype],
        query=NAMES[call.query.dtype],
        head_size=call.head_size,
        group_size=call.num_heads // call.num_kv_heads,
        block_size=call.block_size if call.paged else None,
        prefill=call.query.shape[0] > call.num_seqs,
        split=split,
        window=call.sliding_window is not None,
        softcap=call.softcap is not None,
        alibi=call.alibi_slopes is not None,
        sinks=call.sinks is not None,
    )


def number_of_splits(blocks: int, max_keys: int, places: int) -> int:
    """Into how many parts to split each sequence, so that the GPU is busy to the end.

    `blocks` CUDA blocks without splits, of at most `max_keys` keys; `places` for CUDA blocks on the GPU. They
    run in waves, and the last wave is seldom full. Takes the fewest parts that come near the best share of full
    places. All from shapes: a look at `seq_lens` would make the host wait.
    """
    most = max(1, min(MAX_SPLITS, max_keys // MIN_KEYS))

    def share(splits: int) -> float:
        waves = blocks * splits / places
        return waves / -(-blocks * splits // places)

    best = max(share(splits) for splits in range(1, most + 1))
    return next(splits for splits in range(1, most + 1) if share(splits) >= 0.9 * best)


def launches(call: AttentionCall, num_splits: int | None = None, processors: int = 1) -> list[Launch]:
    """What to launch for this call, whose `out` must be contiguous. Also runs in the tracer, on NumPy arrays.

    `num_splits=None` chooses for a GPU with so many multiprocessors. Prefill is never split.
    """
    from .flash_kernels import NUM_THREADS, ROWS, attention_kernel, combine_kernel

    xp, variant = module_of(call.query), variant_of(call)
    num_tokens, num_heads, num_kv_heads = call.query.shape[0], call.num_heads, call.num_kv_heads
    if num_tokens == 0 or call.num_seqs == 0:
        return []
    if variant.prefill:
        blocks = num_tokens * variant.group_size // variant.rows_per_block + call.num_seqs
        num_splits = 1
    else:
        blocks = num_tokens * -(-variant.group_size // ROWS)
    blocks *= num_kv_heads
    if num_splits is None:
        max_keys = call.keys.shape[0] // call.num_seqs  # contiguous: a guess, that regions are about equal
        if call.block_tables is not None:
            max_keys = call.block_tables.shape[1] * call.block_size
        num_splits = number_of_splits(blocks, max_keys, processors * variant.blocks_per_multiprocessor)
    variant = replace(variant, split=num_splits > 1)

    lse = call.lse if call.lse is not None else xp.empty((num_tokens, num_heads), dtype=np.float32)
    out = _bits(call.out)
    part_out, part_lse = out, lse
    if variant.split:
        part_out = xp.empty((num_tokens, num_heads, num_splits, call.head_size), dtype=np.float32)
        part_lse = xp.empty((num_tokens, num_heads, num_splits), dtype=np.float32)
    query = _bits(xp.ascontiguousarray(call.query))
    if variant.exact:
        if _address(query) % ITEM_BYTES:
            query = query.copy()
        query = query.view(np.uint32)
    tables, starts = call.block_tables, call.starts
    if tables is not None and tables.strides[1] != tables.dtype.itemsize:
        tables = xp.ascontiguousarray(tables)
    where = _span_of(tables, tables.dtype) if tables is not None else xp.ascontiguousarray(starts)
    where_stride = tables.strides[0] // tables.dtype.itemsize if tables is not None else 1
    none = lse.ravel()  # stands for arrays that the variant does not read

    def per_head(array: Array | None) -> Array:
        return none if array is None else xp.ascontiguousarray(array)

    sinks = per_head(call.sinks)
    args = (
        part_out.ravel(), part_lse.ravel(), query,
        _span_of(call.keys, np.uint32), _span_of(call.values, np.uint32),
        where, np.int64(where_stride),
        xp.ascontiguousarray(call.seq_lens), xp.ascontiguousarray(call.query_start_loc),
        np.int64(call.num_seqs), np.int64(num_kv_heads),
        *_strides(call.keys, call.paged), *_strides(call.values, call.paged),
        np.float32(call.scale), np.int64(call.sliding_window or 0), np.float32(call.softcap or 0),
        per_head(call.alibi_slopes), sinks, per_head(call.key_scales), per_head(call.value_scales),
    )  # fmt: skip
    bounds = (NUM_THREADS, variant.blocks_per_multiprocessor)
    answer = [Launch(attention_kernel(variant), (blocks, num_splits, 1), bounds, args)]
    if variant.split:
        combine = combine_kernel(variant.query, variant.head_size, variant.sinks)
        args = (out, lse.ravel(), *args[:2], np.int64(num_heads), np.int64(num_splits), sinks)
        answer.append(Launch(combine, (num_tokens * num_heads, 1, 1), (NUM_THREADS, 8), args))
    return answer


def attention(call: AttentionCall) -> None:
    """Fill `call.out` and `call.lse`, in order with what CuPy's current stream does. The host waits for nothing."""
    xp = device.xp
    out = call.out
    if not out.flags.c_contiguous:
        call = replace(call, out=xp.empty(out.shape, dtype=out.dtype))
    number = int(xp.cuda.Device().id)
    for kernel, grid, bounds, args in launches(call, None, _processors(number)):
        from .machine_code import parameters

        _loaded(kernel, parameters(args), bounds, number)(grid, (bounds[0], 1, 1), args)
    if call.out is not out:
        out[...] = call.out


@cache
def _loaded(kernel: Any, types: tuple[str, ...], bounds: tuple[int, int], number: int) -> Any:
    """The compiled kernel on GPU `number`, which must be the current one: a CuPy function."""
    from .machine_code import compile_kernel

    code = compile_kernel(kernel, types, bounds, _capability(number))
    module = device.xp.cuda.Module()
    module.load(code.binary)
    return module.get_function(code.name)


@cache
def _capability(number: int) -> tuple[int, int]:
    properties = device.xp.cuda.runtime.getDeviceProperties(number)
    return int(properties["major"]), int(properties["minor"])


@cache
def _processors(number: int) -> int:
    return int(device.xp.cuda.runtime.getDeviceProperties(number)["multiProcessorCount"])


def _bits(array: Array) -> Array:
    """A contiguous query or output, flat: 16-bit floats as their bits."""
    return array.ravel().view(np.uint16) if array.dtype.itemsize == 2 else array.ravel()


def _address(array: Array) -> int:
    return int(array.ctypes.data if module_of(array) is np else array.data.ptr)


def _span(array: Array) -> int:
    """Bytes from the first to past the last element."""
    size = array.dtype.itemsize
    return size + sum((n - 1) * stride for n, stride in zip(array.shape, array.strides, strict=True))


def _span_of(array: Array, dtype: Any) -> Array:
    """All memory from the first element of `array` to its last, gaps included, as a flat array of this dtype."""
    shape = (_span(array) // np.dtype(dtype).itemsize if array.size else 0,)
    if module_of(array) is not np:
        return module_of(array).ndarray(shape, dtype, memptr=array.data)
    return np.lib.stride_tricks.as_strided(array.view(dtype), shape, (np.dtype(dtype).itemsize,))


def _strides(cache_array: Array, paged: bool) -> tuple[Any, Any, Any]:
    """From a block to the next, a slot, a KV head: in chunks of 16 bytes."""
    strides = [stride // ITEM_BYTES for stride in cache_array.strides[:-1]]
    return tuple(np.uint32(stride) for stride in (strides if paged else [0, *strides]))  # type: ignore[return-value]

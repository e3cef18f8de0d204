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
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.attention.attention import Addresses, AttentionCall
from ..core.attention.cuda import Launch
from ..core.device import Array, module_of
from ..extras.formats import BFLOAT16, FLOAT8, INT8, format_name
from ..extras.variants import PLAIN
from . import launching
from .flat_views import address_of, flat_view, span_bytes
from .machine_code import Parameters, parameters

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
    major, minor = launching.capability(launching.current_device())
    if (major, minor) < OLDEST:
        return f"the GPU has compute capability {major}.{minor}; {OLDEST[0]}.{OLDEST[1]} is needed"
    return None


def unsupported(call: AttentionCall) -> str | None:
    """Why this backend cannot run this call; None where it can."""
    if not launching.takes(call.query):
        return "query lies in host memory; the kernels read the GPU's (CuPy arrays)"
    keys, values = call.keys, call.values
    what = (
        call.query.dtype.num, call.query.shape[-1], keys.dtype.num, keys.shape, keys.strides, values.strides,
        (address_of(keys) | address_of(values)) % ITEM_BYTES,
    )  # fmt: skip
    if what not in _reasons:
        _reasons[what] = unsupported_by_kernels(call)
    return _reasons[what]


_reasons: dict[Any, str | None] = {}  # for each kind of query and cache that was asked for


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


@dataclass(frozen=True, slots=True)
class Plan:
    """What the shapes of a call decide: a later call of the same shapes only puts its arrays in."""

    variant: KernelVariant
    kernels: tuple[tuple[Any, tuple[int, int]], ...]  # with their grids; the last one is for sequences of few queries
    combine: tuple[Any, tuple[int, int]] | None  # where sequences are split
    num_splits: int
    part_sizes: tuple[int, int]  # numbers in the parts' outputs and log-sum-exps; of split sequences
    scalars: tuple[Any, ...]  # the kernel's, in order, after those of `where`
    types: list[Parameters] = field(default_factory=list)  # of each launch, known after the first call


_plans: dict[Any, Plan] = {}  # by `_shapes_of`
MAX_PLANS = 4096  # block tables grow with their sequences, and each width is a shape of its own


def _plan(call: AttentionCall) -> Plan:
    from .flash_combine import combine_kernel
    from .flash_kernels import attention_kernel
    from .flash_variant import MAX_SPLIT_QUERIES

    variant = kernel_variant_of(call)
    num_tokens, num_heads, head_size = call.query.shape
    num_seqs, num_kv_heads = len(call.addresses.seq_lens), call.keys.shape[-2]
    blocks = min(num_tokens, num_seqs) * num_kv_heads * -(-variant.group_size // variant.rows_per_block)
    places = launching.processors() * variant.blocks_per_multiprocessor
    num_splits = number_of_splits(blocks, _longest(call), places)
    variant = replace(variant, split=num_splits > 1)  # a prefill never is
    kernels = []
    if variant.mixed:
        prefill = replace(variant, prefill=True, split=False)
        blocks = num_tokens * variant.group_size // prefill.rows_per_block + num_seqs
        kernels.append((attention_kernel(prefill), (blocks * num_kv_heads, 1)))
    items = num_seqs if variant.mixed else num_tokens
    kernels.append((attention_kernel(variant), (items * variant.blocks_per_item * num_kv_heads, num_splits)))
    items *= MAX_SPLIT_QUERIES if variant.mixed else 1
    combine = combine_kernel(variant.query, head_size, variant.sinks, variant.mixed) if variant.split else None
    softcap = (call.variant or PLAIN).softcap
    scalars = (
        np.int64(num_seqs), np.int64(num_kv_heads), *_strides(call.keys), *_strides(call.values),
        np.float32(call.scale), np.int64(call.window or 0), np.float32(softcap or 0),
    )  # fmt: skip
    return Plan(
        variant, tuple(kernels), combine and (combine, (items * num_heads, 1)), num_splits,
        (items * num_heads * num_splits * head_size, items * num_heads * num_splits), scalars,
    )  # fmt: skip


def _filled(plan: Plan, call: AttentionCall) -> list[Launch]:
    """The launches of a plan, with the arrays of this call."""
    from .flash_variant import NUM_THREADS

    xp, addresses, asked = module_of(call.query), call.addresses, call.variant or PLAIN
    lse = call.lse if call.lse is not None else xp.empty(call.query.shape[:2], dtype=np.float32)
    out, lse = _bits(call.out), lse.reshape(-1)
    loc = xp.ascontiguousarray(addresses.query_start_loc)
    slopes, sinks, *scales = (  # `lse` stands for arrays that are not read
        lse if array is None else xp.ascontiguousarray(array)
        for array in (asked.alibi_slopes, asked.sinks, asked.key_scales, asked.value_scales)
    )
    args = (
        _query(call.query, plan.variant.exact), flat_view(call.keys, np.uint32), flat_view(call.values, np.uint32),
        *_where(addresses), xp.ascontiguousarray(addresses.seq_lens), loc, *plan.scalars, slopes, sinks, *scales,
    )  # fmt: skip
    found = [Launch(kernel, grid, NUM_THREADS, (out, lse, *args)) for kernel, grid in plan.kernels]
    if plan.combine is None:
        return found
    part_out, part_lse = (xp.empty(size, dtype=np.float32) for size in plan.part_sizes)
    kernel, grid = plan.kernels[-1]
    found[-1] = Launch(kernel, grid, NUM_THREADS, (part_out, part_lse, *args))
    num_heads, num_splits = np.int64(call.query.shape[1]), np.int64(plan.num_splits)
    parts = (out, lse, part_out, part_lse, loc, num_heads, num_splits, sinks)
    return [*found, Launch(*plan.combine, NUM_THREADS, parts)]


def _longest(call: AttentionCall) -> int:
    """Keys that a sequence may have, from shapes."""
    tables = call.addresses.block_tables
    if tables is not None:
        return int(tables.shape[1] * call.keys.shape[1])
    return int(call.keys.shape[0]) // len(call.addresses.seq_lens)  # an estimate: regions are about equal


def _query(query: Array, exact: bool) -> Array:
    """The query, flat, as the kernel reads it."""
    flat = _bits(module_of(query).ascontiguousarray(query))
    if not exact:
        return flat
    return (flat.copy() if address_of(flat) % ITEM_BYTES else flat).view(np.uint32)


def _where(addresses: Addresses) -> tuple[Array, np.int64]:
    """The block tables, flat, and the step from a row to the next; or the starts."""
    tables = addresses.block_tables
    if tables is None:
        return module_of(addresses.starts).ascontiguousarray(addresses.starts), np.int64(1)
    if tables.strides[1] != tables.itemsize:
        tables = module_of(tables).ascontiguousarray(tables)
    return flat_view(tables), np.int64(tables.strides[0] // tables.itemsize)


def _shapes_of(call: AttentionCall) -> tuple[Any, ...]:
    """What decides the plan of a call."""
    query, keys, addresses, asked = call.query, call.keys, call.addresses, call.variant
    where: Array = addresses.starts if addresses.block_tables is None else addresses.block_tables
    variant = asked and (
        asked.softcap, asked.alibi_slopes is None, asked.sinks is None, asked.key_scales is None,
        asked.value_scales is None,
    )  # fmt: skip
    return (
        query.shape, query.dtype.num, keys.shape, keys.strides, keys.dtype.num, call.values.strides,
        where.shape, where.dtype.num, len(addresses.seq_lens), addresses.seq_lens.dtype.num,
        addresses.query_start_loc.dtype.num, call.scale, call.window, variant, launching.current_device(),
    )  # fmt: skip


def attend(call: AttentionCall) -> None:
    """Fill `call.out` and `call.lse`, in order with what CuPy's current stream does. The host waits for nothing."""
    out = call.out
    if call.query.shape[0] == 0 or len(call.addresses.seq_lens) == 0:
        return
    if not out.flags.c_contiguous:
        call = replace(call, out=module_of(out).empty(out.shape, dtype=out.dtype))
    shapes = _shapes_of(call)
    plan = _plans.get(shapes)
    if plan is None:
        if len(_plans) >= MAX_PLANS:
            _plans.clear()
        plan = _plans[shapes] = _plan(call)
    filled = _filled(plan, call)
    if not plan.types:
        plan.types.extend(parameters(launch.args) for launch in filled)
    for launch, types in zip(filled, plan.types, strict=True):
        launching.start(launch, types)
    if call.out is not out:
        out[...] = call.out


def _bits(array: Array) -> Array:
    """A contiguous query or output, flat: 16-bit floats as their bits."""
    flat = array.reshape(-1)
    return flat.view(np.uint16) if array.itemsize == 2 else flat


def _strides(cache_array: Array) -> list[np.uint32]:
    """The steps from a block to the next, from a slot and from a KV head, in chunks of 16 bytes."""
    strides = [np.uint32(stride // ITEM_BYTES) for stride in cache_array.strides[:-1]]
    return strides if cache_array.ndim == 4 else [np.uint32(0), *strides]

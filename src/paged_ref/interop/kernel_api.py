"""The kernels as public functions: arrays of any library in, every argument checked, the same kind of array out.

`paged_ref.kernels` is the door to them. The engine does not come this way: what is fixed for its steps is checked once
for a step (core/attention/attention.py).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..core.attention.attention import Addresses, AttentionCall, attend, by_slot
from ..core.attention.cuda import slots_follow
from ..core.device import Array, module_of, to_host
from ..extras.formats import BFLOAT16, FLOAT8, INT8, MAX_VALUE, decode, encode, format_name
from ..extras.variants import Variant
from ..tuned import store
from .dlpack import adopt, like_caller

FLOATS = (*(np.dtype(name) for name in ("float16", "float32", "float64")), BFLOAT16)
CACHES = (*FLOATS, INT8, FLOAT8)
INTEGERS = tuple(np.dtype(name) for name in ("int32", "int64"))
MAX_HEAD_SIZE = 256


# --- attention -----------------------------------------------------------------------------------------------


def paged_attention(
    query: Any,
    key_cache: Any,
    value_cache: Any,
    block_tables: Any,
    seq_lens: Any,
    query_start_loc: Any = None,
    *,
    scale: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    key_scales: Any = None,
    value_scales: Any = None,
    return_lse: bool = False,
    out: Any = None,
    backend: str = "auto",
    validate: bool | None = None,
) -> Any:
    """Causal attention over K and V that lie in blocks.

    Shapes: `query [num_tokens, num_heads, head_size]`, caches `[num_blocks, block_size, num_kv_heads, head_size]`,
    `block_tables [num_seqs, max_blocks]`, `seq_lens [num_seqs]` (keys of each sequence, this step's included),
    `query_start_loc [num_seqs + 1]` (None: one query token for each sequence). Query i of a sequence sees key j when
    `j <= i + seq_len - query_len`.

    `scale` defaults to 1/sqrt(head_size); `sliding_window=W` sees W keys, the token itself included; `softcap=c` is
    c·tanh(s/c), before ALiBi (`slope * (key_position - query_position)`) and the mask; `sinks [num_heads]` is one more
    logit without a value. `return_lse` adds `lse [num_tokens, num_heads]`, float32, natural log. A query with no
    visible key gives output 0 and lse −inf (with sinks: the sink).

    Formats: float16, float32, float64; bfloat16, in uint16 where the library has none; caches also int8, and float8
    e4m3 in uint8, with `key_scales` and `value_scales [num_kv_heads]`: the value is stored * scale. extras/formats.py
    makes them.

    Arrays are NumPy, CuPy or DLPack; the answer is of the query's kind, dtype and device. Raises ValueError with the
    argument, the value and the bound. Values on a GPU are only checked with `validate=True`. The kernel of Kwon et al.
    2023, §4.1, with the conventions of FlashAttention and of today's vLLM.

    >>> import numpy as np
    >>> query = np.zeros((1, 2, 4), np.float32)  # every key is seen alike
    >>> values = np.arange(3 * 2, dtype=np.float32).reshape(3, 2, 1, 1) * np.ones(4, np.float32)
    >>> paged_attention(query, values, values, np.array([[2, 0]]), np.array([3]))[0, 0]  # blocks 2 and 0: 4, 5, then 0
    array([3., 3., 3., 3.], dtype=float32)
    """
    variant = Variant(softcap, alibi_slopes, sinks, key_scales, value_scales)
    where = Addresses(seq_lens, query_start_loc, block_tables)
    return _attention(
        ("key_cache", "value_cache"), query, key_cache, value_cache, where, scale, sliding_window, variant, return_lse,
        out, backend, validate,
    )  # fmt: skip


def naive_attention(
    query: Any,
    keys: Any,
    values: Any,
    starts: Any,
    seq_lens: Any,
    query_start_loc: Any = None,
    *,
    scale: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    key_scales: Any = None,
    value_scales: Any = None,
    return_lse: bool = False,
    out: Any = None,
    backend: str = "auto",
    validate: bool | None = None,
) -> Any:
    """Causal attention over K and V in one contiguous region for each sequence.

    `keys, values [num_slots, num_kv_heads, head_size]`, `starts [num_seqs]` the first slot of each region; all the rest
    as in `paged_attention`.

    >>> import numpy as np
    >>> query, values = np.zeros((1, 2, 4), np.float32), np.ones((6, 1, 4), np.float32)
    >>> naive_attention(query, values, values, starts=np.array([1]), seq_lens=np.array([3])).shape
    (1, 2, 4)
    """
    variant = Variant(softcap, alibi_slopes, sinks, key_scales, value_scales)
    where = Addresses(seq_lens, query_start_loc, starts=starts)
    return _attention(
        ("keys", "values"), query, keys, values, where, scale, sliding_window, variant, return_lse, out, backend,
        validate,
    )  # fmt: skip


def _attention(
    names: tuple[str, str], query: Any, keys: Any, values: Any, where: Addresses, scale: float | None,
    window: int | None, variant: Variant, return_lse: bool, out: Any, backend: str, validate: bool | None,
) -> Any:  # fmt: skip
    """Check everything, fill in what the caller left out, and run it. `names` are the caller's words for K and V."""
    caller, given_out = query, out
    query, keys, values = adopt(query, "query"), adopt(keys, names[0]), adopt(values, names[1])
    xp = module_of(query)
    _check_query(query)
    _check_caches(keys, values, names, paged=where.starts is None, query=query)
    addresses = _addresses(query, where)
    if window is not None and window < 1:
        raise ValueError(f"sliding_window is {window}; at least 1 is needed (the token itself)")
    checked = _variant(variant, keys, names[0], query.shape[1])
    out = xp.empty(query.shape, dtype=query.dtype) if out is None else _checked_out(adopt(out, "out"), query)
    lse = xp.empty(query.shape[:2], dtype=np.float32) if return_lse else None
    call = AttentionCall(
        query, keys, values, addresses, 1.0 / math.sqrt(query.shape[2]) if scale is None else float(scale), window,
        out, lse, checked,
    )  # fmt: skip
    _check_devices(call, names)
    if validate or (validate is None and xp is np):
        _check_values(call, backend)
    attend(call, backend)
    result = like_caller(out, caller) if given_out is None else given_out
    return (result, like_caller(lse, caller)) if return_lse else result


def _check_query(query: Array) -> None:
    _require_shape(query.ndim == 3, "query", query, "[num_tokens, num_heads, head_size]")
    _require_dtype(query, "query", FLOATS)
    if not 1 <= query.shape[2] <= MAX_HEAD_SIZE:
        raise ValueError(f"query has head_size {query.shape[2]}; 1 to {MAX_HEAD_SIZE} is supported")


def _check_caches(keys: Array, values: Array, names: tuple[str, str], paged: bool, query: Array) -> None:
    num_heads, head_size = query.shape[1:]
    layout = f"[{'num_blocks, block_size' if paged else 'num_slots'}, num_kv_heads, head_size]"
    for array, name in ((keys, names[0]), (values, names[1])):
        _require_shape(array.ndim == (4 if paged else 3), name, array, layout)
        _require_dtype(array, name, CACHES)
        if array.shape[-1] != head_size:
            raise ValueError(f"{name} has head_size {array.shape[-1]}; query has {head_size}")
    if keys.shape != values.shape or keys.dtype != values.dtype:
        raise ValueError(
            f"{names[1]} is {_described(values)}; {names[0]} is {_described(keys)}, and the two must agree"
        )
    num_kv_heads = keys.shape[-2]
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(f"query has {num_heads} heads; a multiple of the {num_kv_heads} KV heads is needed")
    if paged and keys.shape[1] < 1:
        raise ValueError(f"{names[0]} has block_size {keys.shape[1]}; at least 1 is needed")


def _addresses(query: Array, where: Addresses) -> Addresses:
    """The addresses of a call, with the right shapes and dtypes."""
    seq_lens, loc = _indices(where.seq_lens, "seq_lens", "[num_seqs]", None), where.query_start_loc
    num_tokens, num_seqs = query.shape[0], len(seq_lens)
    if loc is None:
        if num_tokens != num_seqs:
            raise ValueError(
                f"query has {num_tokens} tokens for {num_seqs} sequences; without query_start_loc each has one"
            )
        loc = module_of(query).arange(num_seqs + 1, dtype=np.int32)
    loc = _indices(loc, "query_start_loc", f"[{num_seqs + 1}]", num_seqs + 1)
    if where.starts is not None:
        return Addresses(seq_lens, loc, starts=_indices(where.starts, "starts", f"[{num_seqs}]", num_seqs))
    shape = f"[{num_seqs}, max_blocks]"
    return Addresses(seq_lens, loc, _indices(where.block_tables, "block_tables", shape, num_seqs, None))


def _indices(given: Any, name: str, shape: str, *sizes: int | None) -> Array:
    """`given` as integers of these sizes; None is any size."""
    array = adopt(given, name)
    fits = array.ndim == len(sizes) and all(size in (None, n) for size, n in zip(sizes, array.shape, strict=True))
    _require_shape(fits, name, array, shape)
    _require_dtype(array, name, INTEGERS)
    return array


def _variant(variant: Variant, keys: Array, name: str, num_heads: int) -> Variant | None:
    """The variant with checked arrays; None where attention is plain."""
    if variant.softcap is not None and not variant.softcap > 0:
        raise ValueError(f"softcap is {variant.softcap}; a positive number is needed")
    slopes = _per_head(variant.alibi_slopes, "alibi_slopes", num_heads)
    sinks = _per_head(variant.sinks, "sinks", num_heads)
    scales = _scales_of(keys.dtype, name, keys.shape[-2], variant.key_scales, variant.value_scales)
    checked = Variant(variant.softcap, slopes, sinks, *scales)
    return checked if str(checked) else None


def _checked_out(out: Array, query: Array) -> Array:
    if out.shape != query.shape or out.dtype != query.dtype:
        raise ValueError(f"out is {_described(out)}; {_described(query)} is needed, as query is")
    if module_of(out) is np and not out.flags.writeable:
        raise ValueError("out is read-only")
    return out


def _check_devices(call: AttentionCall, names: tuple[str, str]) -> None:
    """All arrays must be of the query's library."""
    xp = module_of(call.query)
    arrays: dict[str, Array | None] = {name: getattr(call.addresses, name) for name in call.addresses.__slots__}
    arrays |= {names[0]: call.keys, names[1]: call.values, "out": call.out}
    if call.variant is not None:
        arrays |= {name: getattr(call.variant, name) for name in call.variant.__slots__ if name != "softcap"}
    for name, array in arrays.items():
        if array is not None and module_of(array) is not xp:
            raise ValueError(f"{name} is a {module_of(array).__name__} array; query is a {xp.__name__} array")


def _check_values(call: AttentionCall, backend: str) -> None:
    """Bounds of what the kernels will follow: lengths, starts, query counts, block ids, scales."""
    where = call.addresses
    if call.variant is not None:
        _check_scales(call.variant.key_scales, call.variant.value_scales)
    if where.block_tables is not None and module_of(call.query) is np and backend in ("auto", "cpu-simd"):
        from ..tuned import cpu_simd  # compiled code: loaded when it is needed

        if cpu_simd.unavailable() is None and cpu_simd.in_bounds(where, call.query.shape[0], *call.keys.shape[:2]):
            return
    arrays = (where.seq_lens, where.query_start_loc, where.block_tables, where.starts)
    on_host = Addresses(*(None if array is None else to_host(array) for array in arrays))
    num_blocks, block_size = (call.keys.shape[0], call.keys.shape[1] if where.starts is None else 1)
    on_host.check(call.query.shape[0], num_blocks, block_size)


# --- writing and copying -------------------------------------------------------------------------------------


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
    scales = _scales_of(key_cache.dtype, "key_cache", key_cache.shape[-2], key_scales, value_scales)
    if slots.shape != key.shape[:1] or slots.dtype.kind != "i":
        raise ValueError(f"slot_mapping is {slots.dtype}{list(slots.shape)}; [{key.shape[0]}] integers are needed")
    if validate or (validate is None and module_of(key) is np):
        _check_scales(*scales)
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
            f"key_cache is {_described(key_cache)} and value_cache {_described(value_cache)}; both must be alike, "
            "[num_blocks, block_size, num_kv_heads, head_size] or [num_slots, num_kv_heads, head_size]"
        )
    for array, name, known in ((key, "key", FLOATS), (value, "value", FLOATS), (key_cache, "key_cache", CACHES)):
        _require_dtype(array, name, known)


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


def merge_states(outputs: Any, lses: Any) -> tuple[Any, Any]:
    """Join attention over parts of the keys into attention over all of them.

    `outputs [num_parts, num_tokens, num_heads, head_size]` and `lses [num_parts, num_tokens, num_heads]` (natural log)
    come from attention over disjoint sets of keys; returns `(output, lse)` without the first axis. A part that saw no
    key (lse −inf, or +inf as in flash-attn 2) adds nothing, whatever its output; where all parts saw none, output is 0
    and lse −inf. The split-KV combine of flash-decoding; FlashInfer's merge_states.

    >>> import numpy as np
    >>> output, lse = merge_states(np.array([[[[1.0]]], [[[4.0]]]]), np.log([[[2.0]], [[1.0]]]))  # 2 keys, and 1 key
    >>> output.item(), round(np.exp(lse).item(), 6)
    (2.0, 3.0)
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
    empty = xp.isinf(lses)  # [num_parts, num_tokens, num_heads]
    lses = xp.where(empty, -xp.inf, lses)
    outputs = xp.where(empty[..., None], 0, decode(outputs))
    highest = lses.max(axis=0)  # [num_tokens, num_heads]
    shift = xp.where(xp.isfinite(highest), highest, xp.zeros_like(highest))
    weights = xp.exp(lses - shift)  # [num_parts, num_tokens, num_heads]
    total = weights.sum(axis=0)  # [num_tokens, num_heads]
    mixed = (outputs * weights[..., None]).sum(axis=0)  # [num_tokens, num_heads, head_size]
    output = encode(mixed / xp.where(total > 0, total, xp.ones_like(total))[..., None], dtype)
    with np.errstate(divide="ignore"):
        lse = xp.log(total) + shift
    return like_caller(output, caller), like_caller(lse, caller)


# --- what the checks share -----------------------------------------------------------------------------------


def _scales_of(
    dtype: np.dtype[Any], name: str, num_kv_heads: int, key_scales: Any, value_scales: Any
) -> tuple[Array | None, Array | None]:
    """The scales of K and V as float32 [num_kv_heads], for the caches that need them, and None for the others."""
    scales = {"key_scales": key_scales, "value_scales": value_scales}
    for scales_name, given in scales.items():
        if dtype in MAX_VALUE and given is None:
            raise ValueError(
                f"{name} is {format_name(dtype)}; {scales_name} [{num_kv_heads}] is needed, one for each KV head"
            )
        if dtype not in MAX_VALUE and given is not None:
            raise ValueError(
                f"{scales_name} is given; {name} is {format_name(dtype)}, and only int8 and float8 have scales"
            )
    key, value = (_per_head(given, name, num_kv_heads, "KV head") for name, given in scales.items())
    return key, value


def _check_scales(key_scales: Array | None, value_scales: Array | None) -> None:
    """Looks at values: not for arrays on a GPU, unless asked to."""
    for scales, name in ((key_scales, "key_scales"), (value_scales, "value_scales")):
        scales = None if scales is None else to_host(scales)
        if scales is not None and not (np.isfinite(scales) & (scales > 0)).all():
            head = int(np.argmin(np.isfinite(scales) & (scales > 0)))
            raise ValueError(f"{name}[{head}] is {scales[head]}; a positive number is needed")


def _per_head(values: Any, name: str, num_heads: int, what: str = "head") -> Array | None:
    if values is None:
        return None
    values = adopt(values, name)
    _require_shape(values.shape == (num_heads,), name, values, f"[{num_heads}], one for each {what}")
    return values.astype(np.float32, copy=False)


def _described(array: Array) -> str:
    return f"{format_name(array.dtype)}{list(array.shape)}"


def _require_shape(ok: bool, name: str, array: Array, shape: str) -> None:
    if not ok:
        raise ValueError(f"{name} has shape {list(array.shape)}; {shape} is needed")


def _require_dtype(array: Array, name: str, known: tuple[np.dtype[Any], ...]) -> None:
    if array.dtype not in known:
        words = (
            f"{dtype} ({format_name(dtype)})" if format_name(dtype) != dtype.name else dtype.name for dtype in known
        )
        raise ValueError(f"{name} is {array.dtype}; known are {', '.join(words)}")

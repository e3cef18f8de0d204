"""Attention as public functions: arrays of any library in, every argument checked, the same kind of array out.

`paged_ref.kernels` is the door to them, and to those of cache_api.py. The engine does not come this way: what is fixed
for its steps is checked once for a step (core/attention/attention.py).
"""

from __future__ import annotations

import math
from functools import cache, lru_cache
from typing import Any

import numpy as np

from ..core.attention.attention import Addresses, AttentionCall, attend
from ..core.device import module_of, to_host
from ..extras.formats import decode, encode
from ..extras.variants import Variant
from .array_checks import (
    CACHES,
    FLOATS,
    INTEGERS,
    Kind,
    check_scales,
    described,
    require_dtype,
    require_per_head,
    require_scales,
    require_shape,
)  # fmt: skip
from .dlpack import adopt, like_caller

MAX_HEAD_SIZE = 256
PER_HEAD = ("alibi_slopes", "sinks", "key_scales", "value_scales")
OPTIONAL = ("query_start_loc", *PER_HEAD, "out")


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
    given = {
        "query": query, "key_cache": key_cache, "value_cache": value_cache, "block_tables": block_tables,
        "seq_lens": seq_lens, "query_start_loc": query_start_loc, "alibi_slopes": alibi_slopes, "sinks": sinks,
        "key_scales": key_scales, "value_scales": value_scales, "out": out,
    }  # fmt: skip
    return _attention(given, scale, sliding_window, softcap, return_lse, backend, validate)


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
    given = {
        "query": query, "keys": keys, "values": values, "starts": starts,
        "seq_lens": seq_lens, "query_start_loc": query_start_loc, "alibi_slopes": alibi_slopes, "sinks": sinks,
        "key_scales": key_scales, "value_scales": value_scales, "out": out,
    }  # fmt: skip
    return _attention(given, scale, sliding_window, softcap, return_lse, backend, validate)


def _attention(
    given: dict[str, Any], scale: float | None, window: int | None, softcap: float | None, return_lse: bool,
    backend: str, validate: bool | None,
) -> Any:  # fmt: skip
    """Check everything, fill in what the caller left out, and run it. `given` are the arrays, in the order above."""
    arrays = {name: adopt(array, name) for name, array in given.items() if array is not None or name not in OPTIONAL}
    _check_kinds(tuple([(name, type(array), array.dtype, array.shape) for name, array in arrays.items()]))
    query, keys, values, where, seq_lens, *_ = arrays.values()
    xp = module_of(query)
    if window is not None and window < 1:
        raise ValueError(f"sliding_window is {window}; at least 1 is needed (the token itself)")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}; a positive number is needed")
    out, loc = arrays.get("out"), arrays.get("query_start_loc")
    if out is None:
        out = xp.empty(query.shape, query.dtype)
    elif xp is np and not out.flags.writeable:
        raise ValueError("out is read-only")
    lse = xp.empty(query.shape[:2], np.float32) if return_lse else None
    loc = xp.arange(len(seq_lens) + 1, dtype=np.int32) if loc is None else loc
    addresses = Addresses(seq_lens, loc, starts=where) if "starts" in arrays else Addresses(seq_lens, loc, where)
    per_head = {name: arrays[name].astype(np.float32, copy=False) for name in PER_HEAD if name in arrays}
    call = AttentionCall(
        query, keys, values, addresses, 1.0 / math.sqrt(query.shape[2]) if scale is None else float(scale), window,
        out, lse, Variant(softcap, **per_head) if per_head or softcap is not None else None,
    )  # fmt: skip
    if validate or (validate is None and xp is np):
        _check_values(call, backend)
    attend(call, backend)
    result = like_caller(out, given["query"]) if given["out"] is None else given["out"]
    return (result, like_caller(lse, given["query"])) if return_lse else result


@lru_cache
def _check_kinds(kinds: tuple[tuple[Any, ...], ...]) -> None:
    """Check all that the kinds of the arrays decide. What was right is remembered, so that a call like an earlier one
    costs one look-up; an error is not remembered."""
    given = {name: Kind(name, *kind) for name, *kind in kinds}
    query, keys, values, where, seq_lens, *_ = given.values()
    _check_query(query)
    _check_caches(query, keys, values, paged=where.name != "starts")
    num_tokens, num_seqs = query.shape[0], _check_indices(seq_lens, "[num_seqs]", None)
    if "query_start_loc" in given:
        _check_indices(given["query_start_loc"], f"[{num_seqs + 1}]", num_seqs + 1)
    elif num_tokens != num_seqs:
        raise ValueError(f"query has length {num_tokens}, and seq_lens {num_seqs}; query_start_loc is needed")
    if where.name == "starts":
        _check_indices(where, f"[{num_seqs}]", num_seqs)
    else:
        _check_indices(where, f"[{num_seqs}, max_blocks]", num_seqs, None)
    for name in ("alibi_slopes", "sinks"):
        require_per_head(given, name, query.shape[1], "head")
    require_scales(keys, keys.name, given)
    out = given.get("out", query)
    if out.shape != query.shape or out.dtype != query.dtype:
        raise ValueError(f"out is {described(out)}; {described(query)} is needed, as query is")
    for name, kind in given.items():
        if kind.library != query.library:
            raise ValueError(f"{name} is a {kind.library} array; query is a {query.library} array")


def _check_query(query: Kind) -> None:
    require_shape(len(query.shape) == 3, "query", query, "[num_tokens, num_heads, head_size]")
    require_dtype(query, "query", FLOATS)
    if not 1 <= query.shape[2] <= MAX_HEAD_SIZE:
        raise ValueError(f"query has head_size {query.shape[2]}; 1 to {MAX_HEAD_SIZE} is supported")


def _check_caches(query: Kind, keys: Kind, values: Kind, paged: bool) -> None:
    num_heads, head_size = query.shape[1:]
    layout = f"[{'num_blocks, block_size' if paged else 'num_slots'}, num_kv_heads, head_size]"
    for array in (keys, values):
        require_shape(len(array.shape) == (4 if paged else 3), array.name, array, layout)
        require_dtype(array, array.name, CACHES)
        if array.shape[-1] != head_size:
            raise ValueError(f"{array.name} has head_size {array.shape[-1]}; query has {head_size}")
    if keys.shape != values.shape or keys.dtype != values.dtype:
        raise ValueError(
            f"{values.name} is {described(values)}; {keys.name} is {described(keys)}, and the two must agree"
        )
    num_kv_heads = keys.shape[-2]
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(f"query has {num_heads} heads; a multiple of the {num_kv_heads} KV heads is needed")
    if paged and keys.shape[1] < 1:
        raise ValueError(f"{keys.name} has block_size {keys.shape[1]}; at least 1 is needed")


def _check_indices(array: Kind, shape: str, *sizes: int | None) -> int:
    """Check that these are integers of these sizes; None is any size. Return the first size."""
    fits = len(array.shape) == len(sizes) and all(size in (None, n) for size, n in zip(sizes, array.shape, strict=True))
    require_shape(fits, array.name, array, shape)
    require_dtype(array, array.name, INTEGERS)
    return array.shape[0]


@cache
def _compiled_checks() -> Any:
    """The module with a compiled check of addresses; None where compiled code cannot run."""
    from ..tuned import cpu_simd  # loaded when it is needed

    return cpu_simd if cpu_simd.unavailable() is None else None


def _check_values(call: AttentionCall, backend: str) -> None:
    """Bounds of what the kernels will follow: lengths, starts, query counts, block ids, scales."""
    where = call.addresses
    if call.variant is not None:
        check_scales(call.variant.key_scales, call.variant.value_scales)
    sizes = call.query.shape[0], call.keys.shape[0], call.keys.shape[1] if where.starts is None else 1
    if module_of(call.query) is np and backend in ("auto", "cpu-simd"):
        compiled = _compiled_checks()
        if compiled is not None and compiled.in_bounds(where, *sizes):
            return
    arrays = (where.seq_lens, where.query_start_loc, where.block_tables, where.starts)
    Addresses(*(None if array is None else to_host(array) for array in arrays)).check(*sizes)


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

"""From what a caller passes to what a kernel reads: one checked `AttentionCall`.

Every backend takes the same `AttentionCall` and fills its `out` (and `lse`), so shapes, dtypes and bounds
are checked here, once, and no kernel checks anything.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..core.device import Array, module_of, to_host
from ..extras.formats import BFLOAT16, FLOAT8, INT8, LARGEST, word

FLOATS = (*(np.dtype(name) for name in ("float16", "float32", "float64")), BFLOAT16)
CACHES = (*FLOATS, INT8, FLOAT8)
INTEGERS = tuple(np.dtype(name) for name in ("int32", "int64"))
MAX_HEAD_SIZE = 256


@dataclass(slots=True)
class AttentionCall:
    """One call of attention over keys and values that lie in blocks or in contiguous regions.

    Paged:      keys, values [num_blocks, block_size, num_kv_heads, head_size], block_tables [num_seqs, max_blocks]
    Contiguous: keys, values [num_slots, num_kv_heads, head_size],              starts [num_seqs]
    Formats that NumPy lacks are known by the dtype of their bits: see quantize.py.
    """

    query: Array  # [num_tokens, num_heads, head_size]
    keys: Array
    values: Array
    block_tables: Array | None  # int32 or int64; None in a contiguous call
    starts: Array | None  # int32 or int64; None in a paged call
    seq_lens: Array  # [num_seqs] keys of each sequence, this step's tokens included
    query_start_loc: Array  # [num_seqs + 1] cumulative query counts
    scale: float
    sliding_window: int | None
    softcap: float | None
    alibi_slopes: Array | None  # [num_heads] float32
    sinks: Array | None  # [num_heads] float32
    key_scales: Array | None  # [num_kv_heads] float32, with int8 and float8 caches only: value = stored * scale
    value_scales: Array | None  # [num_kv_heads] float32
    out: Array  # [num_tokens, num_heads, head_size], the query's dtype
    lse: Array | None  # [num_tokens, num_heads] float32
    copy_tiles: bool = False  # `cpu` copies each tile before it reads it, as out_of_core.py wants

    @property
    def paged(self) -> bool:
        return self.block_tables is not None

    @property
    def block_size(self) -> int:
        """Slots in a block; 1 in a contiguous call, where every slot is a block of its own."""
        return int(self.keys.shape[1]) if self.paged else 1

    @property
    def num_seqs(self) -> int:
        return int(self.seq_lens.shape[0])

    @property
    def num_heads(self) -> int:
        return int(self.query.shape[1])

    @property
    def num_kv_heads(self) -> int:
        return int(self.keys.shape[-2])

    @property
    def head_size(self) -> int:
        return int(self.query.shape[2])


# Formats of other libraries that NumPy, CuPy and DLPack between them do not carry: taken as their bits.
_BITS = {"bfloat16": "uint16", "float8_e4m3fn": "uint8"}


def _bits_of(array: Any) -> str | None:
    """The dtype that holds the bits of such an array; None for all others."""
    dtype = getattr(array, "dtype", None)
    if getattr(dtype, "isbuiltin", 0) == 1:  # NumPy's own: a name takes longer to make than all other checks
        return None
    return _BITS.get(str(dtype).rpartition(".")[2])


def adopt(array: Any, name: str) -> Array:
    """`array` as NumPy or CuPy, sharing its memory. Anything that speaks DLPack is taken.

    torch, JAX and ml_dtypes arrays of bfloat16 and float8_e4m3fn come as uint16 and uint8, without a copy.
    """
    if (bits := _bits_of(array)) is not None:
        array = array.view(getattr(_library(array), bits, bits))
    module = module_of(array)
    if isinstance(array, module.ndarray):
        return array
    if not hasattr(array, "__dlpack__"):
        raise ValueError(f"{name} is a {type(array).__name__}; an array is expected (NumPy, CuPy or DLPack)")
    if hasattr(array, "__dlpack_device__") and array.__dlpack_device__()[0] == 2:  # 2 is kDLCUDA
        import cupy

        return cupy.from_dlpack(array)
    try:
        return np.from_dlpack(array)
    except (BufferError, RuntimeError) as error:
        raise ValueError(f"{name} cannot be read through DLPack: {error}") from None


def like_caller(result: Array, caller: Any) -> Any:
    """`result` in the kind of array that `caller` is: a torch tensor for a torch tensor, and so on."""
    if not isinstance(caller, module_of(result).ndarray):
        library = _library(caller)
        from_dlpack = getattr(library, "from_dlpack", None) or library.numpy.from_dlpack
        result = from_dlpack(result)
    bits = _bits_of(caller)
    return result if bits is None or str(result.dtype).rpartition(".")[2] != bits else result.view(caller.dtype)


def _library(array: Any) -> Any:
    return sys.modules[type(array).__module__.partition(".")[0]]


def build_call(
    query: Any,
    keys: Any,
    values: Any,
    seq_lens: Any,
    query_start_loc: Any,
    *,
    block_tables: Any = None,
    starts: Any = None,
    names: tuple[str, str],
    scale: float | None,
    sliding_window: int | None,
    softcap: float | None,
    alibi_slopes: Any,
    sinks: Any,
    key_scales: Any,
    value_scales: Any,
    return_lse: bool,
    out: Any,
    validate: bool | None,
) -> AttentionCall:
    """Check everything and fill in what the caller left out. `names` are the caller's words for K and V.

    `validate=None` checks shapes always and values where they lie in host memory (a look at values on a
    GPU would make the host wait); True checks values everywhere, False nowhere.
    """
    query = adopt(query, "query")
    xp = module_of(query)
    keys, values, seq_lens = adopt(keys, names[0]), adopt(values, names[1]), adopt(seq_lens, "seq_lens")
    _require(query.ndim == 3, "query", query, "[num_tokens, num_heads, head_size]")
    num_tokens, num_heads, head_size = query.shape
    require_dtype(query, "query", FLOATS)
    if not 1 <= head_size <= MAX_HEAD_SIZE:
        raise ValueError(f"query has head_size {head_size}; 1 to {MAX_HEAD_SIZE} is supported")

    ndim = 4 if block_tables is not None else 3
    layout = f"[{'num_blocks, block_size' if ndim == 4 else 'num_slots'}, num_kv_heads, head_size]"
    for array, name in ((keys, names[0]), (values, names[1])):
        _require(array.ndim == ndim, name, array, layout)
        require_dtype(array, name, CACHES)
        if array.shape[-1] != head_size:
            raise ValueError(f"{name} has head_size {array.shape[-1]}; query has {head_size}")
    if keys.shape != values.shape or keys.dtype != values.dtype:
        raise ValueError(
            f"{names[1]} is {word(values.dtype)}{list(values.shape)}; "
            f"{names[0]} is {word(keys.dtype)}{list(keys.shape)}, "
            "and the two must agree"
        )
    num_kv_heads = keys.shape[-2]
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(f"query has {num_heads} heads; a multiple of the {num_kv_heads} KV heads is needed")
    if ndim == 4 and keys.shape[1] < 1:
        raise ValueError(f"{names[0]} has block_size {keys.shape[1]}; at least 1 is needed")

    _require(seq_lens.ndim == 1, "seq_lens", seq_lens, "[num_seqs]")
    num_seqs = seq_lens.shape[0]
    if query_start_loc is None:
        if num_tokens != num_seqs:
            raise ValueError(
                f"query has {num_tokens} tokens for {num_seqs} sequences; without query_start_loc each has one"
            )
        query_start_loc = xp.arange(num_seqs + 1, dtype=np.int32)
    query_start_loc = adopt(query_start_loc, "query_start_loc")
    _require(query_start_loc.shape == (num_seqs + 1,), "query_start_loc", query_start_loc, f"[{num_seqs + 1}]")
    integers = [(seq_lens, "seq_lens"), (query_start_loc, "query_start_loc")]
    if block_tables is not None:
        block_tables = adopt(block_tables, "block_tables")
        ok = block_tables.ndim == 2 and block_tables.shape[0] == num_seqs
        _require(ok, "block_tables", block_tables, f"[{num_seqs}, max_blocks]")
        integers.append((block_tables, "block_tables"))
    else:
        starts = adopt(starts, "starts")
        _require(starts.shape == (num_seqs,), "starts", starts, f"[{num_seqs}]")
        integers.append((starts, "starts"))
    for array, name in integers:
        require_dtype(array, name, INTEGERS)

    if scale is None:
        scale = 1.0 / math.sqrt(head_size)
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window is {sliding_window}; at least 1 is needed (the token itself)")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}; a positive number is needed")
    alibi_slopes = _per_head(alibi_slopes, "alibi_slopes", num_heads)
    sinks = _per_head(sinks, "sinks", num_heads)
    key_scales, value_scales = scales_of(keys.dtype, names[0], num_kv_heads, key_scales, value_scales)
    if out is None:
        out = xp.empty(query.shape, dtype=query.dtype)
    else:
        out = adopt(out, "out")
        if out.shape != query.shape or out.dtype != query.dtype:
            raise ValueError(
                f"out is {word(out.dtype)}{list(out.shape)}; {word(query.dtype)}{list(query.shape)} is needed, "
                "as query is"
            )
        if module_of(out) is np and not out.flags.writeable:
            raise ValueError("out is read-only")
    lse = xp.empty((num_tokens, num_heads), dtype=np.float32) if return_lse else None

    call = AttentionCall(
        query, keys, values, block_tables, starts, seq_lens, query_start_loc, float(scale),
        sliding_window, softcap, alibi_slopes, sinks, key_scales, value_scales, out, lse,
    )  # fmt: skip
    for array, name in (*integers, (keys, names[0]), (values, names[1]), (alibi_slopes, "alibi_slopes"),
                        (sinks, "sinks"), (key_scales, "key_scales"), (value_scales, "value_scales"),
                        (out, "out")):  # fmt: skip
        if array is not None and module_of(array) is not xp:
            raise ValueError(f"{name} is a {module_of(array).__name__} array; query is a {xp.__name__} array")
    if validate or (validate is None and xp is np):
        check_values(call)
    return call


def check_values(call: AttentionCall) -> None:
    """Bounds of what the kernels will follow: lengths, starts, query counts, block ids."""
    seq_lens, loc = to_host(call.seq_lens), to_host(call.query_start_loc)
    num_tokens = call.query.shape[0]
    if seq_lens.size and seq_lens.min() < 0:
        s = int(seq_lens.argmin())
        raise ValueError(f"seq_lens[{s}] is {seq_lens[s]}; at least 0 is needed")
    if loc[0] != 0 or loc[-1] != num_tokens or (np.diff(loc) < 0).any():
        raise ValueError(
            f"query_start_loc must rise from 0 to the {num_tokens} tokens of query; it is {loc[:8].tolist()}"
            + ("..." if loc.size > 8 else "")
        )
    check_scales(call.key_scales, call.value_scales)
    if call.block_tables is not None:
        tables, block_size, num_blocks = to_host(call.block_tables), call.block_size, call.keys.shape[0]
        needed = -(-seq_lens.astype(np.int64) // block_size)  # blocks of each sequence
        if needed.size and needed.max() > tables.shape[1]:
            s = int(needed.argmax())
            raise ValueError(
                f"seq_lens[{s}] is {seq_lens[s]}; its block table holds {tables.shape[1]} blocks "
                f"of {block_size} = {tables.shape[1] * block_size} tokens"
            )
        bad = ((tables < 0) | (tables >= num_blocks)) & (np.arange(tables.shape[1]) < needed[:, None])
        if bad.any():
            s, b = (int(i) for i in np.argwhere(bad)[0])
            raise ValueError(f"block_tables[{s}, {b}] is {tables[s, b]}; the cache has blocks 0 to {num_blocks - 1}")
        return
    starts, num_slots = to_host(call.starts), call.keys.shape[0]
    bad = (seq_lens > 0) & ((starts < 0) | (starts.astype(np.int64) + seq_lens > num_slots))
    if bad.any():
        s = int(bad.argmax())
        raise ValueError(
            f"starts[{s}] is {starts[s]}; with {seq_lens[s]} keys the region leaves the cache of {num_slots} slots"
        )


def scales_of(
    dtype: np.dtype[Any], name: str, num_kv_heads: int, key_scales: Any, value_scales: Any
) -> tuple[Array | None, Array | None]:
    """The scales of K and V as float32 [num_kv_heads], for the caches that need them, and None for the others."""
    if key_scales is None and value_scales is None and dtype not in LARGEST:
        return None, None
    scales = {"key_scales": key_scales, "value_scales": value_scales}
    for scales_name, given in scales.items():
        if dtype in LARGEST and given is None:
            raise ValueError(f"{name} is {word(dtype)}; {scales_name} [{num_kv_heads}] is needed, one for each KV head")
        if dtype not in LARGEST and given is not None:
            raise ValueError(f"{scales_name} is given; {name} is {word(dtype)}, and only int8 and float8 have scales")
    return tuple(_per_head(given, name, num_kv_heads, "KV head") for name, given in scales.items())  # type: ignore[return-value]


def check_scales(key_scales: Array | None, value_scales: Array | None) -> None:
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
    _require(values.shape == (num_heads,), name, values, f"[{num_heads}], one for each {what}")
    return values.astype(np.float32, copy=False)


def _require(ok: bool, name: str, array: Array, shape: str) -> None:
    if not ok:
        raise ValueError(f"{name} has shape {list(array.shape)}; {shape} is needed")


def require_dtype(array: Array, name: str, known: tuple[np.dtype[Any], ...]) -> None:
    if array.dtype not in known:
        words = (f"{dtype} ({word(dtype)})" if word(dtype) != dtype.name else dtype.name for dtype in known)
        raise ValueError(f"{name} is {array.dtype}; known are {', '.join(words)}")

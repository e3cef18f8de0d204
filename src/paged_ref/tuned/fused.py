"""What stands between a decoder's products, in one kernel each, for CuPy arrays.

As array code each is five launches or more, and in decoding a launch takes longer than its work. The array functions
of core/model/llama.py are the oracle, and take the calls that the kernels cannot.
"""

from __future__ import annotations

from functools import cache, lru_cache
from types import ModuleType

import numpy as np

from ..core.attention.cuda import Launch
from ..core.device import Array, module_of
from ..core.model import llama
from . import launching
from .flat_views import flat_view

THREADS = 256


@cache
def _kernels() -> ModuleType:
    from . import fused_kernels  # here: it imports Numba

    return fused_kernels


@lru_cache(maxsize=256)
def _sizes(*sizes: int) -> tuple[np.int64, ...]:
    return tuple(map(np.int64, sizes))


def takes(*arrays: Array) -> bool:
    """True where the kernels can take these arrays: float16 or float32, on a GPU."""
    return launching.takes(arrays[0]) and all([array.dtype.char in "ef" for array in arrays])


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """`x [..., size]` over its root mean square, times `weight [size]`."""
    if weight.ndim > 1 or not takes(x, weight):
        return llama.rms_norm(x, weight, eps)
    out, size = module_of(x).empty(x.shape, x.dtype), x.shape[-1]
    rows = module_of(x).ascontiguousarray(x).reshape(-1)
    args = (out.reshape(-1), rows, weight, *_sizes(size), np.float32(eps))
    launching.start(Launch(_kernels().rms_norm_kernel, (x.size // size, 1), 32 * _kernels().WARPS, args))
    return out


def add_norm(x: Array, change: Array, weight: Array, eps: float) -> Array:
    """Add `change` to `x`, in place, and give rms_norm(x, weight, eps): all contiguous, [num_tokens, size]."""
    out, (num_tokens, size) = module_of(x).empty(x.shape, x.dtype), x.shape
    args = (out.reshape(-1), x.reshape(-1), change.reshape(-1), weight, *_sizes(size), np.float32(eps))
    launching.start(Launch(_kernels().add_norm_kernel, (num_tokens, 1), 32 * _kernels().WARPS, args))
    return out


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """RoPE of `x [num_tokens, heads, head_size]`; `cos` and `sin [num_tokens, 1, head_size]` of minus the
    angle for the first half and of the angle for the second. The heads of a token lie side by side in `x`."""
    if not (takes(x, cos, sin) and x[0].flags.c_contiguous):
        return llama.rotate(x, cos, sin)
    out, (num_tokens, heads, head_size) = module_of(x).empty(x.shape, x.dtype), x.shape
    sizes = _sizes(heads, head_size // 2, x.strides[0] // x.itemsize)
    args = (out.reshape(-1), flat_view(x), cos.reshape(-1), sin.reshape(-1), *sizes)
    launching.start(Launch(_kernels().rotate_kernel, (num_tokens, heads), 32, args))
    return out


def turn_and_write(
    qk: Array, value: Array, cos: Array, sin: Array, key_cache: Array, value_cache: Array, slot_mapping: Array
) -> Array:
    """RoPE of queries and keys, and the write of K and V to their slots. Returns the queries, contiguous.

    `qk [num_tokens, num_heads + num_kv_heads, head_size]`, `value [num_tokens, num_kv_heads, head_size]`: the heads of
    a token lie side by side. `key_cache, value_cache [num_slots, num_kv_heads, head_size]` are contiguous.
    """
    (num_tokens, both, head_size), num_kv_heads, whole = qk.shape, value.shape[1], qk.base
    query = module_of(qk).empty((num_tokens, both - num_kv_heads, head_size), qk.dtype)
    steps = (qk.strides[0] // qk.itemsize, value.strides[0] // value.itemsize)
    if whole is not None and whole is value.base and whole.flags.c_contiguous and whole.size == num_tokens * steps[0]:
        rows, first = (whole.reshape(-1),) * 2, both * head_size  # of one product: values behind the keys
    else:
        rows, first = (flat_view(qk), flat_view(value)), 0
    args = (
        query.reshape(-1), key_cache.reshape(-1), value_cache.reshape(-1), *rows, cos.reshape(-1), sin.reshape(-1),
        slot_mapping, *_sizes(both - num_kv_heads, num_kv_heads, head_size // 2, *steps, first),
    )  # fmt: skip
    launching.start(Launch(_kernels().turn_and_write_kernel, (num_tokens, both + num_kv_heads), 32, args))
    return query


def gated(gate_up: Array) -> Array:
    """silu(gate) * up of `gate_up [num_tokens, 2 * size]`."""
    if not takes(gate_up):
        return llama.gated(gate_up)
    num_tokens, size = len(gate_up), gate_up.shape[1] // 2
    out = module_of(gate_up).empty((num_tokens, size), gate_up.dtype)
    args = (out.reshape(-1), gate_up.reshape(-1), *_sizes(size))
    launching.start(Launch(_kernels().gated_kernel, (num_tokens, -(-size // THREADS)), THREADS, args))
    return out

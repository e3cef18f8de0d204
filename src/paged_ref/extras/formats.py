"""The number formats of a KV cache that NumPy and CuPy do not have, and the way to them and back.

A format is known by the dtype of the array that holds its bits:

  dtype     holds            true value
  uint16    bfloat16         the upper half of a float32
  int8      int8             stored * scale of its KV head
  uint8     float8 e4m3fn    stored * scale of its KV head; 4 exponent bits, 3 mantissa bits, no infinity

Scales are float32 [num_kv_heads]; K and V have their own. All numbers are rounded to the nearest, ties to
even, and what lies beyond the largest one becomes the largest one (Micikevicius et al. 2022 for e4m3).
Everything here takes NumPy or CuPy arrays and gives the same kind.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from ..core.device import Array, module_of

BFLOAT16, INT8, FLOAT8 = np.dtype("uint16"), np.dtype("int8"), np.dtype("uint8")
FORMAT_NAMES: dict[np.dtype[Any], str] = {BFLOAT16: "bfloat16", INT8: "int8", FLOAT8: "float8_e4m3fn"}
# The largest number of each format that needs scales. int8 leaves out -128, so that the range is symmetric.
MAX_VALUE: dict[np.dtype[Any], float] = {INT8: 127.0, FLOAT8: 448.0}
FLOAT8_NAN = 0x7F


def upper_half(bits: Any) -> Any:
    """The upper 16 of 32 bits, rounded to nearest, ties to even: from the bits of a float32, NaN excepted, to those
    of its bfloat16. For integers and arrays of integers; CUDA kernels compile it, too."""
    return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16


def to_bfloat16(numbers: Array) -> Array:
    """The bits of the nearest bfloat16s, uint16. Infinity and NaN stay what they are."""
    xp = module_of(numbers)
    bits = xp.ascontiguousarray(numbers, dtype=np.float32).view(np.uint32).reshape(numbers.shape)
    rounded = xp.where(xp.isnan(numbers), bits >> 16 | 0x40, upper_half(bits))  # a NaN must not round to infinity
    return rounded.astype(np.uint16)


def from_bfloat16(bits: Array) -> Array:
    """The float32s that these bits stand for, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_float8(numbers: Array) -> Array:
    """The e4m3 codes nearest to the numbers, uint8, at most ±448. NaN stays NaN."""
    xp = module_of(numbers)
    numbers = numbers.astype(np.float32)
    size = xp.minimum(xp.abs(numbers), np.float32(448))
    # floor(log2), at least -6: below the smallest normal number, 2**-6, the steps stay as they are there.
    exponent = xp.frexp(xp.maximum(size, np.float32(2**-6)))[1] - 1
    steps = xp.rint(xp.ldexp(size, 3 - exponent))  # in units of the last mantissa bit, 0 to 16
    code = (exponent + 6) * 8 + xp.nan_to_num(steps).astype(np.int32)  # 16 steps carry into the exponent
    code = xp.where(xp.isnan(numbers), FLOAT8_NAN, code)
    return xp.where(xp.signbit(numbers), code | 0x80, code).astype(np.uint8)


def from_float8(codes: Array) -> Array:
    """The float32s that these e4m3 codes stand for, exactly.

    With one zero bit more in the mantissa's place they are float16s, whose exponents count from 15 instead
    of 7: 2**8 too small. (NaN aside: e4m3 has just this one, and uses the other codes as numbers.)
    """
    xp = module_of(codes)
    wide = codes.astype(np.uint16)
    halves = ((wide & 0x80) << 8 | (wide & 0x7F) << 7).view(np.float16)
    return xp.where(wide & 0x7F == FLOAT8_NAN, np.float32(np.nan), halves.astype(np.float32) * np.float32(256))


def choose_scales(numbers: Array, dtype: DTypeLike) -> Array:
    """Scales with which the largest number of each head becomes the format's largest: float32 [num_kv_heads].

    `numbers [..., num_kv_heads, head_size]` are a sample of what will be stored; later numbers beyond it
    saturate. `dtype` is int8 or uint8 (e4m3). A head of zeros, or of none, gets the scale 1.
    """
    xp, largest = module_of(numbers), MAX_VALUE[np.dtype(dtype)]
    if numbers.size == 0:
        return xp.ones(numbers.shape[-2], dtype=np.float32)
    size = xp.abs(numbers.reshape(-1, *numbers.shape[-2:])).max(axis=(0, 2))  # [num_kv_heads]
    return xp.where(size > 0, size / largest, 1).astype(np.float32)


def encode(numbers: Array, dtype: DTypeLike, scales: Array | None = None) -> Array:
    """`numbers [..., num_kv_heads, head_size]` as a cache of this dtype stores them.

    int8 and uint8 need `scales`. Numbers in uint16 are bfloat16. NaN stays NaN; in int8, which has none, it
    becomes 0.
    """
    if numbers.dtype == dtype and scales is None:
        return numbers
    dtype, xp = np.dtype(dtype), module_of(numbers)
    numbers = decode(numbers)
    if dtype == BFLOAT16:
        return to_bfloat16(numbers)
    if dtype not in MAX_VALUE:
        return numbers.astype(dtype, copy=False)
    assert scales is not None
    parts = numbers.astype(np.float32, copy=False) / scales[:, None]
    if dtype == FLOAT8:
        return to_float8(parts)
    return xp.rint(xp.clip(xp.nan_to_num(parts, posinf=np.inf, neginf=-np.inf), -127, 127)).astype(np.int8)


def decode(stored: Array, scales: Array | None = None, dtype: DTypeLike | None = None) -> Array:
    """What `stored [..., num_kv_heads, head_size]` is worth, in `dtype` (None: float32, or its own float)."""
    if stored.dtype.kind == "f":
        pass
    elif stored.dtype == BFLOAT16:
        stored = from_bfloat16(stored)
    elif stored.dtype == FLOAT8:
        stored = from_float8(stored)
    elif stored.dtype == INT8:
        stored = stored.astype(np.float32)
    numbers = stored if dtype is None else stored.astype(dtype, copy=False)
    return numbers if scales is None else numbers * scales.astype(numbers.dtype)[:, None]


def format_name(dtype: DTypeLike) -> str:
    """The name of the format that an array of this dtype holds: "bfloat16" for uint16."""
    return FORMAT_NAMES.get(np.dtype(dtype)) or str(np.dtype(dtype))

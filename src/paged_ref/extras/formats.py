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

from collections.abc import Callable
from functools import wraps
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from ..core.device import Array, module_of

BFLOAT16, INT8, FLOAT8 = np.dtype("uint16"), np.dtype("int8"), np.dtype("uint8")
FORMAT_NAMES: dict[np.dtype[Any], str] = {BFLOAT16: "bfloat16", INT8: "int8", FLOAT8: "float8_e4m3fn"}
# The largest number of each format that needs scales. int8 leaves out -128, so that the range is symmetric.
MAX_VALUE: dict[np.dtype[Any], float] = {INT8: 127.0, FLOAT8: 448.0}
FLOAT8_NAN = 0x7F
PART = 1 << 14  # elements of one part of a conversion


def upper_half(bits: Any) -> Any:
    """The upper 16 of 32 bits, rounded to nearest, ties to even: from the bits of a float32, NaN excepted, to those
    of its bfloat16. For integers and arrays of integers; CUDA kernels compile it, too."""
    return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16


def _in_one_pass(dtype: DTypeLike) -> Callable[[Callable[[Array], Array]], Callable[[Array], Array]]:
    """Make a conversion of arrays, element by element, to `dtype`, go through a NumPy array once: part by part, so
    that what it makes on the way stays in the processor's cache, and takes no memory beside the result."""

    def decorate(convert: Callable[[Array], Array]) -> Callable[[Array], Array]:
        @wraps(convert)
        def in_parts(array: Array) -> Array:
            if module_of(array) is not np or array.size <= PART:
                return convert(array)
            result = np.empty(array.shape, dtype)
            flat, source = result.reshape(-1), array.reshape(-1)
            for first in range(0, flat.size, PART):
                part = slice(first, first + PART)
                flat[part] = convert(source[part])
            return result

        return in_parts

    return decorate


@_in_one_pass(BFLOAT16)
def to_bfloat16(numbers: Array) -> Array:
    """The bits of the nearest bfloat16s, uint16. Infinity and NaN stay what they are."""
    xp = module_of(numbers)
    bits = xp.ascontiguousarray(numbers, dtype=np.float32).view(np.uint32).reshape(numbers.shape)
    rounded = xp.where(xp.isnan(numbers), bits >> 16 | 0x40, upper_half(bits))  # a NaN must not round to infinity
    return rounded.astype(np.uint16)


@_in_one_pass(np.float32)
def from_bfloat16(bits: Array) -> Array:
    """The float32s that these bits stand for, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


@_in_one_pass(FLOAT8)
def to_float8(numbers: Array) -> Array:
    """The e4m3 codes nearest to the numbers, uint8, at most ±448. NaN stays NaN."""
    xp = module_of(numbers)
    numbers = numbers.astype(np.float32, copy=False)
    size = xp.minimum(xp.abs(numbers), np.float32(448))
    # The exponent and the upper 3 bits of the mantissa, rounded to nearest, ties to even, which may carry into the
    # exponent; and the exponent counted from 7 instead of 127.
    bits = size.view(np.uint32)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - np.uint32((127 - 7) * 8)
    small = xp.rint(size * np.float32(2**9))  # below 2**-6 the numbers are whole multiples of 2**-9
    code = xp.where(size < np.float32(2**-6), small, normal).astype(np.uint8)
    code = xp.where(xp.isnan(numbers), np.uint8(FLOAT8_NAN), code)
    return code | xp.signbit(numbers).astype(np.uint8) << 7


@_in_one_pass(np.float32)
def from_float8(codes: Array) -> Array:
    """The float32s that these e4m3 codes stand for, exactly.

    With one zero bit more in the mantissa's place they are float16s, whose exponents count from 15 instead
    of 7: 2**8 too small. (NaN aside: e4m3 has just this one, and uses the other codes as numbers.)
    """
    xp = module_of(codes)
    wide = codes.astype(np.uint16)
    halves = ((wide & 0x80) << 8 | (wide & 0x7F) << 7).view(np.float16)
    return xp.where(wide & 0x7F == FLOAT8_NAN, np.float32(np.nan), halves.astype(np.float32) * np.float32(256))


@_in_one_pass(INT8)
def to_int8(numbers: Array) -> Array:
    """The nearest integers from -127 to 127, int8. NaN, which int8 does not have, becomes 0."""
    xp = module_of(numbers)
    return xp.rint(xp.clip(xp.nan_to_num(numbers, posinf=np.inf, neginf=-np.inf), -127, 127)).astype(np.int8)


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
    dtype = np.dtype(dtype)
    numbers = decode(numbers)
    if dtype == BFLOAT16:
        return to_bfloat16(numbers)
    if dtype not in MAX_VALUE:
        return numbers.astype(dtype, copy=False)
    assert scales is not None
    round_to = to_float8 if dtype == FLOAT8 else to_int8
    rows = numbers.astype(np.float32, copy=False).reshape(-1, *numbers.shape[-2:])
    encoded = module_of(rows).empty(rows.shape, dtype)
    count = max(1, PART // max(1, scales.size * rows.shape[-1]) if module_of(rows) is np else len(rows))
    for first in range(0, len(rows), count):  # in one pass, as above
        part = slice(first, first + count)
        encoded[part] = round_to(rows[part] / scales[:, None])
    return encoded.reshape(numbers.shape)


def decode(stored: Array, scales: Array | None = None, dtype: DTypeLike | None = None) -> Array:
    """What `stored [..., num_kv_heads, head_size]` is worth, in `dtype` (None: float32, or its own float)."""
    if stored.dtype.kind == "f":
        numbers = stored
    elif stored.dtype == BFLOAT16:
        numbers = from_bfloat16(stored)
    elif stored.dtype == FLOAT8:
        numbers = from_float8(stored)
    else:
        numbers = stored.astype(np.float32)
    if dtype is not None:
        numbers = numbers.astype(dtype, copy=False)
    if scales is None:
        return numbers
    factors = scales.astype(numbers.dtype)[:, None]
    return module_of(numbers).multiply(numbers, factors, out=None if numbers is stored else numbers)


def format_name(dtype: DTypeLike) -> str:
    """The name of the format that an array of this dtype holds: "bfloat16" for uint16."""
    return FORMAT_NAMES.get(np.dtype(dtype)) or str(np.dtype(dtype))

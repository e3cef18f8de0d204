# mypy: ignore-errors
"""The CUDA kernels that move K and V: into slots, and from block to block. store.py launches them.

All arrays are flat. A row that is stored as it is moves in chunks of 16 bytes, the most that one instruction moves.
Otherwise each number is converted on the way, with the rounding of extras/formats.py to the bit.
"""

from __future__ import annotations

from functools import cache

from numba import cuda
from numba.types import float32, int32, uint8, uint16, uint32

from ..extras import formats
from .cuda_intrinsics import bits_of, copy16, device, float_of
from .flash_variant import from_bfloat16

upper_half = device(formats.upper_half)


@cuda.jit
def copy_blocks_kernel(cache, pairs, block_words, plane_words):
    """Copy block pairs[2 * i] to block pairs[2 * i + 1] in each plane of `cache`, uint32.

    A plane is the K or the V of one layer. No block may be both a source and a destination. Launch with the
    grid (num_pairs, num_planes) and any number of threads; block_words and plane_words are multiples of 4.
    """
    pair, plane = cuda.blockIdx.x, cuda.blockIdx.y
    source = plane * plane_words + pairs[2 * pair] * block_words
    target = plane * plane_words + pairs[2 * pair + 1] * block_words
    for word in range(4 * cuda.threadIdx.x, block_words, 4 * cuda.blockDim.x):
        copy16(cache, target + word, cache, source + word)


@cuda.jit
def move_rows_kernel(key, value, key_cache, value_cache, slot_mapping, row_words, key_step, value_step):
    """Write each token's row of K and V to its slot, unchanged; a negative slot is skipped. All uint32.

    row_words is the length of a row and of a slot; the rows of key lie key_step words apart. All three are
    multiples of 4. Launch with the grid (num_tokens, 2), the second of it K and V, and any number of threads.
    """
    token, which = cuda.blockIdx.x, cuda.blockIdx.y
    slot = slot_mapping[token]
    if slot < 0:
        return
    for word in range(4 * cuda.threadIdx.x, row_words, 4 * cuda.blockDim.x):
        if which == 0:
            copy16(key_cache, slot * row_words + word, key, token * key_step + word)
        else:
            copy16(value_cache, slot * row_words + word, value, token * value_step + word)


# ---- number formats, as in extras/formats.py. Each from and to float32, for one number.

ONES_APART = float32(12582912.0)  # 1.5 * 2**23: here float32s are 1 apart, so adding it rounds, ties to even
ONES_APART_BITS = 0x4B400000


@device
def nearest(number):
    """The integer nearest to a float32 below 2**22 in size."""
    return int32(bits_of(float32(number + ONES_APART)) - ONES_APART_BITS)


@device
def unchanged(number):
    return number


@device
def widened(number):
    return float32(number)


@device
def as_it_is(number, scale):
    return number  # storing casts it


@device
def to_bfloat16(number, scale):
    """A NaN stays one, of whatever bits: of a float16's NaN a GPU makes 0x7FFF, where array code keeps 0x7FC0."""
    bits = bits_of(number)
    if number != number:
        return uint16((bits >> 16) | 0x40)
    return uint16(upper_half(bits))


@device
def to_int8(number, scale):
    part = float32(number / scale)
    if part != part:
        part = float32(0)
    return nearest(min(max(part, float32(-127)), float32(127)))


@device
def to_float8(number, scale):
    part = float32(number / scale)
    sign = (bits_of(part) >> 24) & 0x80
    if part != part:
        return uint8(sign | 0x7F)
    size = min(abs(part), float32(448))
    exponent = max(int32(bits_of(size) >> 23) - 127, -6)
    steps = nearest(float32(size * float_of(uint32((130 - exponent) << 23))))  # times 2**(3 - exponent)
    return uint8(sign | ((exponent + 6) * 8 + steps))


DECODE = {"uint16": from_bfloat16}  # by dtype; of the others, a cast
ENCODE = {"uint16": to_bfloat16, "int8": to_int8, "uint8": to_float8}


@cache
def write_rows_kernel(source: str, target: str):
    """The kernel that writes K, or V, of the dtype `source` into a cache of the dtype `target`."""
    if source == target:
        decode, encode = unchanged, as_it_is
    else:
        decode, encode = DECODE.get(source, widened), ENCODE.get(target, as_it_is)

    @cuda.jit
    def kernel(
        rows, cache, slot_mapping, scales, num_heads, head_size, block_size,
        row_step, row_head_step, row_dim_step, block_step, slot_step, head_step, dim_step,
    ):  # fmt: skip
        """Write each token's row to its slot, number by number; a negative slot is skipped.

        rows [num_tokens, num_heads, head_size] and cache [num_blocks, block_size, num_heads, head_size] lie in
        memory by their steps, in elements; scales [num_heads] are read by the formats that have scales. Launch
        with the grid (num_tokens, 1) and any number of threads.
        """
        token = cuda.blockIdx.x
        slot = slot_mapping[token]
        if slot < 0:
            return
        source_at, target_at = token * row_step, slot // block_size * block_step + slot % block_size * slot_step
        for i in range(cuda.threadIdx.x, num_heads * head_size, cuda.blockDim.x):
            head, d = i // head_size, i % head_size
            number = decode(rows[source_at + head * row_head_step + d * row_dim_step])
            cache[target_at + head * head_step + d * dim_step] = encode(number, scales[head])

    return kernel

# mypy: ignore-errors
"""The CUDA kernels that move K and V: into slots, and from block to block. store.py launches them.

Where a row is stored as it comes, it is moved in chunks of 16 bytes, the most that a thread can move at once.
Else each number is converted on the way, with the rounding of quantize.py to the bit.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from llvmlite import ir
from numba import cuda
from numba.core import types
from numba.cuda.extending import intrinsic
from numba.types import float32, int32, uint8, uint16, uint32


@intrinsic
def copy16(typing, target, to, source, at):
    """target[to : to + 4] = source[at : at + 4]: one load and one store of 16 bytes.

    Both are flat arrays of uint32 that begin at a multiple of 16 bytes; `to` and `at` are multiples of 4.
    """

    def codegen(context, builder, signature, args):
        four = ir.VectorType(ir.IntType(32), 4).as_pointer()

        def place(array, index):
            data = context.make_array(signature.args[array])(context, builder, args[array]).data
            return builder.bitcast(builder.gep(data, [args[index]]), four)

        loaded = builder.load(place(2, 3))
        loaded.align = 16
        builder.store(loaded, place(0, 1)).align = 16
        return context.get_dummy_value()

    return types.void(target, types.int64, source, types.int64), codegen


def _copy16(target, to, source, at):
    for i in range(4):
        target[to + i] = source[at + i]


@intrinsic
def bits_of(typing, number):
    """The 32 bits of a float32."""
    return types.int32(types.float32), lambda context, builder, _, args: builder.bitcast(args[0], ir.IntType(32))


def _bits_of(number):
    return int(np.float32(number).view(np.int32))


@intrinsic
def float_of(typing, bits):
    """The float32 with these 32 bits."""
    return types.float32(types.int32), lambda context, builder, _, args: builder.bitcast(args[0], ir.FloatType())


def _float_of(bits):
    return np.uint32(bits & 0xFFFFFFFF).view(np.float32)


# The tracer runs these in place of the three.
copy16.traced_as, bits_of.traced_as, float_of.traced_as = _copy16, _bits_of, _float_of


@cuda.jit
def copy_blocks_kernel(cache, pairs, block_words, plane_words):
    """Copy block pairs[i, 0] to block pairs[i, 1] in each plane of `cache`, flat uint32.

    A plane is the K or the V of one layer. No block may be both a source and a destination. Launch with the
    grid (num_pairs, num_planes) and any number of threads; block_words and plane_words are multiples of 4.
    """
    pair, plane = cuda.blockIdx.x, cuda.blockIdx.y
    source = plane * plane_words + pairs[pair, 0] * block_words
    target = plane * plane_words + pairs[pair, 1] * block_words
    for word in range(4 * cuda.threadIdx.x, block_words, 4 * cuda.blockDim.x):
        copy16(cache, target + word, cache, source + word)


@cuda.jit
def move_rows_kernel(key, value, key_cache, value_cache, slot_mapping, row_words, key_step, value_step):
    """Write each token's row of K and V to its slot, unchanged; a negative slot is skipped. All flat uint32.

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


# ---- number formats, as quantize.py has them. Each from and to float32, for one number.

ONES_APART = float32(12582912.0)  # 1.5 * 2**23: here float32s are 1 apart, so adding it rounds, ties to even
ONES_APART_BITS = 0x4B400000


@cuda.jit(device=True, inline="always")
def nearest(number):
    """The integer nearest to a float32 below 2**22 in size."""
    return bits_of(float32(number + ONES_APART)) - ONES_APART_BITS


@cuda.jit(device=True, inline="always")
def unchanged(number):
    return number


@cuda.jit(device=True, inline="always")
def widened(number):
    return float32(number)


@cuda.jit(device=True, inline="always")
def as_it_is(number, scale):
    return number  # storing casts it


@cuda.jit(device=True, inline="always")
def from_bfloat16(bits):
    return float_of(int32(uint32(bits) << 16))


@cuda.jit(device=True, inline="always")
def to_bfloat16(number, scale):
    bits = uint32(bits_of(number))
    if number != number:
        return uint16((bits >> 16) | 0x40)
    return uint16((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)


@cuda.jit(device=True, inline="always")
def to_int8(number, scale):
    part = float32(number / scale)
    if part != part:
        part = float32(0)
    return nearest(min(max(part, float32(-127)), float32(127)))


@cuda.jit(device=True, inline="always")
def to_float8(number, scale):
    part = float32(number / scale)
    sign = (bits_of(part) >> 24) & 0x80
    if part != part:
        return uint8(sign | 0x7F)
    size = min(abs(part), float32(448))
    exponent = max((bits_of(size) >> 23) - 127, -6)
    steps = nearest(float32(size * float_of(int32((130 - exponent) << 23))))  # times 2**(3 - exponent)
    return uint8(sign | ((exponent + 6) * 8 + steps))


DECODE = {"uint16": from_bfloat16}  # by dtype; of the others, a cast
ENCODE = {"uint16": to_bfloat16, "int8": to_int8, "uint8": to_float8}


@cache
def write_kv_kernel(source: str, target: str):
    """The kernel that writes K and V of the dtype `source` into caches of the dtype `target`."""
    if source == target:
        decode, encode = unchanged, as_it_is
    else:
        decode, encode = DECODE.get(source, widened), ENCODE.get(target, as_it_is)

    @cuda.jit
    def kernel(key, value, key_cache, value_cache, slot_mapping, key_scales, value_scales):
        """Write each token's K and V to its slot; a negative slot is skipped.

        key, value            [num_tokens, num_kv_heads, head_size]
        caches                [num_blocks, block_size, num_kv_heads, head_size]
        key_scales and so on  [num_kv_heads] float32, read by the formats that have scales

        Launch with the grid (num_tokens, 2), the second of it K and V, and any number of threads.
        """
        token, which = cuda.blockIdx.x, cuda.blockIdx.y
        slot = slot_mapping[token]
        if slot < 0:
            return
        block, offset = slot // key_cache.shape[1], slot % key_cache.shape[1]
        head_size = key.shape[2]
        for i in range(cuda.threadIdx.x, key.shape[1] * head_size, cuda.blockDim.x):
            head, d = i // head_size, i % head_size
            if which == 0:
                key_cache[block, offset, head, d] = encode(decode(key[token, head, d]), key_scales[head])
            else:
                value_cache[block, offset, head, d] = encode(decode(value[token, head, d]), value_scales[head])

    return kernel

"""How the tuned kernels take the numbers of a cache to the tensor cores, for each kind of number.

A kind is a set of small device functions with the same names and arguments; the kernel is written once and
gets one set. It says how 16 bytes of a cache become operands of an `mma` (see cuda_intrinsics):

    score_operand(words, at, i)          operand i of the K chunk whose four words begin at `words[at]`
    value_operand(words, row, next, n)   number n of the V chunk at `words[row]`, and of the next key's at `next`
    split(x, y)                          two float32 as words (rounded, what rounding lost)
    multiply_keys(q.., b.., c..)         S += Q · Kᵀ for one pair of words of Q (with what rounding lost) and of K
    multiply_values(a.., p.., c..)       Oᵀ += Vᵀ · Pᵀ for four words of V and one pair of P (and what rounding lost)

8-bit numbers become float16 on the way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from numba.types import uint32

from .cuda_intrinsics import (
    add_float16,
    bits_of,
    device,
    float_of,
    mma_bfloat16,
    mma_float16,
    mma_tfloat32,
    pack_bfloat16,
    pack_float16,
    pick_bytes,
    unpack_float16,
)  # fmt: skip

LOW_HALVES, HIGH_HALVES = uint32(0x5410), uint32(0x7632)  # selectors of pick_bytes


@dataclass(frozen=True)
class Element:
    """A kind of number in a cache."""

    name: str
    bits: int
    per_word: int  # numbers in one word of an operand
    score_operand: Any
    value_operand: Any
    split: Any
    multiply_keys: Any
    multiply_values: Any
    factor: float = 1.0  # true number = what the operands hold * factor

    @property
    def operand(self) -> str:
        """The kind of number that the tensor cores get."""
        return "float16" if self.bits == 8 else self.name

    @property
    def per_chunk(self) -> int:
        """Numbers in 16 bytes."""
        return 128 // self.bits


@device
def score_operand(words, at, i):
    """Operand i of a chunk whose words are operands as they lie."""
    return words[at + 2 * i], words[at + 2 * i + 1]


# ---- float16 and bfloat16: two numbers in a word, as they lie


@device
def value_operand_16(words, row, next_row, n):
    """Numbers n of two keys, side by side: the tensor core adds up over keys, and memory has them rows apart."""
    selector = LOW_HALVES if n % 2 == 0 else HIGH_HALVES
    return pick_bytes(words[row + n // 2], words[next_row + n // 2], selector)


@device
def split_float16(x, y):
    rounded = pack_float16(x, y)
    x_rounded, y_rounded = unpack_float16(rounded)
    return rounded, pack_float16(x - x_rounded, y - y_rounded)


@device
def split_bfloat16(x, y):
    rounded = pack_bfloat16(x, y)
    x_rounded, y_rounded = float_of(uint32(rounded << 16)), float_of(uint32(rounded & 0xFFFF0000))
    return rounded, pack_bfloat16(x - x_rounded, y - y_rounded)


def multiply_values_by(mma):
    """`multiply_values` where V is an operand as it lies."""

    @device
    def multiply_values(a0, a1, a2, a3, p0, p1, p0_lost, p1_lost, c0, c1, c2, c3):
        c0, c1, c2, c3 = mma(a0, a1, a2, a3, p0_lost, p1_lost, c0, c1, c2, c3)
        return mma(a0, a1, a2, a3, p0, p1, c0, c1, c2, c3)

    return multiply_values


# ---- float32: one number in a word, in two parts that tf32 holds exactly, 11 bits and 11 more


@device
def value_operand_32(words, row, next_row, n):
    return words[row + n]


@device
def split_float32(x, y):
    """`per_word` is 1: `y` is `x` again, and only `x` counts."""
    high = uint32(bits_of(x) & 0xFFFFE000)
    return high, bits_of(x - float_of(high))


@device
def multiply_keys_float32(q0, q0_lost, q1, q1_lost, b0, b1, c0, c1, c2, c3):
    """K in two parts."""
    high0, low0 = split_float32(float_of(b0), float_of(b0))
    high1, low1 = split_float32(float_of(b1), float_of(b1))
    c0, c1, c2, c3 = mma_tfloat32(q0, q0_lost, q1, q1_lost, low0, low1, c0, c1, c2, c3)
    return mma_tfloat32(q0, q0_lost, q1, q1_lost, high0, high1, c0, c1, c2, c3)


@device
def multiply_values_float32(a0, a1, a2, a3, p0, p1, p0_lost, p1_lost, c0, c1, c2, c3):
    """V in two parts, P in two parts; the product of the two lower parts is below float32's last bit."""
    high0, low0 = split_float32(float_of(a0), float_of(a0))
    high1, low1 = split_float32(float_of(a1), float_of(a1))
    high2, low2 = split_float32(float_of(a2), float_of(a2))
    high3, low3 = split_float32(float_of(a3), float_of(a3))
    c0, c1, c2, c3 = mma_tfloat32(low0, low1, low2, low3, p0, p1, c0, c1, c2, c3)
    c0, c1, c2, c3 = mma_tfloat32(high0, high1, high2, high3, p0_lost, p1_lost, c0, c1, c2, c3)
    return mma_tfloat32(high0, high1, high2, high3, p0, p1, c0, c1, c2, c3)


# ---- 8 bits


def operands_8(float16_of, low, high):
    """`score_operand` and `value_operand` of a kind of number. `float16_of` takes two numbers to float16 from where the
    selectors `low` and `high` of pick_bytes put numbers 0, 1 and 2, 3 of a word."""
    LOW, HIGH = uint32(low), uint32(high)

    @device
    def score_operand_8(words, at, i):
        word = words[at + i]
        return float16_of(pick_bytes(word, word, LOW)), float16_of(pick_bytes(word, word, HIGH))

    @device
    def value_operand_8(words, row, next_row, n):
        place = n % 4
        selector = uint32(place | place << 4 | (place + 4) << 8 | (place + 4) << 12)
        return float16_of(pick_bytes(words[row + n // 4], words[next_row + n // 4], selector))

    return score_operand_8, value_operand_8


@device
def float16_of_int8(bytes_in_halves):
    """The two numbers in bytes 0 and 2 of a word. The bits of 1024 + (number + 128) as float16 are 0x6400 +
    (number + 128); then 1152 is taken away."""
    return add_float16(uint32((bytes_in_halves & 0x00FF00FF) ^ 0x64806480), uint32(0xE480E480))


@device
def float16_of_e4m3(bytes_in_halves):
    """The two numbers in bytes 1 and 3 of a word, each 256 times too small: sign and the other seven bits go to their
    places in a float16, whose exponents are 8 apart. Not-a-number reads as 480."""
    return uint32((bytes_in_halves & 0x80008000) | ((bytes_in_halves >> 1) & 0x3F803F80))


_as_float16 = (split_float16, mma_float16, multiply_values_by(mma_float16))
_as_bfloat16 = (split_bfloat16, mma_bfloat16, multiply_values_by(mma_bfloat16))
_as_float32 = (split_float32, multiply_keys_float32, multiply_values_float32)

ELEMENTS = {
    "float16": Element("float16", 16, 2, score_operand, value_operand_16, *_as_float16),
    "bfloat16": Element("bfloat16", 16, 2, score_operand, value_operand_16, *_as_bfloat16),
    "float32": Element("float32", 32, 1, score_operand, value_operand_32, *_as_float32),
    "int8": Element("int8", 8, 2, *operands_8(float16_of_int8, 0x1110, 0x3332), *_as_float16),
    "e4m3": Element("e4m3", 8, 2, *operands_8(float16_of_e4m3, 0x1100, 0x3322), *_as_float16, factor=256.0),
}

"""The instructions that the kernels need and Numba has no name for, each with a twin in Python.

An intrinsic becomes one or two lines of PTX. Its twin, `traced_as`, does the same to Python numbers, so the tracer
runs the kernels on machines without a GPU. A "word" is 32 bits, uint32: two 16-bit numbers (the first in the low
half), four bytes, or one float32.

Fragments of `mma` (PTX ISA, "Matrix Fragments for mma.m16n8k16"): lane 4·g + t of a warp, g in 0..7 and t in
0..3, holds of A [16, k] the rows g (words a0, a2) and g + 8 (a1, a3), of B [k, 8] the column g, and of C and D
[16, 8] the columns 2t and 2t + 1 of row g (c0, c1) and of row g + 8 (c2, c3).
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import cuda
from numba.core import types
from numba.cuda.extending import intrinsic
from numba.types import float32, int64, uint32

from ..extras.formats import upper_half

I32, I64, F32 = ir.IntType(32), ir.IntType(64), ir.FloatType()
FOUR_WORDS, FOUR_FLOATS = types.UniTuple(uint32, 4), types.UniTuple(float32, 4)


def _assembly(result, count, text, constraints):
    """The code generator of an intrinsic that is PTX: `count` results of one LLVM type, tupled if several.

    `side_effect` keeps the instruction where the kernel has it. LLVM may then not move loads together or
    apart; ptxas, which knows the machine, still may.
    """
    out = result if count == 1 else ir.LiteralStructType([result] * count)

    def codegen(context, builder, signature, args):
        function = ir.FunctionType(out, [arg.type for arg in args])
        answer = builder.asm(function, text, constraints, args, side_effect=True)
        if count == 1:
            return answer
        parts = [builder.extract_value(answer, i) for i in range(count)]
        return context.make_tuple(builder, signature.return_type, parts)

    return codegen


# ---- loads and stores


@intrinsic
def load16(typing, words, chunk, step):
    """The four words of chunk `chunk + step` of `words`, by one load of 16 bytes. `words` begins at a multiple of 16.

    `chunk` has 32 bits, and `step` is best a constant: then the address is one multiplication, and loads that
    differ in `step` share it. `nc`: the kernel does not write this memory. `L2::128B`: what follows in the
    same 128 bytes is wanted, too.
    """
    text = "{ .reg .u64 place; cvta.to.global.u64 place, $4; ld.global.nc.L2::128B.v4.u32 {$0, $1, $2, $3}, [place]; }"
    emit = _assembly(I32, 4, text, "=r,=r,=r,=r,l")

    def codegen(context, builder, signature, args):
        words, chunk, step = args
        sixteen = ir.Constant(I64, 16)
        first = builder.add(builder.ptrtoint(words, I64), builder.mul(builder.zext(chunk, I64), sixteen))
        return emit(context, builder, signature, [builder.add(first, builder.mul(step, sixteen))])

    return FOUR_WORDS(types.CPointer(uint32), uint32, int64), codegen


def _load16(words, chunk, step):
    first = 4 * (chunk + step)
    return words[first], words[first + 1], words[first + 2], words[first + 3]


@intrinsic
def copy16(typing, target, to, source, at):
    """target[to : to + 4] = source[at : at + 4]: one load and one store of 16 bytes.

    Both are uint32 that begin at a multiple of 16 bytes; `to` and `at` are multiples of 4.
    """
    words = types.CPointer(uint32)

    def codegen(context, builder, signature, args):
        target, to, source, at = args
        four = ir.VectorType(ir.IntType(32), 4).as_pointer()
        loaded = builder.load(builder.bitcast(builder.gep(source, [at]), four))
        loaded.align = 16
        builder.store(loaded, builder.bitcast(builder.gep(target, [to]), four)).align = 16
        return context.get_dummy_value()

    return types.void(words, types.int64, words, types.int64), codegen


def _copy16(target, to, source, at):
    for i in range(4):
        target[to + i] = source[at + i]


# ---- bits


@intrinsic
def float_of(typing, word):
    """The float32 whose bits these are."""
    return float32(uint32), lambda context, builder, signature, args: builder.bitcast(args[0], F32)


def _float_of(word):
    return np.uint32(word).view(np.float32)


@intrinsic
def bits_of(typing, number):
    """The bits of a float32."""
    return uint32(float32), lambda context, builder, signature, args: builder.bitcast(args[0], I32)


def _bits_of(number):
    return int(np.float32(number).view(np.uint32))


@intrinsic
def pick_bytes(typing, first, second, selector):
    """A word of any four of eight bytes: hexadecimal digit i of `selector` says which becomes byte i.

    Bytes 0 to 3 are those of `first`, the low one first; 4 to 7 those of `second`.
    """
    return uint32(uint32, uint32, uint32), _assembly(I32, 1, "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r")


def _pick_bytes(first, second, selector):
    source = int(first).to_bytes(4, "little") + int(second).to_bytes(4, "little")
    return int.from_bytes(bytes(source[selector >> 4 * i & 7] for i in range(4)), "little")


# ---- conversions and arithmetic


@intrinsic
def exp2(typing, x):
    """2 to the power of a float32, in one instruction: within 2 units in the last place, below 2**-126 zero."""
    return float32(float32), _assembly(F32, 1, "ex2.approx.ftz.f32 $0, $1;", "=f,f")


def _exp2(x):
    return np.exp2(np.float32(x))


@intrinsic
def pack_float16(typing, low, high):
    """Two float32 as float16 in one word, rounded to nearest."""
    return uint32(float32, float32), _assembly(I32, 1, "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f")


def _pack_float16(low, high):
    return int(np.array([low, high], np.float16).view(np.uint32)[0])


@intrinsic
def unpack_float16(typing, word):
    """The two float16 of a word as float32; exact."""
    text = "{ .reg .b16 low, high; mov.b32 {low, high}, $2; cvt.f32.f16 $0, low; cvt.f32.f16 $1, high; }"
    return types.UniTuple(float32, 2)(uint32), _assembly(F32, 2, text, "=f,=f,r")


def _unpack_float16(word):
    low, high = np.array([word], np.uint32).view(np.float16)
    return np.float32(low), np.float32(high)


@intrinsic
def pack_bfloat16(typing, low, high):
    """Two float32 as bfloat16 in one word, rounded to nearest."""
    return uint32(float32, float32), _assembly(I32, 1, "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f")


def _pack_bfloat16(low, high):
    word = 0
    for place, number in enumerate((low, high)):
        half = 0x7FFF if np.isnan(number) else upper_half(_bits_of(number))
        word |= half << 16 * place
    return word


@intrinsic
def add_float16(typing, first, second):
    """Two sums of float16: the low halves, and the high halves."""
    return uint32(uint32, uint32), _assembly(I32, 1, "add.rn.f16x2 $0, $1, $2;", "=r,r,r")


def _add_float16(first, second):
    first, second = (np.array([word], np.uint32).view(np.float16) for word in (first, second))
    return int((first + second).view(np.uint32)[0])


# ---- matrix multiplication by a warp

_MMA_TYPES = (uint32,) * 6 + (float32,) * 4


def _mma(shape_and_types):
    text = f"mma.sync.aligned.{shape_and_types} {{$0,$1,$2,$3}}, {{$4,$5,$6,$7}}, {{$8,$9}}, {{$10,$11,$12,$13}};"
    return FOUR_FLOATS(*_MMA_TYPES), _assembly(F32, 4, text, "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f")


@intrinsic
def mma_float16(typing, a0, a1, a2, a3, b0, b1, c0, c1, c2, c3):
    """D = A·B + C for A [16, 16] and B [16, 8] in float16, C and D in float32.

    Words of A and B hold two neighbours in k: 2t and 2t + 1 (a0, a1, b0), 2t + 8 and 2t + 9 (a2, a3, b1).
    """
    return _mma("m16n8k16.row.col.f32.f16.f16.f32")


@intrinsic
def mma_bfloat16(typing, a0, a1, a2, a3, b0, b1, c0, c1, c2, c3):
    """As `mma_float16`, for bfloat16."""
    return _mma("m16n8k16.row.col.f32.bf16.bf16.f32")


@intrinsic
def mma_tfloat32(typing, a0, a1, a2, a3, b0, b1, c0, c1, c2, c3):
    """D = A·B + C for A [16, 8] and B [8, 8] in float32 of which 10 bits of the fraction are looked at.

    Words hold one number: t in k (a0, a1, b0), and t + 4 (a2, a3, b1).
    """
    return _mma("m16n8k8.row.col.f32.tf32.tf32.f32")


def _mma_float16(*fragments):
    return cuda.warp_collective("mma", fragments, _answer_float16)


def _mma_bfloat16(*fragments):
    return cuda.warp_collective("mma", fragments, _answer_bfloat16)


def _mma_tfloat32(*fragments):
    return cuda.warp_collective("mma", fragments, _answer_tfloat32)


def _answer_float16(lane, fragments):
    return _product(lane, fragments, lambda words: words.view(np.float16).astype(np.float32))


def _answer_bfloat16(lane, fragments):
    return _product(lane, fragments, lambda words: (words.view(np.uint16).astype(np.uint32) << 16).view(np.float32))


def _answer_tfloat32(lane, fragments):
    return _product(lane, fragments, lambda words: (words & 0xFFFFE000).view(np.float32))


def _product(lane, fragments, numbers):
    """The part of the product that `lane` gets. `fragments`: the arguments of each lane; `numbers(words)`: the
    numbers in a row of words.

    The first lane multiplies for all lanes, and stores the product in `fragments`, where the other lanes find it.
    """
    if "product" not in fragments:
        words = np.array([fragments[i][:6] for i in range(32)], np.uint32).reshape(8, 4, 6)  # [g, t, word]
        a, b = ([np.ascontiguousarray(words[..., i]) for i in group] for group in ((0, 1, 2, 3), (4, 5)))
        upper, lower = (np.hstack([numbers(a[i]), numbers(a[i + 2])]) for i in (0, 1))  # rows g, rows g + 8
        columns = np.hstack([numbers(part) for part in b])  # [8, k]
        c = np.array([fragments[i][6:] for i in range(32)], np.float32).reshape(8, 4, 2, 2)  # [g, t, half, column]
        c = c.transpose(2, 0, 1, 3).reshape(16, 8)
        product = np.vstack([upper, lower]).astype(np.float64) @ columns.T.astype(np.float64)
        fragments["product"] = (product + c).astype(np.float32)
    g, t = lane // 4, lane % 4
    product = fragments["product"]
    return product[g, 2 * t], product[g, 2 * t + 1], product[g + 8, 2 * t], product[g + 8, 2 * t + 1]


for _intrinsic, _twin in (
    (load16, _load16), (copy16, _copy16), (float_of, _float_of), (bits_of, _bits_of), (pick_bytes, _pick_bytes),
    (pack_float16, _pack_float16), (unpack_float16, _unpack_float16), (pack_bfloat16, _pack_bfloat16),
    (add_float16, _add_float16), (exp2, _exp2),
    (mma_float16, _mma_float16), (mma_bfloat16, _mma_bfloat16), (mma_tfloat32, _mma_tfloat32),
):  # fmt: skip
    _intrinsic.traced_as = _twin

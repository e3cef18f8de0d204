"""The instructions that the kernels need and Numba has no name for, each with a twin in Python.

A function here is the Python twin, which the tracer runs on machines without a GPU. The decorator above the function
makes the intrinsic of the same name: one or two lines of PTX. A "word" is 32 bits, uint32: two 16-bit numbers (the
first in the low half), four bytes, or one float32.

Fragments of `mma` (PTX ISA, "Matrix Fragments for mma.m16n8k16"): lane 4·g + t of a warp, g in 0..7 and t in
0..3, holds of A [16, k] the rows g (words a0, a2) and g + 8 (a1, a3), of B [k, 8] the column g, and of C and D
[16, 8] the columns 2t and 2t + 1 of row g (c0, c1) and of row g + 8 (c2, c3).
"""

from __future__ import annotations

import inspect
import math

import numpy as np
from llvmlite import ir
from numba import cuda
from numba.core import types
from numba.cuda.extending import intrinsic
from numba.types import UniTuple, float32, int64, uint32

from ..extras.formats import upper_half

I32, I64, F32 = ir.IntType(32), ir.IntType(64), ir.FloatType()
WORDS = types.CPointer(uint32)

# Numbers of device code. A Python float would make all arithmetic float64.
MINUS_INFINITY, ZERO, ONE = float32(-math.inf), float32(0), float32(1)
TO_BASE_2, TO_BASE_E = float32(math.log2(math.e)), float32(math.log(2))

device = cuda.jit(device=True, inline="always")  # of all device functions


def lowered(signature, codegen):
    """Decorates a twin: the intrinsic of this signature, for which `codegen` makes LLVM code."""

    def make(twin):
        def typing(context, *args):
            return signature, codegen

        # Numba asks for the names of the parameters.
        names = [
            inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in ("context", *"abcdefghij")
        ]
        typing.__signature__ = inspect.Signature(names[: 1 + len(signature.args)])
        typing.__name__, typing.__doc__ = twin.__name__, twin.__doc__
        made = intrinsic(typing)
        made.traced_as = twin
        return made

    return make


def assembly(signature, text, constraints):
    """Decorates a twin: the intrinsic that is this PTX. Results are words or float32; several make a tuple."""
    return lowered(signature, _assembly(signature.return_type, text, constraints))


def _assembly(result, text, constraints):
    """The code generator. `side_effect` keeps the instruction where the kernel has it: LLVM may then not move loads
    together or apart; ptxas, which knows the machine, still may."""
    count = len(result) if isinstance(result, UniTuple) else 1
    number = F32 if (result.dtype if count > 1 else result) == float32 else I32
    out = number if count == 1 else ir.LiteralStructType([number] * count)

    def codegen(context, builder, signature, args):
        function = ir.FunctionType(out, [arg.type for arg in args])
        answer = builder.asm(function, text, constraints, args, side_effect=True)
        if count == 1:
            return answer
        parts = [builder.extract_value(answer, i) for i in range(count)]
        return context.make_tuple(builder, signature.return_type, parts)

    return codegen


# ---- loads and stores


def _lower_load16(context, builder, signature, args):
    words, chunk, step = args
    sixteen = ir.Constant(I64, 16)
    first = builder.add(builder.ptrtoint(words, I64), builder.mul(builder.zext(chunk, I64), sixteen))
    place = builder.add(first, builder.mul(step, sixteen))
    text = "{ .reg .u64 place; cvta.to.global.u64 place, $4; ld.global.nc.L2::128B.v4.u32 {$0, $1, $2, $3}, [place]; }"
    return _assembly(signature.return_type, text, "=r,=r,=r,=r,l")(context, builder, signature, [place])


@lowered(UniTuple(uint32, 4)(WORDS, uint32, int64), _lower_load16)
def load16(words, chunk, step):
    """The four words of chunk `chunk + step` of `words`, by one load of 16 bytes. `words` begins at a multiple of 16.

    `chunk` has 32 bits, and `step` is best a constant: then the address is one multiplication, and loads that
    differ in `step` share it. `nc`: the kernel does not write this memory. `L2::128B`: what follows in the
    same 128 bytes is wanted, too.
    """
    first = 4 * (chunk + step)
    return words[first], words[first + 1], words[first + 2], words[first + 3]


def _lower_copy16(context, builder, signature, args):
    target, to, source, at = args
    four = ir.VectorType(I32, 4).as_pointer()
    loaded = builder.load(builder.bitcast(builder.gep(source, [at]), four))
    loaded.align = 16
    builder.store(loaded, builder.bitcast(builder.gep(target, [to]), four)).align = 16
    return context.get_dummy_value()


@lowered(types.void(WORDS, int64, WORDS, int64), _lower_copy16)
def copy16(target, to, source, at):
    """target[to : to + 4] = source[at : at + 4]: one load and one store of 16 bytes.

    Both are uint32 that begin at a multiple of 16 bytes; `to` and `at` are multiples of 4.
    """
    for i in range(4):
        target[to + i] = source[at + i]


# ---- bits


@lowered(float32(uint32), lambda context, builder, signature, args: builder.bitcast(args[0], F32))
def float_of(word):
    """The float32 whose bits these are."""
    return np.uint32(word).view(np.float32)


@lowered(uint32(float32), lambda context, builder, signature, args: builder.bitcast(args[0], I32))
def bits_of(number):
    """The bits of a float32."""
    return int(np.float32(number).view(np.uint32))


@assembly(uint32(uint32, uint32, uint32), "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r")
def pick_bytes(first, second, selector):
    """A word of any four of eight bytes: hexadecimal digit i of `selector` says which becomes byte i.

    Bytes 0 to 3 are those of `first`, the low one first; 4 to 7 those of `second`. (A digit above 7 would give a byte's
    sign eight times over; the twin has no such byte, and raises IndexError.)
    """
    source = int(first).to_bytes(4, "little") + int(second).to_bytes(4, "little")
    return int.from_bytes(bytes(source[selector >> 4 * i & 15] for i in range(4)), "little")


# ---- conversions and arithmetic


@assembly(float32(float32), "ex2.approx.ftz.f32 $0, $1;", "=f,f")
def exp2(x):
    """2 to the power of a float32, in one instruction: within 2 units in the last place, below 2**-126 zero."""
    return np.exp2(np.float32(x))


@assembly(uint32(float32, float32), "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f")
def pack_float16(low, high):
    """Two float32 as float16 in one word, rounded to nearest."""
    return int(np.array([low, high], np.float16).view(np.uint32)[0])


@assembly(
    UniTuple(float32, 2)(uint32),
    "{ .reg .b16 low, high; mov.b32 {low, high}, $2; cvt.f32.f16 $0, low; cvt.f32.f16 $1, high; }",
    "=f,=f,r",
)
def unpack_float16(word):
    """The two float16 of a word as float32; exact."""
    low, high = np.array([word], np.uint32).view(np.float16)
    return np.float32(low), np.float32(high)


@assembly(uint32(float32, float32), "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f")
def pack_bfloat16(low, high):
    """Two float32 as bfloat16 in one word, rounded to nearest."""
    return _bfloat16_bits(low) | _bfloat16_bits(high) << 16


def _bfloat16_bits(number):
    return 0x7FFF if np.isnan(number) else upper_half(int(np.float32(number).view(np.uint32)))


@assembly(uint32(uint32, uint32), "add.rn.f16x2 $0, $1, $2;", "=r,r,r")
def add_float16(first, second):
    """Two sums of float16: the low halves, and the high halves."""
    first, second = (np.array([word], np.uint32).view(np.float16) for word in (first, second))
    return int((first + second).view(np.uint32)[0])


# ---- matrix multiplication by a warp: D = A·B + C, C and D in float32


def _mma(shape_and_types, numbers):
    """The intrinsic mma(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3), which returns the four numbers of D.

    For the twin, `numbers(words)` are the numbers in a row of words.
    """

    def product(lane, fragments):
        """What `lane` gets. The first lane multiplies for all, and leaves the product in `fragments` for the others."""
        if "product" not in fragments:
            fragments["product"] = _product([fragments[i] for i in range(32)], numbers)
        g, t = lane // 4, lane % 4
        result = fragments["product"]
        return result[g, 2 * t], result[g, 2 * t + 1], result[g + 8, 2 * t], result[g + 8, 2 * t + 1]

    def mma(*fragments):
        return cuda.warp_collective("mma", fragments, product)

    text = f"mma.sync.aligned.{shape_and_types} {{$0,$1,$2,$3}}, {{$4,$5,$6,$7}}, {{$8,$9}}, {{$10,$11,$12,$13}};"
    signature = UniTuple(float32, 4)(*[uint32] * 6, *[float32] * 4)
    return assembly(signature, text, "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f")(mma)


def _product(fragments, numbers):
    """The whole product, [16, 8], from the arguments of all 32 lanes."""
    words = np.array([fragment[:6] for fragment in fragments], np.uint32).reshape(8, 4, 6)  # [g, t, word]
    a0, a1, a2, a3, b0, b1 = (numbers(np.ascontiguousarray(words[..., i])) for i in range(6))
    rows = np.vstack([np.hstack([a0, a2]), np.hstack([a1, a3])])  # [16, k]
    columns = np.hstack([b0, b1])  # [8, k]
    c = np.array([fragment[6:] for fragment in fragments], np.float32).reshape(8, 4, 2, 2)  # [g, t, half, column]
    c = c.transpose(2, 0, 1, 3).reshape(16, 8)
    return (rows.astype(np.float64) @ columns.T.astype(np.float64) + c).astype(np.float32)


# A [16, 16], B [16, 8]. Words of A and B hold two neighbours in k: 2t and 2t + 1 (a0, a1, b0), 2t + 8 and 2t + 9.
mma_float16 = _mma("m16n8k16.row.col.f32.f16.f16.f32", lambda words: words.view(np.float16).astype(np.float32))
mma_bfloat16 = _mma(
    "m16n8k16.row.col.f32.bf16.bf16.f32", lambda words: (words.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
)
# A [16, 8], B [8, 8], in float32 of which 10 bits of the fraction count. Words hold t in k (a0, a1, b0), and t + 4.
mma_tfloat32 = _mma("m16n8k8.row.col.f32.tf32.tf32.f32", lambda words: (words & 0xFFFFE000).view(np.float32))

# mypy: ignore-errors
"""Vectors of float32 for Numba: a type that is one register of the CPU, and the operations that the loops need.

Numba knows numbers, and leaves it to LLVM to find vectors in loops. That takes LLVM seconds, and the order of additions
depends on what it finds. Here the code names the vectors: LLVM's own type `<LANES x float>`, one source for 8 lanes
(AVX2; LLVM splits them for other CPUs) and for 16 (AVX-512).

Memory is reached through pointers to what a cache holds, so that an index is an addition and nothing else.
`rows` is a tuple whose length R is the number of rows, of queries or of x, that are computed together: the length is
part of the tuple's type, so the compiler knows it. Numbers [n, R] are R numbers for key 0, then R for key 1, and so on;
a vector holds LANES // R keys of them.
"""

from __future__ import annotations

import inspect
import math

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.extending import intrinsic, register_model

from .cpu_machine import LANES, SUMS

FLOAT, I64, I32, HALF, I16 = ir.FloatType(), ir.IntType(64), ir.IntType(32), ir.HalfType(), ir.IntType(16)
FLOATS, I32S, HALVES, I16S = (ir.VectorType(element, LANES) for element in (FLOAT, I32, HALF, I16))
FUSED = ("contract",)  # a product and a sum may become one instruction; no additions may change places


class Vector(types.Type):
    """LANES numbers of float32."""


vector = Vector(name="Vector")


@register_model(Vector)
class _InARegister(models.PrimitiveModel):
    def __init__(self, manager, numba_type):
        super().__init__(manager, numba_type, FLOATS)


def operation(result):
    """Decorate `build(builder, kinds, *arguments)`, which adds instructions to compiled code and gives their result: it
    becomes a function of compiled code. `kinds` are the arguments' Numba types, `result` is the result's type, or a
    function of `kinds` that gives it."""

    def decorate(build):
        def typed(typing_context, *kinds):
            def generate(context, builder, signature, arguments):
                value = build(builder, kinds, *arguments)
                return context.get_dummy_value() if signature.return_type == types.void else value

            given = tuple(types.int64 if isinstance(kind, types.Integer) else kind for kind in kinds)
            return (result if isinstance(result, types.Type) else result(kinds))(*given), generate

        typed.__name__, typed.__doc__ = build.__name__, build.__doc__
        own = inspect.signature(build)  # `builder` stands for the typing context, which Numba takes first
        typed.__signature__ = own.replace(parameters=[p for p in own.parameters.values() if p.name != "kinds"])
        return intrinsic(typed)

    return decorate


# --- what builds instructions ----------------------------------------------------------------------------------


def _filled(kind, value):
    return ir.Constant(kind, [ir.Constant(kind.element, value)] * kind.count)


def _pick(builder, a, b, lanes):
    """The vector of these lanes, counted through `a` and on through `b`."""
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(lanes)), list(lanes)))


def _splat(builder, x):
    first = builder.insert_element(ir.Constant(FLOATS, ir.Undefined), x, I32(0))
    return _pick(builder, first, first, [0] * LANES)


def _fma(builder, a, b, c):
    return builder.fadd(builder.fmul(a, b, flags=FUSED), c, flags=FUSED)


def _larger(builder, a, b):
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def _place(builder, data, *steps):
    """The pointer `data`, moved by the sum of the steps, each a number of elements."""
    for step in steps:
        data = builder.gep(data, [I64(step) if isinstance(step, int) else step])
    return data


def _load(builder, data, dtype):
    """The vector of the numbers from `data` on as float32, whatever of the five formats they are kept in."""
    stored = ir.VectorType(FLOAT if dtype == types.float32 else ir.IntType(dtype.bitwidth), LANES)
    x = builder.load(builder.bitcast(data, stored.as_pointer()), align=dtype.bitwidth // 8)
    if dtype == types.float32:
        return x
    if dtype == types.uint16:  # the bits of float16
        return builder.fpext(builder.bitcast(x, HALVES), FLOATS)
    if dtype == types.int16:  # the bits of bfloat16
        return builder.bitcast(builder.shl(builder.zext(x, I32S), _filled(I32S, 16)), FLOATS)
    if dtype == types.int8:
        return builder.sitofp(x, FLOATS)
    wide = builder.zext(x, I16S)  # float8, as in formats.from_float8
    size = builder.and_(wide, _filled(I16S, 0x7F))
    sign = builder.shl(builder.and_(wide, _filled(I16S, 0x80)), _filled(I16S, 8))
    bits = builder.or_(sign, builder.shl(size, _filled(I16S, 7)))
    small = builder.fpext(builder.bitcast(bits, HALVES), FLOATS)
    is_nan = builder.icmp_unsigned("==", size, _filled(I16S, 0x7F))
    return builder.select(is_nan, _filled(FLOATS, math.nan), builder.fmul(small, _filled(FLOATS, 256.0)))


def _store(builder, data, x):
    builder.store(x, builder.bitcast(data, FLOATS.as_pointer()), align=4)


# --- numbers in, numbers out -----------------------------------------------------------------------------------


@operation(lambda kinds: kinds[0])
def offset(builder, kinds, data, count):
    """The pointer `count` elements further."""
    return _place(builder, data, count)


@operation(vector)
def load(builder, kinds, data, index):
    """The vector of LANES numbers from data[index] on, from any format."""
    return _load(builder, _place(builder, data, index), kinds[0].dtype)


@operation(types.void)
def store(builder, kinds, data, index, x):
    """Write the vector to data[index] and on."""
    _store(builder, _place(builder, data, index), x)


@operation(types.void)
def store_half(builder, kinds, data, index, x):
    """Write the vector as float16, rounded to the nearest, to data[index] and on."""
    place = builder.bitcast(_place(builder, data, index), HALVES.as_pointer())
    builder.store(builder.fptrunc(x, HALVES), place, align=2)


@operation(vector)
def splat(builder, kinds, x):
    """x in all lanes."""
    return _splat(builder, x)


@operation(vector)
def key_numbers(builder, kinds, rows):
    """0, ... R times, 1, ... R times, and so on: which of a vector's keys each lane belongs to."""
    return ir.Constant(FLOATS, [ir.Constant(FLOAT, lane // len(kinds[0])) for lane in range(LANES)])


@operation(vector)
def add(builder, kinds, a, b):
    return builder.fadd(a, b)


@operation(vector)
def subtract(builder, kinds, a, b):
    return builder.fsub(a, b)


@operation(vector)
def multiply(builder, kinds, a, b):
    return builder.fmul(a, b)


@operation(vector)
def divide(builder, kinds, a, b):
    return builder.fdiv(a, b)


@operation(vector)
def maximum(builder, kinds, a, b):
    """The larger of each two lanes; where `a` is NaN, b."""
    return _larger(builder, a, b)


@operation(vector)
def hide(builder, kinds, score, key, earliest, last):
    """score where earliest < key <= last, else -inf."""
    seen = builder.and_(builder.fcmp_ordered(">", key, earliest), builder.fcmp_ordered("<=", key, last))
    return builder.select(seen, score, _filled(FLOATS, -math.inf))


@operation(types.boolean)
def any_greater(builder, kinds, a, b):
    """Whether a > b in any lane."""
    lanes = builder.bitcast(builder.fcmp_ordered(">", a, b), ir.IntType(LANES))
    return builder.icmp_unsigned("!=", lanes, ir.Constant(lanes.type, 0))


@operation(vector)
def exp(builder, kinds, x):
    """e**x for x <= 0 to float32's precision: 2**n * 2**f with f from -0.5 to 0.5, the second by its series."""
    power = builder.fmul(x, _filled(FLOATS, 1.4426950408889634))
    # Adding and taking away a large number would round, too, but a compiler may cancel that.
    kind = ir.FunctionType(FLOATS, [FLOATS])
    n = builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.rint.v{LANES}f32"), [power])
    f = builder.fsub(power, n)
    y = _filled(FLOATS, 1.5403530e-4)
    for factor in (1.3333558e-3, 9.6181291e-3, 5.5504109e-2, 2.4022651e-1, 6.9314718e-1, 1.0):
        y = _fma(builder, y, f, _filled(FLOATS, factor))
    exponent = builder.shl(builder.fptosi(n, I32S), _filled(I32S, 23))
    y = builder.bitcast(builder.add(builder.bitcast(y, I32S), exponent), FLOATS)
    # below float32's normal numbers, -inf included
    return builder.select(builder.fcmp_ordered("<", x, _filled(FLOATS, -87.0)), _filled(FLOATS, 0.0), y)


# --- products of queries and keys: LANES sums, of R rows with LANES // R keys, key by key -------------------------


@operation(types.UniTuple(vector, LANES))
def no_sums(builder, kinds):
    """Sums of nothing."""
    return ir.Constant(ir.ArrayType(FLOATS, LANES), [_filled(FLOATS, 0.0)] * LANES)


@operation(lambda kinds: kinds[0])
def add_products(builder, kinds, sums, rows, query, q, size, keys, places, t, d):
    """sums[key, row] += query[q + row * size:] * keys[places[t + key] + d:], for LANES dims of each."""
    num_rows = len(kinds[1])
    row_at = [_place(builder, query, q, builder.mul(size, I64(row))) for row in range(num_rows)]
    loaded = [_load(builder, at, types.float32) for at in row_at]
    for key in range(LANES // num_rows):
        key_at = _place(builder, keys, builder.load(_place(builder, places, t, key)), d)
        x = _load(builder, key_at, kinds[5].dtype)
        for row in range(num_rows):
            i = key * num_rows + row
            sums = builder.insert_value(sums, _fma(builder, loaded[row], x, builder.extract_value(sums, i)), i)
    return sums


def _every_second(unit, piece):
    """The lanes of every second `unit` lanes of two vectors: of each piece of the first, then of the second."""
    pieces = [vector + first for first in range(0, LANES, piece) for vector in (0, LANES)]
    return [begin + lane for begin in pieces for lane in range(piece) if lane // unit % 2 == 0]


@operation(vector)
def sum_each(builder, kinds, sums):
    """The vector whose lane i is the sum of all lanes of sums[i].

    Each step adds neighbours, of two vectors at a time, and halves the number of vectors: first within pieces of 4
    lanes, in which lanes move fast, then piece by piece.
    """
    vectors = [builder.extract_value(sums, i) for i in range(LANES)]
    for unit, piece in ((1, 4), (1, 4), *[(4, LANES)] * (LANES.bit_length() - 3)):
        low = _every_second(unit, piece)
        high = [lane + unit for lane in low]
        pairs = zip(vectors[::2], vectors[1::2], strict=True)
        vectors = [builder.fadd(_pick(builder, a, b, low), _pick(builder, a, b, high)) for a, b in pairs]
    return vectors[0]


@operation(types.void)
def store_by_row(builder, kinds, data, index, size, x, rows):
    """From a vector of LANES // R keys with R numbers each: write each row's to data[index + row * size] and on."""
    num_rows = len(kinds[4])
    for row in range(num_rows):
        lanes = _pick(builder, x, x, range(row, LANES, num_rows))
        at = _place(builder, data, index, builder.mul(size, I64(row)))
        builder.store(lanes, builder.bitcast(at, lanes.type.as_pointer()), align=4)


# --- the softmax of a block: a number for each row in every R-th lane --------------------------------------------


def _fold(builder, x, num_rows, combine):
    """Combine the lanes of each row, those half a vector apart first: all lanes end with their row's result."""
    step = LANES // 2
    while step >= num_rows:
        x = combine(builder, x, _pick(builder, x, x, [(lane + step) % LANES for lane in range(LANES)]))
        step //= 2
    return x


@operation(vector)
def fold_maximum(builder, kinds, x, rows):
    """In each lane, the largest number of all lanes of its row."""
    return _fold(builder, x, len(kinds[1]), _larger)


@operation(vector)
def fold_sum(builder, kinds, x, rows):
    """In each lane, the sum of all lanes of its row."""
    return _fold(builder, x, len(kinds[1]), lambda builder, a, b: builder.fadd(a, b))


# --- weighted sums of values: R rows, of each as many vectors as the tuple `columns` is long ----------------------


def _keys_together(num_rows, num_columns):
    """With fewer than SUMS sums for a key, some keys have sums of their own."""
    return max(1, SUMS // (num_rows * num_columns))


@operation(types.int64)
def keys_together(builder, kinds, rows, columns):
    """How many keys add_weighted takes."""
    return I64(_keys_together(len(kinds[0]), len(kinds[1])))


def _row_places(builder, data, m, size, num_rows, num_columns):
    for row in range(num_rows):
        for column in range(num_columns):
            yield _place(builder, data, m, builder.mul(size, I64(row)), column * LANES)


@operation(lambda kinds: types.UniTuple(vector, max(SUMS, len(kinds[3]) * len(kinds[4]))))
def load_rows(builder, kinds, mixed, m, size, rows, columns):
    """The vectors of R rows from mixed[m] on, `size` apart, row by row: the first key's sums. The others' are 0."""
    places = list(_row_places(builder, mixed, m, size, len(kinds[3]), len(kinds[4])))
    count = max(SUMS, len(places))
    result = ir.Constant(ir.ArrayType(FLOATS, count), [_filled(FLOATS, 0.0)] * count)
    for i, place in enumerate(places):
        result = builder.insert_value(result, _load(builder, place, types.float32), i)
    return result


@operation(types.void)
def store_rows(builder, kinds, mixed, m, size, rows, columns, sums):
    """Put back what load_rows gave, the sums of all keys added up."""
    places = list(_row_places(builder, mixed, m, size, len(kinds[3]), len(kinds[4])))
    vectors = [builder.extract_value(sums, i) for i in range(kinds[5].count)]
    while len(vectors) > len(places):
        half = len(vectors) // 2
        vectors = [builder.fadd(a, b) for a, b in zip(vectors[:half], vectors[half:], strict=True)]
    for place, x in zip(places, vectors, strict=True):
        _store(builder, place, x)


@operation(lambda kinds: kinds[0])
def add_weighted(builder, kinds, sums, rows, columns, weights, values, places, t, d):
    """sums[row] += weights[t * R + row] * values[places[t] + d:], for `keys_together` keys."""
    num_rows, num_columns = len(kinds[1]), len(kinds[2])
    for key in range(_keys_together(num_rows, num_columns)):
        at, first = builder.load(_place(builder, places, t, key)), key * num_rows * num_columns
        value = [
            _load(builder, _place(builder, values, at, d, column * LANES), kinds[4].dtype)
            for column in range(num_columns)
        ]
        for row in range(num_rows):
            weight = _place(builder, weights, builder.mul(t, I64(num_rows)), key * num_rows + row)
            weight = _splat(builder, builder.load(weight))
            for column in range(num_columns):
                i = first + row * num_columns + column
                sum_now = _fma(builder, weight, value[column], builder.extract_value(sums, i))
                sums = builder.insert_value(sums, sum_now, i)
    return sums


# --- what is not arithmetic ------------------------------------------------------------------------------------


@operation(types.void)
def prefetch(builder, kinds, data, index, line):
    """Ask for cache line number `line` after data[index], into L2, without waiting for it."""
    byte = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [byte, I32, I32, I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    place = builder.bitcast(_place(builder, data, index), byte)
    builder.call(function, [builder.gep(place, [builder.mul(line, I64(64))]), I32(0), I32(2), I32(1)])  # read, L2, data


@operation(types.int64)
def take_next(builder, kinds, counter):
    """counter[0], and counter[0] += 1, as one step between which no other thread can come."""
    return builder.atomic_rmw("add", counter, I64(1), "monotonic")


@operation(types.int64)
def integer(builder, kinds, data, index, size):
    """Integer number `index` of those from `data` on, which have `size` bytes: 4 or 8."""
    short = ir.IntType(32).as_pointer()
    is_short = builder.icmp_unsigned("==", size, I64(4))
    with builder.if_else(is_short) as (then, otherwise):
        with then:
            wide = builder.sext(builder.load(builder.gep(builder.bitcast(data, short), [index])), I64)
            from_short = builder.block
        with otherwise:
            long = builder.load(_place(builder, data, index))
            from_long = builder.block
    value = builder.phi(I64)
    value.add_incoming(wide, from_short)
    value.add_incoming(long, from_long)
    return value

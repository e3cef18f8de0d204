# mypy: ignore-errors
"""Vectors of float32 for Numba: a type that is one register of the CPU, and the operations that cpu_loop.py needs.

Numba knows numbers, and leaves it to LLVM to find vectors in loops. LLVM finds them in many loops, compiles for seconds
to do so, and adds in an order that depends on what it found. Here a vector is said outright: LLVM's own type
`<LANES x float>`, one code for 8 lanes (AVX2; other CPUs split it) and for 16 (AVX-512).

Memory is reached through pointers (`CPointer` of what a cache holds), so that an index is an addition and nothing else.
`rows` is a tuple whose length R is the number of query rows that are computed together: the length is part of the
tuple's type, so the compiler knows it. A block of numbers [n, R] has R numbers for key 0, then R for key 1, and so on;
a vector holds LANES // R keys of it.
"""

from __future__ import annotations

import math

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.extending import intrinsic, register_model

from .cpu_machine import LANES, TILE

FLOAT, I32, HALF, I16 = ir.FloatType(), ir.IntType(32), ir.HalfType(), ir.IntType(16)
FLOATS, I32S, HALVES, I16S = (ir.VectorType(element, LANES) for element in (FLOAT, I32, HALF, I16))
CACHE_LINE = 64
FUSED = ("contract",)  # a product and a sum may become one instruction; nothing may change places


class Vector(types.Type):
    """LANES numbers of float32."""


vector = Vector(name="Vector")


@register_model(Vector)
class _InARegister(models.PrimitiveModel):
    def __init__(self, manager, numba_type):
        super().__init__(manager, numba_type, FLOATS)


# --- what builds instructions ----------------------------------------------------------------------------------


def _filled(vector_type, value):
    return ir.Constant(vector_type, [ir.Constant(vector_type.element, value)] * vector_type.count)


def _pick(builder, a, b, lanes):
    """The vector of these lanes, counted through `a` and on through `b`."""
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(lanes)), lanes))


def _splat(builder, x):
    first = builder.insert_element(ir.Constant(FLOATS, ir.Undefined), x, I32(0))
    return _pick(builder, first, first, [0] * LANES)


def _fma(builder, a, b, c):
    return builder.fadd(builder.fmul(a, b, flags=FUSED), c, flags=FUSED)


def _load(builder, data, index, dtype):
    """Numbers from data[index] on as float32, whatever of the five formats they are kept in."""
    stored = ir.VectorType(FLOAT if dtype == types.float32 else ir.IntType(dtype.bitwidth), LANES)
    place = builder.bitcast(builder.gep(data, [index]), stored.as_pointer())
    return _floats(builder, builder.load(place, align=dtype.bitwidth // 8), dtype)


def _floats(builder, x, dtype):
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


def _store(builder, data, index, x):
    builder.store(x, builder.bitcast(builder.gep(data, [index]), FLOATS.as_pointer()), align=4)


def _broadcast(builder, data, index):
    """data[index] in all lanes."""
    return _splat(builder, builder.load(builder.gep(data, [index])))


def _step(builder, index, count):
    return builder.add(index, ir.Constant(index.type, count))


def _in_tree(builder, parts):
    """The sum of the parts: those half of the list apart first, then a quarter, and so on.

    Each sum over the keys of a tile is added in this one order, however many keys a vector holds. So a query's bits do
    not depend on how many rows are computed beside it.
    """
    if len(parts) == 1:
        return parts[0]()
    return builder.fadd(_in_tree(builder, parts[0::2]), _in_tree(builder, parts[1::2]))


# --- numbers in, numbers out -----------------------------------------------------------------------------------


@intrinsic
def load(typing_context, data, index):
    """The vector of LANES numbers from data[index] on, from any format."""

    def build(context, builder, signature, arguments):
        return _load(builder, *arguments, data.dtype)

    return vector(data, types.int64), build


@intrinsic
def store(typing_context, data, index, x):
    """Write the vector to data[index] and on."""

    def build(context, builder, signature, arguments):
        _store(builder, *arguments)
        return context.get_dummy_value()

    return types.void(data, types.int64, vector), build


@intrinsic
def splat(typing_context, x):
    """x in all lanes."""
    return vector(types.float32), lambda context, builder, signature, arguments: _splat(builder, arguments[0])


@intrinsic
def repeat(typing_context, data, index, rows):
    """data[index], ... data[index + R - 1], and again, and so on: a number for each row."""

    def build(context, builder, signature, arguments):
        data, index, _ = arguments
        result = ir.Constant(FLOATS, ir.Undefined)
        for row in range(len(rows)):
            result = builder.insert_element(
                result, builder.load(builder.gep(data, [_step(builder, index, row)])), I32(row)
            )
        return _pick(builder, result, result, [lane % len(rows) for lane in range(LANES)])

    return vector(data, types.int64, rows), build


@intrinsic
def key_numbers(typing_context, rows):
    """0, ... R times, 1, ... R times, and so on: which of a vector's keys each lane belongs to."""

    def build(context, builder, signature, arguments):
        return ir.Constant(FLOATS, [ir.Constant(FLOAT, lane // len(rows)) for lane in range(LANES)])

    return vector(rows), build


def _of_two(build):
    @intrinsic
    def operation(typing_context, a, b):
        return vector(vector, vector), lambda context, builder, signature, arguments: build(builder, *arguments)

    return operation


add = _of_two(lambda builder, a, b: builder.fadd(a, b))
subtract = _of_two(lambda builder, a, b: builder.fsub(a, b))
multiply = _of_two(lambda builder, a, b: builder.fmul(a, b))
# Where `a` is NaN, the answer is b.
maximum = _of_two(lambda builder, a, b: builder.select(builder.fcmp_ordered(">", a, b), a, b))


@intrinsic
def hide(typing_context, score, key, earliest, last):
    """score where earliest < key <= last, else -inf."""

    def build(context, builder, signature, arguments):
        score, key, earliest, last = arguments
        seen = builder.and_(builder.fcmp_ordered(">", key, earliest), builder.fcmp_ordered("<=", key, last))
        return builder.select(seen, score, _filled(FLOATS, -math.inf))

    return vector(vector, vector, vector, vector), build


@intrinsic
def any_greater(typing_context, a, b):
    """Whether a > b in any lane."""

    def build(context, builder, signature, arguments):
        lanes = builder.bitcast(builder.fcmp_ordered(">", *arguments), ir.IntType(LANES))
        return builder.icmp_unsigned("!=", lanes, ir.Constant(lanes.type, 0))

    return types.boolean(vector, vector), build


@intrinsic
def exp(typing_context, x):
    """e**x for x <= 0 to float32's precision: 2**n * 2**f with f from -0.5 to 0.5, the second by its series."""

    def build(context, builder, signature, arguments):
        (x,) = arguments
        power = builder.fmul(x, _filled(FLOATS, 1.4426950408889634))
        # Adding and taking away a large number would round, too, but a compiler may cancel that.
        kind = ir.FunctionType(FLOATS, [FLOATS])
        rint = cgutils.get_or_insert_function(builder.module, kind, f"llvm.rint.v{LANES}f32")
        n = builder.call(rint, [power])
        f = builder.fsub(power, n)
        y = _filled(FLOATS, 1.5403530e-4)
        for factor in (1.3333558e-3, 9.6181291e-3, 5.5504109e-2, 2.4022651e-1, 6.9314718e-1, 1.0):
            y = _fma(builder, y, f, _filled(FLOATS, factor))
        exponent = builder.shl(builder.fptosi(n, I32S), _filled(I32S, 23))
        y = builder.bitcast(builder.add(builder.bitcast(y, I32S), exponent), FLOATS)
        # below float32's normal numbers, -inf included
        return builder.select(builder.fcmp_ordered("<", x, _filled(FLOATS, -87.0)), _filled(FLOATS, 0.0), y)

    return vector(vector), build


# --- products of queries and keys ------------------------------------------------------------------------------


@intrinsic
def no_sums(typing_context):
    """LANES vectors of zeros: the sums of R rows with LANES // R keys, key by key."""
    return types.UniTuple(vector, LANES)(), lambda context, builder, signature, arguments: ir.Constant(
        ir.ArrayType(FLOATS, LANES), [_filled(FLOATS, 0.0)] * LANES
    )


@intrinsic
def add_products(typing_context, sums, rows, query, q, size, keys, places, t, d):
    """sums[key, row] += query[q + row * size:] * keys[places[t + key] + d:], for LANES dims of each."""
    num_rows = len(rows)

    def build(context, builder, signature, arguments):
        sums, _, query, q, size, keys, places, t, d = arguments
        row_at = [builder.add(q, builder.mul(size, ir.Constant(size.type, row))) for row in range(num_rows)]
        loaded = [_load(builder, query, at, types.float32) for at in row_at]
        for key in range(LANES // num_rows):
            place = builder.load(builder.gep(places, [_step(builder, t, key)]))
            k = _load(builder, keys, builder.add(place, d), signature.args[5].dtype)
            for row in range(num_rows):
                i = key * num_rows + row
                sums = builder.insert_value(sums, _fma(builder, loaded[row], k, builder.extract_value(sums, i)), i)
        return sums

    i64 = types.int64
    kinds = (sums, rows, query, i64, i64, keys, places, i64, i64)
    return sums(*kinds), build


@intrinsic
def sum_each(typing_context, sums):
    """The vector whose lane i is the sum of all lanes of sums[i].

    Each step halves the number of vectors and the width of what is left of each. All sums add their lanes in one order:
    those half a vector apart first, neighbours last.
    """

    def halves(width):
        """The lanes of the first halves of all pieces of two vectors. Pieces of 128 bits stay where they are."""
        together = max(1, 4 // width) if width <= 4 else LANES // width
        for first in range(0, LANES // width, together):
            for begin in (0, LANES):
                for piece in range(first, first + together):
                    yield from range(begin + piece * width, begin + piece * width + width // 2)

    def halved(vectors, combine):
        width = LANES
        while len(vectors) > 1:
            low, count = list(halves(width)), len(vectors) // 2
            high = [lane + width // 2 for lane in low]
            vectors = [combine(vectors[i], vectors[i + count], low, high) for i in range(count)]
            width //= 2
        return vectors[0]

    # The same steps with numbers tell where each sum ends, and so in which order the vectors must begin.
    ends = halved([[i] * LANES for i in range(LANES)], lambda a, b, low, high: [(a + b)[lane] for lane in low])

    def build(context, builder, signature, arguments):
        ordered = [builder.extract_value(arguments[0], ends.index(i)) for i in range(LANES)]

        def combine(a, b, low, high):
            return builder.fadd(_pick(builder, a, b, low), _pick(builder, a, b, high))

        return halved(ordered, combine)

    return vector(sums), build


# --- the softmax of a block: weights [TILE, R], a number for each row in every R-th lane -------------------------


def _folded(builder, x, num_rows, combine):
    """Combine the lanes of each row: all of them end with the row's result. Those half a vector apart come first."""
    step = LANES // 2
    while step >= num_rows:
        x = combine(x, _pick(builder, x, x, [(lane + step) % LANES for lane in range(LANES)]))
        step //= 2
    return x


@intrinsic
def fold_maximum(typing_context, x, rows):
    """In each lane, the largest number of all lanes of its row."""

    def build(context, builder, signature, arguments):
        def larger(a, b):
            return builder.select(builder.fcmp_ordered(">", a, b), a, b)

        return _folded(builder, arguments[0], len(rows), larger)

    return vector(vector, rows), build


@intrinsic
def sum_keys(typing_context, weights, rows):
    """In each lane, the sum of its row's weights over the TILE keys of the block weights [TILE, R]."""
    num_rows = len(rows)

    def build(context, builder, signature, arguments):
        data = arguments[0]
        places = [ir.Constant(ir.IntType(64), i) for i in range(0, TILE * num_rows, LANES)]
        total = _in_tree(builder, [lambda place=place: _load(builder, data, place, types.float32) for place in places])
        return _folded(builder, total, num_rows, builder.fadd)

    return vector(weights, rows), build


# --- weighted sums of values -----------------------------------------------------------------------------------


def _row_places(builder, m, size, num_rows, num_columns):
    """Where R rows' vectors lie, row by row: each is num_columns vectors long."""
    for row in range(num_rows):
        begin = builder.add(m, builder.mul(size, ir.Constant(size.type, row)))
        for column in range(num_columns):
            yield _step(builder, begin, column * LANES)


@intrinsic
def load_rows(typing_context, mixed, m, size, rows, columns):
    """R rows of `mixed` from mixed[m] on, `size` apart: of each as many vectors as `columns` is long."""
    counts = len(rows), len(columns)
    several = types.UniTuple(vector, counts[0] * counts[1])

    def build(context, builder, signature, arguments):
        data, m, size = arguments[:3]
        result = ir.Constant(ir.ArrayType(FLOATS, several.count), ir.Undefined)
        for i, place in enumerate(_row_places(builder, m, size, *counts)):
            result = builder.insert_value(result, _load(builder, data, place, types.float32), i)
        return result

    return several(mixed, types.int64, types.int64, rows, columns), build


@intrinsic
def store_rows(typing_context, mixed, m, size, rows, sums):
    """Put back what load_rows gave."""

    def build(context, builder, signature, arguments):
        data, m, size, _, sums_ = arguments
        for i, place in enumerate(_row_places(builder, m, size, len(rows), sums.count // len(rows))):
            _store(builder, data, place, builder.extract_value(sums_, i))
        return context.get_dummy_value()

    return types.void(mixed, types.int64, types.int64, rows, sums), build


@intrinsic
def add_weighted(typing_context, sums, rows, weights, w, values, v):
    """sums[row] += weights[w + row] * values[v:], for one key."""
    num_columns = sums.count // len(rows)

    def build(context, builder, signature, arguments):
        sums_, _, weights_, w, values_, v = arguments
        value = [_load(builder, values_, _step(builder, v, c * LANES), values.dtype) for c in range(num_columns)]
        for row in range(len(rows)):
            weight = _broadcast(builder, weights_, _step(builder, w, row))
            for column in range(num_columns):
                i = row * num_columns + column
                sums_ = builder.insert_value(
                    sums_, _fma(builder, weight, value[column], builder.extract_value(sums_, i)), i
                )
        return sums_

    i64 = types.int64
    return sums(sums, rows, weights, i64, values, i64), build


@intrinsic
def scale_rows(typing_context, sums, rows, factors):
    """sums[row] * the row's lane of `factors`."""
    num_columns = sums.count // len(rows)

    def build(context, builder, signature, arguments):
        sums_, _, factors_ = arguments
        for i in range(sums.count):
            factor = _pick(builder, factors_, factors_, [i // num_columns] * LANES)
            sums_ = builder.insert_value(sums_, builder.fmul(builder.extract_value(sums_, i), factor), i)
        return sums_

    return sums(sums, rows, factors), build


# --- what is not arithmetic ------------------------------------------------------------------------------------


@intrinsic
def prefetch(typing_context, data, index, line):
    """Ask for the cache line number `line` after data[index], into L2, without waiting for it."""

    def build(context, builder, signature, arguments):
        byte = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, I32, I32, I32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        place = builder.bitcast(builder.gep(arguments[0], [arguments[1]]), byte)
        place = builder.gep(place, [builder.mul(arguments[2], ir.Constant(ir.IntType(64), CACHE_LINE))])
        builder.call(function, [place, I32(0), I32(2), I32(1)])  # read, L2, data
        return context.get_dummy_value()

    return types.void(data, types.int64, types.int64), build


@intrinsic
def take_next(typing_context, counter):
    """counter[0], and counter[0] += 1, as one step between which no other thread can come."""

    def build(context, builder, signature, arguments):
        return builder.atomic_rmw("add", arguments[0], ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(counter), build


@intrinsic
def offset(typing_context, data, count):
    """The pointer `count` elements further."""
    return data(data, types.int64), lambda context, builder, signature, arguments: builder.gep(
        arguments[0], [arguments[1]]
    )

"""Products with weights: of a few rows, as decoding makes them (`linear` for core/model/llama.py), and of many.

A decode step multiplies one row for each sequence by every weight. BLAS is made for many rows: it packs the weights
first, which costs more than the products of a few rows. Here the weights are read once, where they lie.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np

from ..core.device import Array
from .host_arrays import address, in_lines
from .threads import in_parts, in_turns, num_threads

FEW = 32  # rows at a time: from 64 on, BLAS is as fast as the loop
WHOLE = 16  # numbers: the loop takes rows of a multiple, which are whole vectors of any CPU
LARGE = 1 << 18  # numbers of weights: from here on, one or two rows are worth a loop that takes two at a time
PARTS = 16  # of a product that threads share
PARALLEL = 1 << 26  # multiplications, half a millisecond: for fewer, waking threads costs more than it saves


def linear(x: Array, weight: Array) -> Array:
    """`x [rows, in]` times `weight [out, in]`: [rows, out]. What is no float32 is left to the arrays."""
    rows, (out, size) = len(x), weight.shape
    if type(x) is not np.ndarray or type(weight) is not np.ndarray or rows == 0:  # a subclass has its own product
        return x @ weight.T
    if not x.dtype == weight.dtype == np.float32:
        return x @ weight.T
    whole = size % WHOLE == 0 and out >= WHOLE and weight.flags.carray
    if rows > FEW or not whole or (loop := _loop(rows <= 2 and weight.size >= LARGE)) is None:
        if rows * weight.size < PARALLEL or num_threads() == 1:
            return x @ weight.T
        y = np.empty((rows, out), np.float32)
        in_parts(_multiply_by_blas, out, x, weight, y)
        return y

    # Here, not in functions of their own: of a small model's step, each Python call is a measurable part.
    multiply, block = loop
    padded = -(-rows // block) * block
    given = in_lines(padded, size)
    given[:rows], given[rows:] = x, 0
    y = np.empty((padded, out), np.float32)
    x_at, weight_at, places_at, y_at = map(address, (given, weight, places(size), y))
    arguments = x_at, padded, size, weight_at, out, places_at, y_at
    if rows * weight.size >= PARALLEL and num_threads() > 1:
        step = -(-out // (PARTS * WHOLE)) * WHOLE
        in_turns(lambda first, end, *alive: multiply(first, end, *arguments), out, step, given, weight, y)
    else:
        multiply(0, out, *arguments)
    return y[:rows]


def product(a: Array, b: Array) -> Array:
    """`a [rows, size] @ b [size, columns]`, for large arrays of many rows: the threads share the rows."""
    if not isinstance(a, np.ndarray) or len(a) * b.size < PARALLEL or num_threads() == 1:
        return a @ b
    y = np.empty_like(a, order="C", shape=(len(a), b.shape[1]))  # of the kind of `a`: bench training counts in one
    in_parts(lambda first, end: np.matmul(a[first:end], b, out=y[first:end]), len(a))
    return y


@cache
def _loop(two: bool) -> tuple[Callable[..., None], int] | None:
    """The compiled loop, imported when it is first needed, and the rows that it takes at a time: `two`, or as many as
    with two columns of the weights give the sums that fit in the registers. None where NUMBA_DISABLE_JIT is set."""
    from . import cpu_code, cpu_machine

    rows = 2 if two else cpu_machine.LANES // 2
    return None if cpu_code.unavailable() else (cpu_code.function("multiply", "float32", rows), rows)


@cache
def places(size: int) -> np.ndarray:
    """Where the first rows of a matrix of weights lie, `size` apart, counted in numbers: [WHOLE], which is kept."""
    return np.arange(WHOLE, dtype=np.int64) * size


def _multiply_by_blas(first: int, end: int, x: np.ndarray, weight: np.ndarray, y: np.ndarray) -> None:
    """Columns `first` to `end - 1` of y = x @ weight.T. Each column is added up as if it were computed alone."""
    np.matmul(x, weight[first:end].T, out=y[:, first:end])

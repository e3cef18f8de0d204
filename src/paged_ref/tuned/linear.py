"""Products with weights: of a few rows, as decoding makes them (`linear` for core/model/llama.py), and of many.

A decode step multiplies one row for each sequence by every weight. BLAS is made for many rows: it packs the weights
first, which costs more than the products of a few rows. Here the weights are read once, where they lie.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from ..core.device import Array
from .threads import in_parts, num_threads

FEW = 16  # rows: for more, BLAS is as fast as the loop
WHOLE = 16  # numbers: the loop takes rows of a multiple, of any CPU's vectors
PARALLEL = 1 << 26  # multiplications, half a millisecond: for fewer, waking threads costs more than it saves


def linear(x: Array, weight: Array) -> Array:
    """`x [rows, in]` times `weight [out, in]`: [rows, out]. What is no float32 is left to the arrays."""
    rows, (out, size) = len(x), weight.shape
    if type(x) is not np.ndarray or type(weight) is not np.ndarray or rows == 0:  # a subclass has its own product
        return x @ weight.T
    if not x.dtype == weight.dtype == np.float32:
        return x @ weight.T
    parallel, multiply = rows * weight.size >= PARALLEL and num_threads() > 1, _multiply_by_blas
    if rows <= FEW and size % WHOLE == 0 and out >= WHOLE and weight.flags.c_contiguous and _compiled() is not None:
        multiply = _multiply_few
        spare = -rows % _block(rows)
        x = np.concatenate([x, np.zeros((spare, size), np.float32)]) if spare else np.ascontiguousarray(x)
    elif not parallel:
        return x @ weight.T
    y = np.empty((len(x), out), np.float32)
    if parallel:
        in_parts(multiply, out, x, weight, y)
    else:
        multiply(0, out, x, weight, y)
    return y[:rows]


def product(a: Array, b: Array) -> Array:
    """`a [rows, size] @ b [size, columns]`, for large arrays of many rows: the threads share the rows."""
    if not isinstance(a, np.ndarray) or len(a) * b.size < PARALLEL or num_threads() == 1:
        return a @ b
    y = np.empty_like(a, order="C", shape=(len(a), b.shape[1]))  # of the kind of `a`: bench training counts in one
    in_parts(lambda first, end: np.matmul(a[first:end], b, out=y[first:end]), len(a))
    return y


@cache
def _compiled() -> Any:
    """The module that calls compiled code, imported when that is first needed; None where NUMBA_DISABLE_JIT is set."""
    from . import cpu_code

    return cpu_code if cpu_code.unavailable() is None else None


def _block(rows: int) -> int:
    """How many rows the loop takes at a time."""
    return min(rows, 4) if rows != 3 else 4


@cache
def _places(size: int) -> np.ndarray:
    """Where the first rows of a matrix of weights lie, `size` apart, counted in numbers."""
    return np.arange(WHOLE, dtype=np.int64) * size


def _multiply_few(first: int, end: int, x: np.ndarray, weight: np.ndarray, y: np.ndarray) -> None:
    """Columns `first` to `end - 1` of y = x @ weight.T. A number's bits depend on its row and column alone."""
    loop, at = _compiled().function("multiply", "float32", _block(len(x))), _compiled().address
    out, size = weight.shape
    loop(first, end, at(x), len(x), size, at(weight), out, at(_places(size)), at(y))


def _multiply_by_blas(first: int, end: int, x: np.ndarray, weight: np.ndarray, y: np.ndarray) -> None:
    """Columns `first` to `end - 1` of y = x @ weight.T. Each column is added up as if it were computed alone."""
    np.matmul(x, weight[first:end].T, out=y[:, first:end])

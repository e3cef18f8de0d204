"""Products with weights: of a few rows, as decoding makes them (`linear` for core/model/llama.py), and of many.

A decode step multiplies one row for each sequence by every weight. BLAS is made for many rows: it packs the weights
first, which costs more than the products of a few rows. Here the weights are read once, where they lie.
"""

from __future__ import annotations

import numpy as np

from ..core.device import Array
from .threads import in_parts, num_threads

FEW = 16  # rows: for more, BLAS is as fast as the loop
SMALL = 1 << 18  # weights: up to here, BLAS with the weights first is as fast as the loop, and needs no compiling
PARALLEL = 1 << 26  # multiplications, a millisecond: for fewer, waking threads costs more than it saves


def linear(x: Array, weight: Array) -> Array:
    """`x [rows, in]` times `weight [out, in]`: [rows, out]. What is not float32 is left to NumPy."""
    rows, out = len(x), len(weight)
    if not (isinstance(x, np.ndarray) and x.dtype == weight.dtype == np.float32) or rows == 0:
        return x @ weight.T
    if 1 < rows <= FEW and weight.size <= SMALL:
        return np.ascontiguousarray((weight @ x.T).T)
    parallel = rows * weight.size >= PARALLEL and num_threads() > 1
    if 1 < rows <= FEW and out > 1:
        from .linear_loop import multiply_few as multiply  # here, so that importing this file compiles nothing

        spare = -rows % 4  # the loop takes four rows at a time
        x = np.concatenate([x, np.zeros((spare, x.shape[1]), np.float32)]) if spare else np.ascontiguousarray(x)
    elif parallel:
        multiply = _multiply_by_blas
    else:
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


def _multiply_by_blas(first: int, end: int, x: np.ndarray, weight: np.ndarray, y: np.ndarray) -> None:
    """Columns `first` to `end - 1` of y = x @ weight.T. Each column is added up as if it were computed alone."""
    np.matmul(x, weight[first:end].T, out=y[:, first:end])

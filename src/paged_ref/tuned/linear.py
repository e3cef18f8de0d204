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
SMALL = 1 << 18  # weights: up to here, BLAS with the weights first is as fast as the loop, and needs no compiling
PARALLEL = 1 << 26  # multiplications, a millisecond: for fewer, waking threads costs more than it saves


def linear(x: Array, weight: Array) -> Array:
    """`x [rows, in]` times `weight [out, in]`: [rows, out]. What is no float32 is left to the arrays."""
    rows, out = len(x), len(weight)
    if type(x) is not np.ndarray or type(weight) is not np.ndarray or rows == 0:  # a subclass has its own product
        return x @ weight.T
    if not x.dtype == weight.dtype == np.float32:
        return x @ weight.T
    if 1 < rows <= FEW and weight.size <= SMALL:
        return np.ascontiguousarray((weight @ x.T).T)
    parallel = rows * weight.size >= PARALLEL and num_threads() > 1
    if 1 < rows <= FEW and out > 1 and _loop() is not None:
        multiply = _loop()
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


@cache
def _loop() -> Any:
    """The loop of few rows, which is compiled when it is first needed; None where NUMBA_DISABLE_JIT is set."""
    from numba import config

    from .numba_cache import anywhere

    if config.DISABLE_JIT:
        return None
    with anywhere():
        from .linear_loop import multiply_few

    return multiply_few


def _multiply_by_blas(first: int, end: int, x: np.ndarray, weight: np.ndarray, y: np.ndarray) -> None:
    """Columns `first` to `end - 1` of y = x @ weight.T. Each column is added up as if it were computed alone."""
    np.matmul(x, weight[first:end].T, out=y[:, first:end])

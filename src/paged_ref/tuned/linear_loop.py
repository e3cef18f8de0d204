"""The compiled loop of linear.py."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

ZERO = np.float32(0)


# Additions may be reordered, so that the loop over i runs in vectors: each sum becomes a vector of partial sums.
@njit(
    "void(int64, int64, float32[:, ::1], float32[:, ::1], float32[:, ::1])",
    nogil=True, cache=True, fastmath={"reassoc", "nsz", "contract"},
)  # fmt: skip  # type: ignore[untyped-decorator]
def multiply_few(first: int, end: int, x: Any, weight: Any, y: Any) -> None:
    """Columns `first` to `end - 1`, at least two, of y = x @ weight.T, for rows in multiples of four.

    Four rows times two columns: eight sums and what they are made of fit the sixteen registers of AVX2. A number of x
    is used twice for one load and a weight four times. All rows take their turn before the next two rows of weights, so
    that the weights come from memory once.
    """
    rows, size = x.shape
    for pair in range(first, end, 2):
        column = min(pair, end - 2)  # of an odd number of columns, one is computed twice
        for row in range(0, rows, 4):
            a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = ZERO
            for i in range(size):
                a, b = weight[column, i], weight[column + 1, i]
                x0, x1, x2, x3 = x[row, i], x[row + 1, i], x[row + 2, i], x[row + 3, i]
                a0, a1, a2, a3 = a0 + a * x0, a1 + a * x1, a2 + a * x2, a3 + a * x3
                b0, b1, b2, b3 = b0 + b * x0, b1 + b * x1, b2 + b * x2, b3 + b * x3
            y[row, column], y[row, column + 1] = a0, b0
            y[row + 1, column], y[row + 1, column + 1] = a1, b1
            y[row + 2, column], y[row + 2, column + 1] = a2, b2
            y[row + 3, column], y[row + 3, column + 1] = a3, b3

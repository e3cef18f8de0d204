# mypy: ignore-errors
"""The loop of linear.py. It is compiled as cpu_loop.py is, and made of the same vectors."""

from __future__ import annotations

from numba import njit

from .cpu_machine import LANES
from .cpu_vectors import add_products, no_sums, offset, prefetch, store_by_row, sum_each
from .host_arrays import LINE

part = njit(error_model="numpy")  # no exceptions, as in cpu_code.py


@part
def product(first, end, x, num_rows, size, weight, out, places, y, rows):
    """Columns `first` to `end - 1` of y [num_rows, out] = x [num_rows, size] @ weight.T. There are whole blocks of
    rows, whole vectors of a row, at least LANES columns in all; `places` are those of weight's first LANES rows.

    All rows take their turn before the next columns, so that the weights come from memory once. Those that are needed
    two turns later are asked for meanwhile, beyond the end of the matrix too: what lies there is often needed next.
    """
    columns = LANES // len(rows)
    for turn in range(first, end, columns):
        column = max(0, min(turn, end - columns))  # of columns at the end, some are computed twice
        weights = offset(weight, column * size)
        for row in range(0, num_rows, len(rows)):
            sums = no_sums()
            for d in range(0, size, LANES):
                if row == 0 and (LANES == LINE or d % LINE == 0):
                    for i in range(columns):
                        prefetch(weights, (2 * columns + i) * size + d, 0)
                sums = add_products(sums, rows, x, row * size + d, size, weights, places, 0, d)
            store_by_row(y, row * out + column, out, sum_each(sums), rows)


def multiply(rows):
    """The function that computes len(rows) rows at a time, and LANES // len(rows) columns of each."""

    def multiply_few(first, end, x, num_rows, size, weight, out, places, y):
        product(first, end, x, num_rows, size, weight, out, places, y, rows)

    return multiply_few

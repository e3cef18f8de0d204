"""The compiled loop of linear.py."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

ZERO = np.float32(0)
LINE = 16  # float32s of a cache line
AHEAD = 768  # numbers that are prefetched at a time: the processor drops requests beyond its capacity


@intrinsic  # type: ignore[untyped-decorator]
def prefetch(typing_context: Any, array: Any, row: Any, i: Any) -> Any:
    """Ask for the cache line of array[row, i], without waiting for it; `array` may end before."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        struct = context.make_array(signature.args[0])(context, builder, arguments[0])
        size = cgutils.unpack_tuple(builder, struct.shape)[1]
        at = builder.add(builder.mul(arguments[1], size), arguments[2])
        byte, i32 = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, i32, i32, i32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        address = builder.bitcast(builder.gep(struct.data, [at]), byte)
        builder.call(function, [address, i32(0), i32(2), i32(1)])  # to read, into L2, data
        return context.get_dummy_value()

    return types.void(array, types.int64, types.int64), build


# Additions may be reordered, so that the loop over i runs in vectors: each sum becomes a vector of partial sums.
@njit(  # type: ignore[untyped-decorator]
    "void(int64, int64, float32[:, ::1], float32[:, ::1], float32[:, ::1])",
    nogil=True, cache=True, fastmath={"reassoc", "nsz", "contract"},
)  # fmt: skip
def multiply_few(first: int, end: int, x: Any, weight: Any, y: Any) -> None:
    """Columns `first` to `end - 1`, at least two, of y = x @ weight.T, for rows in multiples of four.

    Four rows times two columns: eight sums and what they are made of fit the sixteen registers of AVX2. A number of x
    is used twice for one load and a weight four times. All rows take their turn before the next two rows of weights, so
    that the weights come from memory once; those that come next are on their way meanwhile.
    """
    rows, size = x.shape
    for pair in range(first, end, 2):
        column = min(pair, end - 2)  # of an odd number of columns, one is computed twice
        for i in range(0, min(2 * size, AHEAD), LINE):
            prefetch(weight, column + 2, i)
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

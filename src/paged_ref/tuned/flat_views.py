"""Arrays as kernels take them: the address of the first element, and memory as one flat row."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from ..core.device import Array, module_of


def address_of(array: Array) -> int:
    """Where the first element lies, in the memory of the array's device."""
    return int(array.__array_interface__["data"][0] if isinstance(array, np.ndarray) else array.data.ptr)


def span_bytes(array: Array) -> int:
    """Bytes from the first element to the end of the last one, gaps included. No stride may be negative."""
    steps = sum((n - 1) * stride for n, stride in zip(array.shape, array.strides, strict=True))
    return int(steps + array.itemsize) if array.size else 0


def flat_view(array: Array, dtype: DTypeLike | None = None) -> Array:
    """The memory from the first element to the last, gaps included, as a flat array of `dtype` (None: the array's
    own). No copy."""
    if array.flags.c_contiguous:
        flat = array.reshape(-1)
        return flat if dtype is None else flat.view(dtype)
    dtype = array.dtype if dtype is None else np.dtype(dtype)
    size = span_bytes(array)
    if not isinstance(array, np.ndarray):
        return module_of(array).ndarray((size // dtype.itemsize,), dtype, memptr=array.data)
    row: np.ndarray[Any, Any] = np.lib.stride_tricks.as_strided(
        array, (size // array.itemsize,), (array.itemsize,), writeable=array.flags.writeable
    )
    return row.view(dtype)

"""float16 queries as the CPU's loop reads them, and its results as float16: by compiled code."""

from __future__ import annotations

import numpy as np

from ..extras.formats import decode, encode
from .cpu_code import function
from .host_arrays import address

FLOAT = np.float32


def _are_halves(array: np.ndarray) -> bool:
    """Whether compiled code can read or write the array as float16."""
    return array.dtype == np.float16 and array.flags.c_contiguous


def widened(query: np.ndarray) -> np.ndarray:
    """The query as float32, in one piece."""
    if not _are_halves(query):
        return np.ascontiguousarray(decode(query), FLOAT)
    wide = np.empty(query.shape, FLOAT)
    function("widen", "uint16")(query.size, address(query), address(wide))
    return wide


def write_rounded(results: np.ndarray, out: np.ndarray) -> None:
    """Write float32 `results` to `out`, of another format or in pieces."""
    if _are_halves(out):
        function("narrow", "uint16")(out.size, address(results), address(out))
    else:
        out[...] = encode(results, out.dtype)

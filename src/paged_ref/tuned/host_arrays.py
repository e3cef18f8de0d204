"""Arrays of float32 for compiled code on a CPU: their addresses, and memory that begins with a cache line."""

from __future__ import annotations

from ctypes import addressof, c_char
from typing import Any

import numpy as np

LINE = 16  # numbers of a cache line


def address(array: Any) -> int:
    """Where the first element lies. NumPy's own way takes four times as long, and is left to arrays that are read-only,
    empty or in pieces."""
    try:
        return addressof(c_char.from_buffer(array))
    except (TypeError, ValueError, BufferError):
        return int(array.ctypes.data)


def whole_lines(size: int) -> int:
    """The next multiple of a cache line, in numbers."""
    return -(-size // LINE) * LINE


def in_lines(rows: int, size: int) -> np.ndarray:
    """Memory for `[rows, size]` that begins with a cache line. From there, a vector is loaded in one piece."""
    memory = np.empty(rows * size + LINE, np.float32)
    skipped = -address(memory) % (4 * LINE) // 4
    return memory[skipped : skipped + rows * size].reshape(rows, size)

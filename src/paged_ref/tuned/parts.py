"""Attention over one more part of the keys, merged into that over the parts before, by one kernel."""

from __future__ import annotations

import numpy as np

from ..core.attention.cuda import Launch
from ..core.device import Array
from . import launching


def add_part(out: Array, lse: Array, part: Array, part_lse: Array) -> bool:
    """Merge `part [num_tokens, num_heads, head_size]` and `part_lse [num_tokens, num_heads]` into `out` and `lse`,
    float32, which lie in one piece. False, and nothing is done, where the kernel cannot."""
    if not launching.takes(out) or launching.unavailable() is not None:
        return False
    if out.dtype != np.float32 or part.dtype.char not in "ef":
        return False
    from .flash_combine import add_part_kernel

    arrays = tuple(array.reshape(-1) for array in (out, lse, part, part_lse))
    launching.start(Launch(add_part_kernel, (lse.size, 1), 128, (*arrays, np.int64(out.shape[-1]))))
    return True

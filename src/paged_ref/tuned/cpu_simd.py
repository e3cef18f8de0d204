"""Backend `cpu-simd`: paged and contiguous attention for CPU threads, around the compiled loop in cpu_loop.py.

A contiguous region is one block that is long enough for everything. So contiguous attention runs the same loop with a
table of one entry, and the two differ by the addresses alone.

Work is cut into items by fixed rules, which do not depend on the rest of the batch or on the number of threads: a
sequence gets the same bits in any batch.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
from llvmlite import binding as llvm

from ..core.attention.attention import Addresses, AttentionCall
from ..extras.formats import FLOAT8, decode, encode
from .cpu_code import unavailable
from .cpu_machine import LANES
from .cpu_step import Step, last, make_shape, read_once
from .halves import write_rounded

__all__ = ["attend", "in_bounds", "unavailable", "unsupported"]

FLOAT, INT = np.float32, np.int64
MOST_KEPT = 1 << 25  # bytes of memory that a thread keeps for its next call


def unsupported(call: AttentionCall) -> str | None:
    """Why this backend cannot run this call; None where it can."""
    for name in ("query", "keys", "values"):
        array = getattr(call, name)
        if not isinstance(array, np.ndarray):
            return f"{name} is not in host memory"
        if (reason := _refused(array.dtype)) is not None:
            return f"{name} is {reason}"
        if name != "query" and min(array.strides, default=0) < 0:
            return f"{name} has a negative stride"
    return None


@cache
def _refused(dtype: np.dtype[Any]) -> str | None:
    """What is said of a type of numbers that this backend, or this CPU, cannot take; None where it can."""
    if dtype == np.float64:
        return "float64, and this backend computes in float32"
    halves = {np.dtype(np.float16): "float16", FLOAT8: "float8, which goes by way of float16"}
    if dtype in halves and llvm.get_host_cpu_features().get("f16c") is False:
        return f"{halves[dtype]}, and this CPU has no conversion from it (F16C)"
    return None


def in_bounds(addresses: Addresses, num_tokens: int, num_blocks: int, block_size: int) -> bool:
    """Whether Addresses.check with these arguments would find nothing: one walk, in compiled code."""
    last.read = None  # the check of these addresses that is kept may have been one with other sizes
    return read_once(addresses, num_tokens, num_blocks, block_size).in_bounds


def attend(call: AttentionCall) -> None:
    """Fill `call.out` and `call.lse`."""
    if call.query.size == 0:
        return
    keys = call.keys
    shape = make_shape(*call.query.shape[1:], keys.dtype, keys.shape[1:], keys.strides, call.values.strides)
    if not shape.in_vectors:
        packed = _packed(call)
        attend(packed)
        call.out[...] = encode(packed.out[:, :, : call.query.shape[2]], call.out.dtype)
        return
    step = getattr(last, "step", None)
    last.step = None  # if this call is interrupted, other threads finish their items: their memory is not used again
    key = shape, id(call.addresses), id(call.variant), call.window, len(call.query)
    if step is None or step.key != key:
        step = Step(call, shape, key, None if step is None else step.memory)
    direct = call.out.dtype == FLOAT and call.out.flags.c_contiguous
    out = call.out if direct else np.empty(call.query.shape, FLOAT)
    step.run(call, out, np.empty(out.shape[:2], FLOAT) if call.lse is None else call.lse)
    if step.memory.nbytes <= MOST_KEPT:
        last.step = step
    if call.variant is not None and call.variant.value_scales is not None:
        out *= np.repeat(call.variant.value_scales, out.shape[1] // len(call.variant.value_scales))[:, None]
    if not direct:
        write_rounded(out, call.out)


def _packed(call: AttentionCall) -> AttentionCall:
    """The call on a copy of its keys and values: contiguous, in float32, filled up with zeros to whole vectors."""
    addresses, size = call.addresses, call.query.shape[2]
    lens = addresses.seq_lens.astype(INT)
    starts = np.cumsum(lens) - lens
    owner = np.repeat(np.arange(len(lens)), lens)
    position = np.arange(len(owner)) - starts[owner]
    if addresses.block_tables is not None:
        block, slot = np.divmod(position, call.keys.shape[1])
        where: Any = addresses.block_tables[owner, block], slot
    else:
        assert addresses.starts is not None
        where = addresses.starts[owner] + position

    def filled(array: np.ndarray) -> np.ndarray:
        rows, heads, _ = array.shape  # at least one row: an empty array has the strides 0, 0, 0
        result = np.zeros((max(1, rows), heads, -(-size // LANES) * LANES), FLOAT)
        result[:rows, :, :size] = decode(array)
        return result

    query, keys, values = filled(call.query), filled(call.keys[where]), filled(call.values[where])
    at_starts = replace(addresses, block_tables=None, starts=starts)
    return replace(call, query=query, keys=keys, values=values, addresses=at_starts, out=np.empty_like(query))

"""Backend `cuda`: launches the teaching kernels of `naive.py` and `paged.py` on a GPU.

`launch` says what to launch, and `attention` launches it. The tracer takes the same `launch` and runs it
on the CPU. Nothing here imports numba before a call needs it.
"""

from __future__ import annotations

import importlib.util
from typing import Any, NamedTuple

import numpy as np

from ...extras.formats import word
from ...interop.arguments import AttentionCall
from .. import device
from ..device import Array, module_of

NUM_THREADS = 128


class Launch(NamedTuple):
    """A kernel with all that it needs."""

    kernel: Any  # what cuda.jit made
    grid: tuple[int, int]
    num_threads: int  # of a CUDA block
    args: tuple[Any, ...]


def unavailable() -> str | None:
    """Why this backend cannot run on this machine; None where it can."""
    if not device.on_gpu:
        return device.reason
    if importlib.util.find_spec("numba_cuda") is None:
        return "it needs the package numba-cuda"
    return None


def unsupported(call: AttentionCall) -> str | None:
    """Why this backend cannot run this call; None where it can."""
    if module_of(call.query) is np:
        return "query lies in host memory; the kernels read the GPU's (CuPy arrays)"
    return unsupported_by_kernels(call)


def unsupported_by_kernels(call: AttentionCall) -> str | None:
    """What of this call the teaching kernels leave out, on whatever they run; None if nothing."""
    features = {
        "sliding_window": call.sliding_window,
        "softcap": call.softcap,
        "alibi_slopes": call.alibi_slopes,
        "sinks": call.sinks,
    }
    for name, value in features.items():
        if value is not None:
            return f"the teaching kernels have no {name}"
    for name, array in (("query", call.query), ("the cache", call.keys)):
        if array.dtype not in (np.float32, np.float16):
            return f"{name} is {word(array.dtype)}; the teaching kernels read float32 and float16"
    for array in (call.keys, call.values):
        scattered = call.paged and array.strides[0] != array.shape[1] * array.strides[1]
        if scattered and array.shape[0] > 1 and array.shape[1] > 1:
            return "the blocks of the cache do not follow one another in memory, as slots must"
    return None


def launch(call: AttentionCall, num_threads: int = NUM_THREADS) -> Launch:
    """The kernel for this call, with its grid, its number of threads (a power of two) and its arguments."""
    from . import naive, paged

    num_tokens = call.query.shape[0]
    lse = call.lse
    if lse is None:  # the kernel writes it always: 4 bytes a head cost less than a second kernel
        lse = module_of(call.query).empty((num_tokens, call.num_heads), dtype=np.float32)
    keys, values = _by_slot(call.keys, call.paged), _by_slot(call.values, call.paged)
    ends = (call.seq_lens, call.query_start_loc, np.float32(call.scale))
    where: tuple[Any, ...]
    if call.paged:
        kernel, where = paged.attention_kernel, (call.block_tables, call.block_size)
    else:
        kernel, where = naive.attention_kernel, (call.starts,)
    args = (call.out, lse, call.query, keys, values, *where, *ends)
    return Launch(kernel, (num_tokens, call.num_heads), num_threads, args)


def attention(call: AttentionCall) -> None:
    """Fill `call.out` and `call.lse`, in order with what CuPy's current stream does."""
    start(*launch(call))


def prepare_compiler() -> None:
    """Call before the first kernel is compiled. numba-cuda up to 0.30 looks up np.row_stack, which NumPy 2.5 has no
    more: np.vstack, of which it was another name, stands in for it."""
    if not hasattr(np, "row_stack"):
        np.row_stack = np.vstack  # type: ignore[attr-defined]


def start(kernel: Any, grid: tuple[int, int], num_threads: int, args: tuple[Any, ...]) -> None:
    """Launch a kernel on CuPy's current stream. The host does not wait."""
    from numba import cuda

    if 0 in grid:
        return
    prepare_compiler()
    stream = cuda.external_stream(device.xp.cuda.get_current_stream().ptr)
    # sync=False: CuPy's work and the kernel share the stream, so the host need not wait for either.
    views = [cuda.as_cuda_array(arg, sync=False) if hasattr(arg, "__cuda_array_interface__") else arg for arg in args]
    kernel[grid, num_threads, stream](*views)


def _by_slot(cache: Array, paged: bool) -> Array:
    """`cache [num_blocks, block_size, ...]` as `[num_slots, ...]`: the same memory, never a copy."""
    if not paged:
        return cache
    return cache.reshape(cache.shape[0] * cache.shape[1], *cache.shape[2:])

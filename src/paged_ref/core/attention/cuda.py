"""Backend `cuda`: launches the teaching kernels of naive.py and paged.py on a GPU.

`launch` says what to launch, and `attend` launches it. The tracer takes the same `launch` and runs it on the CPU.
Nothing here imports numba before a call needs it.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from .. import device
from ..device import Array, module_of
from .attention import AttentionCall, by_slot

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
    return compiler_fault()


def unsupported(call: AttentionCall) -> str | None:
    """Why this backend cannot run this call; None where it can."""
    if module_of(call.query) is np:
        return "query lies in host memory; the kernels read the GPU's (CuPy arrays)"
    return unsupported_by_kernels(call)


def unsupported_by_kernels(call: AttentionCall) -> str | None:
    """What of this call the teaching kernels leave out, on whatever they run; None if nothing."""
    if call.window is not None:
        return "the teaching kernels have no sliding_window"
    if call.variant is not None:
        return f"the teaching kernels have no {call.variant}"
    for name, array in (("query", call.query), ("the cache", call.keys)):
        if array.dtype not in (np.float32, np.float16):
            return f"{name} is {array.dtype}; the teaching kernels read float32 and float16"
    if not (slots_follow(call.keys) and slots_follow(call.values)):
        return "the blocks of the cache do not follow one another in memory, as slots must"
    return None


def slots_follow(cache: Array) -> bool:
    """True where `by_slot(cache)` is the same memory: each block begins where the one before it ends."""
    return bool(cache.ndim == 3 or min(cache.shape[:2]) <= 1 or cache.strides[0] == cache.shape[1] * cache.strides[1])


def launch(call: AttentionCall, num_threads: int = NUM_THREADS) -> Launch:
    """The kernel for this call, with its grid, its number of threads (a power of two) and its arguments."""
    from . import naive, paged

    num_tokens, num_heads = call.query.shape[:2]
    lse = call.lse
    if lse is None:  # the kernel always writes it: 4 bytes a head cost less than a second kernel
        lse = module_of(call.query).empty((num_tokens, num_heads), dtype=np.float32)
    addresses = call.addresses
    where: tuple[Any, ...]
    if addresses.block_tables is not None:
        kernel, where = paged.attention_kernel, (addresses.block_tables, call.keys.shape[1])
    else:
        kernel, where = naive.attention_kernel, (addresses.starts,)
    ends = (addresses.seq_lens, addresses.query_start_loc, np.float32(call.scale))
    args = (call.out, lse, call.query, by_slot(call.keys), by_slot(call.values), *where, *ends)
    return Launch(kernel, (num_tokens, num_heads), num_threads, args)


def attend(call: AttentionCall) -> None:
    """Fill `call.out` and `call.lse`, in order with what CuPy's current stream does."""
    start(launch(call))


def prepare_compiler() -> Any:
    """numba.cuda, ready to compile. numba-cuda up to 0.30 looks up np.row_stack, which NumPy 2.5 has no more:
    np.vstack, of which it was another name, stands in for it. Warnings of small grids are off."""
    from numba import cuda

    if not hasattr(np, "row_stack"):
        np.row_stack = np.vstack
    cuda.config.CUDA_LOW_OCCUPANCY_WARNINGS = 0
    return cuda


@cache
def compiler_fault() -> str | None:
    """Why no kernel can be compiled here, found by compiling a small one; None where it can."""
    try:
        prepare_compiler().compile(lambda array: None, "void(float32[:])", cc=(8, 0))
    except Exception as error:  # of Numba, of NVVM or of a loader: whatever it is, no other kernel compiles
        return f"no kernel compiles: {type(error).__name__}: {error}"
    return None


def start(launch: Launch) -> None:
    """Launch a kernel on CuPy's current stream. The host does not wait."""
    if 0 in launch.grid:
        return
    cuda = prepare_compiler()
    stream = cuda.external_stream(device.xp.cuda.get_current_stream().ptr)
    # sync=False: CuPy's work and the kernel share the stream, so the host need not wait for either.
    arrays = [
        cuda.as_cuda_array(arg, sync=False) if hasattr(arg, "__cuda_array_interface__") else arg for arg in launch.args
    ]
    launch.kernel[launch.grid, launch.num_threads, stream](*arrays)

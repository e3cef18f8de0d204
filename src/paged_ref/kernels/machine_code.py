"""From a `@cuda.jit` function to machine code, without a GPU: PTX by Numba, then SASS by nvJitLink.

The launch path loads exactly this code, so what the tests read without a GPU is what a GPU runs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

Parameters = tuple[str, ...]  # of each parameter: a dtype's name, with a star for a pointer to such numbers


@dataclass(frozen=True)
class Code:
    """A compiled kernel."""

    name: str  # of the entry point
    ptx: str
    binary: bytes  # a cubin
    registers: int  # of a thread
    shared_bytes: int  # static shared memory of a CUDA block
    stack_bytes: int  # of a thread; these and the next two are 0 in good code
    spill_stores: int
    spill_loads: int


def parameters(args: tuple[Any, ...]) -> Parameters:
    """The types of a kernel's arguments: arrays are passed as pointers, NumPy scalars by value."""
    return tuple(arg.dtype.name + ("*" if getattr(arg, "ndim", 0) else "") for arg in args)


@cache
def compile_kernel(
    kernel: Any, types: Parameters, bounds: tuple[int, int], capability: tuple[int, int]
) -> Code:
    """Compile for GPUs of this compute capability.

    `bounds`: threads of a CUDA block, and how many CUDA blocks must fit on a multiprocessor. Raises ImportError where numba-cuda or nvJitLink is missing."""
    from numba import cuda
    from numba.core import types as numba_types
    from numba.np.numpy_support import from_dtype

    def numba_type(name: str) -> Any:
        number = from_dtype(np.dtype(name.rstrip("*")))
        return numba_types.CPointer(number) if name.endswith("*") else number

    signature = tuple(numba_type(name) for name in types)
    ptx, _ = cuda.compile(
        kernel.py_func, signature, cc=capability, device=False, abi="numba", launch_bounds=bounds
    )
    name = re.search(r"\.entry (\w+)", ptx)
    assert name is not None
    return link(str(ptx), name[1], capability)


def link(ptx: str, name: str, capability: tuple[int, int]) -> Code:
    """PTX to machine code, with what the assembler says about it."""
    from cuda.bindings import nvjitlink

    options = [f"-arch=sm_{capability[0]}{capability[1]}", "-Xptxas=-v", "-verbose"]
    linker = nvjitlink.create(len(options), options)
    try:
        text = ptx.encode()
        nvjitlink.add_data(linker, nvjitlink.InputType.PTX, text, len(text), name)
        nvjitlink.complete(linker)
        binary = bytearray(nvjitlink.get_linked_cubin_size(linker))
        nvjitlink.get_linked_cubin(linker, binary)
        log = bytearray(nvjitlink.get_info_log_size(linker))
        nvjitlink.get_info_log(linker, log)
    finally:
        nvjitlink.destroy(linker)
    said = log.decode()
    stack = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
    used = re.search(r"[Uu]sed (\d+) registers", said)
    shared = re.search(r"(\d+) bytes smem", said)
    assert stack is not None and used is not None, said
    return Code(
        name, ptx, bytes(binary), int(used[1]), int(shared[1]) if shared else 0, *(int(n) for n in stack.groups())
    )

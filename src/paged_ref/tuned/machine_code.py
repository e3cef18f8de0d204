"""From a `@cuda.jit` function to machine code, without a GPU: PTX by Numba, then SASS by nvJitLink.

The launch path loads exactly this code, so what the tests read without a GPU is what a GPU runs.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from ..core.attention.cuda import Launch, prepare_compiler

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


def bounds_of(launch: Launch) -> tuple[int, int]:
    """Threads of a CUDA block, and how many CUDA blocks must fit on a multiprocessor: 1, or the kernel's own number."""
    return launch.kernel.targetoptions.get("launch_bounds") or (launch.num_threads, 1)


# By a dtype's number: a number's name, and a pointer's. (`dtype.name` is Python code in NumPy, and takes microseconds.)
_NAMES = {np.dtype(code).num: (np.dtype(code).name, np.dtype(code).name + "*") for code in "?bBhHiIlLqQefd"}


def parameters(args: tuple[Any, ...]) -> Parameters:
    """The types of a kernel's arguments: arrays are passed as pointers, NumPy scalars by value."""
    return tuple([_NAMES[arg.dtype.num][arg.ndim > 0] for arg in args])


def missing_packages() -> list[str]:
    """What is not installed of what compiles and reads kernels; the extra `ptx` brings all of it."""
    found = {
        "numba-cuda": importlib.util.find_spec("numba_cuda"),  # Numba's own cuda takes no launch_bounds
        "cuda-bindings": importlib.util.find_spec("cuda") and importlib.util.find_spec("cuda.bindings"),
        "nvidia-cuda-nvdisasm": disassembler(),
    }
    return [package for package, place in found.items() if place is None]


@cache
def compile_kernel(kernel: Any, types: Parameters, bounds: tuple[int, int], capability: tuple[int, int]) -> Code:
    """Compile for GPUs of this compute capability. `bounds` as `bounds_of` gives them.

    Raises ImportError where one of the missing_packages is needed, and RuntimeError where nvJitLink is older than NVVM.
    """
    from numba import cuda
    from numba import types as numba_types
    from numba.np.numpy_support import from_dtype

    def numba_type(name: str) -> Any:
        number = from_dtype(np.dtype(name.rstrip("*")))
        return numba_types.CPointer(number) if name.endswith("*") else number

    prepare_compiler()
    signature = tuple(numba_type(name) for name in types)
    ptx, _ = cuda.compile(kernel.py_func, signature, cc=capability, device=False, abi="numba", launch_bounds=bounds)
    name = re.search(r"\.entry (\w+)", ptx)
    assert name is not None
    check_versions(str(ptx), linker_version())
    return link(str(ptx), name[1], capability)


def linker_version() -> tuple[int, int]:
    """The CUDA version of nvJitLink."""
    from cuda.bindings import nvjitlink

    major, minor = nvjitlink.version()
    return int(major), int(minor)


def check_versions(ptx: str, linker: tuple[int, int]) -> None:
    """Raise RuntimeError if nvJitLink is older than NVVM, which names its CUDA version in its PTX. (A newer nvJitLink
    reads that, and NVIDIA's packages install such pairs.)"""
    found = re.search(r"release (\d+)\.(\d+)", ptx)
    if found is not None and (int(found[1]), int(found[2])) > linker:
        raise RuntimeError(
            f"NVVM is of CUDA {found[1]}.{found[2]} and nvJitLink of CUDA {linker[0]}.{linker[1]}, which cannot read "
            "newer PTX: install the packages nvidia-nvvm and nvidia-nvjitlink of one version"
        )


@cache
def compiler_fault(capability: tuple[int, int]) -> str | None:
    """Why no kernel can be compiled here, found by compiling a small one; None where it can."""
    from numba import cuda

    def nothing(array: Any) -> None:
        array[0] = 0

    try:
        compile_kernel(cuda.jit(nothing), ("float32*",), (32, 1), capability)
    except Exception as error:  # of Numba, NVVM, nvJitLink or a loader: whatever it is, no kernel will compile
        return f"no kernel compiles: {type(error).__name__}: {error}"
    return None


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
    report = log.decode()
    stack = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    used = re.search(r"[Uu]sed (\d+) registers", report)
    shared = re.search(r"(\d+) bytes smem", report)
    if stack is None or used is None:
        raise RuntimeError(f"nvJitLink does not say what the kernel needs: {report}")
    return Code(
        name, ptx, bytes(binary), int(used[1]), int(shared[1]) if shared else 0, *(int(n) for n in stack.groups())
    )


def disassembler() -> str | None:
    """Where nvdisasm is; None where it is not. The package nvidia-cuda-nvdisasm (extra `ptx`) brings it."""
    try:
        from cuda.pathfinder import find_nvidia_binary_utility
    except ImportError:
        return shutil.which("nvdisasm")
    return find_nvidia_binary_utility("nvdisasm") or shutil.which("nvdisasm")


def disassemble(code: Code) -> list[str]:
    """The machine code in order: instructions, as `LDG.E.128.CONSTANT R4, ...`, and labels, as `.L_x_1:`."""
    program = disassembler()
    if program is None:
        raise ValueError("nvdisasm is not here: install the extra `ptx`")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code.binary)
        file.flush()
        text = subprocess.run([program, "-c", file.name], capture_output=True, text=True, check=True).stdout
    lines = []
    for line in text.splitlines():
        if line.startswith(".L_"):
            lines.append(line.strip())
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            lines.append(instruction[1])
    return lines


def operation(instruction: str) -> str:
    """The operation of an instruction, without its predicate: `LDG.E.128.CONSTANT`."""
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0]


def loop_with_most(lines: list[str], name: str) -> list[str]:
    """The instructions of the loop with the most operations that begin so: from a label to the jump back to it."""
    labels = {line.rstrip(":"): i for i, line in enumerate(lines) if line.startswith(".L_")}
    loops = []
    for i, line in enumerate(lines):
        jump = re.search(r"BRA\S* .*`\((\.L_\w+)\)", line)
        if jump and labels[jump[1]] < i:
            body = [line for line in lines[labels[jump[1]] : i + 1] if not line.startswith(".L_")]
            loops.append((-sum(operation(line).startswith(name) for line in body), len(body), body))
    return min(loops, key=lambda loop: loop[:2])[2]

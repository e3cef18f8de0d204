"""Compiled kernels as files: a machine without a GPU compiles them, and a GPU starts with them immediately.

A tuned kernel takes about six seconds to compile, and its file is some 60 KB. The environment variable
PAGED_REF_CUBINS names the folder; without it nothing is read or written. `make cubins` fills the folder.
"""

from __future__ import annotations

import hashlib
import json
import os
from functools import cache
from pathlib import Path
from typing import Any

from . import machine_code
from .machine_code import Parameters

ROOT = Path(__file__).parent.parent
SOURCES = (  # what a kernel's code comes from
    "tuned/flash_*.py", "tuned/*_kernels.py", "tuned/cuda_intrinsics.py", "tuned/machine_code.py", "extras/formats.py",
)  # fmt: skip
counts = {"read": 0, "compiled": 0}  # kernels since the start


def code_of(kernel: Any, types: Parameters, bounds: tuple[int, int], capability: tuple[int, int]) -> tuple[str, bytes]:
    """The name of the kernel's entry point, and its machine code: from the folder if it is there, else compiled, and
    then written to the folder."""
    folder = os.environ.get("PAGED_REF_CUBINS")
    path = Path(folder) / file_name(kernel, types, bounds, capability) if folder else None
    if path is not None and (found := read(path)) is not None:
        counts["read"] += 1
        return found
    counts["compiled"] += 1
    code = machine_code.compile_kernel(kernel, types, bounds, capability)
    if path is not None:
        write(path, code)
    return code.name, code.binary


def read(path: Path) -> tuple[str, bytes] | None:
    """What `write` wrote; None where there is no file, or only a part of one."""
    if not path.exists():
        return None
    line, _, binary = path.read_bytes().partition(b"\n")
    try:
        header = json.loads(line)
    except ValueError:
        return None
    return (header["name"], binary) if header["bytes"] == len(binary) else None


def write(path: Path, code: machine_code.Code) -> None:
    """A line of JSON, then the machine code. Another process may do the same at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = json.dumps({"name": code.name, "bytes": len(code.binary), "registers": code.registers})
    beside = path.with_suffix(f".{os.getpid()}")
    beside.write_bytes(header.encode() + b"\n" + code.binary)
    beside.replace(path)


def file_name(kernel: Any, types: Parameters, bounds: tuple[int, int], capability: tuple[int, int]) -> str:
    """The folder and name of a kernel's file: the CUDA version and the architecture, then a digest of all else that
    decides the code: source, constants, types and bounds."""
    what = "|".join([source_digest(), constants_of(kernel), repr(types), repr(bounds)])
    major, minor = machine_code.linker_version()
    digest = hashlib.sha256(what.encode()).hexdigest()[:24]
    return f"cuda{major}.{minor}-sm{capability[0]}{capability[1]}/{kernel.py_func.__name__}-{digest}.cubin"


@cache
def source_digest() -> str:
    """Of every file that a kernel's code comes from."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in SOURCES for path in ROOT.glob(pattern)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def constants_of(function: Any) -> str:
    """What is fixed in a kernel when its factory makes it: the values in its closure, and in those of the device
    functions that it calls."""
    plain = getattr(function, "py_func", function)
    code = getattr(plain, "__code__", None)
    if code is None:  # a class or an intrinsic: its source says all
        return getattr(function, "__name__", type(function).__name__)
    values = (cell.cell_contents for cell in plain.__closure__ or ())
    inner = (constants_of(value) if callable(value) else repr(value) for value in values)
    return f"{plain.__module__}.{plain.__qualname__}({', '.join(inner)})"

"""Machine code of the loop: compiled by Numba once, and kept in a file.

Numba's own cache would do, but it needs Numba, which takes longer to import (0.4 s) than all else in a first call.
Code from a file needs llvmlite alone. Here functions take pointers and numbers only, and so need no part of Numba
when they run. A file's name holds a digest of all that the code depends on: both source files, versions, the CPU.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import tempfile
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llvmlite import binding as llvm

from .cpu_machine import cpu_features, cpu_name

HERE = Path(__file__).parent
SOURCES = ("cpu_loop.py", "cpu_vectors.py", "cpu_machine.py", "cpu_code.py")
KINDS = {"i": ctypes.c_int64, "f": ctypes.c_float}  # all others are pointers


@cache
def function(name: str, kinds: str, *fixed: int) -> Callable[..., None]:
    """The compiled form of the function `name` in cpu_loop.py. Its arguments are pointers and numbers, one letter of
    `kinds` each: `I`, `F`, or the letter of a NumPy dtype: a pointer to these; `i`, `f`: an int64, a float32.
    With `fixed`, the function is what `<name>_of` returns for tuples of these lengths."""
    key = f"{name}-{kinds}-{'-'.join(map(str, fixed))}"
    file = _folder() / f"paged_ref.{key}.{_digest()}.o"
    try:
        code = file.read_bytes()
    except OSError:
        code = _compile(name, kinds, fixed, key)
        _keep(file, code)
    return _callable(code, key, kinds)


def _digest() -> str:
    digest = hashlib.sha256()
    for source in SOURCES:
        digest.update((HERE / source).read_bytes())
    for part in (version("numba"), version("llvmlite"), llvm.get_process_triple(), cpu_name(), cpu_features()):
        digest.update(part.encode())
    return digest.hexdigest()[:16]


def _folder() -> Path:
    """Where code is kept: with Numba's own, beside the sources, or, where that cannot be written, with the user's."""
    named = os.environ.get("NUMBA_CACHE_DIR")
    beside = HERE / "__pycache__"
    if named:
        return Path(named)
    return beside if os.access(HERE, os.W_OK) else Path.home() / ".cache" / "paged_ref"


def _keep(file: Path, code: bytes) -> None:
    """Write the file in one step, so that another process sees all of it or nothing."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as written:
            written.write(code)
        Path(written.name).replace(file)
    except OSError:
        pass  # it is compiled again next time


def _machine() -> llvm.TargetMachine:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    target = llvm.Target.from_triple(llvm.get_process_triple())
    return target.create_target_machine(cpu=cpu_name(), features=cpu_features(), opt=3, codemodel="jitdefault", jit=True)


def _compile(name: str, kinds: str, fixed: tuple[int, ...], key: str) -> bytes:
    """Object code in which the function is called `key`."""
    from numba import njit, types

    from . import cpu_loop

    numba_types = {
        "i": types.int64, "f": types.float32, "I": types.CPointer(types.int64), "F": types.CPointer(types.float32),
        "H": types.CPointer(types.uint16), "h": types.CPointer(types.int16), "b": types.CPointer(types.int8),
        "B": types.CPointer(types.uint8),
    }
    python = getattr(cpu_loop, name) if not fixed else getattr(cpu_loop, f"{name}_of")(*((0,) * n for n in fixed))
    compiled = njit(python, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)
    compiled.compile(tuple(numba_types[kind] for kind in kinds))
    (result,) = compiled.overloads.values()
    ir = result.library.get_llvm_str().replace(result.fndesc.llvm_func_name, key)
    return _machine().emit_object(llvm.parse_assembly(ir))


def _callable(code: bytes, key: str, kinds: str) -> Callable[..., None]:
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _machine())
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    address = engine.get_function_address(key)
    argument_types = [KINDS.get(kind, ctypes.c_void_p) for kind in kinds]
    native = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, *argument_types)(address)
    unused = ctypes.create_string_buffer(16)  # where Numba's functions would put a result and an exception
    place = ctypes.addressof(unused)

    def call(*arguments: Any) -> None:
        assert native(place, place, *arguments) == 0

    call.keep = engine, unused  # type: ignore[attr-defined]
    return call

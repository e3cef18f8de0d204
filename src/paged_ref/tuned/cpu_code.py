"""Machine code of cpu_items.py and of the loops: compiled by Numba once, and kept in a file.

Numba keeps compiled code, too, but to find it again Numba must be imported, and that takes longer than all the rest of
a first call. These functions take numbers and pointers only, so their code needs no part of Numba to run: llvmlite
loads it. A file's name holds a digest of all that its code depends on: the sources, the versions, the CPU.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llvmlite import binding as llvm

from .cpu_machine import cpu_features, cpu_name
from .numba_cache import folder, only_mine

HERE = Path(__file__).parent
# Where each function is, and its arguments. i, f: an int64, a float32; I, F: pointers to such; K: a pointer to the
# numbers of a cache.
FUNCTIONS = {
    "read_addresses": ("cpu_items", "IIIiIiIiiiiiiii"),
    "plan": ("cpu_items", "IIIiiiiii"),
    "merge": ("cpu_items", "IiiiFFFF"),
    "attend_in_place": ("cpu_loop", "IIIffFKKIFFFFIFFFF"),
    "attend_copied": ("cpu_loop", "IIIffFKKIFFFFIFFFF"),
    "widen": ("half_loop", "iKF"),
    "narrow": ("half_loop", "iFK"),
    "multiply": ("linear_loop", "iiFiiFiIF"),
    "between": ("decoder_loop", "iiiiFFFFFFFFFFiiiiiifIIIFFFFFF"),
}


def unavailable() -> str | None:
    """Why compiled code cannot run on this machine; None where it can."""
    disabled = os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0")  # asked without importing the compiler
    return "its loop is for the compiler, and NUMBA_DISABLE_JIT is set" if disabled else None


@cache
def function(name: str, cache_type: str = "float32", *fixed: int) -> Callable[..., None]:
    """The compiled form of the function `name`, for caches of numbers of Numba's type `cache_type`. With `fixed`: of
    the function that `name` returns for tuples of these lengths."""
    symbol = "_".join(map(str, (name, cache_type, *fixed)))
    place = folder()
    file = None if place is None else Path(place, f"paged_ref.{symbol}.{_digest()}.o")
    code = None if file is None else _kept(file)
    if code is None:
        code = _compile(name, cache_type, fixed, symbol)
        if file is not None:
            _keep(file, code)
    return _load(code, symbol, FUNCTIONS[name][1])


@cache
def _digest() -> str:
    digest = hashlib.sha256()
    others = {"cpu_vectors", "cpu_machine", "cpu_code", "host_arrays"}
    for name in sorted({module for module, _ in FUNCTIONS.values()} | others):
        digest.update((HERE / f"{name}.py").read_bytes())
    parts = (version("numba"), version("llvmlite"), llvm.get_process_triple(), cpu_name(), cpu_features())
    digest.update("\n".join(parts).encode())
    return digest.hexdigest()[:16]


def _kept(file: Path) -> bytes | None:
    """What `_keep` wrote; None where it wrote nothing, or where another user may have written since."""
    with suppress(OSError), file.open("rb") as opened:
        return opened.read() if only_mine(os.fstat(opened.fileno())) else None
    return None


def _keep(file: Path, code: bytes) -> None:
    """Write the file, for this user alone. Another process sees all of it or no file."""
    with suppress(OSError):
        with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as written:
            written.write(code)
        Path(written.name).replace(file)


def _target_machine() -> Any:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    target = llvm.Target.from_triple(llvm.get_process_triple())
    return target.create_target_machine(cpu_name(), cpu_features(), opt=3, codemodel="jitdefault", jit=True)


def _compile(name: str, cache_type: str, fixed: tuple[int, ...], symbol: str) -> bytes:
    """Object code in which the function is called `symbol`."""
    from numba import njit, types

    kinds = {"i": types.int64, "f": types.float32}
    kinds |= {"I": types.CPointer(types.int64), "F": types.CPointer(types.float32)}
    kinds["K"] = types.CPointer(getattr(types, cache_type))
    module, signature = FUNCTIONS[name]
    python = getattr(import_module(f".{module}", __package__), name)
    if fixed:
        python = python(*(tuple(range(length)) for length in fixed))
    # No wrapper for calls from Python, and no exceptions for divisions: what is left needs nothing but a C library.
    compiled = njit(python, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)
    compiled.compile(tuple(kinds[kind] for kind in signature))
    (result,) = compiled.overloads.values()
    instructions = result.library.get_llvm_str().replace(result.fndesc.llvm_func_name, symbol)
    return bytes(_target_machine().emit_object(llvm.parse_assembly(instructions)))


def _load(code: bytes, symbol: str, signature: str) -> Callable[..., None]:
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _target_machine())
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    c_types: dict[str, Any] = {"i": ctypes.c_int64, "f": ctypes.c_float}
    # Before its own arguments, a function of Numba's takes the places for a result and for an exception.
    arguments = [ctypes.c_void_p, ctypes.c_void_p, *(c_types.get(kind, ctypes.c_void_p) for kind in signature)]
    native = ctypes.CFUNCTYPE(ctypes.c_int32, *arguments)(engine.get_function_address(symbol))
    unused = ctypes.create_string_buffer(16)
    # ctypes releases the interpreter during a call: several threads run this.
    call = partial(native, ctypes.addressof(unused), ctypes.addressof(unused))
    vars(call)["alive"] = engine, unused
    return call

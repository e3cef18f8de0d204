"""Arrays of other libraries as NumPy or CuPy, without a copy, and results in the caller's kind of array."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from ..core.device import Array, module_of

# Formats of other libraries that NumPy, CuPy and DLPack between them do not carry: taken as their bits.
_BITS = {"bfloat16": "uint16", "float8_e4m3fn": "uint8"}


def _bits_of(array: Any) -> str | None:
    """The dtype that holds the bits of such an array; None for all others."""
    dtype = getattr(array, "dtype", None)
    if getattr(dtype, "isbuiltin", 0) == 1:  # NumPy's own: a name takes longer to make than all other checks
        return None
    return _BITS.get(str(dtype).rpartition(".")[2])


def adopt(array: Any, name: str) -> Array:
    """`array` as NumPy or CuPy, sharing its memory. Anything that speaks DLPack is taken.

    torch, JAX and ml_dtypes arrays of bfloat16 and float8_e4m3fn come as uint16 and uint8, without a copy.
    """
    if type(array) is np.ndarray and array.dtype.isbuiltin == 1:  # so are most, and there is nothing more to ask
        return array
    if (bits := _bits_of(array)) is not None:
        array = array.view(getattr(_library(array), bits, bits))
    module = module_of(array)
    if isinstance(array, module.ndarray):
        return array
    if not hasattr(array, "__dlpack__"):
        raise ValueError(f"{name} is a {type(array).__name__}; an array is expected (NumPy, CuPy or DLPack)")
    if hasattr(array, "__dlpack_device__") and array.__dlpack_device__()[0] == 2:  # 2 is kDLCUDA
        import cupy

        return cupy.from_dlpack(array)
    try:
        return np.from_dlpack(array)
    except (BufferError, RuntimeError) as error:
        raise ValueError(f"{name} cannot be read through DLPack: {error}") from None


def like_caller(result: Array, caller: Any) -> Any:
    """`result` in the kind of array that `caller` is: a torch tensor for a torch tensor, and so on."""
    if not isinstance(caller, module_of(result).ndarray):
        library = _library(caller)
        from_dlpack = getattr(library, "from_dlpack", None) or library.numpy.from_dlpack
        result = from_dlpack(result)
    bits = _bits_of(caller)
    return result if bits is None or str(result.dtype).rpartition(".")[2] != bits else result.view(caller.dtype)


def _library(array: Any) -> Any:
    return sys.modules[type(array).__module__.partition(".")[0]]

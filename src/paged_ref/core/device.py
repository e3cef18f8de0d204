"""Where arrays live, decided once when this module is first imported.

`xp` is CuPy where an NVIDIA driver shows a GPU and CuPy is installed, and NumPy elsewhere. The rest of
the package writes array code against `xp` and never asks again. `PAGED_REF_DEVICE=cpu` keeps a machine
with a GPU on NumPy.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import sys
from typing import Any

import numpy as np

Array = Any  # a NumPy or CuPy array: no common static type exists for the two


def driver_reports_gpu() -> bool:
    """True where the NVIDIA driver is present and counts at least one GPU. Imports nothing."""
    for name in ("libcuda.so.1", "nvcuda.dll"):
        try:
            driver = ctypes.CDLL(name)
        except OSError:
            continue
        count = ctypes.c_int(0)
        return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0
    return False


def _choose() -> tuple[Any, str]:
    """The array module, and the reason in words."""
    wanted = os.environ.get("PAGED_REF_DEVICE", "auto")
    if wanted not in ("auto", "cpu"):
        raise ValueError(f"PAGED_REF_DEVICE is {wanted!r}; known are 'auto' and 'cpu'")
    if wanted == "cpu":
        return np, "PAGED_REF_DEVICE=cpu"
    if not driver_reports_gpu():
        return np, "no NVIDIA GPU found"
    try:
        cupy = importlib.import_module("cupy")
    except ImportError as error:
        return np, f"a GPU is here, but CuPy is not: install the extra cuda12 or cuda13 ({error})"
    if not cupy.cuda.is_available():
        return np, "a GPU is here, but CuPy cannot use it"
    return cupy, "GPU found, CuPy installed"


xp, reason = _choose()
on_gpu: bool = xp is not np


def module_of(array: Array) -> Any:
    """NumPy or CuPy, whichever `array` belongs to."""
    cupy = sys.modules.get("cupy")
    return cupy if cupy is not None and isinstance(array, cupy.ndarray) else np


def to_host(array: Array) -> np.ndarray:
    """`array` as NumPy; copies only from a GPU."""
    return array if isinstance(array, np.ndarray) else np.asarray(xp.asnumpy(array) if on_gpu else array)


def synchronize() -> None:
    """Wait until the device has done all that it was given. Call before reading a clock."""
    if on_gpu:
        xp.cuda.get_current_stream().synchronize()

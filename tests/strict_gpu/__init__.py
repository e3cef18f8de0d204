"""A strict stand-in for CuPy and for the GPU behind it. README.md says what it refuses, and what it does not model.

PYTHONPATH=src:tests python -m strict_gpu SCRIPT [arguments]      a program with the stand-in in place
PYTHONPATH=src:tests python -m strict_gpu -m MODULE [arguments]
PYTHONPATH=src:tests python -m pytest -p strict_gpu.plugin ...    tests with the stand-in in place
"""

from __future__ import annotations

import ctypes
from typing import Any


class _Driver:
    """libcuda: there is one GPU."""

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return 0

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
        count._obj.value = 1
        return 0


def install() -> None:
    """Make paged_ref believe that a GPU is here. Call it before anything imports paged_ref."""
    from . import modules

    modules.put_in_place()
    real, driver = ctypes.CDLL, _Driver()
    ctypes.CDLL = lambda name, *args, **options: driver if name == "libcuda.so.1" else real(name, *args, **options)  # type: ignore[assignment,misc]
    try:
        from paged_ref.core import device
    finally:
        ctypes.CDLL = real  # type: ignore[misc]
    if not device.on_gpu:
        raise RuntimeError(f"the stand-in is not in use: {device.reason}")
    from . import kernels

    kernels.put_in_place()

"""Kernels made for speed. Each is a backend of the core's attention, or takes the place of array code."""

import os

from ..core.attention.attention import known_backends, register

FLASH = "tuned kernels on a GPU: split sequences, tensor cores, all formats"
SIMD = "a loop for CPU threads, in vectors: all variants and formats"


def register_backends() -> None:
    """Make the backends known. The core then asks them again whether they work here."""
    register("cuda-flash", FLASH, f"{__name__}.flash", rank=0)
    register("cpu-simd", SIMD, f"{__name__}.cpu_simd", rank=20)
    # Python's own loops are there to be stepped through, and asked for by name: NumPy is much faster.
    compiled = os.environ.get("NUMBA_DISABLE_JIT", "0") in ("", "0")
    register("cpu", known_backends()["cpu"], f"{__name__}.cpu", rank=30 if compiled else None)


register_backends()

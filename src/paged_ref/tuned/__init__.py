"""Kernels made for speed. Each is a backend of the core's attention, or takes the place of array code."""

import os

from ..core.attention.attention import known_backends, register

register(
    "cuda-flash", "tuned kernels on a GPU: split sequences, tensor cores, all formats", f"{__name__}.flash", rank=0
)
register("cpu-simd", "a loop for CPU threads, in vectors: all variants and formats", f"{__name__}.cpu_simd", rank=20)
# Python's own loops are there to be stepped through, and asked for by name: NumPy is much faster.
_compiled = os.environ.get("NUMBA_DISABLE_JIT", "0") in ("", "0")
register("cpu", known_backends()["cpu"], f"{__name__}.cpu", rank=30 if _compiled else None)

"""Kernels made for speed. Each is a backend of the core's attention, or takes the place of array code."""

from ..core.attention.attention import register

FLASH = "tuned kernels on a GPU: split sequences, tensor cores, all formats"


def register_backends() -> None:
    """Make the backends known. The core then asks them again whether they work here."""
    register("cuda-flash", FLASH, f"{__name__}.flash", rank=0)
    register(
        "cpu-simd", "a loop for CPU threads, in vectors: all variants and formats", f"{__name__}.cpu_simd", rank=20
    )


register_backends()

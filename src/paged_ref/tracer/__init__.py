"""Runs CUDA kernels on the CPU, thread by thread, and records every access."""

from ..core.attention.attention import register

# No rank: the tracer shows what a kernel does, and `auto` never takes it.
register("trace", "the teaching kernels run here, thread by thread, and every access recorded", f"{__name__}.trace")

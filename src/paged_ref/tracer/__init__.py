"""Runs CUDA kernels on the CPU, thread by thread, and records every access."""

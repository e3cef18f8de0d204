# mypy: ignore-errors
"""float16 to float32 and back, whole vectors at a time. NumPy takes one number after another, a tenth as long as the
attention of a step of 8 sequences. Compiled as cpu_loop.py is."""

from __future__ import annotations

from .cpu_machine import LANES
from .cpu_vectors import load, store, store_half


def widen(count, halves, out):
    """`count` numbers, a multiple of LANES."""
    for i in range(0, count, LANES):
        store(out, i, load(halves, i))


def narrow(count, x, halves):
    """`count` numbers, a multiple of LANES."""
    for i in range(0, count, LANES):
        store_half(halves, i, load(x, i))

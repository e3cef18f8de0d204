"""What tests count in the record of a traced kernel."""

from __future__ import annotations

import numpy as np

from paged_ref.tracer.access_record import IntArray, Trace


def per_thread(trace: Trace, array: str | None = None, *, write: bool | None = None) -> IntArray:
    """[num_blocks, num_threads]: accesses that each thread makes."""
    rows = trace.select(array, write=write)
    counts = np.zeros((trace.num_blocks, trace.num_threads), dtype=np.int32)
    np.add.at(counts, (rows.block, rows.thread), 1)
    return counts

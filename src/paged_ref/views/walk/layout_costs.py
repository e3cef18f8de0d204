"""What a warp's load of K or V moves when the cache has another layout."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from ...interop.layouts import LAYOUTS, element_offsets, pack_size
from ...tracer.access_record import SECTOR_BYTES, WARP_SIZE
from .kernel_run import IntArray, KernelRun, Load


@dataclass(frozen=True, slots=True)
class LayoutCost:
    """What one load moves in one layout."""

    layout: str
    sectors: int
    used: float  # share of the bytes moved that the lanes asked for
    groups: tuple[tuple[int, ...], ...]  # threads whose element lies in the same sector, by sector
    wide_sectors: int | None  # sectors when each lane loads 16 bytes; None where that makes no sense
    wide_used: float | None
    block_sectors: int  # of all such loads of the CUDA block together


def layout_costs(run: KernelRun, position: int) -> list[LayoutCost]:
    """The warp load at `position` (of K or V) in each layout that has one for this head size."""
    return _costs_of_load(run, int(run.load(position).rows[0]))


@cache
def _costs_of_load(run: KernelRun, first: int) -> list[LayoutCost]:
    """`first` is the first access of the load: all its accesses share the costs."""
    load, info = run.load(first), run.info(first)
    costs = []
    for layout in LAYOUTS:
        try:
            of_keys, of_values = element_offsets(layout, run.shape, info.dtype.itemsize)
        except ValueError:  # head_size is no multiple of x
            continue
        costs.append(_cost(run, layout, (of_keys if info.name == "keys" else of_values).ravel(), load, first))
    return costs


def _cost(run: KernelRun, layout: str, offsets: IntArray, load: Load, position: int) -> LayoutCost:
    """The cost of a load where element i of the cache lies at byte `offsets[i]`.

    The lanes' elements come from the record. The 16-byte form asks for the x elements around each lane's: what the lane
    asks for in its next x - 1 turns, too.
    """
    t, info = run.trace, run.info(position)
    itemsize = info.dtype.itemsize
    elements = t.index[load.rows]
    sectors = offsets[elements] // SECTOR_BYTES
    groups = tuple(
        tuple(thread for thread, sector in zip(load.threads, sectors, strict=True) if sector == shared)
        for shared in np.unique(sectors)
    )
    wide_sectors, wide_used = None, None
    x = pack_size(itemsize)
    if info.name == "keys" and run.shape[3] % x == 0:
        asked = np.unique(offsets[(elements // x * x)[:, None] + np.arange(x)])
        wide_sectors = len(np.unique(asked // SECTOR_BYTES))
        wide_used = len(asked) * itemsize / (wide_sectors * SECTOR_BYTES)
    used = len(np.unique(elements)) * itemsize / (len(groups) * SECTOR_BYTES)
    block = np.flatnonzero((t.block == t.block[position]) & (t.array == t.array[position]))
    loads = np.stack([t.thread[block] // WARP_SIZE, t.site[block], run.turns[block]])  # each of one warp
    block_sectors = np.unique(np.vstack([loads, offsets[t.index[block]] // SECTOR_BYTES]), axis=1).shape[1]
    return LayoutCost(layout, len(groups), used, groups, wide_sectors, wide_used, block_sectors)

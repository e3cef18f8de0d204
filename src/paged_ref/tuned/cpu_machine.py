"""What the CPU backend knows about this machine, and what it chooses by that.

Each choice is a line of a table, with its reason. The figures are of a Zen 3 (AVX2, 2 cores) and of an Emerald Rapids
(AVX-512, 2 cores of a virtual machine); `paged-ref bench kernels` measures what comes of them.
"""

from __future__ import annotations

import os
from functools import cache
from typing import NamedTuple

from llvmlite import binding as llvm

FIELDS = 12  # numbers that say what an item is: cpu_items.py names them
SUMS = 8  # so many at once hide how long each takes: 4 cycles, of which each begins 2

# Numbers by which a call is cut into items. They depend on nothing but a sequence's own lengths, and so do its bits.
TILE = 32  # keys whose scores are kept: a multiple of every number of keys that a vector of scores holds
PART_KEYS = 512  # keys of an item: a long sequence feeds several threads
ITEM_ROWS = 256  # query rows of an item: for size 128 they and their sums (256 KB together) stay in a core's L2

# Query-key products times head_size; for less, one thread. Waking another one takes 10 to 100 us, in which a thread
# does a quarter to all of this.
MIN_PARALLEL_WORK = 1 << 20

# The same for a sequence: for more, its tiles are copied, and a long prompt takes about a fifth less time. The first
# such prompt waits 3 s for its code to be compiled. Results have the same bits.
MIN_COPIED_WORK = 1 << 26


class Vectors(NamedTuple):
    """How the loop is compiled for a kind of CPU."""

    lanes: int  # float32 numbers of a vector
    keys: int  # that all heads go through together
    prefetch_lines: int  # cache lines of each of the next tokens' rows that a head of this token's asks for


# The first line whose feature the CPU has counts.
#   keys      Memory is read in its order, token by token, and rows that lie a multiple of 4,096 bytes apart throw each
#             other out of the L1 cache: 8 of them fit where it has 12 ways (Intel, since AVX-512), and 4 elsewhere.
#   prefetch  takes 2.5 cycles of a Zen 3 even if the line is there already, and its hardware follows a row from the
#             first line on. Intel's does not: float16 is read 1.4 times as fast with 4 lines as with 1.
VECTORS = {
    "avx512f": Vectors(16, 8, 4),
    "sse4a": Vectors(8, 4, 1),  # a feature of AMD's alone
    "": Vectors(8, 4, 4),
}


def cpu_name() -> str:
    """LLVM's name of the CPU for which code is compiled: this one, or the one that Numba is told to compile for."""
    return os.environ.get("NUMBA_CPU_NAME") or str(llvm.get_host_cpu_name())


def cpu_features() -> str:
    """What that CPU has, as LLVM writes it: "+avx2,+fma,-avx512f"."""
    named = os.environ.get("NUMBA_CPU_FEATURES")
    return str(llvm.get_host_cpu_features().flatten()) if named is None else named


def vectors_of(features: str) -> Vectors:
    """The line of VECTORS for a CPU with these features."""
    has = {feature[1:] for feature in features.split(",") if feature.startswith("+")} | {""}
    return next(vectors for feature, vectors in VECTORS.items() if feature in has)


LANES, KEYS, PREFETCH_LINES = vectors_of(cpu_features())


@cache
def block_of(group_size: int, head_size: int, lanes: int = LANES) -> tuple[int, int]:
    """The rows of a block, and how many vectors of each row are summed together.

    Rows share each K and V that is loaded, so as many as fit: 4, 2 or 1, with at most one row in four left empty.
    At most as many sums as a vector has lanes: 8 hide the time that a sum takes and leave room in AVX2's 16 registers,
    and AVX-512 has 32.
    """
    rows = next(rows for rows in (4, 2, 1) if -group_size % rows <= rows // 4)
    vectors = -(-head_size // lanes)  # of a row, filled up with zeros
    return rows, next(columns for columns in (8, 4, 2, 1) if columns * rows <= lanes and vectors % columns == 0)


def passes_of(row_bytes: int, head_bytes: int, sums: int) -> tuple[int, int]:
    """How many keys all heads go through together, and how many cache lines of each next key a head prefetches.

    `row_bytes`: a token's K of all heads, `head_bytes`: of one; `sums`: those of a block that are added up together.
    The whole tile where rows are short: sums then stay in registers throughout, and the hardware's own prefetches are
    enough. The same with fewer than SUMS sums: several keys then have sums of their own, added up in the end.
    """
    lines = min(PREFETCH_LINES, -(-head_bytes // 64))
    return (KEYS, lines) if row_bytes > 256 and sums >= SUMS else (TILE, 0)

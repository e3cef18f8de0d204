"""What is fixed when a tuned kernel is compiled, and the numbers that all of them share."""

from __future__ import annotations

from dataclasses import dataclass

from numba.types import uint16, uint32

from .cuda_intrinsics import device, float_of, unpack_float16
from .flash_elements import ELEMENTS, split_bfloat16, split_float16

NUM_WARPS = 4
NUM_THREADS = 32 * NUM_WARPS
ROWS = 8  # of a warp: a row is one query of one head
MAX_SPLIT_QUERIES = 4  # up to this many queries per sequence, split the keys over warps (as in decoding)
EVERY_LANE = 0xFFFFFFFF


@dataclass(frozen=True)
class KernelVariant:
    """What is fixed when a kernel is compiled."""

    cache: str  # a name in ELEMENTS
    query: str  # "float16", "bfloat16" or "float32"; the output is of the same kind
    head_size: int
    group_size: int  # query heads that share a KV head
    block_size: int | None  # None: contiguous
    prefill: bool = False  # each warp has rows of its own; else the warps of a CUDA block share rows
    mixed: bool = (
        False  # sequences of up to MAX_SPLIT_QUERIES are for the kernel without prefill, the others for prefill
    )
    split: bool = False  # write parts for `combine_kernel`; not in a prefill
    window: bool = False
    softcap: bool = False
    alibi: bool = False
    sinks: bool = False

    @property
    def rows_per_block(self) -> int:
        """Of a CUDA block."""
        return ROWS * NUM_WARPS if self.prefill else ROWS

    @property
    def blocks_per_item(self) -> int:
        """CUDA blocks, not in a prefill, for a token; mixed: for a sequence."""
        return -(-self.group_size * (MAX_SPLIT_QUERIES if self.mixed else 1) // ROWS)

    @property
    def exact(self) -> bool:
        """Q is read as the tensor cores take it, and rounding loses nothing. The kernel then takes it in words."""
        return self.query == ELEMENTS[self.cache].operand and self.query != "float32"

    @property
    def wide(self) -> bool:
        """K and V of a tile do not fit into the registers together."""
        return self.head_size > 128 and ELEMENTS[self.cache].bits == 16

    @property
    def blocks_per_multiprocessor(self) -> int:
        """CUDA blocks that must fit on a multiprocessor, with 4 warps each: it bounds the registers of a thread.

        2: 255 registers, 3: 168, 4: 128.
        """
        row_bytes = self.head_size * ELEMENTS[self.cache].bits // 8
        scattered = self.block_size is not None and self.block_size % 8 != 0  # a table entry for each row
        if row_bytes > 256 or self.head_size > 128 or scattered or not self.exact:
            return 2
        return 3 if row_bytes > 128 or self.head_size > 64 else 4


# ---- a query's numbers in and out, as bits


@device
def from_float16(bits):
    return unpack_float16(uint32(bits))[0]


@device
def from_bfloat16(bits):
    return float_of(uint32(uint32(bits) << 16))


@device
def from_float32(number):
    return number


def rounded_by(split):
    @device
    def to_16_bits(number):
        return uint16(split(number, number)[0] & 0xFFFF)

    return to_16_bits


FROM = {"float16": from_float16, "bfloat16": from_bfloat16, "float32": from_float32}
TO = {"float16": rounded_by(split_float16), "bfloat16": rounded_by(split_bfloat16), "float32": from_float32}

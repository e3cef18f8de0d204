"""The numbers that follow from a KernelVariant: how a kernel lays out tiles, registers and shared memory."""

from __future__ import annotations

from .flash_elements import ELEMENTS
from .flash_variant import NUM_WARPS, ROWS, KernelVariant


class Layout:
    """See flash_kernels.py for what a tile is, and which lane (4 * g + t of a warp) has which part of it."""

    def __init__(self, variant: KernelVariant) -> None:
        self.variant = variant
        self.element = ELEMENTS[variant.cache]
        self.paged = variant.block_size is not None
        self.block_size = variant.block_size or 1
        self.quantized = self.element.bits == 8

        per_word, per_chunk = self.element.per_word, self.element.per_chunk  # numbers in a word; in 16 bytes
        self.per_word, self.per_chunk = per_word, per_chunk
        self.chunks = variant.head_size // per_chunk  # of 16 bytes, of a row of K or V
        self.tile = 8 * per_word  # keys
        self.k_rows, self.v_rows = per_word, 2 * per_word  # keys of a tile that a lane reads of K; of V
        self.k_loads = -(-self.chunks // 4)  # loads for each K row: lanes t = 0..3 take neighbouring chunks
        self.v_loads = -(-self.chunks // 8)  # loads for each V row: lanes g = 0..7 do
        self.all_k = self.chunks % 4 == 0  # no lane is left without a chunk of K
        self.pairs = 4 if self.quantized else 2  # operands (pairs of words) in a chunk of K
        self.pairs_out = per_chunk // 2  # a fragment of O is two numbers of each lane's chunk

        # Registers of a lane: words of Q, K and V, and float32s of O and S.
        self.q_words = self.k_loads * 2 * self.pairs
        self.k_words, self.v_words = 4 * self.k_rows * self.k_loads, 4 * self.v_rows * self.v_loads
        self.o_size, self.s_size = 4 * self.v_loads * self.pairs_out, 4 * self.k_rows

        # Table entries that a lane needs for a tile: one if a tile lies in one block, one for every eight keys if they
        # do, else one for each of its rows.
        self.one_block, self.eights = self.block_size % self.tile == 0, self.block_size % 8 == 0
        several = per_word if self.eights else self.k_rows + self.v_rows
        self.lookups = 1 if self.one_block or not self.paged else several

        self.parts = 1 if variant.prefill else NUM_WARPS  # warps that hold parts of a row
        self.step = 1 if variant.prefill else NUM_WARPS  # from a warp's tile to its next
        self.shared_rows = NUM_WARPS * ROWS
        self.stride = 8 * self.v_loads * per_chunk + 4  # of rows in shared memory: no bank has two lanes of a store

# mypy: ignore-errors
"""The first stage of the tuned kernel: which rows a CUDA block has, and which keys they see. See flash_stages.py."""

from __future__ import annotations

from numba.types import int32, int64, uint32

from .cuda_intrinsics import device
from .flash_layout import Layout
from .flash_variant import MAX_SPLIT_QUERIES, ROWS


def last_sequence(first_of):
    """Makes `search`: by halving, the last sequence whose `first_of(query_start_loc, seq)` is at most `number`."""

    @device
    def search(query_start_loc, num_seqs, number):
        low, high = int64(0), int64(num_seqs - 1)
        while low < high:
            middle = (low + high + 1) >> 1
            if first_of(query_start_loc, middle) <= number:
                low = middle
            else:
                high = middle - 1
        return low

    return search


@device
def first_token_of(query_start_loc, seq):
    return query_start_loc[seq]


search_token = last_sequence(first_token_of)


@device
def sequence_of_token(query_start_loc, num_seqs, token):
    """The sequence of a token: a search, unless each sequence has one token."""
    if token < num_seqs and query_start_loc[token] == token and query_start_loc[token + 1] == token + 1:
        return int64(token)
    return search_token(query_start_loc, num_seqs, token)


def rows_of_block(layout: Layout):
    """Makes `rows`, which finds the rows of a CUDA block."""
    GROUP, PREFILL, MIXED = layout.variant.group_size, layout.variant.prefill, layout.variant.mixed
    BLOCKS_PER_ITEM, ROWS_PER_BLOCK = layout.variant.blocks_per_item, layout.variant.rows_per_block

    @device
    def first_block_of(query_start_loc, seq):
        """The first CUDA block of a sequence in a prefill, without a sum over those before it: each sequence gets as
        many blocks as its rows fill, or one more."""
        return query_start_loc[seq] * GROUP // ROWS_PER_BLOCK + seq

    sequence_of_block = last_sequence(first_block_of)

    @device
    def rows(query_start_loc, num_seqs, block, num_blocks, warp):
        """(sequence, first row of the CUDA block, first row of the warp, first token, number of rows).

        Row r is head r % GROUP of the group, of query `first_token + r // GROUP`. No rows: another kernel has the
        sequence.
        """
        if PREFILL:
            block = int32(num_blocks - 1 - block)  # the last queries, which see most, begin first
            seq = sequence_of_block(query_start_loc, num_seqs, block)
            first_row = (block - first_block_of(query_start_loc, seq)) * ROWS_PER_BLOCK
            warp_row = first_row + ROWS * warp
        else:
            seq = int64(block // BLOCKS_PER_ITEM)
            if not MIXED:
                seq = sequence_of_token(query_start_loc, num_seqs, seq)
            first_row = block % BLOCKS_PER_ITEM * ROWS
            warp_row = first_row
        first_token, num_queries = int32(query_start_loc[seq]), query_start_loc[seq + 1] - query_start_loc[seq]
        if MIXED and (num_queries <= MAX_SPLIT_QUERIES) == PREFILL:
            num_queries = 0
        if not PREFILL and not MIXED:  # a token for each CUDA block
            first_token, num_queries = int32(block // BLOCKS_PER_ITEM), 1
        return seq, first_row, warp_row, first_token, num_queries * GROUP

    return rows


def tiles_of_warp(layout: Layout):
    """Makes `tiles`, which finds the keys that some row of a warp sees, and the tiles that hold these keys."""
    GROUP, TILE, WINDOW = layout.variant.group_size, layout.tile, layout.variant.window
    PREFILL, SPLIT = layout.variant.prefill, layout.variant.split

    @device
    def tiles(warp, warp_row, first_token, num_rows, to_position, window, num_splits, split_number):
        """(first key, key past the last, first tile of this warp, tile past the last)."""
        high = int32(first_token + (min(warp_row + ROWS, num_rows) - 1) // GROUP + to_position + 1)
        low = int32(0)
        if WINDOW:
            low = int32(max(0, first_token + warp_row // GROUP + to_position - window + 1))
        tile, end = int32(low // TILE), int32((high + TILE - 1) // TILE)
        if PREFILL:
            if warp_row >= num_rows:
                end = tile
        else:
            if SPLIT:
                part = int32(uint32(max(0, end - tile + num_splits - 1)) // uint32(num_splits))
                tile = int32(tile + part * split_number)
                end = int32(min(end, tile + part))
            tile = int32(tile + warp)
        return low, high, tile, end

    return tiles

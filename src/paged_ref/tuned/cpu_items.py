# mypy: ignore-errors
"""A call of the backend `cpu-simd`, cut into items before the loop of cpu_loop.py, and its parts joined after it.

How a sequence is cut depends on its own lengths alone, and so do its bits. Compiled by Numba, as the loop is.
"""

from __future__ import annotations

import math

import numpy as np

from .cpu_machine import FIELDS, PART_KEYS
from .cpu_vectors import integer, offset

FLOAT = np.float32
LOWEST = FLOAT(-3.0e38)  # stands for -inf, since -inf - -inf would be NaN

# One piece of work: `count` queries of sequence `seq` from row `query` on, the first at `position` in its sequence,
# over the keys from `begin` to before `end`, in the KV heads from `head` to before `end_head`. Where a query's keys are
# split, this is part `part` of `parts`, and its result goes to the rows from `to` on of the partial results; else to
# the queries' own rows. `copied`: of one KV head, whose tiles are copied first.
SEQ, QUERY, COUNT, POSITION, BEGIN, END, HEAD, END_HEAD, PART, PARTS, TO, COPIED = range(FIELDS)


def read_addresses(
    found, whole, seq_lens, seq_lens_bytes, query_start_loc, loc_bytes, table, table_bytes, row_step, num_seqs,
    max_blocks, num_tokens, num_blocks, block_size, is_contiguous,
):  # fmt: skip
    """Copy what is used of the addresses to `whole`: seq_lens [num_seqs], query_start_loc [num_seqs + 1] and the table
    [num_seqs, max_blocks], whose rows are `row_step` numbers apart. Numbers have so many bytes: 4 or 8. Where
    `is_contiguous`, the table is each region's first slot, and num_blocks is the number of slots.

    found [2] = whether a length, a query count or a block id is out of bounds, and the sum of the lengths.
    """
    wrong, total, loc, to = 0, 0, offset(whole, num_seqs), offset(whole, 2 * num_seqs + 1)
    for s in range(num_seqs + 1):
        loc[s] = integer(query_start_loc, s, loc_bytes)
    if loc[0] != 0 or loc[num_seqs] != num_tokens:
        wrong = 1
    for s in range(num_seqs):
        whole[s] = integer(seq_lens, s, seq_lens_bytes)
        if whole[s] < 0 or loc[s + 1] < loc[s] or whole[s] > max_blocks * block_size:
            wrong = 1
        end = num_blocks - (whole[s] - 1) * is_contiguous  # the last slot must be one of the cache, too
        for b in range(min(max_blocks, (whole[s] - 1) // block_size + 1)):
            block = integer(table, s * row_step + b, table_bytes)
            if block < 0 or block >= end:
                wrong = 1
            to[s * max_blocks + b] = block
        total += whole[s]
    found[0], found[1] = wrong, total


def plan(found, items, whole, num_seqs, num_kv_heads, window, most_queries, most_of_a_head, copied_from):
    """Fill `items`. found [4] = how many there are, the rows of partial results, the query-key products, and how many
    items are `copied`. `whole`: what read_addresses wrote.

    An item has all KV heads, and up to `most_queries`: K and V are read in the order in which they lie. A sequence with
    more queries has items of one head, and up to `most_of_a_head`, so that K and V are read fewer times; they are
    `copied` if it has `copied_from` query-key products.
    """
    seq_lens, query_start_loc = whole, offset(whole, num_seqs)
    count, split_rows, products, copied = 0, 0, 0, 0
    for s in range(num_seqs):
        query_len = query_start_loc[s + 1] - query_start_loc[s]
        most, heads = (most_queries, num_kv_heads) if query_len <= most_queries else (most_of_a_head, 1)
        for first in range(0, query_len, most):
            queries = min(most, query_len - first)
            position = seq_lens[s] - query_len + first
            begin, end = max(0, position - window + 1), max(0, position + queries)
            parts = max(1, -(-(end - begin) // PART_KEYS)) if query_len <= most_queries else 1
            products += queries * max(0, end - begin)
            for head in range(0, num_kv_heads, heads):
                for part in range(parts):
                    item = offset(items, count * FIELDS)
                    item[SEQ], item[QUERY], item[COUNT] = s, query_start_loc[s] + first, queries
                    item[POSITION], item[BEGIN] = position, begin + part * PART_KEYS
                    item[END] = min(end, item[BEGIN] + PART_KEYS) if parts > 1 else end
                    item[HEAD], item[END_HEAD] = head, head + heads
                    item[PART], item[PARTS], item[TO] = part, parts, item[QUERY]
                    item[COPIED] = 1 if query_len > most_queries and query_len * seq_lens[s] >= copied_from else 0
                    count, copied = count + 1, copied + item[COPIED]
                    if parts > 1:
                        item[TO] = split_rows
                        split_rows += queries
    found[0], found[1], found[2], found[3] = count, split_rows, products, copied


def merge(items, num_items, num_heads, size, parts_out, parts_lse, out, lse):
    """Join the parts of each split query, as merge_states does: a part weighs e**lse."""
    for i in range(num_items):
        item = offset(items, i * FIELDS)
        if item[PART] == 0 and item[PARTS] > 1:
            rows = item[COUNT] * num_heads  # of a part; the next part begins as many rows further
            for r in range(rows):
                first, target = item[TO] * num_heads + r, (item[QUERY] * num_heads + r) * size
                after = first + item[PARTS] * rows
                top, total = LOWEST, FLOAT(0)
                for row in range(first, after, rows):
                    top = max(top, parts_lse[row])
                for d in range(size):
                    out[target + d] = FLOAT(0)
                for row in range(first, after, rows):
                    weight = FLOAT(math.exp(parts_lse[row] - top))
                    total += weight
                    for d in range(size):
                        out[target + d] += weight * parts_out[row * size + d]
                if total != 0:  # else no key was seen
                    for d in range(size):
                        out[target + d] /= total
                lse[target // size] = top + math.log(total) if total != 0 else FLOAT(-np.inf)
